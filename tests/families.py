"""The families of ranks of the real pairs, read once for all tests of what is made of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from pp_to_vpp.checkpoint.family import Family
from pp_to_vpp.container.extents import Extent
from pp_to_vpp.container.tensors import TensorRef
from pp_to_vpp.megatron.optimizer_chain import OptimizerKind
from pp_to_vpp.megatron.pipeline import PipelineLayout, Placement
from pp_to_vpp.source import proof
from pp_to_vpp.source.files import read_rank
from pp_to_vpp.source.survey import Survey, take_survey
from pp_to_vpp.target.request import TargetSpec

from .pairs import names, pair

SIDES = [(name, side) for name in names() for side in ("source", "truth")]
"""Every checkpoint in the test data."""


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
        files = {p: read_rank(found.path, rank) for p, rank in found.family(key).items()}
        read.append(proof.proven_family(files)[0])
    return tuple(read)


def family(name: str, side: str) -> Family:
    """The first family of one side."""
    return families(name, side)[0]


def placed(of: Family, placement: Placement) -> PipelineLayout:
    """What a placement means for the model of a family."""
    return of.arguments.place(placement, of.rules)


def target_of(name: str, other: str) -> TargetSpec:
    """The layout of one side of a pair, as the target of converting the other side."""
    there = family(name, other).arguments
    placement = there.placement
    return TargetSpec(
        placement, placed(family(name, other), placement), there.overlaps_param_gather_with_step
    )


def opposite(side: str) -> str:
    """The other side of a pair: what a side is converted to."""
    return "truth" if side == "source" else "source"


def of_kind(kind: OptimizerKind) -> list[tuple[str, str]]:
    """The sides whose optimizer is of a kind."""
    return [(name, side) for name, side in SIDES if family(name, side).kind is kind]


def values_of(tensor: TensorRef) -> Any:
    """The values of a source tensor, as torch reads raw bytes."""
    (extent,) = tensor.content()
    assert isinstance(extent, Extent)
    return values_at(extent, getattr(torch, tensor.dtype))


def values_at(extent: Extent, dtype: torch.dtype) -> torch.Tensor:
    """What torch makes of a range of a file."""
    data = Path(extent.path).read_bytes()[extent.offset : extent.offset + extent.length]
    return torch.frombuffer(bytearray(data), dtype=dtype)
