"""What somebody who watches sees: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import builtins
import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from pp_to_vpp import progress
from pp_to_vpp.progress import Progress
from pp_to_vpp.run.listener import Listener, Phase

from .pairs import MOE, pair
from .runs import command, environment


class Clock:
    """Time that goes by when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_where_nobody_watches_a_line_comes_after_five_seconds_and_each_minute(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pp_to_vpp")
    with Progress() as shown:
        listener = shown.listen(Listener())
        listener.began(Phase.COPY, 4_000_000_000)
        for seconds in range(1, 131):
            clock.now = 1000.0 + seconds
            listener.looked()
            if seconds == 60:
                listener.advanced(1_000_000_000)
                listener.finished("mp_rank_00_000")
    assert [record.getMessage() for record in caplog.records] == [
        "copy: 0 B of 4.0 GB, 0 folders done",
        "copy: 1.0 GB of 4.0 GB, 1 folders done, 15.4 MB/s, 195 s left",
        "copy: 1.0 GB of 4.0 GB, 1 folders done, 8.0 MB/s, 375 s left",
    ]


def test_phases_count_what_they_are_about(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pp_to_vpp")
    with Progress() as shown:
        shown.begin(Phase.PLAN, 1024)
        clock.now += 2
        shown.advance(256)
        assert caplog.records == [], "what takes no time needs no words"
        clock.now += 6
        shown.look()
        shown.wait("mp_rank_00_001: another run is writing it")
    assert [record.getMessage() for record in caplog.records] == [
        "plan: 256 of 1024 folders, 32/s, 24 s left",
        "waiting: mp_rank_00_001: another run is writing it",
    ]


def test_sizes_are_for_people() -> None:
    found = [progress.size(n) for n in (0, 999, 1000, 14_000_000, 6.4e9, 11.9e12)]
    assert found == ["0 B", "999 B", "1.0 kB", "14.0 MB", "6.4 GB", "11.90 TB"]


def test_a_terminal_has_a_bar_for_each_phase(tmp_path: Path) -> None:
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    case = pair(MOE)
    arguments = command(
        "--load-iteration-dir", case.source, "--save-iteration-dir", tmp_path / "iter_0000001",
        *case.options,
    )  # fmt: skip
    with subprocess.Popen(
        arguments, stderr=side, stdout=subprocess.DEVNULL, env=environment(), cwd="/"
    ) as process:
        os.close(side)
        seen = b""
        while True:
            try:
                piece = os.read(main, 4096)
            except OSError:  # nobody writes any more
                break
            if not piece:
                break
            seen += piece
        assert process.wait(60) == 0
    os.close(main)
    for phase in (Phase.PLAN, Phase.COPY):
        assert f"{phase.word}: ".encode() in seen
    assert b"INFO" not in seen


def test_without_tqdm_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "tqdm":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    with Progress() as shown:
        shown.begin(Phase.COPY, 10)
        shown.advance(10)
        assert shown._bar is None
