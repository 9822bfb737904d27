"""The pool of worker processes: errors come back as they are, nobody is left behind."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.queues
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from pp_to_vpp.errors import CheckpointError, CopyError, VerificationError
from pp_to_vpp.run.workers import QUEUED_PER_WORKER, Workers

from ..pairs import DENSE, pair
from ..runs import command, environment


def pid_of(_: int = 0) -> int:
    return os.getpid()


def late_square(number: int) -> int:
    """Earlier jobs take longer, so that results come in another order than jobs."""
    time.sleep(0.05 if number % 4 == 0 else 0)
    return number * number


def fail(error: Exception) -> None:
    raise error


def die(_: int = 0) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long(_: int = 0) -> None:
    time.sleep(600)


def handlers() -> tuple[bool, bool]:
    """Whether Ctrl-C is left to the parent, and a plain kill ends a worker."""
    return (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
    )


def exists(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while exists(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not exists(pid)


def test_results_keep_the_order_of_the_jobs() -> None:
    with Workers(3) as workers:
        assert list(workers.map(late_square, range(40))) == [n * n for n in range(40)]


def test_work_is_done_elsewhere() -> None:
    with Workers(2) as workers:
        pids = set(workers.map(pid_of, range(20)))
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2


def test_few_jobs_wait_at_any_time() -> None:
    """Memory must not grow with the number of jobs: they are taken as results are."""
    taken = itertools.count()
    jobs = (next(taken) for _ in range(10_000))
    with Workers(2) as workers:
        results = workers.map(abs, jobs)
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert next(taken) <= 5 + QUEUED_PER_WORKER * 2 + 1


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("one line", "another line"),
        VerificationError("a; b"),
        CopyError("c"),
        KeyError("d"),
        OSError(28, "No space left"),
    ],
)
def test_errors_arrive_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, Workers(1) as workers:
        workers.result_of(workers.submit(fail, error))
    assert type(caught.value) is type(error)
    assert caught.value.args == error.args
    assert str(caught.value) == str(error)


def test_an_error_does_not_spoil_the_pool() -> None:
    with Workers(1) as workers:
        with pytest.raises(CopyError, match="lost"):
            list(workers.map(fail, [CopyError("lost")]))
        assert list(workers.map(late_square, [5])) == [25]


def test_a_killed_worker_is_one_clear_error() -> None:
    with pytest.raises(CopyError, match=r"it was killed.*--resume"), Workers(2) as w:
        w.result_of(w.submit(die))


def test_tasks_after_a_killed_worker_get_the_same_error() -> None:
    with Workers(1) as workers:
        with pytest.raises(CopyError, match="it was killed"):
            list(workers.map(die, [0]))
        with pytest.raises(CopyError, match="it was killed"):
            workers.submit(late_square, 1)


def ended(program: str) -> subprocess.CompletedProcess[str]:
    """A program that has ended by itself."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_tasks_that_fill_the_pipe_do_not_outlive_a_killed_worker() -> None:
    """Before Python 3.11.5 the pool's own thread waits for a reader of what it has written."""
    program = """
        import os, signal
        from pp_to_vpp.run.workers import Workers

        def die(data):
            os.kill(os.getpid(), signal.SIGKILL)

        with Workers(1) as workers:
            for _ in workers.map(die, [bytes(1_000_000)] * 4):
                pass
    """
    run = ended(program)
    assert "CopyError: worker process: it was killed" in run.stderr


def test_no_pipe_is_closed_twice_at_once() -> None:
    """Whoever came second would fail, and the pool's own thread wait for ever (Python 3.11.2)."""
    program = """
        import os, time
        from multiprocessing import connection
        from pp_to_vpp.run.workers import Workers

        def close_slowly(self):
            handle = self._handle
            time.sleep(0.05)
            os.close(handle)

        connection.Connection._close = close_slowly
        with Workers(2) as workers:
            workers.result_of(workers.submit(len, "a"))
        print("ended")
    """
    run = ended(program)
    assert (run.stdout, run.returncode) == ("ended\n", 0), run.stderr


def begin_a_result(_: int = 0) -> None:
    """Write the head of a result into the pool's pipe, as a worker with a large one does."""
    frame = sys._getframe()
    while "result_queue" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    os.write(frame.f_locals["result_queue"]._writer.fileno(), struct.pack("!i", 10_000) + b"x" * 9)


def begin_a_result_and_die(_: int = 0) -> None:
    begin_a_result()
    die()


def begin_a_result_and_sleep(_: int = 0) -> None:
    begin_a_result()
    sleep_long()


def test_a_worker_killed_while_it_answers_is_one_clear_error() -> None:
    """The pool's own thread waits for the rest of the answer."""
    with pytest.raises(CopyError, match=r"it was killed.*--resume"), Workers(2) as workers:
        workers.result_of(workers.submit(begin_a_result_and_die))


def test_killing_ends_workers_that_answer() -> None:
    with Workers(2) as workers:
        future = workers.submit(begin_a_result_and_sleep)
        time.sleep(0.3)
        assert not future.done()
        workers.kill()
    assert not multiprocessing.active_children()


def test_killing_ends_what_is_being_done() -> None:
    with Workers(2) as workers:
        assert list(workers.map(late_square, [1])) == [1]
        pids = {child.pid or 0 for child in multiprocessing.active_children()}
        assert len(pids) == 2
        running = [workers.submit(sleep_long) for _ in range(2)]
        began = time.monotonic()
        workers.kill()
        assert time.monotonic() - began < 10
        assert not any(exists(pid) for pid in pids)
        over = [future for future in running if future.done() and not future.cancelled()]
        assert all(future.exception() for future in over), "none came to its end"


def test_an_error_of_the_parent_ends_the_workers() -> None:
    pid = 0

    def work() -> None:
        nonlocal pid
        with Workers(1) as workers:
            pid = workers.result_of(workers.submit(pid_of))
            workers.submit(sleep_long)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert pid
    assert not exists(pid)


def test_leaving_in_peace_waits_for_the_workers() -> None:
    with Workers(1) as workers:
        pid = workers.result_of(workers.submit(pid_of))
        slow = workers.submit(time.sleep, 0.3)
    assert slow.done()
    assert not exists(pid)


def test_a_worker_that_does_not_answer_hinders_nobody_from_leaving() -> None:
    """As those do that wait for the lock which a killed one took along."""
    began = time.monotonic()
    with Workers(2) as workers:
        pids = {workers.result_of(workers.submit(pid_of)) for _ in range(20)}
        pids |= {process.pid or 0 for process in multiprocessing.active_children()}
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
    assert time.monotonic() - began < 10
    assert not any(exists(pid) for pid in pids)


def test_workers_leave_interruptions_to_their_parent() -> None:
    with Workers(1) as workers:
        assert workers.result_of(workers.submit(handlers)) == (True, True)


def test_workers_end_with_their_parent() -> None:
    """Even if it is killed, so that nobody writes on behind its back."""
    script = textwrap.dedent(
        """
        import time
        from pp_to_vpp.run.workers import Workers
        from tests.run.test_workers import pid_of, sleep_long
        workers = Workers(1)
        print(workers.submit(pid_of).result(), flush=True)
        workers.submit(sleep_long)
        time.sleep(600)
        """
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert exists(worker)
        parent.kill()
    assert wait_until_gone(worker)


def test_a_pool_without_threads_is_an_error_not_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's own thread dies where the system gives it none to feed the queue with."""

    def no_thread(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(multiprocessing.queues.Queue, "_start_thread", no_thread)
    hook = threading.excepthook
    reason = r"no more processes, threads or memory \(can't start new thread\).*--num-max"
    with pytest.raises(CopyError, match=reason), Workers(1) as workers:
        workers.result_of(workers.submit(pid_of))
    assert threading.excepthook is hook


def test_a_pool_without_processes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_process)
    with pytest.raises(CopyError, match="no more processes"), Workers(1) as workers:
        workers.submit(pid_of)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_shared_memory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    case, target = pair(DENSE), tmp_path / "iter_0000001"
    arguments = command(
        "--load-iteration-dir", case.source, "--save-iteration-dir", target, *case.options
    )
    mounted = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro none /dev/shm; exec "$@"']
    done = subprocess.run(
        [*mounted, "sh", *arguments], capture_output=True, text=True, env=environment(), cwd="/",
        timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 5, done
    assert "no more processes, threads or memory" in done.stderr
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()
