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
    used = _by_path(extent for plan in ranks for extent in plan.extents())
    for path, ranges in used.items():
        if not all(0 <= offset <= offset + length <= sizes[path] for offset, length in ranges):
            errors.append(f"{path}: bytes past its end are wanted")
    twice = used_twice(ranks, family)
    errors += [f"{path}: bytes at {offset} are used twice" for path, offset in twice]
    taken = {path: sorted(set(ranges)) for path, ranges in used.items()}
    elsewhere = {name for plan in ranks for name in plan.elsewhere}
    for name, tensor in family.manifest().items() if is_whole else ():
        if name.kind and name.parameter in elsewhere:
            continue
        if not _covers(taken.get(tensor.extent.path, []), tensor.extent):
            errors.append(f"{tensor.extent.path}: {name} is not used")
    return errors[:20]


def _by_path(extents: Iterable[Extent]) -> dict[str, list[tuple[int, int]]]:
    """Offset and length of each, by file."""
    found: dict[str, list[tuple[int, int]]] = {}
    for extent in extents:
        found.setdefault(extent.path, []).append((extent.offset, extent.length))
    return found


def used_twice(ranks: Sequence[RankPlan], family: Family) -> Iterator[tuple[str, int]]:
    """File and offset of bytes that two objects share: written apart, each would have a copy, as
    only those of the word embedding may.

    The model's files are apart from the others, one of which they may repeat. Several ranks may
    begin with the same of what is no tensor of the model, such as random states.
    """
    made = [item for item in family.items() if item.name in family.made]
    copied = _by_path(tensor.extent for tensor in family.manifest(made).values())
    for of_model in (True, False):
        used: dict[str, list[tuple[int, int, int]]] = {}
        for index, plan in enumerate(ranks):
            files = (file for file in plan.files if (file.name == MODEL_FILE) == of_model)
            for extent in (extent for file in files for extent in file.extents()):
                used.setdefault(extent.path, []).append((extent.offset, extent.length, index))
        for path, found in used.items():
            end, holder = 0, -1
            for offset, length, index in sorted(found):
                again = Extent(path, offset, min(end - offset, length))
                if again.length <= 0 or _covers(sorted({*copied.get(path, [])}), again):
                    pass
                elif index == holder or _is_of_a_tensor(again, family):
                    yield path, offset
                if offset + length > end:
                    end, holder = offset + length, index


def _is_of_a_tensor(extent: Extent, family: Family) -> bool:
    """Whether bytes are those of a parameter or a state of one, if only in part."""
    end = extent.offset + extent.length
    held = (tensor.extent for tensor in family.manifest().values())
    own = (other for other in held if other.path == extent.path)
    return any(o.offset < end and extent.offset < o.offset + o.length for o in own)


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
