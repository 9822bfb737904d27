"""A pool of worker processes that leaves nobody behind, and touches nobody else of its caller's.

Workers end with their parent, and leave Ctrl-C to it. It gets no thread, no handler and no hook.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from multiprocessing import current_process
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue
from typing import Any, NoReturn, TypeVar, cast

from ..errors import ConversionError, CopyError
from ..source.files import forget

QUEUED_PER_WORKER = 3
"""Tasks in hand: enough that nobody waits, few enough that memory stays constant."""

_OBJECTS_BETWEEN_COLLECTIONS = 200_000
_LOOK_SECONDS = 1.0
"""How often who waits looks up."""

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers:
    """A pool of worker processes; a context manager that leaves none behind.

    The caller does the work itself if it asks for one process. So it does where it may have none:
    daemonic processes may not, and a frozen program has no Python to start.
    """

    def __init__(self, count: int, looked: Callable[[], None] = lambda: None) -> None:
        """Make the pool; its processes start with the first task.

        Args:
            count: of processes.
            looked: called about once a second while the pool is waited for.
        """
        self.count = count
        self._looked = looked
        may_start = sys.executable and not hasattr(sys, "frozen") and not current_process().daemon
        self._is_caller = count == 1 or not may_start
        self.in_hand = 1 if self._is_caller else QUEUED_PER_WORKER * count
        """Tasks that should be submitted and not done at any time."""
        self._pids: list[int] = []
        self._given: dict[Connection, deque[Future[Any]]] = {}
        """By the pipe to a worker, what it has not answered, in order."""
        self._waiting: deque[tuple[Future[Any], bytes]] = deque()
        """Tasks that no worker has been given yet."""
        forget()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            while kind is None and any(self._given.values()):
                self._hear()
        finally:
            self.kill()

    def kill(self) -> None:
        """End the workers at once, whatever they are doing."""
        while self._pids:
            with suppress(ProcessLookupError, ChildProcessError):  # the caller has waited for all
                os.kill(self._pids[-1], signal.SIGKILL)
                os.waitpid(self._pids[-1], 0)
            self._pids.pop()
        while self._given:
            self._given.popitem()[0].close()
        forget()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run a function in a worker.

        Raises:
            CopyError: the system gives no process.
        """
        future: Future[Result] = Future()
        if self._is_caller:
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            return future
        if not self._given:
            self._start()
        self._waiting.append((future, pickle.dumps((function, arguments))))
        self._hand_out()
        return future

    def _start(self) -> None:
        start = _fork if _has_one_thread() else _spawn
        handled = [n for n in signal.valid_signals() if callable(signal.getsignal(n))]
        # With all signals blocked: in a worker none may run a handler of the caller's.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            for _ in range(self.count):
                with obtaining("socketpair"):
                    ours, theirs = Pipe()
                self._given[ours] = deque()
                with theirs:
                    self._pids.append(start(theirs, handled, self._given))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _hand_out(self) -> None:
        """Give tasks to who has fewest; a second one only while there are enough for all, for it
        could wait behind a long one while others are idle."""
        while self._waiting:
            pipe, tasks = min(self._given.items(), key=lambda given: len(given[1]))
            if len(tasks) > (len(self._waiting) > self.count):
                return
            future, task = self._waiting.popleft()
            tasks.append(future)
            with suppress(OSError):  # the worker has ended, as is heard soon
                pipe.send_bytes(task)

    def _hear(self) -> None:
        """Take answers; wait for them a second at most.

        Raises:
            CopyError: a worker has ended before its time.
        """
        ready = cast("list[Connection]", wait(self._given, _LOOK_SECONDS))
        for pipe in ready:
            try:
                result, error = pipe.recv()
            except (EOFError, OSError):
                raise CopyError.of(
                    "worker process",
                    "it was killed",
                    cure="if the kernel ran out of memory, use fewer with "
                    "--num-max-processing-processes; then run again with --resume",
                ) from None
            future = self._given[pipe].popleft()
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        self._hand_out()
        if not ready:
            self._looked()

    def wait(self, futures: Collection[Future[Any]]) -> None:
        """Wait until one of some tasks is done.

        Raises:
            CopyError: a worker was killed.
        """
        while not any(future.done() for future in futures):
            self._hear()

    def result_of(self, future: Future[Result]) -> Result:
        """The result of a task, when it is done.

        Raises:
            CopyError: a worker was killed.
        """
        self.wait([future])
        return future.result()

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Results in the order of the jobs, with few of them waiting at any time."""
        pending: deque[Future[Result]] = deque()
        for job in jobs:
            pending.append(self.submit(function, job))
            if len(pending) >= self.in_hand:
                yield self.result_of(pending.popleft())
        while pending:
            yield self.result_of(pending.popleft())


def _has_one_thread() -> bool:
    """Whether a fork copies all there is: what another thread has locked stays so in the copy."""
    try:
        return len(os.listdir("/proc/self/task")) == 1  # those of libraries count, too
    except OSError:
        return False


def _fork(pipe: Connection, handled: Iterable[int], others: Iterable[Connection]) -> int:
    with obtaining("fork"):
        pid = os.fork()
    if pid == 0:
        serve(pipe, handled, others)
    return pid


def _spawn(pipe: Connection, handled: Iterable[int], _: object) -> int:
    """Start a Python that runs nothing of the caller's main module; its input is the pipe."""
    from multiprocessing.spawn import get_executable  # few need it

    serving = f"import {__name__} as w; w.serve(w.Connection(0), {[*map(int, handled)]})"
    code = f"import sys; sys.path[:] = sys.argv[1:]; {serving}"
    python, actions = get_executable(), [(os.POSIX_SPAWN_DUP2, pipe.fileno(), 0)]
    command = [python, "-c", code, *map(str, sys.path)]
    with obtaining("posix_spawn"):
        return os.posix_spawn(python, command, os.environ, file_actions=actions)


def serve(pipe: Connection, handled: Iterable[int], others: Iterable[Connection] = ()) -> NoReturn:
    """What a worker does until its parent ends it, or has ended.

    Args:
        pipe: to the parent.
        handled: signals that are the parent's affair.
        others: what a fork copies of the parent's ends of pipes.
    """
    try:
        for other in others:
            other.close()
        for number in (signal.SIGINT, *handled):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        settle_in()
        tasks: SimpleQueue[bytes] = SimpleQueue()
        try:
            with obtaining("starting a thread"):
                threading.Thread(target=_receive, args=(pipe, tasks), daemon=True).start()
        except CopyError as error:
            while pipe.recv_bytes():
                pipe.send((None, error))
        while True:
            pipe.send_bytes(_outcome(tasks.get()))
    finally:
        os._exit(1)


def settle_in() -> None:
    """What a process does that is no guest: a worker, the command line."""
    # numpy would start a thread for each core, for nothing, and forking wants a single thread.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # What is decoded is trees of many objects: to look for cycles in them takes a quarter of the
    # time, again and again.
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)


def _receive(pipe: Connection, tasks: SimpleQueue[bytes]) -> None:
    """Take tasks at once, so that the parent never waits to be rid of one; end with it."""
    parent = os.getppid()
    try:
        while os.getppid() == parent:
            if pipe.poll(_LOOK_SECONDS):
                tasks.put(pipe.recv_bytes())
    finally:
        os._exit(1)


def _outcome(task: bytes) -> bytes:
    """The result of a task, and its error."""
    try:
        function, arguments = pickle.loads(task)
        return pickle.dumps((function(*arguments), None))
    except Exception as error:
        if sys.version_info >= (3, 11) and not isinstance(error, ConversionError):
            error.add_note(traceback.format_exc())  # no pickle carries it
        return pickle.dumps((None, error))


@contextmanager
def obtaining(call: str) -> Iterator[None]:
    """Name the call by which the system refused a process, a pipe or a thread.

    Raises:
        CopyError: it did.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CopyError.of(
            "worker processes",
            f"{call} failed ({getattr(error, 'strerror', error)})",
            cure="raise the limit (ulimit -a, or pids.max of the container), or use fewer with "
            "--num-max-processing-processes; then run again with --resume",
        ) from None
