"""Which param group a parameter belongs to, held against the groups that Megatron saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pp_to_vpp.checkpoint.family import Family
from pp_to_vpp.megatron.arguments import SavedArguments
from pp_to_vpp.megatron.naming import Section
from pp_to_vpp.megatron.param_groups import GroupKey, key_of_group, key_of_item
from pp_to_vpp.megatron.parameters import Item, have_experts, in_expert_buffer
from pp_to_vpp.megatron.rules import Rules

from ..families import SIDES, families, family

DENSE, MOE, MTP = "dense-pp2-v016", "moe-pp2ep2-v016", "deepseek-mtp-pp2ep2-v016"

PLAIN = GroupKey(decays=True, is_expert=False, is_decoupled=False)
FLAT = replace(PLAIN, decays=False)
DECOUPLED = replace(PLAIN, is_decoupled=True)


def saved_groups(of: Family) -> Iterator[dict[str, Any]]:
    """All param groups in the files of a family."""
    for rank in of.ranks.values():
        for entry in rank.entries:
            yield from entry.groups


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_groups_and_parameters_meet(name: str, side: str) -> None:
    """Each parameter has a group that Megatron saved, and each group has a parameter."""
    for of in families(name, side):
        saved = {key_of_group(group) for group in saved_groups(of)}
        computed = {
            key_of_item(item, of.arguments, of.rules) for item in of.items() if item.is_parameter
        }
        assert computed
        assert saved == (set() if name == "dense-pp2-nosaveoptim-v016" else computed)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_groups_of_an_optimizer_have_different_keys(name: str, side: str) -> None:
    for of in families(name, side):
        for rank in of.ranks.values():
            for entry in rank.entries:
                keys = [key_of_group(group) for group in entry.groups]
                assert len(set(keys)) == len(keys)


def key(name: str, of: Family, arguments: SavedArguments, rules: Rules | None = None) -> GroupKey:
    """The group of a parameter by its global name."""
    (item,) = (item for item in of.items() if item.name == name)
    return key_of_item(item, arguments, rules or of.rules)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder.layers.3.self_attention.linear_proj.weight", PLAIN),
        ("decoder.layers.3.self_attention.linear_proj.bias", FLAT),
        ("decoder.layers.3.input_layernorm.weight", FLAT),
        ("decoder.final_layernorm.bias", FLAT),
        ("embedding.word_embeddings.weight", PLAIN),
        ("embedding.position_embeddings.weight", PLAIN),
    ],
)
def test_biases_and_vectors_do_not_decay(name: str, expected: GroupKey) -> None:
    of = family(DENSE, "source")
    assert key(name, of, of.arguments) == expected


def test_embeddings_may_be_kept_from_decay() -> None:
    of = family(DENSE, "source")
    arguments = replace(of.arguments, skips_embedding_weight_decay=True)
    for item in of.items():
        if item.is_parameter and "embedding" in item.rest:
            assert key_of_item(item, arguments, of.rules) == FLAT
    assert key("decoder.layers.0.mlp.linear_fc1.weight", of, arguments) == PLAIN


def test_a_bias_of_any_shape_does_not_decay() -> None:
    of = family(DENSE, "source")
    (matrix,) = (i for i in of.items() if i.name == "decoder.layers.0.mlp.linear_fc1.weight")
    assert key_of_item(matrix, of.arguments, of.rules) == PLAIN
    bias = replace(matrix, rest=".mlp.linear_fc1.bias")
    assert key_of_item(bias, of.arguments, of.rules) == FLAT


def norm_of(name: str) -> Item:
    """A norm inside an attention, of the shape of a vector."""
    of = family(DENSE, "source")
    (like,) = (i for i in of.items() if i.name == "decoder.layers.0.input_layernorm.weight")
    return replace(like, rest=f".self_attention.{name}.weight")


@pytest.mark.parametrize("name", ["q_layernorm", "k_layernorm"])
def test_norms_of_queries_and_keys_decay_if_asked_to(name: str) -> None:
    of = family(DENSE, "source")
    for decays in (False, True):
        arguments = replace(of.arguments, decays_qk_norms=decays)
        found = key_of_item(norm_of(name), arguments, of.rules)
        assert found.decays is decays
        other = key_of_item(norm_of("kv_norm"), arguments, of.rules)
        assert not other.decays


def test_decoupled_learning_rates_are_those_of_embedding_and_output() -> None:
    of = family(MTP, "source")
    arguments = replace(of.arguments, decoupled_lr=True)
    found = {
        item.name
        for item in of.items()
        if item.is_parameter and key_of_item(item, arguments, of.rules).is_decoupled
    }
    both = {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert found == both
    marking = replace(of.rules, marks_mtp_embedding=True)
    copy = "embedding.word_embeddings.weight (MTP copy)"
    assert key(copy, of, arguments, marking) == DECOUPLED
    assert key(copy, of, arguments) == PLAIN
    assert key(copy, of, of.arguments, marking) == PLAIN


def test_the_position_embedding_is_not_decoupled() -> None:
    of = family(DENSE, "source")
    arguments = replace(of.arguments, decoupled_lr=True)
    (item,) = (i for i in of.sections[Section.EMBEDDING] if "position" in i.rest)
    assert not key_of_item(item, arguments, of.rules).is_decoupled


def test_experts_have_buffers_of_their_own_with_expert_parallelism() -> None:
    of = family(MOE, "source")
    items = [item for item in of.items() if item.is_parameter]
    found = {item.name for item in items if in_expert_buffer(item, of.arguments, of.rules)}
    assert found == {item.name for item in items if ".experts." in item.name}
    alone = replace(of.arguments, ep_size=1)
    assert not any(in_expert_buffer(item, alone, of.rules) for item in items)
    sizes = replace(alone, etp_size=2)
    assert not any(in_expert_buffer(item, sizes, of.rules) for item in items)
    newer = replace(of.rules, separates_experts_by_tp=True)
    assert {i.name for i in items if in_expert_buffer(i, sizes, newer)} == found
    contents = of.ranks[0].contents
    assert have_experts([c.parameters for c in contents], of.arguments, of.rules)
    assert not have_experts([c.parameters for c in contents], alone, of.rules)
    groups = {key_of_item(item, of.arguments, of.rules).is_expert: item for item in items}
    assert {is_expert: item.name in found for is_expert, item in groups.items()} == {
        True: True,
        False: False,
    }


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({"wd_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}, PLAIN),
        ({"wd_mult": 0.0, "is_expert_parallel": False, "is_decoupled_lr": False}, FLAT),
        ({"wd_mult": 1.0, "is_expert_parallel": True}, replace(PLAIN, is_expert=True)),
        ({"wd_mult": 1.0, "is_decoupled_lr": True}, DECOUPLED),
        ({"wd_mult": 1.0, "is_decoupled_lr": False, "default_config": False}, DECOUPLED),
        ({"wd_mult": 1.0, "default_config": True}, PLAIN),
        ({}, PLAIN),
    ],
)
def test_what_a_group_tells(group: dict[str, Any], expected: GroupKey) -> None:
    assert key_of_group(group) == expected
