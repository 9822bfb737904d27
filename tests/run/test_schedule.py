"""Copying in tiny tasks, against the stupid concatenation of the pieces."""

from __future__ import annotations

import itertools
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.container import crc32
from pp_to_vpp.container.extents import Extent, Literal, Piece, Zeros
from pp_to_vpp.errors import CopyError
from pp_to_vpp.megatron.ranks import RankId
from pp_to_vpp.run import copying, schedule
from pp_to_vpp.run.folders import TemporaryFolder
from pp_to_vpp.run.schedule import Copier, FamilyCopy
from pp_to_vpp.run.workers import Workers
from pp_to_vpp.target.plan import FilePlan, RankPlan

from ..examples import examples
from ..inline import Inline
from .test_copying import Crcs, Known, concatenated, file_plan, whole_file, write_sources


@contextmanager
def tiny(task: int, moves: int, buffer: int) -> Iterator[None]:
    """Tasks, and parts of files, of so few bytes that everything is cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "_TASK_BYTES", task)
        patch.setattr(schedule, "_TASK_MOVES", moves)
        patch.setattr(copying, "_BUFFER_BYTES", buffer)
        patch.setattr(copying, "_KERNEL_COPY_BYTES", buffer + 1)
        patch.setattr(crc32, "_WORTH_DERIVING", 1)
        patch.setattr(crc32, "_WORTH_READING", 0)
        yield


@dataclass
class Made:
    """Source files, and what is to be made of them."""

    sources: dict[str, bytes]
    """By name."""
    ranks: list[list[list[list[Piece]]]]
    """Pieces of each record of each file of each rank; sources by name only."""


@st.composite
def made(draw: st.DrawFn) -> Made:
    """Random files, cut in random ways; most ranges are used once, as derived checksums need."""
    sources = {
        name: draw(st.binary(min_size=1, max_size=40)) * draw(st.integers(1, 30))
        for name in ("a", "b")
    }
    extents: list[Piece] = []
    for name, data in sources.items():
        cuts = draw(st.sets(st.integers(0, len(data)), max_size=8))
        ends = sorted({0, len(data), *cuts})
        extents += [Extent(name, a, b - a) for a, b in itertools.pairwise(ends)]
    others = st.builds(Zeros, st.integers(1, 90)) | st.builds(Literal, st.binary(max_size=70))
    twice = st.sampled_from(extents) if draw(st.booleans()) else others
    pieces = draw(st.permutations(extents + draw(st.lists(others | twice, max_size=6))))
    pieces = pieces[: draw(st.integers(1, len(pieces)))]
    ranks: list[list[list[list[Piece]]]] = [[[[]]]]
    for piece in pieces:
        turn = draw(st.integers(0, 6))
        if turn == 0:
            ranks.append([[[]]])
        elif turn == 1:
            ranks[-1].append([[]])
        elif turn == 2:
            ranks[-1][-1].append([])
        ranks[-1][-1][-1].append(piece)
    return Made(sources, ranks)


@dataclass
class Finished:
    """Stands for finishing: takes down what the copier hands over, completes and publishes."""

    crc32s: dict[RankId, Crcs] = field(default_factory=dict)
    files: dict[str, int | None] = field(default_factory=dict)
    order: list[RankId] = field(default_factory=list)

    known: dict[RankId, Known] = field(default_factory=dict)

    def __call__(
        self, _: Any, plan: RankPlan, folder: TemporaryFolder, crc32s: Crcs, known: Known
    ) -> RankId:
        self.crc32s[plan.id] = crc32s
        self.known[plan.id] = known
        for file, records in zip(plan.files, crc32s, strict=True):
            path = folder.file(file.name)
            self.files[f"{plan.id.folder}/{file.name}"] = copying.complete_file(path, file, records)
        folder.path.rename(folder.target)
        self.order.append(plan.id)
        return plan.id


def plans_of(case: Made, folder: Path) -> tuple[RankPlan, ...]:
    return tuple(
        RankPlan(
            RankId(0, rank, None),
            tuple(file_plan(f"file{i}", records, folder) for i, records in enumerate(files)),
        )
        for rank, files in enumerate(case.ranks)
    )


@examples(150)
@given(made(), st.integers(1, 60), st.integers(1, 4), st.integers(1, 50), st.integers(1, 3))
def test_copies_are_the_concatenated_pieces(
    case: Made, task: int, moves: int, buffer: int, workers: int
) -> None:
    """Bytes and checksums, read or derived, whatever is cut where."""
    with tempfile.TemporaryDirectory() as name, tiny(task, moves, buffer):
        folder, target = Path(name), Path(name) / "target"
        write_sources(case.sources, folder)
        plans = plans_of(case, folder)
        wanted = [
            p for r in plans for f in r.files for c in f.contents for p in c if type(p) is Extent
        ]
        records = {
            str(folder / source): [(Extent(str(folder / source), 0, len(data)), zlib.crc32(data))]
            for source, data in case.sources.items()
        }
        family = FamilyCopy(plans, crc32.derivable(wanted, records), None)
        finished, advanced = Finished(), list[int]()
        run = Copier(Inline(workers), target, finished, advanced.append).run([family])
        assert list(run) == [plan.id for plan in plans]
        for plan, files in zip(plans, case.ranks, strict=True):
            expected = [concatenated(contents, case.sources) for contents in files]
            crc32s = tuple(tuple(map(zlib.crc32, contents)) for contents in expected)
            assert finished.crc32s[plan.id] == crc32s
            for file, contents in zip(plan.files, expected, strict=True):
                data = (target / plan.id.folder / file.name).read_bytes()
                assert data == whole_file(file, contents)
                assert finished.files[f"{plan.id.folder}/{file.name}"] == zlib.crc32(data)
        written = [p for r in plans for f in r.files for c in f.contents for p in c]
        assert sum(advanced) == sum(p.length for p in written if not isinstance(p, Zeros))
        assert sorted(path.name for path in target.iterdir()) == [p.id.folder for p in plans]


def test_derived_checksums_keep_the_damage_of_the_source(tmp_path: Path) -> None:
    """A derived checksum is not computed from the bytes: wrong ones in the source stay wrong."""
    data = bytes(range(256)) * 1024
    write_sources({"a": data}, tmp_path)
    whole = Extent(str(tmp_path / "a"), 0, len(data))
    plan = RankPlan(RankId(0, 0, None), (FilePlan("f", len(data), ((whole,),), None),))
    wrong = zlib.crc32(data) ^ 1
    derivations = crc32.derivable([whole], {whole.path: [(whole, wrong)]})
    finished = Finished()
    family = FamilyCopy((plan,), derivations, None)
    list(Copier(Inline(), tmp_path / "out", finished, lambda _: None).run([family]))
    assert finished.crc32s[plan.id] == ((wrong,),)
    assert (tmp_path / "out" / plan.id.folder / "f").read_bytes() == data


def one_rank(tmp_path: Path, path: str = "a", rank: int = 0) -> RankPlan:
    """A folder of one file that is a copy of a source."""
    extent = Extent(str(tmp_path / path), 0, 3)
    return RankPlan(RankId(0, rank, None), (FilePlan("f", 3, ((extent,),), None),))


def test_an_error_leaves_no_temporary_folder_and_no_worker(tmp_path: Path) -> None:
    write_sources({"a": b"abc"}, tmp_path)
    plans = (one_rank(tmp_path), one_rank(tmp_path, "missing", 1))
    workers, finished = Inline(), Finished()
    run = Copier(workers, tmp_path / "out", finished, lambda _: None)
    with pytest.raises(CopyError, match="missing: cannot be opened"):
        list(run.run([FamilyCopy(plans, {}, None)]))
    assert workers.killed
    assert [path.name for path in (tmp_path / "out").iterdir()] in ([], ["mp_rank_00_000"])


def test_leaving_in_the_middle_cleans_up(tmp_path: Path) -> None:
    """As an interruption between two results does."""
    write_sources({"a": b"abc"}, tmp_path)
    plans = tuple(one_rank(tmp_path, "a", rank) for rank in range(9))
    workers = Inline(1)
    run = Copier(workers, tmp_path / "out", Finished(), lambda _: None).run(
        [FamilyCopy(plans, {}, None)]
    )
    done = {next(run).folder}
    run.close()  # type: ignore[attr-defined]  # an iterator that is a generator
    assert workers.killed
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert done <= left <= {plan.id.folder for plan in plans}


def finish_by_renaming(
    context: str, plan: RankPlan, folder: TemporaryFolder, crcs: Crcs, _: Known
) -> str:
    """Runs in a worker process."""
    folder.path.rename(folder.target)
    return f"{context} {plan.id.folder} {crcs}"


def test_worker_processes_copy_the_same(tmp_path: Path) -> None:
    write_sources({"a": b"abc", "b": b"xyz"}, tmp_path)
    families = [
        FamilyCopy((one_rank(tmp_path, "a", 0), one_rank(tmp_path, "b", 1)), {}, "one"),
        FamilyCopy((one_rank(tmp_path, "b", 2),), {}, "two"),
    ]
    with Workers(2) as workers:
        run = Copier(workers, tmp_path / "out", finish_by_renaming, lambda _: None)
        found = sorted(run.run(families))
    a, b = zlib.crc32(b"abc"), zlib.crc32(b"xyz")
    assert found == sorted(
        f"{word} mp_rank_00_00{rank} (({crc32},),)"
        for word, rank, crc32 in (("one", 0, a), ("one", 1, b), ("two", 2, b))
    )
    assert (tmp_path / "out" / "mp_rank_00_002" / "f").read_bytes() == b"xyz"


def test_a_family_is_checked_when_all_is_copied_and_before_anything_is_finished(
    tmp_path: Path,
) -> None:
    write_sources({"a": b"abc", "b": b"xyz"}, tmp_path)
    plans = (one_rank(tmp_path, "a", 0), one_rank(tmp_path, "b", 1))
    families = [FamilyCopy(plans, {}, "one", True), FamilyCopy((), {}, "none left", True)]
    finished, checked = Finished(), dict[str, Known]()

    def check(context: str, found: Known) -> None:
        assert not finished.order
        checked[context] = found

    copier = Copier(Inline(), tmp_path / "out", finished, lambda _: None, check)
    assert list(copier.run(families)) == [plan.id for plan in plans]
    whole = {Extent(str(tmp_path / "a"), 0, 3): zlib.crc32(b"abc")}
    other = {Extent(str(tmp_path / "b"), 0, 3): zlib.crc32(b"xyz")}
    assert checked == {"one": whole | other, "none left": {}}
    assert finished.known == {plans[0].id: whole, plans[1].id: other}


def test_what_a_check_refuses_is_not_finished(tmp_path: Path) -> None:
    write_sources({"a": b"abc"}, tmp_path)
    finished = Finished()

    def refuse(_context: Any, _found: Known) -> None:
        raise CopyError("a: damaged")

    copier = Copier(Inline(), tmp_path / "out", finished, lambda _: None, refuse)
    with pytest.raises(CopyError, match="a: damaged"):
        list(copier.run([FamilyCopy((one_rank(tmp_path),), {}, None, True)]))
    assert not finished.order
    assert list((tmp_path / "out").iterdir()) == []
