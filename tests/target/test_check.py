"""Faults in plans of real families are found, whichever they are."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.checkpoint.family import Family
from pp_to_vpp.container.extents import Extent, Piece, Zeros
from pp_to_vpp.target import check
from pp_to_vpp.target.plan import RankPlan

from ..examples import examples
from ..pairs import BUCKETS, DENSE, MOE, PLAIN
from .test_plan import converted, extents, sizes_of


def changed_at(
    ranks: list[RankPlan], place: tuple[int, int, int, int], new: list[Piece]
) -> list[RankPlan]:
    """Plans in which other pieces stand in the place of one."""
    rank, file, record, piece = place
    files = list(ranks[rank].files)
    contents = list(files[file].contents)
    pieces = list(contents[record])
    pieces[piece : piece + 1] = new
    contents[record] = tuple(pieces)
    files[file] = replace(files[file], contents=tuple(contents))
    return [*ranks[:rank], replace(ranks[rank], files=tuple(files)), *ranks[rank + 1 :]]


def places_of_tensors(ranks: list[RankPlan], of: Family) -> list[tuple[int, int, int, int]]:
    """Where the weights and flat states stand in plans."""
    ranges = {item.tensor.extent for item in of.items() if item.tensor is not None}
    inside = {(e.path, e.offset + i) for e in ranges for i in (0, e.length - 1)}
    return [
        (r, f, c, p)
        for r, rank in enumerate(ranks)
        for f, file in enumerate(rank.files)
        for c, pieces in enumerate(file.contents)
        for p, piece in enumerate(pieces)
        if isinstance(piece, Extent)
        and (file.name == "distrib_optim.pt" or (piece.path, piece.offset) in inside)
    ]


def piece_at(ranks: list[RankPlan], place: tuple[int, int, int, int]) -> Extent:
    """The range that stands in a place."""
    rank, file, record, piece = place
    found = ranks[rank].files[file].contents[record][piece]
    assert isinstance(found, Extent)
    return found


FAULTS = ("shifted", "dropped", "zeroed", "doubled", "swapped", "beyond", "before", "split")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", [DENSE, MOE, BUCKETS])
@examples(5)
@given(data=st.data())
def test_faults_are_found(name: str, fault: str, data: st.DataObject) -> None:
    of, ranks = converted(name, data.draw(st.sampled_from(["source", "truth"])))
    sizes = sizes_of(of)
    places = places_of_tensors(ranks, of)
    place = data.draw(st.sampled_from(places))
    old = piece_at(ranks, place)
    step = data.draw(st.sampled_from([-64, -4, -1, 1, 2, 64]))
    like = [e for e in extents(ranks) if e.length == old.length and e != old]
    other = data.draw(st.sampled_from(like)) if like else replace(old, offset=old.offset + 1)
    new: dict[str, list[Piece]] = {
        "shifted": [replace(old, offset=old.offset + step)],
        "dropped": [],
        "zeroed": [Zeros(old.length)],
        "doubled": [old, old],
        "swapped": [other],
        "beyond": [replace(old, offset=sizes[old.path] - old.length + 1)],
        "before": [replace(old, offset=-1)],
        "split": [old.cut(0, old.length - 1), Zeros(1)],
    }
    assert check.check(changed_at(ranks, place, new[fault]), of, sizes, is_whole=True)


def test_overlapping_records_and_short_files_are_found() -> None:
    of, ranks = converted(DENSE, "source")
    file = ranks[0].files[0]
    assert file.archive is not None
    for length in (file.length // 2, file.archive.records[-1].offset):
        short = replace(ranks[0], files=(replace(file, length=length), *ranks[0].files[1:]))
        (error,) = check.check([short, *ranks[1:]], of, sizes_of(of), is_whole=True)
        assert "records end at" in error
    records = list(file.archive.records)
    index = next(i for i, record in enumerate(records) if i and record.length)
    records[index] = replace(records[index], offset=records[index - 1].offset)
    overlapping = replace(file, archive=replace(file.archive, records=tuple(records)))
    changed = replace(ranks[0], files=(overlapping, *ranks[0].files[1:]))
    errors = check.check([changed, *ranks[1:]], of, sizes_of(of), is_whole=True)
    assert any(f"record {index}" in error for error in errors)


def test_a_part_of_the_ranks_need_not_use_everything() -> None:
    """Nodes may share the work."""
    of, ranks = converted(DENSE, "source")
    assert check.check(ranks[:1], of, sizes_of(of), is_whole=False) == []
    assert check.check(ranks[:1], of, sizes_of(of), is_whole=True) != []


def test_a_range_that_is_used_twice_is_found_in_a_part_of_the_ranks() -> None:
    """Nothing else would tell: what is not used may belong to the other ranks."""
    of, ranks = converted(DENSE, "source")
    places = [place for place in places_of_tensors(ranks, of) if place[0] == 0]
    one, other = next(
        (a, b)
        for a in places
        for b in places
        if a != b and piece_at(ranks, a).length == piece_at(ranks, b).length
    )
    doubled = changed_at(ranks, one, [piece_at(ranks, other)])
    assert check.check(doubled[:1], of, sizes_of(of), is_whole=False) != []


def test_lost_states_of_a_plain_optimizer_are_found() -> None:
    """Moments are no weights: their records are those that no weight lies in."""
    of, ranks = converted(PLAIN, "source")
    weights = {item.tensor.extent for item in of.items() if item.tensor is not None}
    file = ranks[0].files[0]
    found = [
        (0, 0, c, 0)
        for c, pieces in enumerate(file.contents)
        if isinstance(pieces[0], Extent) and pieces[0] not in weights
    ]
    place = max(found, key=lambda place: piece_at(ranks, place).length)
    lost = changed_at(ranks, place, [Zeros(piece_at(ranks, place).length)])
    (error,) = check.check(lost, of, sizes_of(of), is_whole=True)
    assert re.search(r"\[\w+\] is not used$", error)
