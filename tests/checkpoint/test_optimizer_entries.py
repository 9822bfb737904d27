"""The optimizers that a rank chains: whose parameters they take, their entries in real files."""

from __future__ import annotations

from typing import Any

import pytest

from pp_to_vpp.checkpoint.optimizer_entries import (
    GROUPS,
    MAINS,
    OPTIMIZER,
    STATE,
    OptimizerEntry,
    part_entries,
    read_entries,
    routed_parts,
)
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.optimizer_chain import OptimizerPart, chained_optimizers, items_by_group
from pp_to_vpp.megatron.parameters import is_layer_matrix

from ..families import SIDES, families, family

DENSE, MOE, PLAIN = "dense-pp2-v016", "moe-pp2ep2-v016", "dense-pp2-nodistopt-v016"
OVERLAPPED = "dense-pp2-opgos-v016"


@pytest.mark.parametrize(
    ("vp_size", "expert", "overlaps", "parts"),
    [
        (1, False, False, [(False, (0,))]),
        (2, True, False, [(False, (0, 1)), (True, (0, 1))]),
        (3, False, True, [(False, (0,)), (False, (1, 2))]),
        (2, True, True, [(False, (0,)), (False, (1,)), (True, (0, 1))]),
    ],
)
def test_chained_optimizers(
    vp_size: int, expert: bool, overlaps: bool, parts: list[tuple[bool, tuple[int, ...]]]
) -> None:
    found = chained_optimizers(
        vp_size, has_expert_part=expert, overlaps_param_gather_with_step=overlaps
    )
    assert found == tuple(OptimizerPart(is_expert, stages) for is_expert, stages in parts)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_groups_take_each_parameter_once(name: str, side: str) -> None:
    for of in families(name, side):
        for rank in of.ranks.values():
            parameters = [content.parameters for content in rank.contents]
            found = [
                item.name
                for part in rank.parts
                for items in items_by_group(parameters, part, of.arguments, of.rules).values()
                for item in items
            ]
            expected = [item.name for items in parameters for item in items] if rank.parts else []
            assert sorted(found) == sorted(expected)


def test_groups_keep_the_order_of_parameters() -> None:
    of = family(OVERLAPPED, "truth")
    parameters = [content.parameters for content in of.ranks[0].contents]
    part = OptimizerPart(is_expert=False, vp_stages=(1,))
    by_key = items_by_group(parameters, part, of.arguments, of.rules)
    order = [item.name for item in parameters[1]]
    for items in by_key.values():
        places = [order.index(item.name) for item in items]
        assert places == sorted(places)
    first = [order.index(items[0].name) for items in by_key.values()]
    assert first == sorted(first)


@pytest.mark.parametrize("node", [{"a": 1}, [{"a": 1}, None]])
def test_part_entries(node: Any) -> None:
    assert part_entries(node, "file") == (node if isinstance(node, list) else [node])


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_an_entry_replaced_by_its_own_values_is_the_same(name: str, side: str) -> None:
    for of in families(name, side):
        for rank in of.ranks.values():
            for entry in rank.entries:
                outer = {MAINS: entry.node[MAINS]} if MAINS in entry.node else {}
                assert entry.replaced({GROUPS: entry.groups}, outer) == entry.node


def test_the_state_dict_of_an_fp32_optimizer_is_its_entry() -> None:
    node = {STATE: {}, GROUPS: [{"lr": 1.0}]}
    entry = OptimizerEntry(node)
    assert entry.inner is node
    assert entry.replaced({GROUPS: []}, {MAINS: []}) == {STATE: {}, GROUPS: []}


@pytest.mark.parametrize(
    "node",
    [
        3,
        {OPTIMIZER: 3},
        {OPTIMIZER: {GROUPS: 3}},
        {OPTIMIZER: {GROUPS: [3]}},
        {"ema": 1},
        {True: 1},
    ],
)
def test_what_no_optimizer_saves_is_refused(node: Any) -> None:
    with pytest.raises(CheckpointError, match="unknown optimizer entry"):
        read_entries([node], "file")


def chain(*nodes: Any) -> tuple[OptimizerEntry, ...]:
    return read_entries([{OPTIMIZER: {GROUPS: groups}} for groups in nodes], "file")


def test_groups_tell_a_chain_for_matrices() -> None:
    own, experts = {"wd_mult": 1.0}, {"wd_mult": 1.0, "is_expert_parallel": True}
    assert routed_parts(chain([own], [experts]), 2) == ()
    found = routed_parts(chain([own], [experts], [{**own, "optimizer": "adam"}]), 2)
    assert found == (
        OptimizerPart(is_expert=False, vp_stages=(0, 1), takes_matrices=True),
        OptimizerPart(is_expert=True, vp_stages=(0, 1), takes_matrices=True),
        OptimizerPart(is_expert=False, vp_stages=(0, 1), takes_matrices=False),
    )
    assert found[0].is_like(routed_parts(chain([{**own, "optimizer": "adam"}], [own]), 1)[1])
    assert not found[0].is_like(found[1])
    assert not found[0].is_like(found[2])


def test_matrices_of_layers_and_all_others() -> None:
    of = family(MOE, "source")
    parameters = [content.parameters for content in of.ranks[0].contents]
    held = [item for items in parameters for item in items]
    for is_expert in (False, True):
        for takes in (False, True):
            part = OptimizerPart(is_expert, (0,), takes)
            found = items_by_group(parameters, part, of.arguments, of.rules)
            names = {item.name for items in found.values() for item in items}
            assert names == {
                item.name
                for item in held
                if (".experts." in item.name) is is_expert
                and is_layer_matrix(item, of.rules) is takes
            }
    matrices = {item.name for item in held if is_layer_matrix(item, of.rules)}
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in matrices
    assert "decoder.layers.0.input_layernorm.weight" not in matrices
    assert "embedding.word_embeddings.weight" not in matrices
