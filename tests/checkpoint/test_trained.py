"""Which parameters are trained, as files tell it: all that tells, and what does not."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pp_to_vpp.checkpoint.chunks import ChunkContents
from pp_to_vpp.checkpoint.flat_states import Unexplained
from pp_to_vpp.checkpoint.reading import read_family as read_family_by
from pp_to_vpp.checkpoint.trained import answers, marked, only_alignment
from pp_to_vpp.container.extents import Literal
from pp_to_vpp.container.pickling import Global, Instance, Storage, as_mapping
from pp_to_vpp.container.tensors import TensorRef, flat_tensor
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.source.proof import likeliest_family

from ..compare import differences
from ..edit import copy_of, float_tensor, rewrite, rewrite_all
from ..families import families, family, read_family
from ..pairs import (
    DENSE,
    FROZEN,
    FROZEN_LAYER_WISE,
    FROZEN_MOST,
    FROZEN_PLAIN,
    LAYER_WISE,
    LONE,
    MUON,
    MUP,
    PLAIN,
    WEIGHTS,
    pair,
)
from ..runs import Program

PROJECTION = "decoder.layers.{}.self_attention.linear_proj.weight"


def never(_weight: TensorRef, _main: TensorRef) -> bool:
    return False


def trained(contents: tuple[ChunkContents, ...]) -> list[str]:
    return [item.name for content in contents for item in content.parameters]


@pytest.mark.parametrize("side", ["source", "truth"])
def test_all_families_tell_the_same_of_dense_parameters(side: str) -> None:
    """Also those without dense states, where a weight is a buffer by itself."""
    for of in families(FROZEN_MOST, side):
        dense = {item.name for item in of.items() if item.is_trained and "expert" not in item.name}
        assert dense == {PROJECTION.format(2), PROJECTION.format(3)}


def test_without_the_dense_states_nothing_tells() -> None:
    of = families(FROZEN_MOST, "truth")[1]
    files = {pp_rank: rank.files for pp_rank, rank in of.ranks.items()}
    assert all(rank_files.dense is not None for rank_files in files.values())
    alone = {pp_rank: replace(rank_files, dense=None) for pp_rank, rank_files in files.items()}
    with pytest.raises(CheckpointError, match=r"no file at hand tells whether .* is frozen"):
        list(read_family(alone))


def test_dense_states_of_another_size_are_not_explained() -> None:
    """Those of another folder are held to the layout like its own."""
    of = families(FROZEN_MOST, "truth")[1]
    other = families(FROZEN_MOST, "source")[1].ranks[1].files.dense
    files = {1: replace(of.ranks[1].files, dense=other)}
    with pytest.raises(CheckpointError, match="no known layout of Megatron's buffers"):
        list(read_family(files))


def test_a_rank_without_an_optimizer_trains_nothing() -> None:
    """Up to 0.13, and if no weight is a view of a buffer."""
    of = family(FROZEN_MOST, "source")
    assert not any(of.ranks[0].parameters)
    assert any(of.ranks[1].parameters)
    truth = family(FROZEN_MOST, "truth")
    files = {pp_rank: rank.files for pp_rank, rank in truth.ranks.items()}
    root = dict(as_mapping(files[1].model.root) or {})
    del root["optimizer"]
    files[1] = replace(files[1], model=replace(files[1].model, root=root), optimizer=None)
    with pytest.raises(CheckpointError, match="its siblings hold distributed optimizer"):
        list(read_family(files))


def test_a_missing_entry_of_a_newer_version_is_missing() -> None:
    """By nothing but the version's signs, without the distributed optimizer."""
    of = family(PLAIN, "source")
    files = {pp_rank: rank.files for pp_rank, rank in of.ranks.items()}
    root = dict(as_mapping(files[0].model.root) or {})
    del root["optimizer"]
    files[0] = replace(files[0], model=replace(files[0].model, root=root))
    with pytest.raises(CheckpointError, match="its siblings hold non-distributed optimizer"):
        list(read_family(files))


@pytest.mark.parametrize("name", [LONE, FROZEN_MOST, FROZEN_PLAIN, FROZEN_LAYER_WISE])
def test_known_answers_are_held_to_the_files(name: str) -> None:
    of = family(name, "truth")
    files = {pp_rank: rank.files for pp_rank, rank in of.ranks.items()}
    same, way, _ = likeliest_family(files, of.megatron.rules, of.frozen)
    assert (same.frozen, way) == (of.frozen, "rounded")
    one = next(item.name for item in of.items() if item.is_trained)
    with pytest.raises(CheckpointError, match="no known layout of Megatron's buffers"):
        likeliest_family(files, of.megatron.rules, of.frozen | {one})


@pytest.mark.parametrize("name", [LONE, FROZEN_MOST, FROZEN_LAYER_WISE])
def test_a_frozen_weight_called_trained_is_not_explained(name: str) -> None:
    of = family(name, "truth")
    files = {pp_rank: rank.files for pp_rank, rank in of.ranks.items()}
    for one in sorted(of.frozen):
        with pytest.raises(CheckpointError):
            likeliest_family(files, of.megatron.rules, of.frozen - {one})


@pytest.mark.parametrize("optimizers", [None, [[None, {}]]])
def test_a_weight_alone_of_its_kind_is_trained(optimizers: list[object] | None) -> None:
    """As an embedding that has a chunk for itself, where no file at hand has its state."""
    lone, shared = (family(name, "truth") for name in (FROZEN_MOST, DENSE))
    first = lone.ranks[0].contents[0]
    alone = replace(first, items=(replace(first.items[0], is_frozen=False),))
    both = (alone, shared.ranks[0].contents[1])
    found, *others = answers(both, optimizers, lone.megatron, never)
    assert trained(found) == trained(both)
    assert [trained(other) for other in others] == [trained(both[1:])] * (optimizers is None)


def test_weights_alone_with_storages_of_their_own_are_frozen_beside_buffers() -> None:
    lone, shared = (family(name, "truth") for name in (FROZEN_MOST, DENSE))
    first = lone.ranks[0].contents[0]
    items = tuple(replace(item, is_frozen=False) for item in first.items)
    both = (replace(first, items=items), shared.ranks[0].contents[1])
    (found,) = answers(both, None, lone.megatron, never)
    assert trained(found) == trained(both[1:])
    with pytest.raises(Unexplained, match="no file at hand tells"):
        list(answers(both, [], lone.megatron, never))


@pytest.mark.parametrize("side", ["source", "truth"])
def test_layer_wise_files_tell_what_is_trained(side: str) -> None:
    """By name: what the pair was made with."""
    for of in families(FROZEN_LAYER_WISE, side):
        wanted = re.compile(r"router|layers\.[02]\..*linear_fc1|embedding")
        parameters = {item.name for item in of.items() if item.is_parameter}
        assert of.frozen == {name for name in parameters if wanted.search(name)}
        assert set(of.states) == parameters - of.frozen


def test_layer_wise_files_of_equal_bytes_do_not_tell() -> None:
    """Any weight could follow from any main parameter of its shape."""
    of = family(FROZEN_LAYER_WISE, "source")
    files = {pp_rank: rank.files for pp_rank, rank in of.ranks.items()}
    with pytest.raises(CheckpointError, match="if some are frozen, more than one way to tell"):
        list(read_family_by(files, lambda _weight, _main, _ways: True))
    alone = {
        pp_rank: replace(own, layer_wise=replace(own.layer_wise, others=None))
        for pp_rank, own in files.items()
    }
    with pytest.raises(CheckpointError, match="only all layer-wise files together tell"):
        list(read_family(alone))


def _damage(tensor: Instance) -> None:
    storage, offset, _, *rest = tensor.arguments
    tensor.arguments = (storage, offset, (1 << 40,), *rest)


def _first_flat(root: Any) -> Any:
    entry = root[0] if isinstance(root, list) else root
    return next(iter(entry[0].values()))["param"]


def _first_plain(root: Any) -> Any:
    return root["optimizer"]["fp32_from_fp16_params"][0][0]


@pytest.mark.parametrize(
    ("name", "file", "first"),
    [
        (FROZEN, "distrib_optim.pt", _first_flat),
        (FROZEN_MOST, "distrib_optim.pt", _first_flat),
        (FROZEN_PLAIN, "model_optim_rng.pt", _first_plain),
        (MUP, "model_optim_rng.pt", _first_plain),
    ],
)
def test_damaged_main_parameters_tell_nothing(
    name: str, file: str, first: Callable[[Any], Instance], program: Program, tmp_path: Path
) -> None:
    """And whoever reads them for themselves says where they are."""
    source = copy_of(pair(name).source, tmp_path)
    path = sorted(source.glob(f"*/{file}"))[0]
    rewrite(path, lambda root: _damage(first(root)))
    run = program.convert(source, tmp_path / "x", pair(name).options)
    program.refuses(4, run, str(path.parent))


def test_marking_nothing_changes_nothing() -> None:
    contents = family(LONE, "truth").ranks[0].contents
    assert trained(marked(contents, ())) == trained(contents)


_BOUNDS = "mlp.router.qb_bin_bounds"
_TABLE = "mlp.router.tid2eid"


def with_buffers(iteration: Path, numel: int) -> None:
    """Two tensors that are not trained in each layer, as hash routing and quantile balancing of
    Megatron's development branch register them."""

    def edit(root: Any) -> None:
        for name in (name for name in root if name.startswith("model")):
            chunk = as_mapping(root[name]) or {}
            items = list(chunk.items())
            chunk.clear()
            for index, (key, value) in enumerate(items):
                chunk[key] = value
                layer = ".".join(key.split(".")[:3])
                after = items[index + 1][0] if index + 1 < len(items) else ""
                if key.startswith("decoder.layers.") and not after.startswith(f"{layer}."):
                    data = struct.pack(f"<{numel}f", *range(numel))
                    chunk[f"{layer}.{_BOUNDS}"] = float_tensor(data)
                    table = Storage(Global("torch", "IntStorage"), "cpu", numel, (Literal(data),))
                    chunk[f"{layer}.{_TABLE}"] = flat_tensor(table)

    rewrite_all(iteration, edit)


@pytest.mark.parametrize("name", [DENSE, PLAIN, FROZEN_PLAIN, MUON, LAYER_WISE, WEIGHTS])
def test_tensors_without_state_are_carried_as_buffers(
    name: str, program: Program, tmp_path: Path
) -> None:
    """Under any optimizer, without a list of their names."""
    case = pair(name)
    source, truth = (
        copy_of(side, tmp_path / side.parent.name) for side in (case.source, case.truth)
    )
    for side in (source, truth):
        with_buffers(side, 3)
    target = tmp_path / "target" / source.name
    run = program.convert(source, target, case.options)
    assert run.status == 0, run.errors
    assert differences(target, truth, source) == []


def test_a_tensor_that_may_have_a_state_is_named() -> None:
    """Of fp32 weights no main parameter tells which are trained, and shapes must."""
    of = family(FROZEN_PLAIN, "source")
    contents = of.ranks[0].contents
    mains = [item.weight.shape for content in contents for item in content.parameters]
    items = [item for content in contents for item in content.parameters]
    assert only_alignment(mains, items, lambda item, shape: item.weight.shape == shape) == items
    name = re.escape(items[-1].name)
    with pytest.raises(Unexplained, match=rf"more than one way .* or {name}"):
        only_alignment(mains[-1:], items, lambda item, shape: item.weight.shape == shape)
