"""The families of ranks of the real pairs, read once for all tests of what is made of them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pp_to_vpp.checkpoint import reading
from pp_to_vpp.checkpoint.family import Family, RankFiles
from pp_to_vpp.container.extents import Extent
from pp_to_vpp.container.pickling import Instance, as_mapping
from pp_to_vpp.container.tensors import TensorRef
from pp_to_vpp.container.torch_file import TorchFile
from pp_to_vpp.megatron.megatron import Megatron
from pp_to_vpp.megatron.optimizer_chain import OptimizerKind
from pp_to_vpp.megatron.rules import Rules
from pp_to_vpp.source.files import RangeReader
from pp_to_vpp.source.proof import SampledAgreement, proven_family
from pp_to_vpp.source.survey import Survey, take_survey

from .examples import FACTOR
from .pairs import (
    EACH_KIND,
    EXPERTS_FIRST,
    FROZEN_LAYER_WISE,
    FROZEN_PLAIN,
    LAYER_WISE,
    LAYER_WISE_ODD,
    LAYER_WISE_WIDE,
    LION,
    MUON,
    MUP,
    OWN_RATES,
    PLAIN,
    SGD,
    SOAP,
    WEIGHTS,
    names,
    pair,
)

SIDES = [(name, side) for name in names() for side in ("source", "truth")]
"""Every checkpoint in the test data: for what is compared with Megatron's own files."""
OF_KINDS = [(name, side) for name, side in SIDES if name in EACH_KIND or FACTOR > 1]
"""Checkpoints of each kind: for what must hold of any checkpoint."""

_USUAL = OptimizerKind.DISTRIBUTED
KINDS = {
    PLAIN: OptimizerKind.PLAIN,
    SGD: OptimizerKind.PLAIN,
    LION: OptimizerKind.PLAIN,
    MUON: OptimizerKind.PLAIN,
    SOAP: OptimizerKind.PLAIN,
    FROZEN_PLAIN: OptimizerKind.PLAIN,
    MUP: OptimizerKind.PLAIN,
    OWN_RATES: OptimizerKind.PLAIN,
    LAYER_WISE: OptimizerKind.LAYER_WISE,
    LAYER_WISE_ODD: OptimizerKind.LAYER_WISE,
    LAYER_WISE_WIDE: OptimizerKind.LAYER_WISE,
    FROZEN_LAYER_WISE: OptimizerKind.LAYER_WISE,
    EXPERTS_FIRST: OptimizerKind.LAYER_WISE,
    WEIGHTS: OptimizerKind.NONE,
}
"""The optimizers of pairs that have not the usual one, told here so that no file need be decoded
when tests are collected (test_family holds this to the files)."""


def iteration(name: str, side: str) -> Path:
    """The iteration folder of one side of a pair."""
    case = pair(name)
    return case.source if side == "source" else case.truth


@functools.cache
def surveyed(name: str, side: str) -> Survey:
    """What is found on one side of a pair."""
    return take_survey(str(iteration(name, side)))


@functools.cache
def families(name: str, side: str) -> tuple[Family, ...]:
    """Every family of one side, under the rules that its bytes prove."""
    found = surveyed(name, side)
    read = []
    for key in found.families:
        folders = found.family(key)
        read.append(proven_family(folders.read(folders.ranks))[0])
    return tuple(read)


def family(name: str, side: str) -> Family:
    """The first family of one side."""
    return families(name, side)[0]


def files_read(of: Family) -> list[TorchFile]:
    """The files that a family was read from, those of other expert ranks included."""
    found = [file for rank in of.ranks.values() for file in rank.files.all]
    others = (rank.files.layer_wise.others or {} for rank in of.ranks.values())
    return found + [file for files in others for file in files.values()]


def read_family(
    files: Mapping[int, RankFiles], only: Rules | None = None, frozen: Collection[str] | None = None
) -> Iterator[Family]:
    """The product's own, comparing the bytes of the files where nothing else tells."""
    with RangeReader() as reader:
        yield from reading.read_family(files, SampledAgreement(reader), only, frozen)


def target_of(name: str, other: str) -> Megatron:
    """The run of one side of a pair, as the target of converting the other side."""
    return family(name, other).megatron


def opposite(side: str) -> str:
    """The other side of a pair: what a side is converted to."""
    return "truth" if side == "source" else "source"


def of_kind(kind: OptimizerKind) -> list[tuple[str, str]]:
    """The sides whose optimizer is of a kind."""
    return [(name, side) for name, side in SIDES if KINDS.get(name, _USUAL) is kind]


def values_of(tensor: TensorRef) -> Any:
    """The values of a source tensor, as torch reads raw bytes."""
    return values_at(tensor.extent, getattr(torch, tensor.dtype))


def values_at(extent: Extent, dtype: torch.dtype) -> torch.Tensor:
    """What torch makes of a range of a file."""
    data = Path(extent.path).read_bytes()[extent.offset : extent.offset + extent.length]
    return torch.frombuffer(bytearray(data), dtype=dtype)


def files_of(of: Family) -> dict[int, RankFiles]:
    """Those of each rank that was read."""
    return {pp_rank: rank.files for pp_rank, rank in of.ranks.items()}


def edited(files: RankFiles, **changes: Any) -> RankFiles:
    """Rank files with other entries at the top of the model file; None takes one away."""
    root = {**(as_mapping(files.model.root) or {}), **changes}
    kept = {key: value for key, value in root.items() if value is not None}
    return replace(files, model=replace(files.model, root=kept))


def with_arguments(files: RankFiles, **changes: Any) -> RankFiles:
    """Rank files with other arguments."""
    node = (as_mapping(files.model.root) or {})["args"]
    args = Instance(node.factory, node.arguments, node.by_new, state={**node.state, **changes})
    return edited(files, args=args)


def without_argument(files: RankFiles, name: str) -> RankFiles:
    """Rank files that do not have an argument."""
    node = (as_mapping(files.model.root) or {})["args"]
    state = {key: value for key, value in node.state.items() if key != name}
    return edited(files, args=Instance(node.factory, node.arguments, node.by_new, state=state))
