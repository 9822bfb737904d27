"""The inventory of a family: what its files hold, under the rules that explain them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pp_to_vpp.checkpoint.family import TensorName
from pp_to_vpp.megatron.optimizer_chain import OptimizerKind
from pp_to_vpp.megatron.ranks import MODEL_FILE, OPTIMIZER_FILE

from ..compare import load
from ..families import OF_KINDS, SIDES, families, family, files_read, opposite, read_family
from ..pairs import DENSE, FORK, names

STATE_FILES = {
    OptimizerKind.DISTRIBUTED: OPTIMIZER_FILE,
    OptimizerKind.PLAIN: MODEL_FILE,
    OptimizerKind.LAYER_WISE: r"layer_wise_optimizer_[0-3].pt",
}
"""Where the optimizer states of each kind are."""


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_families_hold_the_whole_model(name: str, side: str) -> None:
    for of in families(name, side):
        arguments = of.megatron.arguments
        assert set(of.layers) == set(range(arguments.num_layers)) - arguments.noop_layers
        held = {section for chunk in of.layout.chunks for section in chunk.sections}
        assert set(of.sections) == held
        items = list(of.items())
        assert len(items) == sum(len(c.items) for r in of.ranks.values() for c in r.contents)
        assert len({item.name for item in items}) == len(items)
        assert all(item.layer == layer for layer, found in of.layers.items() for item in found)
        assert of.any_rank is of.ranks[0]


@pytest.mark.parametrize("name", names())
def test_both_sides_are_one_model(name: str) -> None:
    """Layer by layer: keys, shapes and states, whichever rank they were on."""
    for source, truth in zip(families(name, "source"), families(name, "truth"), strict=True):
        for layer, items in source.layers.items():
            ours = [(item.name, shape(item), item.name in source.states) for item in items]
            theirs = [
                (item.name, shape(item), item.name in truth.states) for item in truth.layers[layer]
            ]
            assert ours == theirs
        assert (source.kind, source.megatron.rules) == (truth.kind, truth.megatron.rules)
        for is_expert in (False, True):
            held = source.holds_state(is_expert=is_expert)
            assert held == truth.holds_state(is_expert=is_expert)
        assert source.has_expert_optimizer == truth.has_expert_optimizer


def shape(item: Any) -> object:
    return None if item.tensor is None else (item.tensor.dtype, item.tensor.shape)


@pytest.mark.parametrize("pp_rank", [0, 1, 2, 3])
def test_a_part_of_the_ranks_holds_its_part(pp_rank: int) -> None:
    of = family(FORK, "truth")
    part = next(read_family({pp_rank: of.ranks[pp_rank].files}))
    chunks = of.layout.rank_chunks(pp_rank)
    assert sorted(part.layers) == [layer for chunk in chunks for layer in chunk.layers]
    assert set(part.sections) == {section for chunk in chunks for section in chunk.sections}
    assert part.layout == of.layout
    assert {item.name for item in part.items() if item.is_parameter} == set(part.states)


@pytest.mark.parametrize("name", names())
def test_samples_are_all_parameters_with_states(name: str) -> None:
    """In one family at least: another may hold frozen experts alone."""
    has_any = any(any(of.samples()) for of in families(name, "source"))
    assert has_any is (family(name, "source").kind is not OptimizerKind.NONE)
    for of in families(name, "source"):
        found = {sample.name: sample for sample in of.samples()}
        assert set(found) == set(of.states)
        for item in of.items():
            if item.name in found:
                sample = found[item.name]
                assert item.tensor is not None
                assert (sample.weight, sample.dtype) == (item.tensor.extent, item.tensor.dtype)
                assert sample.main.length == 4 * item.tensor.numel
                where = sample.main.path.rpartition("/")[2]
                assert re.fullmatch(STATE_FILES[of.kind], where)


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
def test_a_manifest_names_every_tensor(name: str, side: str) -> None:
    """Weights and buffers as torch counts them, states as the optimizer files hold them."""
    for of in families(name, side):
        found = of.manifest()
        weights = {key.parameter: tensor for key, tensor in found.items() if not key.kind}
        assert weights == {item.name: item.tensor for item in of.items() if item.tensor is not None}
        loaded = [load(Path(rank.files.model.path)) for rank in of.ranks.values()]
        chunks = [root[key] for root in loaded for key in root if key.startswith("model")]
        values = [value for chunk in chunks for value in chunk.values()]
        assert len(weights) == sum(isinstance(value, torch.Tensor) for value in values)
        kinds: dict[str, set[str]] = {}
        for key in found:
            if key.kind:
                kinds.setdefault(key.parameter, set()).add(key.kind)
        assert set(kinds) == set(of.states)
        for parameter, state in of.states.items():
            assert kinds[parameter] == set(state.tensors)
            for kind, tensor in state.tensors.items():
                assert found[TensorName(parameter, kind)] is tensor
        assert len({str(key) for key in found}) == len(found)


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
def test_tensors_of_a_manifest_lie_in_their_files(name: str, side: str) -> None:
    """Each in one of its own family, apart from all others."""
    for of in families(name, side):
        sizes = {file.path: Path(file.path).stat().st_size for file in files_read(of)}
        places: list[tuple[str, int, int]] = []
        for key, tensor in of.manifest().items():
            extent = tensor.extent
            assert extent.path in sizes, key
            assert 0 <= extent.offset <= extent.offset + extent.length <= sizes[extent.path], key
            assert extent.length == tensor.numel * tensor.item_bytes, key
            where = extent.path.rpartition("/")[2]
            assert re.fullmatch(STATE_FILES[of.kind] if key.kind else MODEL_FILE, where), key
            places.append((extent.path, extent.offset, extent.offset + extent.length))
        for (path, _, end), (next_path, start, _) in itertools.pairwise(sorted(places)):
            assert path != next_path or end <= start


@pytest.mark.parametrize("name", names())
def test_manifests_of_both_sides_are_alike(name: str) -> None:
    """Names, dtypes and shapes: no layout changes them."""
    for source, truth in zip(families(name, "source"), families(name, "truth"), strict=True):
        ours, theirs = source.manifest(), truth.manifest()
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            other = theirs[key]
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), key


def test_a_manifest_of_some_items() -> None:
    of = family(DENSE, "source")
    found = of.manifest(of.layers[1])
    assert found
    assert found == {
        key: tensor
        for key, tensor in of.manifest().items()
        if key.parameter.startswith("decoder.layers.1.")
    }
    assert of.manifest([]) == {}


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_megatron_loses_no_group(name: str, side: str) -> None:
    for of in families(name, side):
        assert list(of.lost_groups()) == []


def test_tensors_are_told_apart_by_name_and_kind() -> None:
    assert str(TensorName("a.weight", "")) == "a.weight"
    assert str(TensorName("a.weight", "exp_avg")) == "a.weight [exp_avg]"


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
def test_items_in_a_layout_are_those_of_its_ranks(name: str, side: str) -> None:
    """Of the own one what each rank file holds, of the other side's what its rank files hold."""
    for of, other in zip(families(name, side), families(name, opposite(side)), strict=True):
        for there in (of, other):
            for pp_rank, rank in there.ranks.items():
                found = [item.name for item in of.items_in(there.layout, pp_rank)]
                held = [item.name for content in rank.contents for item in content.items]
                assert sorted(found) == sorted(held)
        everything = [item for p in of.ranks for item in of.items_in(of.layout, p)]
        assert {id(item) for item in everything} == {id(item) for item in of.items()}


def test_items_in_a_layout_are_only_those_that_were_read() -> None:
    """A part of the ranks gives its part of a rank of another layout."""
    of, layout = family(DENSE, "source"), family(DENSE, "truth").layout
    part = next(read_family({1: of.ranks[1].files}))
    read = {item.name for item in part.items()}
    for pp_rank in of.ranks:
        wanted = [item.name for item in of.items_in(layout, pp_rank)]
        found = [item.name for item in part.items_in(layout, pp_rank)]
        assert found == [name for name in wanted if name in read]
        assert 0 < len(found) < len(wanted)
