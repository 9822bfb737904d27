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
from pp_to_vpp.container.extents import Extent
from pp_to_vpp.container.pickling import Instance
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.placement import Placement
from pp_to_vpp.megatron.ranks import MODEL_FILE, RankId
from pp_to_vpp.target import check
from pp_to_vpp.target.plan import FilePlan, RankPlan, plan_rank

from ..examples import examples
from ..families import OF_KINDS, SIDES, families, family, files_read, opposite, target_of
from ..pairs import DENSE, MOE
from ..strategies import targets

Cells = npt.NDArray[np.int64]


def plans_for(of: Family, placement: Placement) -> list[RankPlan]:
    """The plans of all ranks of a family."""
    target = of.megatron.relaunched(placement, overlaps=False)
    return [plan_rank(of, target, pp_rank) for pp_rank in of.ranks]


def converted(name: str, side: str) -> tuple[Family, list[RankPlan]]:
    """A real family, and the plans of converting it to the other side's layout."""
    of, target = family(name, side), target_of(name, opposite(side))
    return of, [plan_rank(of, target, pp_rank) for pp_rank in of.ranks]


def sizes_of(of: Family) -> dict[str, int]:
    """Bytes of each source file."""
    return {file.path: Path(file.path).stat().st_size for file in files_read(of)}


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
    assert file.archive is not None
    for offset, data in archive.frame(file.archive, [0] * len(file.contents)):
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


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
@examples(4)
@given(data=st.data())
def test_files_are_tiled_and_sources_used_up(name: str, side: str, data: st.DataObject) -> None:
    """Any layout: no byte of a target is missing or written twice, none of the source is lost."""
    wanted = data.draw(targets(family(name, side).megatron.arguments))
    used: dict[str, Cells] = {}
    for of in families(name, side):
        ranks = plans_for(of, wanted)
        for file in (file for rank in ranks for file in rank.files):
            assert (times_written(file) == 1).all()
        for path, cells in times_used(originals(ranks), of).items():
            used[path] = used.get(path, 0) + cells
        assert check.check(ranks, of, sizes_of(of), is_whole=True) == []
    repeated = [copy for of in families(name, side) for _, copy, _ in of.copies()]
    held = {tensor.extent.path for of in families(name, side) for tensor in of.manifest().values()}
    for path, cells in used.items():
        filled = with_data(path)
        for copy in repeated:
            if copy.path == path:
                filled[copy.offset : copy.offset + copy.length] = False
        assert filled.any() or path not in held
        assert (cells[filled] == 1).all(), path
        assert cells.max(initial=0) <= 1


def originals(ranks: list[RankPlan]) -> list[RankPlan]:
    """Plans without what ``model_optim_rng.pt`` repeats from layer-wise files."""

    def without_copies(file: FilePlan) -> FilePlan:
        records = (
            tuple(p for p in r if not (isinstance(p, Extent) and "layer_wise" in p.path))
            for r in file.contents
        )
        return replace(file, contents=tuple(records)) if file.name == MODEL_FILE else file

    return [replace(rank, files=tuple(map(without_copies, rank.files))) for rank in ranks]


def test_a_plan_is_a_function_of_its_inputs() -> None:
    assert converted(MOE, "source") == converted(MOE, "source")


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_planned_folders_have_the_files_of_the_truth(name: str, side: str) -> None:
    of, ranks = converted(name, side)
    for rank in ranks:
        truth = family(name, opposite(side)).ranks[rank.id.pp_rank or 0].files
        assert [file.name for file in rank.files] == [Path(file.path).name for file in truth.all]
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


def test_the_rank_is_that_of_the_source_folder() -> None:
    _, ranks = converted(MOE, "source")
    assert [rank.id for rank in ranks] == [RankId(0, 0, 0), RankId(0, 1, 0)]
