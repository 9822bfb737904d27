"""From a family's inventory and a target layout to the bytes of every target file.

A plan holds tuples only, is a function of its inputs, knows its size and can be checked: every
file is tiled, every source byte exists, no source byte is used twice and no tensor is left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..checkpoint.family import Family
from ..container import torch_file
from ..container.archive import ArchivePlan
from ..container.extents import Extent, Piece
from ..errors import ASK_FOR_SUPPORT, located
from ..megatron.arguments import patch_arguments
from ..megatron.megatron import Megatron
from ..megatron.optimizer_chain import OptimizerKind
from ..megatron.ranks import MODEL_FILE, OPTIMIZER_FILE, RankId
from .flat_file import flat_root
from .model import StateDictWriter, replace_chunks, target_rank
from .optimizer_entry import placed_entries, target_chain


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One target file: where each record's bytes come from."""

    name: str
    length: int
    contents: tuple[tuple[Piece, ...], ...]
    """The bytes of each record; of a file that is no archive, one entry."""
    archive: ArchivePlan | None
    """Where the records lie; None for a file that is copied as it is."""

    def places(self) -> Iterator[tuple[int, tuple[Piece, ...]]]:
        """Offset in the file and bytes of each record."""
        offsets = [record.offset for record in self.archive.records] if self.archive else [0]
        yield from zip(offsets, self.contents, strict=True)


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One target rank folder."""

    id: RankId
    files: tuple[FilePlan, ...]

    @property
    def length(self) -> int:
        """Bytes of all files."""
        return sum(file.length for file in self.files)

    def extents(self) -> Iterator[Extent]:
        """The ranges of source files that it is made of, in order."""
        pieces = (piece for file in self.files for record in file.contents for piece in record)
        return (piece for piece in pieces if isinstance(piece, Extent))

    def source_paths(self) -> tuple[str, ...]:
        """The source files that its bytes come from."""
        return tuple(sorted({extent.path for extent in self.extents()}))


def plan_rank(
    family: Family, megatron: Megatron, pp_rank: int, others: Sequence[tuple[str, Extent]] = ()
) -> RankPlan:
    """The plan of one target rank folder.

    Args:
        family: the inventory, with all source ranks that hold what this rank needs.
        megatron: the run that will load it.
        pp_rank: which rank.
        others: name and whole content of further files of the folder, which are copied.

    Raises:
        LayoutError: Megatron could not build the target's buffers.
        CheckpointError: the source has no param groups, or objects that cannot be written.
    """
    rank = target_rank(family, megatron, pp_rank)
    own = rank.own.files
    root = replace_chunks(rank.own.root, StateDictWriter(rank).chunks())
    root["args"] = patch_arguments(root["args"], family.megatron.arguments, megatron.arguments)
    chain = target_chain(rank)
    if family.kind is not OptimizerKind.NONE:
        root = placed_entries(root, rank, chain)
    roots = {MODEL_FILE: (root, own.model)}
    if family.kind is OptimizerKind.DISTRIBUTED:
        flat = flat_root(rank, chain)
        templates = (source.files.optimizer for source in rank.sources)
        if flat is not None:
            roots[OPTIMIZER_FILE] = (flat, next(file for file in templates if file is not None))
    with located(own.model.path, cure=ASK_FOR_SUPPORT):
        files = [
            _file_plan(name, torch_file.encode(graph, template))
            for name, (graph, template) in roots.items()
        ]
    files += [FilePlan(name, extent.length, ((extent,),), None) for name, extent in others]
    return RankPlan(own.id, tuple(files))


def _file_plan(name: str, encoded: torch_file.EncodedFile) -> FilePlan:
    return FilePlan(name, encoded.archive.length, encoded.contents, encoded.archive)
