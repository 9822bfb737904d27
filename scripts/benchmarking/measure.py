"""Run a command and measure it: time, processor time, memory and bytes of its whole process tree.

Linux only. A process inherits the input/output counters of the children it has waited for, so the
bytes are exact: ``rchar`` and ``wchar`` of /proc count every read, write, sendfile and
copy_file_range (not the pages of mapped files). Memory is sampled while the command runs.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_INTERVAL = 0.2
"""Seconds between two samples of memory; one takes about a millisecond of some core."""
_SHOWN_BYTES = 2000


class RunFailedError(RuntimeError):
    """The measured command did not end with status 0."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a command."""

    seconds: float
    cpu_seconds: float
    """User and system time of all its processes."""
    peak_bytes: int
    """Highest sum of the proportional set sizes of its processes."""
    read_bytes: int
    """Those that copy_file_range copies count."""
    written_bytes: int
    new_bytes: int = 0
    """By which the file system has become fuller."""


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command to its end. The caller must have no other children and no threads.

    Raises:
        RunFailedError: it failed; with the end of what it printed.
    """
    before = _children_io()
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        try:
            peak = _watch(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # the converter removes unfinished folders
            process.wait()
            raise
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RunFailedError(f"{' '.join(command)}\n{_end_of(output)}")
    after = _children_io()
    return Measured(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=peak,
        read_bytes=after[0] - before[0],
        written_bytes=after[1] - before[1],
    )


def _end_of(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _SHOWN_BYTES))
    return output.read().decode(errors="replace")


def _watch(pid: int) -> int:
    """Sample memory until a process ends; the peak."""
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        peak = _tree_bytes(pid)
        while not poll.poll(_INTERVAL * 1000):
            peak = max(peak, _tree_bytes(pid))
        return peak
    finally:
        os.close(descriptor)


def _tree_bytes(pid: int) -> int:
    """Proportional set size of a process and its descendants; those that just ended count 0."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total = int(line.split()[1]) * 1024
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(_tree_bytes(int(child)) for child in children.read_text().split())
    except OSError:
        pass
    return total


def _children_io() -> tuple[int, int]:
    """Bytes read and written by the children waited for: all of the process less its own."""
    whole, own = (_io(Path(f"/proc/{name}/io")) for name in ("self", "thread-self"))
    return whole["rchar"] - own["rchar"], whole["wchar"] - own["wchar"]


def _io(path: Path) -> dict[str, int]:
    pairs = (line.split(":") for line in path.read_text().splitlines())
    return {name: int(value) for name, value in pairs}
