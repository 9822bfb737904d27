"""A pool of worker processes that leaves nobody behind.

Workers import neither torch nor Megatron, end with their parent, and leave Ctrl-C to it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import CopyError, problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

QUEUED_PER_WORKER = 3
"""Tasks in hand: enough that nobody waits, few enough that memory stays constant."""

_OBJECTS_BETWEEN_COLLECTIONS = 200_000

Job = TypeVar("Job")
Result = TypeVar("Result")


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # What is decoded is trees of many objects: to look for cycles in them takes a quarter of the
    # time, again and again.
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


class Workers:
    """A pool of worker processes; a context manager that leaves none behind."""

    def __init__(self, count: int) -> None:
        self.count = count
        # Forked before any thread exists, workers share the parent's memory and start at once.
        method = "fork" if sys.platform == "linux" else "spawn"
        self._pool = ProcessPoolExecutor(
            count, multiprocessing.get_context(method), initializer=_start_worker
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self.kill()
        else:
            self._pool.shutdown()

    def kill(self) -> None:
        """End the workers at once, whatever they are doing."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
            process.join()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run a function in a worker."""
        try:
            return self._pool.submit(function, *arguments)
        except BrokenProcessPool:
            raise _worker_died() from None

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Results in the order of the jobs, with few of them waiting at any time."""
        pending: list[Future[Result]] = []
        for job in jobs:
            pending.append(self.submit(function, job))
            if len(pending) > QUEUED_PER_WORKER * self.count:
                yield result_of(pending.pop(0))
        while pending:
            yield result_of(pending.pop(0))


def result_of(future: Future[Result]) -> Result:
    """The result of a task.

    Raises:
        CopyError: its worker was killed.
    """
    try:
        return future.result()
    except BrokenProcessPool:
        raise _worker_died() from None


def _worker_died() -> CopyError:
    return CopyError(
        problem(
            "worker process",
            "it was killed",
            cure="if the kernel ran out of memory, use fewer with --num-max-processing-processes; "
            "then run again with --resume",
        )
    )
