"""One of several processes fails, and the others end with its line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pp_to_vpp.errors import CheckpointError, CopyError
from pp_to_vpp.megatron.ranks import TRACKER
from pp_to_vpp.run import target_folder
from pp_to_vpp.run.share import Share
from pp_to_vpp.run.siblings import Siblings

from ..pairs import MOE, pair
from ..runs import Program
from .test_convert import files_of

MARK = ".failed-1-of-2"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody waits long for who does not come."""
    monkeypatch.setattr(target_folder, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(target_folder, "_PATIENCE_SECONDS", 2.0)


def _of(tmp_path: Path, share: Share | None) -> Siblings:
    return Siblings(tmp_path / "source", tmp_path / "target", share, is_launched=True)


def test_who_waits_for_a_failed_one_ends_with_its_line(program: Program, tmp_path: Path) -> None:
    """The right run after it is not hindered."""
    case, target = pair(MOE), tmp_path / "iter_0000001"
    failed = program.convert(tmp_path / "missing", target, case.options, "--share", "1/2")
    program.refuses(4, failed, "missing: cannot be listed")
    os.utime(target / MARK, (time.time() + 60,) * 2)  # as if the first one were at work already
    first = program.convert(case.source, target, case.options, "--share", "0/2")
    program.refuses(4, first, "share 1/2 failed: ", "missing: cannot be listed")
    assert [path.name for path in target.glob(".failed-*")] == [MARK], "who was told tells nobody"
    for share in ("1/2", "0/2"):
        run = program.convert(case.source, target, case.options, "--share", share, "--resume")
        assert run.status == 0, run
    assert (tmp_path / TRACKER).read_text() == "1"
    assert [name for name in files_of(target) if name.startswith(".")] == []


def test_a_mark_of_an_earlier_run_ends_nobody(program: Program, tmp_path: Path) -> None:
    case, target = pair(MOE), tmp_path / "iter_0000001"
    target.mkdir()
    (target / MARK).write_text('{"status": 4, "problems": ["long ago"]}')
    os.utime(target / MARK, (time.time() - 60,) * 2)
    run = program.convert(case.source, target, case.options, "--share", "0/2")
    program.refuses(5, run, "2 rank folders of other processes are still to come")
    assert "long ago" not in run.errors
    assert not (target / ".failed-0-of-2").exists(), "nobody waits for who has done its part"
    assert program.convert(case.source, target, case.options, "--resume").status == 0
    assert not (target / MARK).exists(), "the run that ends the conversion removes it"


def _fail(tmp_path: Path, error: BaseException) -> Path:
    with pytest.raises(type(error)), _of(tmp_path, Share(1, 2)):
        raise error
    return tmp_path / "target" / MARK


def test_marks_tell_the_kind_and_the_lines(tmp_path: Path) -> None:
    first = _of(tmp_path, Share(0, 2))
    mark = _fail(tmp_path, CheckpointError("a: is wrong", "b: too"))
    with pytest.raises(CheckpointError) as told:
        first.check()
    assert told.value.problems == ("share 1/2 failed: a: is wrong", "share 1/2 failed: b: too")
    _of(tmp_path, Share(0, 3)).check()  # it is one of others
    _of(tmp_path, None).check()
    for text in ("", "{", "[]", '{"status": 4}'):
        mark.write_text(text)
        with pytest.raises(CopyError, match="share 1/2 failed: see what it printed"):
            first.check()
    sign = tmp_path / "target" / ".sharing-1-of-2.elsewhere-0-0-1-0"
    sign.touch()
    first.check()  # another one called himself so: ours is at work
    sign.unlink()
    with _of(tmp_path, Share(1, 2)):
        first.check()  # it has begun anew


@pytest.mark.parametrize(
    ("elapsed", "before", "is_heard"),
    [
        (10, -1, True),  # left while this process works
        (10, 2, True),  # by one that began and failed a little earlier, and began anew not yet
        (4, 2, False),  # it still may
        (10, 4, False),  # by one of an earlier launch
    ],
)
def test_a_mark_is_of_this_launch_or_not(
    elapsed: float, before: float, is_heard: bool, tmp_path: Path
) -> None:
    mark = _fail(tmp_path, CheckpointError("the line"))
    first = _of(tmp_path, Share(0, 2))
    first._began -= elapsed
    os.utime(mark, (time.time() - elapsed - before,) * 2)
    if is_heard:
        with pytest.raises(CheckpointError):
            first.check()
    else:
        first.check()


def test_what_is_interrupted_or_told_of_another_leaves_no_mark(tmp_path: Path) -> None:
    first = _of(tmp_path, Share(0, 2))
    assert not _fail(tmp_path, KeyboardInterrupt()).exists()
    mark = _fail(tmp_path, ZeroDivisionError("error of the program"))
    with pytest.raises(Exception, match=r"share 1/2 failed: ZeroDivisionError: error of the"):
        first.check()
    (tmp_path / "source").mkdir()
    inside = Siblings(
        tmp_path / "source", tmp_path / "source" / "x", Share(1, 2), is_launched=False
    )
    with pytest.raises(CheckpointError), inside:
        raise CheckpointError("the source is never written")
    assert list((tmp_path / "source").iterdir()) == []
    _of(tmp_path, None).forget()
    assert not mark.exists()


def test_who_cannot_write_fails_with_its_own_line(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("a file is there")
    _fail(tmp_path, CheckpointError("the line"))
