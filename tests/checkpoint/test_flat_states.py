"""Optimizer states found in real files; what contradicts them is unexplained or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pp_to_vpp.checkpoint.family import Family, SourceRank
from pp_to_vpp.checkpoint.flat_states import (
    FlatState,
    RankStates,
    Unexplained,
    are_views_of_buffers,
    read_flat_states,
)
from pp_to_vpp.checkpoint.optimizer_entries import optimizer_entries
from pp_to_vpp.container.pickling import Global
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.buffers import RankBuffers, buffers_of
from pp_to_vpp.megatron.megatron import Megatron
from pp_to_vpp.megatron.optimizer_chain import ChainedOptimizer, OptimizerKind
from pp_to_vpp.megatron.parameters import is_in_expert_buffer

from ..compare import load
from ..edit import float_tensor
from ..families import SIDES, families, family, of_kind, values_at, values_of
from ..pairs import DENSE, LAYOUT, MOE, ODD, UNCOMPARED


@pytest.mark.parametrize(("name", "side"), of_kind(OptimizerKind.DISTRIBUTED))
def test_every_element_of_a_weight_is_its_main_parameter_rounded(name: str, side: str) -> None:
    """So states are found where they are, to the element; moments lie beside them."""
    for of in families(name, side):
        held = {item.name: item for item in of.items() if item.is_parameter}
        for key, state in of.states.items():
            assert isinstance(state, FlatState)
            tensor = held[key].tensor
            assert tensor is not None
            main = state.tensors["param"].extent
            assert state.main.extent == main
            dtype = getattr(torch, tensor.dtype)
            if name not in UNCOMPARED:
                assert torch.equal(values_at(main, torch.float32).to(dtype), values_of(tensor)), key
            assert {own.extent.length for own in state.tensors.values()} == {main.length}
            assert set(state.tensors) == {"param", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(("name", "side"), of_kind(OptimizerKind.DISTRIBUTED))
def test_families_hold_all_states_once(name: str, side: str) -> None:
    """Dense and expert states in the families that have them."""
    for of in families(name, side):
        parameters = [item for item in of.items() if item.is_trained]
        expected = {
            item.name
            for item in parameters
            if of.holds_state(is_expert=is_in_expert_buffer(item, of.megatron))
        }
        assert set(of.states) == expected


@pytest.mark.parametrize(("name", "side"), of_kind(OptimizerKind.DISTRIBUTED))
def test_computed_buffers_have_the_sizes_of_the_stored(name: str, side: str) -> None:
    for of in families(name, side):
        for rank in of.ranks.values():
            assert rank.buffers is not None
            for content, buffers in zip(rank.contents, rank.buffers.by_stage, strict=True):
                for buffer in buffers:
                    items = [content.parameters[index] for index in buffer.members]
                    tensors = [item.tensor for item in items if item.tensor is not None]
                    assert {t.storage.numel for t in tensors} == {buffer.numel}
                    assert [t.offset for t in tensors] == list(buffer.starts)
            if rank.files.optimizer is not None:
                loaded = optimizer_entries(load(Path(rank.files.optimizer.path)), "file")
                check_sizes(loaded, rank, rank.buffers)


def check_sizes(loaded: list[Any], rank: SourceRank, buffers: RankBuffers) -> None:
    for own, entry in zip(rank.optimizers, loaded, strict=True):
        for index, (_, buffer) in enumerate(buffers.of(own.kind) if entry else ()):
            ((_, tensors),) = entry[index].items()
            assert tensors["param"].numel() == tensors["numel_unpadded"] == buffer.numel_unpadded


def test_kinds_of_all_pairs() -> None:
    """Weights are views of buffers with the distributed optimizer, saved or not."""
    for name, side in SIDES:
        of = family(name, side)
        for rank in of.ranks.values():
            has_weights = any(content.parameters for content in rank.contents)
            has_own = of.kind in (OptimizerKind.PLAIN, OptimizerKind.LAYER_WISE)
            shares = has_weights and not has_own
            assert rank.shares_storages is shares
            if shares:
                assert rank.buffers is not None
                assert are_views_of_buffers(rank.contents, rank.buffers)


def test_buffers_of_an_optimizer() -> None:
    """In the order of the indices in the file."""
    of = family(MOE, "truth")
    buffers = of.ranks[0].buffers
    assert buffers is not None
    dense, experts = (own.kind for own in of.ranks[0].optimizers)
    for kind in (dense, experts):
        found = buffers.of(kind)
        assert [stage for stage, _ in found] == [0, 1]
        assert all(buffer.is_expert is kind.is_expert for _, buffer in found)
    one = replace(dense, vp_stages=(1,))
    assert buffers.of(one) == buffers.of(dense)[1:]


@pytest.mark.parametrize("name", [LAYOUT, ODD])
def test_other_rules_do_not_explain_odd_sizes(name: str) -> None:
    """Offsets of views prove the rules of a version."""
    of = family(name, "source")
    rules = of.megatron.rules
    other = replace(rules, aligns_parameters=not rules.aligns_parameters)
    assert not of.megatron.arguments.overlaps_param_gather_with_step
    differing = 0
    for pp_rank, rank in of.ranks.items():
        buffers = buffers_of(
            [content.items for content in rank.contents],
            pp_rank,
            Megatron(of.megatron.arguments, other),
        )
        if buffers != rank.buffers:
            differing += 1
            with pytest.raises(Unexplained, match=r"lies at element \d+ of \d+ in its storage"):
                are_views_of_buffers(rank.contents, buffers)
    assert differing


def changed(of: Family, edit: Callable[[dict[Any, Any]], Any]) -> Callable[[], RankStates]:
    """Reading the flat states of rank 0 after an edit of the first buffer of its file."""
    rank = of.ranks[0]
    assert rank.files.optimizer is not None
    assert rank.buffers is not None
    root = rank.files.optimizer.root
    ((key, tensors),) = root[0].items()
    copy = {**root, 0: {key: dict(tensors)}}
    result = edit(copy)
    new, buffers = copy if result is None else result, rank.buffers
    return lambda: read_flat_states(new, rank.contents, chain_in(rank), buffers, "file")


def chain_in(rank: SourceRank) -> list[ChainedOptimizer]:
    return [own.kind for own in rank.optimizers]


def in_buffer(edit: Callable[[dict[Any, Any]], object]) -> Callable[[dict[Any, Any]], None]:
    """An edit of the tensors of the first buffer."""

    def apply(root: dict[Any, Any]) -> None:
        (tensors,) = root[0].values()
        edit(tensors)

    return apply


def with_key(key: object) -> Callable[[dict[Any, Any]], None]:
    def apply(root: dict[Any, Any]) -> None:
        (tensors,) = root[0].values()
        root[0] = {key: tensors}

    return apply


_HALF, _FLOAT = Global("torch", "float16"), Global("torch", "float32")

ODD_FILES: dict[str, tuple[Callable[[dict[Any, Any]], Any], type[Exception], str]] = {
    "not coalesced": (
        lambda r: r.update(buckets_coalesced=False), CheckpointError, "not the coalesced format",
    ),
    "per bucket": (
        lambda _: {"per_bucket_numel": []}, CheckpointError, "stored per bucket, as Megatron 0.6",
    ),
    "two optimizers": (lambda r: [r, r], CheckpointError, "another number of optimizers"),
    "text": (lambda _: "text", CheckpointError, "neither a dict nor a list, found 'text'"),
    "text in a list": (lambda _: ["text"], CheckpointError, "not the coalesced format"),
    "unknown entry": (lambda r: r.update(extra=1), CheckpointError, "unknown optimizer entry"),
    "a truth value": (lambda r: r.update({True: 1}), CheckpointError, "unknown optimizer entry"),
    "a buffer too many": (lambda r: r.update({1: r[0]}), Unexplained, r"\[0, 1\] in the file, 1 c"),
    "no buffer": (lambda r: r.pop(0) and None, Unexplained, r"\[\] in the file, 1 computed"),
    "two dtypes": (
        lambda r: r[0].update({(_HALF, _FLOAT): {}}), CheckpointError, "exactly one dtype",
    ),
    "a bare dtype": (with_key(_HALF), CheckpointError, "is no .parameter dtype, gradient dtype"),
    "another dtype": (with_key((_HALF, _FLOAT)), Unexplained, "dtype float16 in the file, bfloat1"),
    "no main": (in_buffer(lambda t: t.pop("param")), CheckpointError, "without 'param'"),
    "no number": (in_buffer(lambda t: t.pop("numel_unpadded")), CheckpointError, "without 'param'"),
    "another number": (
        in_buffer(lambda t: t.update(numel_unpadded=5)), Unexplained, "5 elements found, ",
    ),
    "another length": (
        in_buffer(lambda t: t.update(exp_avg=float_tensor(bytes(8)))), CheckpointError,
        r"state 'exp_avg' is unknown, expected a flat float32 tensor of \d+, found float32 \(2,\)",
    ),
    "no tensor": (in_buffer(lambda t: t.update(extra=3)), CheckpointError, "state 'extra' is unk"),
    "no name": (
        in_buffer(lambda t: t.update({7: t["param"]})), CheckpointError, "state 7 is unknown",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_FILES)
def test_odd_optimizer_files(case: str) -> None:
    """What other rules could explain is unexplained; what none can is refused."""
    edit, kind, reason = ODD_FILES[case]
    with pytest.raises(kind, match=reason):
        changed(family(DENSE, "source"), edit)()


def test_further_flat_states_are_carried_along() -> None:
    """Such as those of other optimizers: any flat fp32 tensor of the right size."""
    of = family(DENSE, "source")
    found = changed(of, in_buffer(lambda t: t.update(master=t["exp_avg"])))()
    assert found.held == (True,)
    for state in found.by_name.values():
        assert state.tensors["master"] == state.tensors["exp_avg"]


def test_states_that_another_family_holds_are_none() -> None:
    of = families(MOE, "source")[1]
    rank = of.ranks[0]
    assert rank.files.optimizer is not None
    assert rank.buffers is not None
    found = read_flat_states(
        rank.files.optimizer.root, rank.contents, chain_in(rank), rank.buffers, "file"
    )
    assert found.held == (False, True)
    assert all(".experts." in name for name in found.by_name)
