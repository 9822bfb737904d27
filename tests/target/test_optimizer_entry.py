"""The optimizer of a target rank, held to the very objects that Megatron saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pp_to_vpp.checkpoint.family import Family, SourceRank
from pp_to_vpp.checkpoint.optimizer_entries import GROUPS, OPTIMIZER, read_entries
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.forms import LayoutString
from pp_to_vpp.megatron.megatron import Megatron
from pp_to_vpp.megatron.optimizer_chain import OptimizerKind
from pp_to_vpp.megatron.param_groups import keys_of_groups
from pp_to_vpp.megatron.placement import Placement
from pp_to_vpp.target.model import target_rank
from pp_to_vpp.target.optimizer import target_optimizer
from pp_to_vpp.target.optimizer_entry import place_entry, target_chain

from ..families import SIDES, families, family, of_kind, opposite, target_of
from ..pairs import DENSE, MOE, ODD, OVERLAP, PLAIN
from .test_model import outline

WITH_OPTIMIZER = [case for case in SIDES if case not in of_kind(OptimizerKind.NONE)]


def entry_of(of: Family, target: Megatron, pp_rank: int) -> Any:
    """The value of ``optimizer`` that is to be written for a rank."""
    return target_optimizer(target_rank(of, target, pp_rank)).entry


@pytest.mark.parametrize(("name", "side"), WITH_OPTIMIZER)
def test_entries_are_those_that_megatron_saved(name: str, side: str) -> None:
    """Groups with their steps and numbers; of plain optimizers the whole state, renumbered."""
    target = target_of(name, opposite(side))
    for of, truth in zip(families(name, side), families(name, opposite(side)), strict=True):
        for pp_rank, rank in truth.ranks.items():
            made = target_optimizer(target_rank(of, target, pp_rank))
            assert made.chain == tuple(dict.fromkeys(own.kind for own in rank.optimizers))
            assert outline(place_entry(rank.root, made.entry)) == outline(rank.root)


def target_without_layers(of: Family) -> Megatron:
    """All layers on the last rank."""
    layout = "E|" + "t" * of.megatron.arguments.num_layers + "L"
    return of.megatron.relaunched(Placement(1, LayoutString(layout)), overlaps=False)


def groups_of(entry: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = entry.get(OPTIMIZER, entry)[GROUPS]
    return found


def test_all_ranks_have_all_groups_by_newer_rules() -> None:
    """Those of an optimizer without parameters have no step (it never stepped here)."""
    of = family(MOE, "source")
    dense, experts = entry_of(of, target_without_layers(of), 0)
    assert ["step" in group for group in groups_of(dense)] == [True] * len(groups_of(dense))
    assert ["step" in group for group in groups_of(experts)] == [False] * len(groups_of(experts))
    assert groups_of(experts)


def test_older_rules_keep_the_groups_of_own_parameters() -> None:
    """In the order of their first parameter: loading matches them by position."""
    of = family(ODD, "source")
    assert not of.megatron.rules.keeps_all_groups
    first = entry_of(of, target_without_layers(of), 0)
    assert [key.decays for key in keys_of_groups(groups_of(first))] == [True]
    last = entry_of(of, target_without_layers(of), 1)
    assert [key.decays for key in keys_of_groups(groups_of(last))] == [False, True]
    assert all("step" in group for entry in (first, last) for group in groups_of(entry))


def without_entry(of: Family, edit: Any, *pp_ranks: int) -> Family:
    """A family in which the optimizer entries of some ranks are edited."""
    ranks: dict[int, SourceRank] = dict(of.ranks)
    for pp_rank in pp_ranks:
        optimizers = ranks[pp_rank].optimizers
        entries = read_entries([edit(own.entry.node) for own in optimizers], "file")
        changed = (replace(o, entry=e) for o, e in zip(optimizers, entries, strict=True))
        ranks[pp_rank] = replace(ranks[pp_rank], optimizers=tuple(changed))
    return replace(of, ranks=ranks)


def no_groups(entry: dict[str, Any]) -> dict[str, Any]:
    return {OPTIMIZER: {k: v for k, v in entry[OPTIMIZER].items() if k != GROUPS}}


def no_steps(entry: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in g.items() if k != "step"} for g in groups_of(entry)]
    return {**entry, OPTIMIZER: {**entry[OPTIMIZER], GROUPS: groups}}


def test_a_sibling_gives_what_a_rank_has_not() -> None:
    of, target = family(DENSE, "source"), target_of(DENSE, "truth")
    truth = outline(family(DENSE, "truth").ranks[0].root[OPTIMIZER])
    assert outline(entry_of(without_entry(of, no_groups, 0), target, 0)) == truth
    stepless = without_entry(of, no_steps, 0)
    found = groups_of(entry_of(stepless, target, 0))
    assert [group["step"] for group in found] == [1, 1]


def test_without_any_step_none_is_made_up() -> None:
    """As optimizers that count in their state do."""
    of, target = family(DENSE, "source"), target_of(DENSE, "truth")
    bare = without_entry(of, no_steps, 0, 1)
    found = groups_of(entry_of(bare, target, 0))
    assert not any("step" in group for group in found)


def test_without_any_groups_it_is_refused() -> None:
    of, target = family(DENSE, "source"), target_of(DENSE, "truth")
    bare = without_entry(of, no_groups, 0, 1)
    with pytest.raises(CheckpointError, match="no rank of its family has param groups"):
        entry_of(bare, target, 0)


def test_a_group_that_nobody_has_is_refused() -> None:
    """By older rules, where the groups follow from the parameters."""

    def decaying_only(entry: dict[str, Any]) -> dict[str, Any]:
        groups = [group for group in groups_of(entry) if group["wd_mult"] != 0]
        return {**entry, OPTIMIZER: {**entry[OPTIMIZER], GROUPS: groups}}

    of = without_entry(family(ODD, "source"), decaying_only, 0, 1)
    with pytest.raises(CheckpointError, match="are not those that Megatron's rules make of"):
        entry_of(of, target_of(ODD, "truth"), 0)


def test_the_source_is_not_changed() -> None:
    """Planning twice must give the same."""
    for name in (DENSE, MOE, PLAIN, ODD):
        of = family(name, "source")
        before = [outline(rank.root[OPTIMIZER]) for rank in of.ranks.values()]
        for pp_rank in of.ranks:
            for target in (target_of(name, "truth"), target_without_layers(of)):
                entry_of(of, target, pp_rank)
        assert [outline(rank.root[OPTIMIZER]) for rank in of.ranks.values()] == before


def test_plain_states_are_numbered_through_the_groups() -> None:
    of, target = family(PLAIN, "source"), target_of(PLAIN, "truth")
    for pp_rank in of.ranks:
        entry = entry_of(of, target, pp_rank)
        numbers = [number for group in groups_of(entry) for number in group["params"]]
        assert numbers == list(range(len(numbers)))
        assert list(entry[OPTIMIZER]["state"]) == numbers
        assert len(numbers) == sum(map(len, target_rank(of, target, pp_rank).parameters))


def test_overlapping_makes_an_optimizer_of_each_chunk() -> None:
    of, target = family(OVERLAP, "source"), target_of(OVERLAP, "truth")
    assert target.arguments.overlaps_param_gather_with_step
    chain = target_chain(target_rank(of, target, 0))
    assert [optimizer.vp_stages for optimizer in chain] == [(0,), (1,)]
    assert isinstance(entry_of(of, target, 0), list)
    plain = target.relaunched(target.arguments.placement, overlaps=False)
    assert isinstance(entry_of(of, plain, 0), dict)
