"""Signs of life: whose a temporary name is, and whether that run still exists.

What a run makes and has not yet published carries its mark: host, boot, PID namespace, process and
when that began. On the same kernel and in the same namespace ``/proc`` tells whether it lives;
elsewhere the age of what it touches does, by the clock of the file server, for those of two hosts
may differ.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import refusals
from .workers import obtaining

WRITING, SHARING, SMALL = ".writing-", ".sharing-", ".small-"
"""Beginnings of temporary names: a rank folder before its publication; a process at work; a small
file before it is whole, or asked for the time."""
BEAT_SECONDS = 30.0
SILENT_SECONDS = 180.0
"""Who has touched nothing for so long is dead: six beats were missed."""
DEAD = "dead"
"""The end of the mark of what is being removed."""


class _Mark(NamedTuple):
    host: str
    boot: str
    namespace: str
    """Inode of the PID namespace; "" where /proc shows another one."""
    pid: str
    start: str
    """In the kernel's ticks: tells a process from a later one with its number."""

    def __str__(self) -> str:
        return "-".join(self)

    @classmethod
    def parse(cls, text: str) -> _Mark | None:
        parts = text.rsplit("-", 4)
        return cls(*parts) if len(parts) == len(cls._fields) else None


def own_mark() -> str:
    """The mark of this process."""
    return str(_mark_of(os.getpid()))


def _mark_of(pid: int) -> _Mark:
    boot = _read("/proc/sys/kernel/random/boot_id").replace("-", "")[:12]
    namespace = ""
    with contextlib.suppress(OSError):
        if os.readlink("/proc/self") == str(pid):
            namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return _Mark(socket.gethostname(), boot, namespace, str(pid), _start_time(pid))


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


@dataclass(frozen=True, slots=True)
class Writer:
    """Another run, by something that it has not published."""

    path: Path
    host: str
    pid: str
    silent: float
    """Seconds since it last touched it, by the clock of the file server."""
    is_dead: bool
    is_seen: bool
    """Its process was looked for and found here: it will not be taken for dead."""

    def __str__(self) -> str:
        who = f"process {self.pid} of {self.host}" if self.pid else "unknown process"
        return f"{who}, last sign of life {max(0, self.silent):.0f} s ago"


def writer_of(path: Path, mark: str, now: float) -> Writer:
    """Who writes what carries a mark, and whether he still does.

    Args:
        path: the file or folder.
        mark: the end of its name; of somebody's making, anything.
        now: see ``server_time``.
    """
    silent = now - last_touched(path)
    parsed, own = _Mark.parse(mark), _mark_of(os.getpid())
    is_dead = mark.rpartition(".")[2] == DEAD
    if is_dead or parsed is None:
        return Writer(path, "", "", silent, is_dead or silent > SILENT_SECONDS, is_seen=False)
    if own.namespace and (own.host, own.boot, own.namespace) == parsed[:3]:
        # A name of this very process was left by an earlier attempt of it.
        is_alive = parsed != own and _start_time_of(parsed.pid) == parsed.start
        return Writer(path, parsed.host, parsed.pid, silent, not is_alive, is_alive)
    return Writer(path, parsed.host, parsed.pid, silent, silent > SILENT_SECONDS, is_seen=False)


def _start_time_of(pid: str) -> str | None:
    return _start_time(int(pid)) or None if pid.isdecimal() else None


def last_touched(path: Path) -> float:
    """When a file, or a folder or something in it, was last written or touched; 0 if it is gone."""
    newest = 0.0
    with contextlib.suppress(OSError):
        newest = path.stat().st_mtime
        for entry in path.iterdir() if path.is_dir() else ():
            with contextlib.suppress(OSError):
                newest = max(newest, entry.stat().st_mtime)
    return newest


def server_time(folder: Path) -> float:
    """The time by the clock that stamps files in a folder.

    Raises:
        CopyError: nothing can be written there.
    """
    path = folder / f"{SMALL}clock.{own_mark()}"
    with refusals(folder, "cannot be written"):
        try:
            path.touch()
            return path.stat().st_mtime
        finally:
            path.unlink(missing_ok=True)


def own_names(folder: Path) -> list[Path]:
    """What this process has made in a folder and not published; nothing if it cannot be listed."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
    own = f".{own_mark()}"
    return [folder / n for n in names if n.startswith((WRITING, SHARING)) and n.endswith(own)]


class Heartbeat:
    """Touches, as long as it lasts, what this process has not published."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        """Begin.

        Raises:
            CopyError: the system gives no thread.
        """
        with obtaining("starting a thread"):
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            for path in own_names(self._folder):
                with contextlib.suppress(OSError):  # published meanwhile, or the next beat tells
                    os.utime(path)
