"""The entries of a rank's optimizers in real files; what no optimizer saves is refused."""

from __future__ import annotations

from typing import Any

import pytest

from pp_to_vpp.checkpoint.optimizer_entries import (
    GROUPS,
    MAINS,
    OPTIMIZER,
    STATE,
    OptimizerEntry,
    optimizer_entries,
    read_entries,
    routed_chain,
)
from pp_to_vpp.container.pickling import Global, Instance
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.optimizer_chain import ChainedOptimizer

from ..families import OF_KINDS, families


@pytest.mark.parametrize("node", [{"a": 1}, [{"a": 1}, None]])
def test_one_entry_stands_by_itself(node: Any) -> None:
    assert optimizer_entries(node, "file") == (node if isinstance(node, list) else [node])


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
def test_an_entry_replaced_by_its_own_values_is_the_same(name: str, side: str) -> None:
    for of in families(name, side):
        for rank in of.ranks.values():
            for entry in (own.entry for own in rank.optimizers):
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


def test_groups_hold_plain_values() -> None:
    """Optimizer classes too, as those of a HybridDeviceOptimizer; no objects."""
    group = {"lr": 0.5, "betas": (0.9, None), "cpu_optimizer_cls": Global("torch.optim", "AdamW")}
    assert read_entries({GROUPS: [group]}, "file")[0].groups == [group]
    group["own"] = [{"x": Instance(Global("a.b", "Schedule"), ())}]
    with pytest.raises(CheckpointError, match=r"'own' of a param group .* object of a\.b\.Sched"):
        read_entries({GROUPS: [group]}, "file")


def chain(*nodes: Any) -> tuple[OptimizerEntry, ...]:
    return read_entries([{OPTIMIZER: {GROUPS: groups}} for groups in nodes], "file")


def test_groups_tell_a_chain_for_matrices() -> None:
    own, experts = {"wd_mult": 1.0}, {"wd_mult": 1.0, "is_expert_parallel": True}
    assert routed_chain(chain([own], [experts]), 2) == ()
    found = routed_chain(chain([own], [experts], [{**own, "optimizer": "adam"}]), 2)
    assert found == (
        ChainedOptimizer(is_expert=False, vp_stages=(0, 1), takes_matrices=True),
        ChainedOptimizer(is_expert=True, vp_stages=(0, 1), takes_matrices=True),
        ChainedOptimizer(is_expert=False, vp_stages=(0, 1), takes_matrices=False),
    )
    assert found[0].is_like(routed_chain(chain([{**own, "optimizer": "adam"}], [own]), 1)[1])
    assert not found[0].is_like(found[1])
    assert not found[0].is_like(found[2])
