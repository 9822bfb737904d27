"""From a family's inventory and a target layout to the bytes of every target file.

A plan holds tuples only, is a function of its inputs, knows its size and can be checked: every
file is tiled, every source byte exists, no source byte is used twice and no tensor is left behind.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.family import Family
from ..container import torch_file
from ..container.archive import ArchiveLayout
from ..container.extents import Extent, Piece
from ..container.torch_file import FileFormatError
from ..errors import ASK_FOR_SUPPORT, CheckpointError
from ..megatron.arguments import patch_arguments
from ..megatron.buffers import RankBuffers, rank_buffers
from ..megatron.optimizer_chain import OptimizerKind
from ..megatron.ranks import MODEL_FILE, OPTIMIZER_FILE, RankId
from .model import StateDictWriter, replace_chunks, target_chunk
from .optimizer_entry import TargetOptimizer
from .request import TargetSpec


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One target file: where each record's bytes come from."""

    name: str
    length: int
    contents: tuple[tuple[Piece, ...], ...]
    """The bytes of each record; of a file that is no archive, one entry."""
    layout: ArchiveLayout | None
    """Where the records lie; None for a file that is copied as it is."""

    def places(self) -> Iterator[tuple[int, tuple[Piece, ...]]]:
        """Offset in the file and bytes of each record."""
        offsets = [record.offset for record in self.layout.records] if self.layout else [0]
        yield from zip(offsets, self.contents, strict=True)


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One target rank folder."""

    rank: RankId
    files: tuple[FilePlan, ...]

    @property
    def length(self) -> int:
        """Bytes of all files."""
        return sum(file.length for file in self.files)

    def source_paths(self) -> tuple[str, ...]:
        """The source files that its bytes come from."""
        extents = (p for file in self.files for pieces in file.contents for p in pieces)
        return tuple(sorted({p.path for p in extents if isinstance(p, Extent)}))


def plan_rank(
    family: Family, target: TargetSpec, pp_rank: int, others: Sequence[tuple[str, Extent]] = ()
) -> RankPlan:
    """The plan of one target rank folder.

    Args:
        family: the inventory, with all source ranks that hold what this rank needs.
        target: placement and layout of the target.
        pp_rank: which rank.
        others: name and whole content of further files of the folder, which are copied.

    Raises:
        LayoutError: Megatron could not build the target's buffers.
        CheckpointError: the source has no param groups, or objects that cannot be written.
    """
    try:
        return _plan_rank(family, target, pp_rank, others)
    except (FileFormatError, pickle.PicklingError) as error:
        where = family.ranks[pp_rank].files.model.path
        cure = ASK_FOR_SUPPORT
        raise CheckpointError.of(where, str(error), cure=cure) from None


def _plan_rank(
    family: Family, target: TargetSpec, pp_rank: int, others: Sequence[tuple[str, Extent]]
) -> RankPlan:
    ranks = family.ranks_for(target.layout, pp_rank)
    own = ranks[0]
    chunks = [target_chunk(family, chunk) for chunk in target.layout.rank_chunks(pp_rank)]
    overlaps = target.overlaps_param_gather_with_step
    buffers: RankBuffers | None = None
    if family.shares_storages or family.kind is OptimizerKind.DISTRIBUTED:
        buffers = rank_buffers(
            [(chunk.chunk, chunk.parameters) for chunk in chunks],
            family.arguments,
            family.rules,
            overlaps_param_gather_with_step=overlaps,
        )
    writer = StateDictWriter(family, pp_rank)
    views = buffers.by_stage if buffers is not None and family.shares_storages else ()
    nodes = [writer.chunk(chunk, view) for chunk, view in itertools.zip_longest(chunks, views)]
    root = replace_chunks(own.root, nodes)
    root["args"] = patch_arguments(
        root["args"], family.arguments, target.placement, overlap_param_gather_with_step=overlaps
    )
    flat: Any = None
    if family.kind is not OptimizerKind.NONE:
        optimizer = TargetOptimizer(family, ranks, chunks, buffers, overlaps)
        root = optimizer.placed_entry(root)
        flat = optimizer.flat_root() if family.kind is OptimizerKind.DISTRIBUTED else None
    roots = {MODEL_FILE: (root, own.files.model)}
    if flat is not None:
        templates = (rank.files.optimizer for rank in ranks)
        roots[OPTIMIZER_FILE] = (flat, next(file for file in templates if file is not None))
    files = [
        _file_plan(name, torch_file.encode(graph, template))
        for name, (graph, template) in roots.items()
    ]
    files += [FilePlan(name, extent.length, ((extent,),), None) for name, extent in others]
    return RankPlan(own.files.rank, tuple(files))


def _file_plan(name: str, encoded: torch_file.EncodedFile) -> FilePlan:
    return FilePlan(name, encoded.layout.length, encoded.contents, encoded.layout)
