"""Rank folders and small files that appear only when they are whole."""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from pathlib import Path

import pytest

from pp_to_vpp.container.extents import Literal, Zeros
from pp_to_vpp.errors import CopyError
from pp_to_vpp.megatron.ranks import RankId
from pp_to_vpp.run import folders
from pp_to_vpp.run.folders import TemporaryFolder
from pp_to_vpp.run.signs import own_mark
from pp_to_vpp.target.plan import FilePlan, RankPlan

from .test_signs import mark, sleeper

__all__ = ["sleeper"]  # a fixture

RANK = RankId(0, 3, 1)
PLAN = RankPlan(
    RANK, (FilePlan("a.pt", 5, ((Literal(b"hello"),),), None), FilePlan("b", 1 << 20, (), None))
)
NAME = "mp_rank_00_003_001"


def leftover(folder: Path, mark: str, name: str = NAME) -> Path:
    """A temporary folder that somebody made."""
    path = folder / f".writing-{name}.{mark}"
    path.mkdir()
    (path / "a.pt").write_text("half")
    return path


def test_files_begin_as_holes_of_their_final_size(tmp_path: Path) -> None:
    before = time.monotonic()
    folder = folders.create_folder(tmp_path / "deep" / "down", PLAN)
    assert before <= folder.began <= time.monotonic()
    assert folder.target == tmp_path / "deep" / "down" / NAME
    assert not folder.target.exists()
    assert folder.path.parent == folder.target.parent, "one rename must do"
    assert {p.name: p.stat().st_size for p in folder.path.iterdir()} == {"a.pt": 5, "b": 1 << 20}
    assert (folder.path / "b").stat().st_blocks == 0
    assert folder.file("a.pt") == str(folder.path / "a.pt")


def test_the_name_tells_who_writes(tmp_path: Path) -> None:
    folder = folders.create_folder(tmp_path, PLAN)
    assert folder.path.name == f".writing-{NAME}.{own_mark()}"


def test_nobody_writes_into_a_folder_twice(tmp_path: Path) -> None:
    folders.create_folder(tmp_path, PLAN)
    with pytest.raises(CopyError, match=r"cannot be written \(File exists\)"):
        folders.create_folder(tmp_path, PLAN)


def test_a_folder_that_cannot_be_filled_is_removed(tmp_path: Path) -> None:
    twice = RankPlan(RANK, (PLAN.files[0], PLAN.files[0]))
    with pytest.raises(CopyError, match="File exists"):
        folders.create_folder(tmp_path, twice)
    assert list(tmp_path.iterdir()) == []


def test_a_leftover_that_cannot_be_removed_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps files that another host has open, and their folder. It is removed later."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        for number in range(2):
            leftover(tmp_path, mark("4194305", str(number)))
            assert folders.clear_leftovers(tmp_path, [NAME]) == []
        left = folders.left_behind(tmp_path)
        assert [path.suffix for path in left] == [".dead", ".dead"]
        folders.publish(folders.create_folder(tmp_path, PLAN))
    assert folders.clear_leftovers(tmp_path, [NAME]) == []
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("number", [errno.EIO, errno.EMLINK])
def test_where_links_fail_a_file_is_made_that_was_not_there(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "a.json"
    assert folders.write_first(path, "first")
    assert not folders.write_first(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_lives_is_left_alone_and_told(tmp_path: Path, sleeper: int) -> None:
    path = leftover(tmp_path, mark(sleeper))
    (found,) = folders.clear_leftovers(tmp_path, [NAME])
    assert (found.path, found.pid) == (path, str(sleeper))
    assert f"process {sleeper} of " in str(found)
    assert folders.folder_of(path) == NAME
    assert (path / "a.pt").read_text() == "half"
    assert 0 <= folders.newest_sign(tmp_path) < 60


def test_what_is_dead_is_removed(tmp_path: Path) -> None:
    for text in (mark("4194305", "77"), own_mark(), "dead"):
        leftover(tmp_path, text)
    for name in (".sharing-1-of-4", ".small-pp_to_vpp-json", ".small-clock"):
        (tmp_path / f"{name}.{mark('4194305', '77')}").touch()
    assert folders.newest_sign(tmp_path) == math.inf
    assert folders.clear_leftovers(tmp_path, [NAME]) == []
    assert list(tmp_path.iterdir()) == []


def test_processes_that_share_show_that_they_are_at_work(tmp_path: Path) -> None:
    with folders.shown_at_work(tmp_path, "3/16"):
        assert [p.name for p in tmp_path.iterdir()] == [f".sharing-3-of-16.{own_mark()}"]
    with folders.shown_at_work(tmp_path, None):
        assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(CopyError, match="cannot be written"),
        folders.shown_at_work(tmp_path / "missing", "0/2"),
    ):
        pass


def test_only_the_wanted_folders_are_cleared(tmp_path: Path) -> None:
    """Others may be those of nodes that share the work."""
    dead = mark("4194305", "77")
    mine, other = leftover(tmp_path, dead), leftover(tmp_path, dead, "mp_rank_00_002_001")
    finished = tmp_path / NAME
    finished.mkdir()
    folders.clear_leftovers(tmp_path, [NAME, "mp_rank_00_007"])
    assert not mine.exists()
    assert other.exists()
    assert finished.exists()
    folders.clear_leftovers(tmp_path / "missing", [NAME])


def test_publishing_is_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders.create_folder(tmp_path, PLAN)
    inode = folder.path.stat().st_ino
    done: list[str] = []
    sync, rename = folders.sync_folder, Path.rename

    def synced(path: Path) -> None:
        done.append(f"sync {path.name}")
        sync(path)

    monkeypatch.setattr(folders, "sync_folder", synced)

    def renamed(self: Path, target: Path) -> Path:
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    assert folders.publish(folder)
    assert done == [f"sync {folder.path.name}", "rename", f"sync {tmp_path.name}"]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert folder.target.stat().st_ino == inode


def test_who_comes_second_takes_it_as_done(tmp_path: Path) -> None:
    """Another run of the conversion has published the folder: its own is not needed."""
    folder = folders.create_folder(tmp_path, PLAN)
    folder.target.mkdir()
    (folder.target / "a.pt").write_text("theirs")
    assert not folders.publish(folder)
    assert not folder.path.exists()
    assert (folder.target / "a.pt").read_text() == "theirs"


def test_an_empty_folder_of_that_name_is_no_hindrance(tmp_path: Path) -> None:
    folder = folders.create_folder(tmp_path, PLAN)
    folder.target.mkdir()
    folders.publish(folder)
    assert (folder.target / "a.pt").exists()


def test_a_folder_that_was_taken_away_cannot_be_published(tmp_path: Path) -> None:
    """As one that a second run took for dead."""
    folder = TemporaryFolder(tmp_path / ".writing-x", tmp_path / "x", 0.0)
    with pytest.raises(CopyError, match="x: cannot be given its name"):
        folders.publish(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_folders_that_cannot_be_synced(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems that have no such call are forgiven, failing disks are not."""

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EINVAL:
        folders.sync_folder(tmp_path)
    else:
        with pytest.raises(OSError, match="Input/output"):
            folders.sync_folder(tmp_path)


def test_small_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "tracker.txt"
    folders.write_whole(path, "1000")
    assert path.read_text() == "1000"
    folders.write_whole(path, "2000")
    assert path.read_text() == "2000"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_small_files_are_written_whole_or_not_at_all(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tracker.txt"
    path.write_text("before")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if call == "fsync" else Path, call, refuse)
    with pytest.raises(CopyError, match=r"No space left on device.*free some space"):
        folders.write_whole(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    plan = RankPlan(RANK, (FilePlan("z", 3, ((Zeros(3),),), None),))
    with pytest.raises(CopyError, match="cannot be written"):
        folders.create_folder(tmp_path / "file", plan)
    with pytest.raises(CopyError, match="cannot be written"):
        folders.write_whole(tmp_path / "missing" / "tracker.txt", "1")
