"""The target's iteration folder: its place, what is there, room, and the tracker."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pp_to_vpp.errors import CopyError, UsageError, VerificationError
from pp_to_vpp.megatron.ranks import TRACKER, RankId
from pp_to_vpp.run.folders import is_filled
from pp_to_vpp.run.listener import Listener
from pp_to_vpp.run.target_folder import (
    check_others,
    check_place,
    check_space,
    existing,
    write_tracker,
)
from pp_to_vpp.target.plan import FilePlan, RankPlan

from ..edit import copy_of
from ..families import family
from ..inline import Inline
from ..pairs import DENSE, MOE, pair
from ..runs import Program

RANKS = [RankId(0, 0, None), RankId(0, 1, None)]
PLANS = [RankPlan(rank, ()) for rank in RANKS]


@pytest.mark.parametrize(
    ("target", "is_inside"),
    [
        ("source", True),
        ("source/deep/down", True),
        ("link", True),
        ("other/../source/x", True),
        ("source-2", False),
        ("other", False),
        (".", False),
    ],
)
def test_the_source_is_never_the_target(target: str, is_inside: bool, tmp_path: Path) -> None:
    """By whatever name it is called."""
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(source)
    if is_inside:
        with pytest.raises(UsageError, match="--save-iteration-dir: it lies in the source"):
            check_place(source, tmp_path / target)
    else:
        check_place(source, tmp_path / target)


def test_a_target_inside_the_source_is_refused(program: Program, tmp_path: Path) -> None:
    case = pair(DENSE)
    source = copy_of(case.source, tmp_path)
    for target in (source, source / "vpp"):
        program.refuses(2, program.convert(source, target, case.options), "it lies in the source")


def test_an_existing_target_is_refused(program: Program, tmp_path: Path) -> None:
    case = pair(DENSE)
    target = tmp_path / "iter_0000001"
    assert program.convert(case.source, target, case.options).status == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run = program.convert(case.source, target, case.options)
    program.refuses(2, run, "the target exists already (2 of 2 rank folders)", "--resume")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_empty_folders_are_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "filled" / "x").mkdir(parents=True)
    (tmp_path / "file").touch()
    found = [is_filled(tmp_path / name) for name in ("missing", "empty", "filled", "file")]
    assert found == [False, False, True, True]


def test_what_is_there_is_kept_if_it_is_asked_for(tmp_path: Path) -> None:
    """What an interrupted run left of the others is cleared away, and nothing before that."""
    assert existing(tmp_path / "missing", PLANS, Listener(), resume=False) == set()
    (tmp_path / RANKS[0].folder / "x").mkdir(parents=True)
    leftover = tmp_path / f".writing-{RANKS[1].folder}.dead"
    leftover.mkdir()
    with pytest.raises(UsageError, match=r"mp_rank_00_000: the target exists already \(1 of 2"):
        existing(tmp_path, PLANS, Listener(), resume=False)
    assert leftover.exists()
    assert existing(tmp_path, PLANS[1:], Listener(), resume=False) == set()
    assert not leftover.exists()
    assert existing(tmp_path, PLANS, Listener(), resume=True) == {RANKS[0]}


def test_folders_of_other_runs_are_held_to_the_layout(tmp_path: Path) -> None:
    """Those that this run writes itself are not looked at, and no empty ones."""
    of, truth = family(DENSE, "source").megatron, family(DENSE, "truth").megatron
    target = copy_of(pair(DENSE).truth, tmp_path)

    def check(own: list[RankPlan], other: bool = False) -> None:
        check_others(Inline(), target, RANKS, own, of if other else truth)

    check(PLANS[:1])
    check(PLANS, other=True)
    reason = r"mp_rank_00_001: another conversion wrote this folder.*expected .* size 1.*found .* 2"
    with pytest.raises(UsageError, match=reason):
        check(PLANS[:1], other=True)
    path = target / RANKS[1].folder / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(VerificationError, match=r"mp_rank_00_001/model_optim_rng\.pt"):
        check(PLANS[:1])
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    check(PLANS[:1])
    for name in ("mp_rank_00", "mp_rank_00_002", "mp_rank_00_000_000"):
        (target / name).mkdir()
        check(PLANS)
        (target / name / "model_optim_rng.pt").touch()
        with pytest.raises(UsageError, match=f"{name}: the target will have no such rank folder"):
            check(PLANS)
        shutil.rmtree(target / name)


@pytest.mark.parametrize("free", [99, 100])
def test_room_is_needed_for_all_of_it(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the file system that the target will be on: its folder need not be there."""
    asked: list[Path] = []
    rank = RankId(0, 0, None)
    files = FilePlan("a", 70, (), None), FilePlan("b", 60, (), None, block=10, shared=30)
    plans = [RankPlan(rank, files)]

    def usage(path: Path) -> object:
        asked.append(path)
        return SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=1000)

    monkeypatch.setattr(os, "statvfs", usage)
    if free < 100:
        with pytest.raises(CopyError, match=r"space, expected 100 bytes, found 99 bytes free"):
            check_space(tmp_path / "deep" / "down", plans)
    else:
        check_space(tmp_path / "deep" / "down", plans)
    assert asked == [tmp_path]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EACCES, 0])
def test_room_that_nobody_tells_is_noted_and_no_refusal(
    number: int, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems in user space refuse the question, others tell 0 bytes of 0."""

    def usage(_: Path) -> object:
        if number:
            raise OSError(number, os.strerror(number))
        return SimpleNamespace(f_bavail=0, f_frsize=4096, f_blocks=0, f_bsize=4096)

    monkeypatch.setattr(os, "statvfs", usage)
    run = program.convert(pair(DENSE).source, tmp_path / "x", pair(DENSE).options, "--dry-run")
    assert run.status == 0, run
    assert "note: the target's file system does not tell how much room it has" in run.output


def test_a_file_system_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, *_: object, **__: object) -> object:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(os, "statvfs", fail)
    with pytest.raises(CopyError, match=r"its free space cannot be read \(Input/output error\)"):
        check_space(tmp_path, [])
    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(CopyError, match=r"x: cannot be looked at \(Input/output error\)"):
        is_filled(tmp_path / "x")


def test_runs_of_two_layouts_make_no_checkpoint(program: Program, tmp_path: Path) -> None:
    """Two nodes with different options: layers would be in no folder, others in two."""
    source = pair(MOE).source
    target = tmp_path / source.name
    size = "--target-virtual-pipeline-model-parallel-size"
    first = program.convert(source, target, [size, "2"], "--pipeline-ranks-to-process", "0")
    assert first.status == 0
    other = ([size, "4"], "--pipeline-ranks-to-process", "1")
    second = program.convert(source, target, *other)
    program.refuses(2, second, "pp_to_vpp.json: another conversion writes, or wrote, this target")
    (target / "pp_to_vpp.json").unlink()
    second = program.convert(source, target, *other)
    program.refuses(2, second, "another conversion wrote this folder", "found virtual pipeline si")
    assert not (tmp_path / TRACKER).exists()


def test_the_tracker_of_another_iteration_is_left_alone(program: Program, tmp_path: Path) -> None:
    case = pair(DENSE)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("77")
    run = program.convert(case.source, tmp_path / "iter_0000001", case.options)
    assert run.status == 0
    assert tracker.read_text() == "77"
    assert "names 77" in run.output


def test_folders_without_an_iteration_get_no_tracker(program: Program, tmp_path: Path) -> None:
    case = pair(DENSE)
    run = program.convert(case.source, tmp_path / "converted", case.options)
    assert run.status == 0
    assert "no iter_NNNNNNN folder" in run.output
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("iter_0000042", "42"), ("release", "release"), ("iter_12345678", "12345678")],
)
def test_the_tracker_names_the_iteration(name: str, text: str, tmp_path: Path) -> None:
    """Once all rank folders are there; also where it names it already."""
    for index, rank in enumerate(RANKS):
        missing = f"{2 - index} rank folders are still to come ({rank.folder})"
        assert write_tracker(tmp_path / name, RANKS) == f"not written: {missing}"
        assert not (tmp_path / TRACKER).exists()
        (tmp_path / name / rank.folder).mkdir(parents=True)
    for _ in range(2):
        assert write_tracker(tmp_path / name, RANKS) == f"{tmp_path / TRACKER} names {text}"
        assert (tmp_path / TRACKER).read_text() == text


def test_a_tracker_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_bytes(b"\xff")
    assert write_tracker(tmp_path / "iter_0000001", []).startswith("left alone: ")
    assert (tmp_path / TRACKER).read_bytes() == b"\xff"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("iter_00000005", "expected iter_0000005"),
        ("iter_5", "expected iter_0000005"),
        ("iter_x", "expected iter_ and seven digits"),
    ],
)
def test_names_that_megatron_does_not_look_for_are_refused(
    name: str, wanted: str, program: Program, tmp_path: Path
) -> None:
    run = program.convert(pair(DENSE).source, tmp_path / name, pair(DENSE).options)
    program.refuses(2, run, "Megatron looks for no such folder", wanted)
    assert list(tmp_path.iterdir()) == []


def test_a_target_called_after_another_iteration_is_noted(program: Program, tmp_path: Path) -> None:
    case = pair(DENSE)
    for name, is_odd in (("iter_0000001", False), ("iter_0000005", True), ("release", False)):
        run = program.convert(case.source, tmp_path / name, case.options, "--dry-run")
        assert ("and the checkpoint is of iteration 1" in run.output) is is_odd


def test_a_linked_target_is_known_by_its_own_name(program: Program, tmp_path: Path) -> None:
    """By which --load will find it: the tracker stands beside the link."""
    case = pair(DENSE)
    (tmp_path / "fast" / "any").mkdir(parents=True)
    (tmp_path / "ckpt").mkdir()
    link = tmp_path / "ckpt" / "iter_0000001"
    link.symlink_to(tmp_path / "fast" / "any")
    run = program.convert(case.source, link, case.options)
    assert run.status == 0, run
    assert (tmp_path / "ckpt" / TRACKER).read_text() == "1"
    assert not (tmp_path / "fast" / TRACKER).exists()


def test_a_tracker_that_megatron_cannot_read_is_told(tmp_path: Path) -> None:
    target = tmp_path / "iter_0000001"
    (target / RANKS[0].folder).mkdir(parents=True)
    (tmp_path / TRACKER).write_text("hello")
    said = write_tracker(target, RANKS[:1])
    assert "holds 'hello', which Megatron cannot read" in said
    assert (tmp_path / TRACKER).read_text() == "hello"
