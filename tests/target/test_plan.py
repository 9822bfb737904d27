"""Plans of real families for random layouts, held to stupid arrays with a cell for each byte."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.checkpoint.family import Family
from pp_to_vpp.container import archive
from pp_to_vpp.container.extents import Extent, Piece, Zeros
from pp_to_vpp.container.pickling import Instance
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.pipeline import Placement
from pp_to_vpp.megatron.ranks import RankId
from pp_to_vpp.target import check
from pp_to_vpp.target.plan import FilePlan, RankPlan, plan_rank
from pp_to_vpp.target.request import TargetSpec

from ..examples import examples
from ..families import SIDES, families, family, opposite, placed, target_of
from ..strategies import targets

DENSE, MOE, PLAIN = "dense-pp2-v016", "moe-pp2ep2-v016", "dense-pp2-nodistopt-v016"

Cells = npt.NDArray[np.int64]


def plans_for(of: Family, placement: Placement) -> list[RankPlan]:
    """The plans of all ranks of a family."""
    target = TargetSpec(placement, placed(of, placement), overlaps_param_gather_with_step=False)
    return [plan_rank(of, target, pp_rank) for pp_rank in of.ranks]


def converted(name: str, side: str) -> tuple[Family, list[RankPlan]]:
    """A real family, and the plans of converting it to the other side's layout."""
    of, target = family(name, side), target_of(name, opposite(side))
    return of, [plan_rank(of, target, pp_rank) for pp_rank in of.ranks]


def sizes_of(of: Family) -> dict[str, int]:
    """Bytes of each source file."""
    files = [f for r in of.ranks.values() for f in (r.files.model, r.files.optimizer) if f]
    return {file.path: Path(file.path).stat().st_size for file in files}


def extents(ranks: list[RankPlan]) -> Iterator[Extent]:
    """All ranges that plans take from the source."""
    for rank in ranks:
        for file in rank.files:
            yield from (p for pieces in file.contents for p in pieces if isinstance(p, Extent))


def times_written(file: FilePlan) -> Cells:
    """How often a plan writes each byte of a file, archive structure included."""
    cells = np.zeros(file.length, np.int64)
    for start, pieces in file.places():
        position = start
        for piece in pieces:
            cells[position : position + piece.length] += 1
            position += piece.length
    assert file.layout is not None
    for offset, data in archive.frame(file.layout, [0] * len(file.contents)):
        cells[offset : offset + len(data)] += 1
    return cells


def times_used(ranks: list[RankPlan], of: Family) -> dict[str, Cells]:
    """How often plans use each byte of the source."""
    cells = {path: np.zeros(size, np.int64) for path, size in sizes_of(of).items()}
    for extent in extents(ranks):
        assert 0 <= extent.offset <= extent.offset + extent.length <= len(cells[extent.path])
        cells[extent.path][extent.offset : extent.offset + extent.length] += 1
    return cells


def with_data(path: str) -> npt.NDArray[np.bool_]:
    """Which bytes of a file are tensor data other than zeros, by the standard library's reader.

    What Megatron leaves in holes and padding is zero, so all others are somebody's.
    """
    everything = np.frombuffer(Path(path).read_bytes(), np.uint8)
    found = np.zeros(len(everything), np.bool_)
    with zipfile.ZipFile(path) as file:
        for info in file.infolist():
            if "/data/" in info.filename:
                header = everything[info.header_offset : info.header_offset + 30].tobytes()
                names = int.from_bytes(header[26:28], "little")
                start = info.header_offset + 30 + names + int.from_bytes(header[28:30], "little")
                found[start : start + info.file_size] = True
    found &= everything != 0
    return found


@pytest.mark.parametrize(("name", "side"), SIDES)
@examples(4)
@given(data=st.data())
def test_files_are_tiled_and_sources_used_up(name: str, side: str, data: st.DataObject) -> None:
    """Any layout: no byte of a target is missing or written twice, none of the source is lost."""
    for of in families(name, side):
        ranks = plans_for(of, data.draw(targets(of.arguments)))
        for file in (file for rank in ranks for file in rank.files):
            assert (times_written(file) == 1).all()
        holders = [rank for rank in of.ranks.values() if any(rank.parameters)]
        held = {file.path for rank in holders for file in rank.files.files}
        for path, cells in times_used(ranks, of).items():
            filled = with_data(path)
            assert filled.any() or path not in held
            assert (cells[filled] == 1).all(), path
            assert cells.max(initial=0) <= 1
        assert check.check(ranks, of, sizes_of(of), is_whole=True) == []


def test_a_plan_is_a_function_of_its_inputs() -> None:
    assert converted(MOE, "source") == converted(MOE, "source")


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_planned_folders_have_the_files_of_the_truth(name: str, side: str) -> None:
    of, ranks = converted(name, side)
    for rank in ranks:
        truth = family(name, opposite(side)).ranks[rank.rank.pp_rank].files
        paths = [file.path for file in (truth.model, truth.optimizer) if file is not None]
        assert [file.name for file in rank.files] == [Path(path).name for path in paths]
        assert rank.length == sum(file.length for file in rank.files)
        assert rank.source_paths() == tuple(sorted({e.path for e in extents([rank])}))
        assert set(rank.source_paths()) <= set(sizes_of(of))


def test_other_files_are_copied_whole() -> None:
    """Such as the state of a data loader."""
    of, target = family(DENSE, "source"), target_of(DENSE, "truth")
    whole = Extent("/somewhere/loader.pt", 0, 777)
    file = plan_rank(of, target, 1, [("loader.pt", whole)]).files[-1]
    assert file == FilePlan("loader.pt", 777, ((whole,),), None)
    assert list(file.places()) == [(0, (whole,))]


def test_objects_that_cannot_be_written_back_are_refused() -> None:
    of = family(DENSE, "source")
    odd = Instance(object(), ())  # type: ignore[arg-type]  # no name to write
    own = replace(of.ranks[0], root={**of.ranks[0].root, "rng_state": odd})
    changed = replace(of, ranks={**of.ranks, 0: own})
    with pytest.raises(CheckpointError, match="cannot be written back"):
        plan_rank(changed, target_of(DENSE, "truth"), 0)


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
    parameters = [item.tensor for item in of.items() if item.tensor is not None]
    ranges = {p for tensor in parameters for p in tensor.content() if isinstance(p, Extent)}
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
@pytest.mark.parametrize("name", [DENSE, MOE, "dense-pp2-buckets-odd-dp2-v016"])
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
    assert file.layout is not None
    for length in (file.length // 2, file.layout.records[-1].offset):
        short = replace(ranks[0], files=(replace(file, length=length), *ranks[0].files[1:]))
        (error,) = check.check([short, *ranks[1:]], of, sizes_of(of), is_whole=True)
        assert "records end at" in error
    records = list(file.layout.records)
    index = next(i for i, record in enumerate(records) if i and record.length)
    records[index] = replace(records[index], offset=records[index - 1].offset)
    overlapping = replace(file, layout=replace(file.layout, records=tuple(records)))
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
    weights = {e for i in of.items() if i.tensor for e in i.tensor.content()}
    file = ranks[0].files[0]
    found = [
        (0, 0, c, 0)
        for c, pieces in enumerate(file.contents)
        if isinstance(pieces[0], Extent) and pieces[0] not in weights
    ]
    place = max(found, key=lambda place: piece_at(ranks, place).length)
    lost = changed_at(ranks, place, [Zeros(piece_at(ranks, place).length)])
    assert check.check(lost, of, sizes_of(of), is_whole=True) != []


def test_the_rank_is_that_of_the_source_folder() -> None:
    _, ranks = converted(MOE, "source")
    assert [rank.rank for rank in ranks] == [RankId(0, 0, 0), RankId(0, 1, 0)]
