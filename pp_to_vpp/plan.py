"""From a family's inventory and a target layout to the bytes of every target file.

A plan holds tuples only, is a function of its inputs, knows its size and can be checked: every
file is tiled, every source byte exists, no source byte is used twice and no tensor is left behind.
"""

from __future__ import annotations

import bisect
import itertools
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import states, torch_file
from .archive import ArchiveLayout
from .arguments import patch_arguments
from .errors import ASK_FOR_SUPPORT, CheckpointError
from .inventory import Family
from .model_state import StateDictWriter, replace_chunks, target_chunk
from .optimizer_state import TargetOptimizer
from .plain_states import PlainState
from .request import TargetSpec
from .states import OptimizerKind, RankBuffers
from .torch_file import FileFormatError
from .types import MODEL_FILE, OPTIMIZER_FILE, Extent, Piece, RankId


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
        buffers = states.rank_buffers(
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


def check(
    ranks: Sequence[RankPlan], family: Family, sizes: Mapping[str, int], *, is_whole: bool
) -> list[str]:
    """What is wrong with a plan; nothing, unless this program has an error.

    Args:
        ranks: plans of ranks of one family.
        family: its inventory.
        sizes: bytes of each source file.
        is_whole: all ranks of the family are planned, so everything in the source must be used.
    """
    errors = [
        f"{plan.rank.folder}/{file.name}: {text}"
        for plan in ranks
        for file in plan.files
        for text in _holes(file)
    ]
    used = _used(ranks)
    for path, ranges in used.items():
        if not all(0 <= offset <= offset + length <= sizes[path] for offset, length in ranges):
            errors.append(f"{path}: bytes past its end are wanted")
    errors += [f"{path}: bytes at {offset} are used twice" for path, offset in used_twice(ranks)]
    wanted = _tensor_bytes(family) if is_whole else {}
    for path, ranges in wanted.items():
        taken = sorted(used.get(path, ()))
        errors += [
            f"{path}: {length} bytes at {offset} are not used"
            for offset, length in ranges
            if not _covers(taken, offset, length)
        ]
    return errors[:20]


def _used(ranks: Iterable[RankPlan]) -> dict[str, list[tuple[int, int]]]:
    """The ranges of each source file that are to be copied."""
    used: dict[str, list[tuple[int, int]]] = {}
    for piece in (p for plan in ranks for file in plan.files for c in file.contents for p in c):
        if isinstance(piece, Extent):
            used.setdefault(piece.path, []).append((piece.offset, piece.length))
    return used


def used_twice(ranks: Iterable[RankPlan]) -> Iterator[tuple[str, int]]:
    """File and offset of bytes that two objects share: written apart, each would have a copy."""
    for path, ranges in _used(ranks).items():
        end = 0
        for offset, length in sorted(ranges):
            if offset < end:
                yield path, offset
            end = max(end, offset + length)


def _holes(file: FilePlan) -> Iterator[str]:
    """Records whose pieces do not fill them, or that overlap."""
    end = 0
    for index, (offset, pieces) in enumerate(file.places()):
        length = sum(piece.length for piece in pieces)
        planned = file.layout.records[index].length if file.layout else file.length
        if length != planned or offset < end:
            yield f"record {index} of {planned} bytes gets {length} at {offset}"
        end = offset + length
    if end > file.length:
        yield f"records end at {end} of {file.length}"


def _tensor_bytes(family: Family) -> dict[str, list[tuple[int, int]]]:
    """Where the bytes of every weight and state lie."""
    found: dict[str, list[tuple[int, int]]] = {}
    contents: list[tuple[Piece, ...]] = []
    for item in family.items():
        if item.tensor is not None:
            contents.append(item.tensor.content())
        state = family.states.get(item.name)
        if isinstance(state, states.FlatState):
            contents += state.parts.values()
        elif isinstance(state, PlainState):
            contents += (tensor.content() for tensor in state.tensors().values())
    for piece in (p for pieces in contents for p in pieces):
        if isinstance(piece, Extent):
            found.setdefault(piece.path, []).append((piece.offset, piece.length))
    return found


def _covers(taken: list[tuple[int, int]], offset: int, length: int) -> bool:
    """Whether sorted, disjoint ranges cover one range; neighbours count together."""
    index = bisect.bisect_right(taken, (offset, 1 << 63)) - 1
    while length > 0:
        if index < 0 or index >= len(taken):
            return False
        start, size = taken[index]
        if not start <= offset < start + size:
            return False
        length -= start + size - offset
        offset = start + size
        index += 1
    return True
