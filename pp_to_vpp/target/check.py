"""A plan held to what every plan must be: tiled, in bounds, nothing twice, nothing left behind."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..checkpoint.family import Family
from ..container.extents import Extent
from ..megatron.ranks import MODEL_FILE
from .plan import FilePlan, RankPlan


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
        f"{plan.id.folder}/{file.name}: {text}"
        for plan in ranks
        for file in plan.files
        for text in _holes(file)
    ]
    used = _used(file for plan in ranks for file in plan.files)
    for path, ranges in used.items():
        if not all(0 <= offset <= offset + length <= sizes[path] for offset, length in ranges):
            errors.append(f"{path}: bytes past its end are wanted")
    errors += [f"{path}: bytes at {offset} are used twice" for path, offset in used_twice(ranks)]
    taken = {path: sorted(set(ranges)) for path, ranges in used.items()}
    elsewhere = {name for plan in ranks for name in plan.elsewhere}
    for name, tensor in family.manifest().items() if is_whole else ():
        if name.kind and name.parameter in elsewhere:
            continue
        if not _covers(taken.get(tensor.extent.path, []), tensor.extent):
            errors.append(f"{tensor.extent.path}: {name} is not used")
    return errors[:20]


def _used(files: Iterable[FilePlan]) -> dict[str, list[tuple[int, int]]]:
    """The ranges of each source file that are to be copied."""
    used: dict[str, list[tuple[int, int]]] = {}
    for extent in (extent for file in files for extent in file.extents()):
        used.setdefault(extent.path, []).append((extent.offset, extent.length))
    return used


def used_twice(ranks: Sequence[RankPlan]) -> Iterator[tuple[str, int]]:
    """File and offset of bytes that two objects share: written apart, each would have a copy.

    The model's files are apart from the others, one of which they may repeat.
    """
    for of_model in (True, False):
        files = (file for plan in ranks for file in plan.files)
        kind = (file for file in files if (file.name == MODEL_FILE) == of_model)
        for path, ranges in _used(kind).items():
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
        planned = file.archive.records[index].length if file.archive else file.length
        if length != planned or offset < end:
            yield f"record {index} of {planned} bytes gets {length} at {offset}"
        end = offset + length
    if end > file.length:
        yield f"records end at {end} of {file.length}"


def _covers(taken: list[tuple[int, int]], extent: Extent) -> bool:
    """Whether sorted, disjoint ranges cover an extent; neighbours count together."""
    offset, length = extent.offset, extent.length
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
