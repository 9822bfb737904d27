"""The ``distrib_optim.pt`` of a target rank, held to the very objects that Megatron saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pp_to_vpp.checkpoint.family import Family
from pp_to_vpp.checkpoint.flat_states import COALESCED, FlatState
from pp_to_vpp.checkpoint.optimizer_entries import optimizer_entries
from pp_to_vpp.container.extents import Zeros
from pp_to_vpp.container.tensors import as_tensor
from pp_to_vpp.megatron.forms import LayoutString
from pp_to_vpp.megatron.megatron import Megatron
from pp_to_vpp.megatron.placement import Placement
from pp_to_vpp.target.flat_file import flat_root
from pp_to_vpp.target.model import target_rank
from pp_to_vpp.target.optimizer_entry import target_chain

from ..edit import pieces_of
from ..families import families, family, opposite, target_of
from ..pairs import DENSE, LAYOUT, MOE, OVERLAP
from .test_model import outline
from .test_optimizer_entry import WITH_OPTIMIZER


def root_of(of: Family, target: Megatron, pp_rank: int) -> Any:
    """What is to be written for a rank."""
    rank = target_rank(of, target, pp_rank)
    return flat_root(rank, target_chain(rank))


@pytest.mark.parametrize(("name", "side"), WITH_OPTIMIZER)
def test_flat_files_are_those_that_megatron_saved(name: str, side: str) -> None:
    """Buffers under the same indices and keys, of the same sizes, or no file at all."""
    target = target_of(name, opposite(side))
    for of, truth in zip(families(name, side), families(name, opposite(side)), strict=True):
        for pp_rank, rank in truth.ranks.items():
            file = rank.files.optimizer
            found = root_of(of, target, pp_rank)
            assert outline(found) == outline(None if file is None else file.root)


@pytest.mark.parametrize("name", [DENSE, MOE, LAYOUT, OVERLAP])
def test_states_stand_where_their_parameters_do(name: str) -> None:
    """Each state of each parameter, cut out of its new buffer, comes from where it was."""
    target = target_of(name, "truth")
    for of in families(name, "source"):
        seen: set[str] = set()
        for pp_rank in of.ranks:
            rank = target_rank(of, target, pp_rank)
            assert rank.buffers is not None
            chain = target_chain(rank)
            entries = optimizer_entries(flat_root(rank, chain), "file")
            for optimizer, entry in zip(chain, entries, strict=True):
                for index, (stage, buffer) in enumerate(rank.buffers.of(optimizer)):
                    if entry is None:
                        continue
                    ((_, tensors),) = entry[index].items()
                    for member, start in zip(buffer.members, buffer.saved_starts, strict=True):
                        item = rank.parameters[stage][member]
                        state = of.states[item.name]
                        assert isinstance(state, FlatState)
                        seen.add(item.name)
                        for word, source in state.tensors.items():
                            tensor = as_tensor(tensors[word])
                            assert tensor is not None
                            placed = tensor.segment(start, item.weight.numel)
                            assert pieces_of(placed) == (source.extent,)
        assert seen == set(of.states), "no state is left behind"


def test_holes_of_flat_buffers_are_zeros() -> None:
    of = family(LAYOUT, "source")
    ((_, tensors),) = root_of(of, target_of(LAYOUT, "truth"), 0)[0].items()
    tensor = as_tensor(tensors["exp_avg"])
    assert tensor is not None
    assert any(isinstance(piece, Zeros) for piece in pieces_of(tensor))


def test_only_one_family_writes_the_dense_state() -> None:
    target = target_of(MOE, "truth")
    roots = [root_of(of, target, 0) for of in families(MOE, "source")]
    assert [root[0] is None for root in roots] == [False, True]
    assert all(root[1] is not None for root in roots)
    held = [of.holds_state(is_expert=False) for of in families(MOE, "source")]
    assert held == [True, False]


def test_a_file_of_nothing_is_not_written() -> None:
    """A family without the dense state, on a rank without experts, by older rules."""
    of = families(MOE, "source")[1]
    rules = replace(of.megatron.rules, keeps_all_groups=False)
    old = replace(of, megatron=replace(of.megatron, rules=rules))
    target = old.megatron.relaunched(Placement(1, LayoutString("E|t*8L")), overlaps=False)
    assert root_of(old, target, 0) is None
    assert len(target_chain(target_rank(old, target, 0))) == 1
    assert root_of(old, target, 1)[1][COALESCED] is True
