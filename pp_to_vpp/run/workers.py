"""A pool of worker processes that leaves nobody behind.

Workers import no Megatron, end with their parent, and leave Ctrl-C to it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ..errors import CopyError

QUEUED_PER_WORKER = 3
"""Tasks in hand: enough that nobody waits, few enough that memory stays constant."""

_OBJECTS_BETWEEN_COLLECTIONS = 200_000
_LOOK_SECONDS = 1.0
"""How often a waiting parent looks whether the pool is still served."""

_POOL_SURVIVES_DEATH = (3, 11, 5)
"""From this Python on a pool itself closes the pipe of its tasks when a worker dies (gh-94777)."""

_STUCK_SECONDS = 1.0
"""After the death of all workers the pool's thread ends in milliseconds, or waits for ever."""

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

    def __init__(self, count: int, looked: Callable[[], None] = lambda: None) -> None:
        """Make the pool; its processes start with the first task.

        Args:
            count: of processes.
            looked: called about once a second while the pool is waited for.

        Raises:
            CopyError: the system gives no more of something.
        """
        self.count = count
        self._looked = looked
        self._open: set[Future[Any]] = set()
        """Tasks that are not done."""
        self._dead_thread: str | None = None
        """Why a thread of this process died: one of the pool's own, on which all waiting hangs."""
        self._old_hook = threading.excepthook
        # Forked before any thread exists, workers share the parent's memory and start at once.
        method = "fork" if sys.platform == "linux" else "spawn"
        try:
            self._pool = ProcessPoolExecutor(
                count, multiprocessing.get_context(method), initializer=_start_worker
            )
        except OSError as error:
            raise no_more(error) from None
        threading.excepthook = self._note_death

    def _note_death(self, death: threading.ExceptHookArgs) -> None:
        self._dead_thread = str(death.exc_value)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            while kind is None and self._open:
                self.wait(list(self._open))
        finally:
            # Not asked to end: a worker that was killed while it waited for a task keeps the lock
            # of their queue, and the others would wait for it for ever.
            self.kill()

    def kill(self) -> None:
        """End the workers at once, whatever they are doing."""
        for process in multiprocessing.active_children():
            process.kill()
        # Else the pool's thread waits for the rest of a result that a worker was writing.
        _close(getattr(self._pool, "_result_queue", None), "_writer")
        thread = getattr(self._pool, "_executor_manager_thread", None)
        tasks = getattr(self._pool, "_call_queue", None)
        self._pool.shutdown(wait=False, cancel_futures=True)
        # The pool's thread sees that they are gone, and ends: left running, it could close its pipe
        # while the interpreter's exit writes to it.
        if thread is not None:
            thread.join(_STUCK_SECONDS)
            if thread.is_alive() and sys.version_info < _POOL_SURVIVES_DEATH:
                # It waits for one that writes a task, to nobody, into a pipe that is full. Closed
                # before, the pipe could be closed twice: that one would wait for ever.
                _close(tasks, "_reader")
            thread.join()
        for process in multiprocessing.active_children():
            process.join()
        threading.excepthook = self._old_hook

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run a function in a worker."""
        try:
            future = self._pool.submit(function, *arguments)
        except BrokenProcessPool:
            raise _worker_died() from None
        except (OSError, RuntimeError) as error:  # no process, no thread
            raise no_more(error) from None
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def wait(self, futures: Collection[Future[Any]]) -> None:
        """Wait until one of some tasks is done.

        Raises:
            CopyError: none ever will be, for the pool could not start a thread of its own, or a
                worker was killed.
        """
        was_lost = False
        while not wait(futures, _LOOK_SECONDS, FIRST_COMPLETED).done:
            self._looked()
            if self._dead_thread is not None:
                raise no_more(self._dead_thread)
            if was_lost:  # and the pool, waiting for the rest of a result, has not seen it
                raise _worker_died()
            was_lost = self._has_lost_a_worker()

    def _has_lost_a_worker(self) -> bool:
        """Whether a process of the pool has ended."""
        processes = getattr(self._pool, "_processes", None) or {}
        return any(process.exitcode is not None for process in list(processes.values()))

    def result_of(self, future: Future[Result]) -> Result:
        """The result of a task, when it is done.

        Raises:
            CopyError: its worker was killed, or the pool is not served any more.
        """
        self.wait([future])
        try:
            return future.result()
        except BrokenProcessPool:
            raise _worker_died() from None

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Results in the order of the jobs, with few of them waiting at any time."""
        pending: list[Future[Result]] = []
        for job in jobs:
            pending.append(self.submit(function, job))
            if len(pending) > QUEUED_PER_WORKER * self.count:
                yield self.result_of(pending.pop(0))
        while pending:
            yield self.result_of(pending.pop(0))


def _close(queue: object, end: str) -> None:
    """Close this process's end of a pipe of the pool: the others died with the workers."""
    pipe = getattr(queue, end, None)
    if pipe is not None:
        pipe.close()


def no_more(reason: object) -> CopyError:
    """The system's refusal of a process or thread."""
    return CopyError.of(
        "worker processes",
        f"the system gives this program no more processes, threads or memory ({reason})",
        cure="use fewer with --num-max-processing-processes, or raise the limit (ulimit -a); "
        "then run again with --resume",
    )


def _worker_died() -> CopyError:
    return CopyError.of(
        "worker process",
        "it was killed",
        cure="if the kernel ran out of memory, use fewer with --num-max-processing-processes; "
        "then run again with --resume",
    )
