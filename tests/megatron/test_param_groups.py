"""Which param group a parameter belongs to, held against the groups that Megatron saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from pp_to_vpp.checkpoint.family import Family
from pp_to_vpp.megatron.megatron import Megatron
from pp_to_vpp.megatron.naming import Section
from pp_to_vpp.megatron.optimizer_chain import has_expert_optimizer
from pp_to_vpp.megatron.param_groups import are_sorted, bare, is_bare, key_of_item, keys_of_groups
from pp_to_vpp.megatron.parameters import GroupKey, Item, is_in_expert_buffer

from ..families import OF_KINDS, SIDES, families, family, read_family
from ..pairs import BARE, DEEPSEEK, DENSE, MOE, OWN_RATES, WEIGHTS

PLAIN = GroupKey(decays=True, is_expert=False, is_decoupled=False)
FLAT = replace(PLAIN, decays=False)
DECOUPLED = replace(PLAIN, is_decoupled=True)


def saved_groups(of: Family) -> Iterator[list[dict[str, Any]]]:
    """The param groups of each optimizer in the files of a family."""
    for rank in of.ranks.values():
        for own in rank.optimizers:
            yield own.entry.groups


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_groups_and_parameters_meet(name: str, side: str) -> None:
    """Each parameter has a group that Megatron saved, and each group has a parameter."""
    for of in families(name, side):
        saved = {key for groups in saved_groups(of) for key in keys_of_groups(groups)}
        computed = {key_of_item(item, of.megatron) for item in of.items() if item.is_trained}
        assert computed
        assert saved == (set() if name == WEIGHTS else computed)


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
def test_groups_of_an_optimizer_have_different_keys(name: str, side: str) -> None:
    for of in families(name, side):
        for rank in of.ranks.values():
            for own in rank.optimizers:
                keys = keys_of_groups(own.entry.groups)
                assert len(set(keys)) == len(keys)


def otherwise(run: Megatron, rules: Mapping[str, bool] | None = None, **arguments: Any) -> Megatron:
    """A run with other rules or arguments."""
    return Megatron(replace(run.arguments, **arguments), replace(run.rules, **(rules or {})))


def key(name: str, of: Family, run: Megatron) -> GroupKey:
    """The group of a parameter by its global name."""
    (item,) = (item for item in of.items() if item.name == name)
    return key_of_item(item, run)


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
    assert key(name, of, of.megatron) == expected


def test_embeddings_may_be_kept_from_decay() -> None:
    of = family(DENSE, "source")
    keeping = otherwise(of.megatron, skips_embedding_weight_decay=True)
    for item in of.items():
        if item.is_parameter and "embedding" in item.rest:
            assert key_of_item(item, keeping) == FLAT
    assert key("decoder.layers.0.mlp.linear_fc1.weight", of, keeping) == PLAIN


def test_a_bias_of_any_shape_does_not_decay() -> None:
    of = family(DENSE, "source")
    (matrix,) = (i for i in of.items() if i.name == "decoder.layers.0.mlp.linear_fc1.weight")
    assert key_of_item(matrix, of.megatron) == PLAIN
    bias = replace(matrix, rest=".mlp.linear_fc1.bias")
    assert key_of_item(bias, of.megatron) == FLAT


def norm_of(name: str) -> Item:
    """A norm inside an attention, of the shape of a vector."""
    of = family(DENSE, "source")
    (like,) = (i for i in of.items() if i.name == "decoder.layers.0.input_layernorm.weight")
    return replace(like, rest=f".self_attention.{name}.weight")


@pytest.mark.parametrize("name", ["q_layernorm", "k_layernorm"])
def test_norms_of_queries_and_keys_decay_if_asked_to(name: str) -> None:
    of = family(DENSE, "source")
    for decays in (False, True):
        run = otherwise(of.megatron, decays_qk_norms=decays)
        found = key_of_item(norm_of(name), run)
        assert found.decays is decays
        other = key_of_item(norm_of("kv_norm"), run)
        assert not other.decays


def test_decoupled_learning_rates_are_those_of_embedding_and_output() -> None:
    of = family(DEEPSEEK, "source")
    decoupled = otherwise(of.megatron, decoupled_lr=True)
    found = {
        item.name
        for item in of.items()
        if item.is_parameter and key_of_item(item, decoupled).is_decoupled
    }
    both = {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert found == both
    marking = {"marks_mtp_embedding": True}
    copy = "embedding.word_embeddings.weight (MTP copy)"
    assert key(copy, of, otherwise(decoupled, marking)) == DECOUPLED
    assert key(copy, of, decoupled) == PLAIN
    assert key(copy, of, otherwise(of.megatron, marking)) == PLAIN


def test_the_position_embedding_is_not_decoupled() -> None:
    of = family(DENSE, "source")
    decoupled = otherwise(of.megatron, decoupled_lr=True)
    (item,) = (i for i in of.sections[Section.EMBEDDING] if "position" in i.rest)
    assert not key_of_item(item, decoupled).is_decoupled


def test_experts_have_buffers_of_their_own_with_expert_parallelism() -> None:
    of = family(MOE, "source")
    items = [item for item in of.items() if item.is_parameter]
    found = {item.name for item in items if is_in_expert_buffer(item, of.megatron)}
    assert found == {item.name for item in items if ".experts." in item.name}
    alone = otherwise(of.megatron, ep_size=1)
    assert not any(is_in_expert_buffer(item, alone) for item in items)
    sizes = otherwise(alone, etp_size=2)
    assert not any(is_in_expert_buffer(item, sizes) for item in items)
    newer = otherwise(sizes, {"separates_experts_by_tp": True})
    assert {item.name for item in items if is_in_expert_buffer(item, newer)} == found
    parameters = of.ranks[0].parameters
    assert has_expert_optimizer(parameters, of.megatron, others_have=False)
    assert not has_expert_optimizer(parameters, alone, others_have=False)
    groups = {key_of_item(item, of.megatron).is_expert: item for item in items}
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
    assert keys_of_groups([group]) == [expected]


def test_a_group_has_one_key_on_all_ranks() -> None:
    """Whether its siblings are there or not: up to 0.13 a rank has those of its own parameters."""
    for side in ("source", "truth"):
        entries = list(saved_groups(family(OWN_RATES, side)))
        fewer, more = sorted((set(keys_of_groups(groups)) for groups in entries), key=len)
        assert fewer < more


def told(wd_mult: float, max_lr: float | None = None, *, is_default: bool = True) -> dict[str, Any]:
    """A group of main of December 2025: its learning rates are told where it has parameters."""
    rates = {} if max_lr is None else {"max_lr": max_lr, "min_lr": 0.0}
    common = {"wd_mult": wd_mult, "is_expert_parallel": False, "default_config": is_default}
    return {**common, **rates, "lr": 0.1 if is_default else 0.2}


def test_a_group_of_parameters_of_others_is_the_one_that_is_left() -> None:
    """It tells no learning rates, and the one with the usual rates may stand beside it."""
    usual, flat, own = told(1.0, 0.1), told(0.0, 0.1), told(1.0, 0.2, is_default=False)
    assert keys_of_groups([flat, usual, told(1.0)]) == [FLAT, PLAIN, DECOUPLED]
    assert keys_of_groups([own, told(0.0), told(1.0)]) == [DECOUPLED, FLAT, PLAIN]
    assert keys_of_groups([told(1.0), told(0.0), told(1.0)]) == [PLAIN, FLAT, DECOUPLED]
    assert not are_sorted([flat, usual, told(1.0)])
    assert bare(own, [flat]) == told(1.0)
    assert is_bare(told(1.0))
    assert not is_bare({"wd_mult": 1.0})


@pytest.mark.parametrize("side", ["source", "truth"])
def test_a_rank_alone_tells_the_same_keys_of_its_groups(side: str) -> None:
    """And no identity of those that it has no parameters of."""
    of = family(BARE, side)
    assert of.odd_groups == ()
    assert None not in of.group_identities.values()
    assert list(of.lost_groups()) == []
    alone = next(read_family({1: of.ranks[1].files}))
    assert alone.group_identities.keys() == of.group_identities.keys()
    assert alone.group_identities[None, DECOUPLED] is None
