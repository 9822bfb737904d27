"""The program in a forked child with limits: no start-up time, and no harm to its parent."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pp_to_vpp import cli, report
from pp_to_vpp.target import request
from tests.runs import Run

LATE = -1000
"""Status of a child that took too long and was killed."""
_WARM = (report, request)
"""What the program imports late, imported before the fork."""


def run(work: Callable[[], int], folder: Path, *, seconds: float, megabytes: int) -> Run:
    """Do some work in a child that may not take more time or memory than this.

    The status is that of the work, minus the signal that killed the child, or ``LATE``.

    Args:
        work: calls the program; its exit status.
        folder: the child's current folder.
        seconds: until it is killed, with all that it started.
        megabytes: what it may take on top of what this process has already.
    """
    limit = _address_space() + (megabytes << 20)
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
            child = os.fork()
        if child == 0:
            status = 1
            try:
                _enter(folder, (output.fileno(), errors.fileno()), limit)
                status = _status_of(work)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        status = _wait(child, seconds)
        return Run(status, _text(output), _text(errors))


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _enter(folder: Path, descriptors: tuple[int, int], limit: int) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.chdir(folder)
    for descriptor, number in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", errors=errors, closefd=False)
        for number, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _status_of(work: Callable[[], int]) -> int:
    try:
        return work()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _wait(child: int, seconds: float) -> int:
    """The child's status, after ending it if it is late, and whatever it has left behind."""
    descriptor = os.pidfd_open(child)
    try:
        is_late = not select.select([descriptor], [], [], seconds)[0]
    finally:
        os.close(descriptor)
    if is_late:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return LATE if is_late else os.waitstatus_to_exitcode(status)


def _text(file: Any) -> str:
    file.seek(0)
    data: bytes = file.read(1 << 20)
    return data.decode(errors="replace")


def program(*arguments: str | Path, workers: int = 1) -> int:
    """The program's exit status."""
    return cli.main([*map(str, arguments), "--num-max-processing-processes", str(workers)])
