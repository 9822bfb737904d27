"""The optimizer of a target rank, held to the very objects that Megatron saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pp_to_vpp.checkpoint.family import Family, RankInventory
from pp_to_vpp.checkpoint.flat_states import COALESCED, FlatState
from pp_to_vpp.checkpoint.optimizer_entries import GROUPS, OPTIMIZER, part_entries, read_entries
from pp_to_vpp.container.extents import Zeros, cut_pieces
from pp_to_vpp.container.tensors import as_tensor
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.buffers import rank_buffers
from pp_to_vpp.megatron.optimizer_chain import OptimizerKind
from pp_to_vpp.megatron.param_groups import key_of_group
from pp_to_vpp.target.model import TargetChunk, target_chunk
from pp_to_vpp.target.optimizer_entry import TargetOptimizer
from pp_to_vpp.target.request import TargetSpec

from ..families import SIDES, families, family, opposite, placed, target_of
from ..target.test_model import outline

DENSE, MOE, OLD = "dense-pp2-v016", "moe-pp2ep2-v016", "dense-pp2-odd-dp3-v012"
PLAIN, OVERLAPPED = "dense-pp2-nodistopt-v016", "dense-pp2-opgos-v016"


def optimizer_of(of: Family, target: TargetSpec, pp_rank: int) -> TargetOptimizer:
    """What a target rank's optimizers are made of."""
    chunks = [target_chunk(of, chunk) for chunk in target.layout.rank_chunks(pp_rank)]
    overlaps = target.overlaps_param_gather_with_step
    buffers = None
    if of.kind is OptimizerKind.DISTRIBUTED:
        held = [(chunk.chunk, chunk.parameters) for chunk in chunks]
        buffers = rank_buffers(
            held, of.arguments, of.rules, overlaps_param_gather_with_step=overlaps
        )
    ranks = of.ranks_for(target.layout, pp_rank)
    return TargetOptimizer(of, ranks, chunks, buffers, overlaps)


WITH_OPTIMIZER = [
    (name, side) for name, side in SIDES if family(name, side).kind is not OptimizerKind.NONE
]


@pytest.mark.parametrize(("name", "side"), WITH_OPTIMIZER)
def test_entries_are_those_that_megatron_saved(name: str, side: str) -> None:
    """Groups with their steps and numbers; of plain optimizers the whole state, renumbered."""
    target = target_of(name, opposite(side))
    for of, truth in zip(families(name, side), families(name, opposite(side)), strict=True):
        for pp_rank, rank in truth.ranks.items():
            found = optimizer_of(of, target, pp_rank)
            assert found.parts() == rank.parts
            assert outline(found.placed_entry(rank.root)) == outline(rank.root)


@pytest.mark.parametrize(("name", "side"), WITH_OPTIMIZER)
def test_flat_files_are_those_that_megatron_saved(name: str, side: str) -> None:
    """Buffers under the same indices and keys, of the same sizes, or no file at all."""
    target = target_of(name, opposite(side))
    for of, truth in zip(families(name, side), families(name, opposite(side)), strict=True):
        for pp_rank, rank in truth.ranks.items():
            file = rank.files.optimizer
            found = optimizer_of(of, target, pp_rank).flat_root()
            assert outline(found) == outline(None if file is None else file.root)


@pytest.mark.parametrize("name", [DENSE, MOE, "dense-pp2-layout-v016", OVERLAPPED])
def test_states_stand_where_their_parameters_do(name: str) -> None:
    """Each state of each parameter, cut out of its new buffer, comes from where it was."""
    target = target_of(name, "truth")
    for of in families(name, "source"):
        seen: set[str] = set()
        for pp_rank in of.ranks:
            found = optimizer_of(of, target, pp_rank)
            assert found.buffers is not None
            entries = part_entries(found.flat_root(), "file")
            for part, entry in zip(found.parts(), entries, strict=True):
                for index, (stage, buffer) in enumerate(found.buffers.of_part(part)):
                    if entry is None:
                        continue
                    ((_, tensors),) = entry[index].items()
                    for member, start in zip(buffer.members, buffer.saved_starts, strict=True):
                        item = found.chunks[stage].parameters[member]
                        state = of.states[item.name]
                        assert isinstance(state, FlatState)
                        assert item.tensor is not None
                        seen.add(item.name)
                        for word, pieces in state.parts.items():
                            tensor = as_tensor(tensors[word])
                            assert tensor is not None
                            length = 4 * item.tensor.numel
                            assert cut_pieces(tensor.content(), 4 * start, length) == pieces
        assert seen == set(of.states), "no state is left behind"


def test_holes_of_flat_buffers_are_zeros() -> None:
    name = "dense-pp2-layout-v016"
    of = family(name, "source")
    found = optimizer_of(of, target_of(name, "truth"), 0)
    ((_, tensors),) = found.flat_root()[0].items()
    tensor = as_tensor(tensors["exp_avg"])
    assert tensor is not None
    assert any(isinstance(piece, Zeros) for piece in tensor.content())


def test_only_one_family_writes_the_dense_state() -> None:
    target = target_of(MOE, "truth")
    roots = [optimizer_of(of, target, 0).flat_root() for of in families(MOE, "source")]
    assert [root[0] is None for root in roots] == [False, True]
    assert all(root[1] is not None for root in roots)
    held = [of.holds_state(is_expert=False) for of in families(MOE, "source")]
    assert held == [True, False]


def test_a_file_of_nothing_is_not_written() -> None:
    """A family without the dense state, on a rank without experts, by older rules."""
    of = families(MOE, "source")[1]
    old = replace(of, rules=replace(of.rules, keeps_all_groups=False))
    placement = replace(of.arguments.placement, vp_size=1, layout="E|t*8L")
    target = TargetSpec(placement, placed(of, placement), overlaps_param_gather_with_step=False)
    assert optimizer_of(old, target, 0).flat_root() is None
    assert len(optimizer_of(old, target, 0).parts()) == 1
    assert optimizer_of(old, target, 1).flat_root()[1][COALESCED] is True


def target_without_layers(of: Family) -> TargetSpec:
    """All layers on the last rank."""
    layout = "E|" + "t" * of.arguments.num_layers + "L"
    placement = replace(of.arguments.placement, vp_size=1, layout=layout)
    return TargetSpec(placement, placed(of, placement), overlaps_param_gather_with_step=False)


def groups_of(entry: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = entry.get(OPTIMIZER, entry)[GROUPS]
    return found


def test_all_ranks_have_all_groups_by_newer_rules() -> None:
    """Those of an optimizer without parameters have no step (it never stepped here)."""
    of = family(MOE, "source")
    dense, experts = optimizer_of(of, target_without_layers(of), 0).entry()
    assert ["step" in group for group in groups_of(dense)] == [True] * len(groups_of(dense))
    assert ["step" in group for group in groups_of(experts)] == [False] * len(groups_of(experts))
    assert groups_of(experts)


def test_older_rules_keep_the_groups_of_own_parameters() -> None:
    """In the order of their first parameter: loading matches them by position."""
    of = family(OLD, "source")
    assert not of.rules.keeps_all_groups
    first = optimizer_of(of, target_without_layers(of), 0).entry()
    assert [key_of_group(group).decays for group in groups_of(first)] == [True]
    last = optimizer_of(of, target_without_layers(of), 1).entry()
    assert [key_of_group(group).decays for group in groups_of(last)] == [False, True]
    assert all("step" in group for entry in (first, last) for group in groups_of(entry))


def without_entry(of: Family, edit: Any, *pp_ranks: int) -> Family:
    """A family in which the optimizer entries of some ranks are edited."""
    ranks: dict[int, RankInventory] = dict(of.ranks)
    for pp_rank in pp_ranks:
        entries = read_entries([edit(entry.node) for entry in ranks[pp_rank].entries], "file")
        ranks[pp_rank] = replace(ranks[pp_rank], entries=entries)
    return replace(of, ranks=ranks)


def no_groups(entry: dict[str, Any]) -> dict[str, Any]:
    return {OPTIMIZER: {k: v for k, v in entry[OPTIMIZER].items() if k != GROUPS}}


def no_steps(entry: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in g.items() if k != "step"} for g in groups_of(entry)]
    return {**entry, OPTIMIZER: {**entry[OPTIMIZER], GROUPS: groups}}


def test_a_sibling_gives_what_a_rank_has_not() -> None:
    of, target = family(DENSE, "source"), target_of(DENSE, "truth")
    truth = outline(family(DENSE, "truth").ranks[0].root[OPTIMIZER])
    assert outline(optimizer_of(without_entry(of, no_groups, 0), target, 0).entry()) == truth
    stepless = without_entry(of, no_steps, 0)
    found = groups_of(optimizer_of(stepless, target, 0).entry())
    assert [group["step"] for group in found] == [1, 1]


def test_without_any_step_none_is_made_up() -> None:
    """As optimizers that count in their state do."""
    of, target = family(DENSE, "source"), target_of(DENSE, "truth")
    bare = without_entry(of, no_steps, 0, 1)
    found = groups_of(optimizer_of(bare, target, 0).entry())
    assert not any("step" in group for group in found)


def test_without_any_groups_it_is_refused() -> None:
    of, target = family(DENSE, "source"), target_of(DENSE, "truth")
    bare = without_entry(of, no_groups, 0, 1)
    with pytest.raises(CheckpointError, match="no rank of its family has param groups"):
        optimizer_of(bare, target, 0).entry()


def test_a_group_that_nobody_has_is_refused() -> None:
    """By older rules, where the groups follow from the parameters."""

    def decaying_only(entry: dict[str, Any]) -> dict[str, Any]:
        groups = [group for group in groups_of(entry) if group["wd_mult"] != 0]
        return {**entry, OPTIMIZER: {**entry[OPTIMIZER], GROUPS: groups}}

    of = without_entry(family(OLD, "source"), decaying_only, 0, 1)
    with pytest.raises(CheckpointError, match="no param group for GroupKey"):
        optimizer_of(of, target_of(OLD, "truth"), 0).entry()


def test_the_source_is_not_changed() -> None:
    """Planning twice must give the same."""
    for name in (DENSE, MOE, PLAIN, OLD):
        of = family(name, "source")
        before = [outline(rank.root[OPTIMIZER]) for rank in of.ranks.values()]
        for pp_rank in of.ranks:
            for target in (target_of(name, "truth"), target_without_layers(of)):
                optimizer_of(of, target, pp_rank).entry()
        assert [outline(rank.root[OPTIMIZER]) for rank in of.ranks.values()] == before


def test_plain_states_are_numbered_through_the_groups() -> None:
    of, target = family(PLAIN, "source"), target_of(PLAIN, "truth")
    for pp_rank in of.ranks:
        found = optimizer_of(of, target, pp_rank)
        entry = found.entry()
        numbers = [number for group in groups_of(entry) for number in group["params"]]
        assert numbers == list(range(len(numbers)))
        assert list(entry[OPTIMIZER]["state"]) == numbers
        assert len(numbers) == sum(len(chunk.parameters) for chunk in chunks_of(found))


def chunks_of(found: TargetOptimizer) -> list[TargetChunk]:
    return list(found.chunks)


def test_overlapping_makes_an_optimizer_of_each_chunk() -> None:
    of, target = family(OVERLAPPED, "source"), target_of(OVERLAPPED, "truth")
    assert target.overlaps_param_gather_with_step
    found = optimizer_of(of, target, 0)
    assert [part.vp_stages for part in found.parts()] == [(0,), (1,)]
    assert isinstance(found.entry(), list)
    plain = replace(target, overlaps_param_gather_with_step=False)
    assert isinstance(optimizer_of(of, plain, 0).entry(), dict)
