"""Whose a temporary name is, and whether that run still lives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pp_to_vpp.errors import CopyError
from pp_to_vpp.run import signs
from pp_to_vpp.run.signs import Heartbeat, Writer

FOLDER = "mp_rank_00_003_001"


def start_of(pid: int) -> str:
    """When a process began, as the kernel tells."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def mark(pid: int | str | None = None, start: str | None = None, **parts: str) -> str:
    """The mark of a process here, or one that differs in the given parts."""
    own = signs._mark_of(os.getpid())
    if pid is not None:
        own = own._replace(pid=str(pid), start=start if start is not None else start_of(int(pid)))
    return str(own._replace(**parts))


@pytest.fixture
def sleeper() -> Iterator[int]:
    """The number of another process that is alive."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process.pid
        process.kill()


def writer(folder: Path, text: str, age: float = 0.0) -> Writer:
    """Who writes a folder with a mark that was last touched some seconds ago."""
    path = folder / f".writing-{FOLDER}.{text}"
    path.mkdir(exist_ok=True)
    now = signs.server_time(folder)
    os.utime(path, (now - age, now - age))
    return signs.writer_of(path, text, now)


def test_the_mark_tells_host_boot_namespace_process_and_when_it_began() -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")
    namespace = os.readlink("/proc/self/ns/pid")
    found = signs.own_mark().rsplit("-", 4)
    assert found[0] == socket.gethostname()
    assert boot.startswith(found[1])
    assert len(found[1]) == 12
    assert namespace == f"pid:[{found[2]}]"
    assert found[3:] == [str(os.getpid()), start_of(os.getpid())]


def test_on_the_same_kernel_the_process_tells_whatever_the_age(
    tmp_path: Path, sleeper: int
) -> None:
    alive = writer(tmp_path, mark(sleeper), age=1e6)
    assert (alive.is_dead, alive.is_seen, alive.pid) == (False, True, str(sleeper))
    for text in (
        mark("4194305", "77"),  # beyond the largest number
        mark(sleeper, str(int(start_of(sleeper)) - 1)),  # its number was another's before
        mark("what", "ever"),
        signs.own_mark(),  # this process begins anew
        signs.DEAD,  # an earlier run was interrupted while it removed it
    ):
        assert writer(tmp_path, text).is_dead, text


@pytest.mark.parametrize(
    "parts",
    [
        {"host": "another-host"},
        {"boot": "0123456789ab"},  # a container, or the same host before it was started anew
        {"namespace": "1"},  # a container here: its process numbers mean nothing
    ],
)
@pytest.mark.parametrize(("age", "is_dead"), [(0, False), (150, False), (190, True)])
def test_elsewhere_the_age_tells(
    parts: dict[str, str], age: int, is_dead: bool, tmp_path: Path
) -> None:
    """Even if there is a process of that number here, or none."""
    for text in (mark(os.getpid(), **parts), mark("4194305", "7", **parts)):
        found = writer(tmp_path, text, age)
        assert (found.is_dead, found.is_seen) == (is_dead, False)
        assert found.silent == pytest.approx(age, abs=2)


@pytest.mark.parametrize("text", ["", "bak", "a-b", "host-17-4242"])
def test_marks_of_anybodys_making_are_judged_by_their_age(text: str, tmp_path: Path) -> None:
    """Somebody may have renamed or copied one; an earlier version had other marks."""
    assert not writer(tmp_path, text, 100).is_dead
    assert writer(tmp_path, text, 200).is_dead


def test_the_newest_file_of_a_folder_counts(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "a.pt").touch()
    os.utime(path / "a.pt", (5000, 5000))
    os.utime(path, (1, 1))
    assert signs.last_touched(path) == 5000
    assert signs.last_touched(tmp_path / "missing") == 0


def test_ages_are_by_the_clock_that_stamps_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that is 17 minutes ahead must not kill a run of another host."""
    monkeypatch.setattr(time, "time", lambda: time.time_ns() / 1e9 + 1000)
    assert not writer(tmp_path, mark(host="other")).is_dead
    assert list(tmp_path.glob(".small*")) == []


def test_host_names_may_have_hyphens_and_dots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7.rack-2")
    text = signs.own_mark()
    assert writer(tmp_path, text).host == "node-7.rack-2"
    (tmp_path / f".sharing-0-of-4.{text}").touch()
    (tmp_path / ".writing-x.other").touch()
    assert {p.name for p in signs.own_names(tmp_path)} == {
        f".writing-{FOLDER}.{text}", f".sharing-0-of-4.{text}",
    }  # fmt: skip


def test_a_namespace_without_its_own_proc_is_judged_by_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There /proc shows the processes of another one."""
    readlink = os.readlink
    monkeypatch.setattr(os, "readlink", lambda p: "1" if p == "/proc/self" else readlink(p))
    text = signs.own_mark()
    assert text.split("-")[-3] == ""
    assert not writer(tmp_path, text.replace(f"-{os.getpid()}-", "-4194305-")).is_dead


def test_a_heart_touches_what_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "BEAT_SECONDS", 0.01)
    own, other = (tmp_path / f".writing-{FOLDER}.{m}" for m in (signs.own_mark(), "x"))
    for path in (own, other):
        path.mkdir()
        os.utime(path, (1, 1))
    with Heartbeat(tmp_path):
        deadline = time.monotonic() + 10
        while own.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert other.stat().st_mtime == 1
    os.utime(own, (1, 1))
    time.sleep(0.05)
    assert own.stat().st_mtime == 1, "it has stopped"


def test_no_thread_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(CopyError, match="starting a thread failed"), Heartbeat(tmp_path):
        pass
