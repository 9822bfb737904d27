"""From a family's inventory and a target layout to the bytes of every target file.

A plan holds tuples only, is a function of its inputs, knows its size and can be checked: every
file is tiled, every source byte exists, no source byte is used twice and no tensor is left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..checkpoint.family import Family
from ..checkpoint.top_level import for_data_parallel
from ..container import torch_file
from ..container.archive import ArchivePlan
from ..container.extents import Extent, Piece, cut_pieces
from ..container.torch_file import TorchFile
from ..errors import ASK_FOR_SUPPORT, located
from ..megatron import naming
from ..megatron.arguments import patch_arguments
from ..megatron.megatron import Megatron
from ..megatron.ranks import MODEL_FILE, RankId
from .model import StateDictWriter, TargetRank, replace_chunks, target_rank
from .optimizer import target_optimizer
from .optimizer_entry import place_entry


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One target file: where each record's bytes come from."""

    name: str
    length: int
    contents: tuple[tuple[Piece, ...], ...]
    """The bytes of each record; of a file that is no archive, one entry."""
    archive: ArchivePlan | None
    """Where the records lie; None for a file that is copied as it is."""
    block: int = 1
    """Bytes of a block that it may share with the files that it is made of."""
    shared: int = 0
    """Bytes of the blocks that it then does share."""

    def places(self) -> Iterator[tuple[int, tuple[Piece, ...]]]:
        """Offset in the file and bytes of each record."""
        offsets = [record.offset for record in self.archive.records] if self.archive else [0]
        yield from zip(offsets, self.contents, strict=True)

    def extents(self) -> Iterator[Extent]:
        """The ranges of source files that it is made of, in order."""
        pieces = (piece for record in self.contents for piece in record)
        return (piece for piece in pieces if isinstance(piece, Extent))


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One target rank folder."""

    id: RankId
    files: tuple[FilePlan, ...]
    elsewhere: frozenset[str] = frozenset()
    """Parameters whose optimizer states go into folders of other expert ranks."""

    @property
    def length(self) -> int:
        """Bytes of all files."""
        return sum(file.length for file in self.files)

    def extents(self) -> Iterator[Extent]:
        """The ranges of source files that it is made of, in order."""
        return (extent for file in self.files for extent in file.extents())

    def cut(self, borders: Mapping[str, Sequence[int]]) -> RankPlan:
        """The same plan with no range across a border: sorted offsets in each source file."""
        files = tuple(
            _with_shared(
                replace(file, contents=tuple(cut_pieces(c, borders) for c in file.contents))
            )
            for file in self.files
        )
        return replace(self, files=files)

    @property
    def shared(self) -> int:
        """Bytes of the blocks that it may share with the source."""
        return sum(file.shared for file in self.files)

    def source_paths(self) -> tuple[str, ...]:
        """The source files that its bytes come from."""
        return tuple(sorted({extent.path for extent in self.extents()}))


def plan_rank(
    family: Family,
    megatron: Megatron,
    pp_rank: int,
    others: Sequence[tuple[str, Extent]] = (),
    block: int = 1,
) -> RankPlan:
    """The plan of one target rank folder.

    Args:
        family: the inventory, with all source ranks that hold what this rank needs.
        megatron: the run that will load it.
        pp_rank: which rank.
        others: name and whole content of further files of the folder, which are copied.
        block: bytes of a block that the target may share with the source; 1 where it cannot.

    Raises:
        LayoutError: Megatron could not build the target's buffers.
        CheckpointError: the source has no param groups, or objects that cannot be written.
    """
    rank = target_rank(family, megatron, pp_rank)
    own = rank.own.files
    writer = StateDictWriter(rank)
    root = for_data_parallel(rank.own.root, megatron.arguments)
    root = replace_chunks(root, writer.chunks())
    root = replace_chunks(root, writer.averages(), naming.AVERAGE)
    both = family.megatron.arguments, megatron.arguments
    before = family.megatron.counterpart(megatron, pp_rank)
    root["args"] = patch_arguments(root["args"], *both, (before, pp_rank))
    optimizer = target_optimizer(rank)
    graphs = {MODEL_FILE: place_entry(root, optimizer.entry), **optimizer.files}
    with located(own.model.path, cure=ASK_FOR_SUPPORT):
        plans = [
            _file_plan(name, torch_file.encode(graph, _template(rank, name), block), block)
            for name, graph in graphs.items()
        ]
    for name, extent in others:
        plans.append(_with_shared(FilePlan(name, extent.length, ((extent,),), None, block)))
    id_ = own.id.at(pp_rank, megatron.layout.pp_size)
    return RankPlan(id_, tuple(plans), optimizer.elsewhere)


def _template(rank: TargetRank, name: str) -> TorchFile:
    """The file of that name in the same folder of the source, or in the first that has one; for a
    layer-wise file of a data-parallel rank that the source has not, another one."""
    files = (file for source in rank.sources for file in source.files.all)
    found = next((file for file in files if file.path.endswith(f"/{name}")), None)
    if found is None:
        found = rank.own.files.all[-1]
        is_named = found.path.endswith(f"/{found.stem}.pt")  # torch calls the archive as the file
        return replace(found, stem=name.removesuffix(".pt")) if is_named else found
    return found


def _file_plan(name: str, encoded: torch_file.EncodedFile, block: int) -> FilePlan:
    plan = FilePlan(name, encoded.archive.length, encoded.contents, encoded.archive, block)
    return _with_shared(plan)


def _with_shared(file: FilePlan) -> FilePlan:
    shared = 0
    for offset, pieces in file.places():
        position = offset
        for piece in pieces:
            if isinstance(piece, Extent):
                shared += piece.blocks(position, file.block).length
            position += piece.length
    return replace(file, shared=shared)
