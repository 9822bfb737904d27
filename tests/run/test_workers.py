"""The pool of worker processes: errors come back as they are, nobody is left behind."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pp_to_vpp.errors import CheckpointError, CopyError, VerificationError
from pp_to_vpp.run import workers as module
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


@pytest.fixture(autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How workers are started, whatever threads this process has."""
    found: str = getattr(request, "param", "fork")
    monkeypatch.setattr(module, "_has_one_thread", lambda: found == "fork")
    return found


both_ways = pytest.mark.parametrize("way", ["fork", "spawn"], indirect=True)


@both_ways
def test_results_keep_the_order_of_the_jobs() -> None:
    with Workers(3) as workers:
        assert list(workers.map(late_square, range(40))) == [n * n for n in range(40)]


def test_work_is_done_elsewhere() -> None:
    with Workers(2) as workers:
        pids = set(workers.map(pid_of, range(20)))
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2


def test_one_process_is_that_of_the_caller() -> None:
    with Workers(1) as workers:
        assert set(workers.map(pid_of, range(3))) == {os.getpid()}
        with pytest.raises(CopyError, match="lost"):
            workers.result_of(workers.submit(fail, CopyError("lost")))


def in_daemonic_process(_: int) -> tuple[bool, ...]:
    with Workers(2) as workers:
        return tuple(pid == os.getpid() for pid in workers.map(pid_of, range(3)))


def test_a_daemonic_process_does_the_work_itself() -> None:
    """It may have no children."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(in_daemonic_process, [0]) == [(True, True, True)]


def threads() -> list[str]:
    return os.listdir("/proc/self/task")


@pytest.mark.parametrize("way", ["spawn"], indirect=True)
def test_a_process_with_threads_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copied while a thread holds a lock waits for it for ever; Python 3.12 warns of that."""
    monkeypatch.undo()
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    monkeypatch.setattr(os, "fork", fail)
    try:
        with Workers(2) as workers:
            assert workers.result_of(workers.submit(os.getppid)) == os.getpid()
    finally:
        over.set()
        thread.join()


def test_a_process_of_one_thread_is_forked() -> None:
    """The command line is one, and numpy gives it no more."""
    program = """
        import os
        from pp_to_vpp.run.workers import Workers, settle_in

        settle_in()
        import numpy

        del os.posix_spawn
        with Workers(2) as workers:
            print(workers.result_of(workers.submit(os.getppid)) == os.getpid())
    """
    run = ended(program)
    assert (run.stdout, run.stderr) == ("True\n", "")


def state() -> list[Any]:
    """What a pool may not change for the process that has it."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return [threads(), handlers, blocked, threading.excepthook, multiprocessing.active_children()]


@both_ways
def test_the_caller_gets_nothing_but_pipes() -> None:
    before, files = state(), os.listdir("/proc/self/fd")
    with Workers(2) as workers:
        assert list(workers.map(late_square, range(9)))
        assert state() == before
    assert state() == before
    assert os.listdir("/proc/self/fd") == files


@both_ways
def test_signals_that_the_caller_handles_do_nothing_in_workers() -> None:
    """Schedulers send them to all processes of a job, and one of them is to act."""
    old = signal.signal(signal.SIGUSR1, lambda *_: os._exit(7))
    try:
        with Workers(2) as workers:
            pids = workers.map(pid_of, range(4))
            os.kill(next(pids), signal.SIGUSR1)
            assert len(list(pids)) == 3
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_few_jobs_wait_at_any_time() -> None:
    """Memory must not grow with the number of jobs: they are taken as results are."""
    taken = itertools.count()
    jobs = (next(taken) for _ in range(10_000))
    with Workers(2) as workers:
        results = workers.map(abs, jobs)
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert next(taken) <= 5 + QUEUED_PER_WORKER * 2 + 1


def test_nobody_has_two_tasks_while_another_has_none() -> None:
    """What is given to a worker cannot be taken back: it would wait behind a long task."""
    with Workers(2) as workers:
        long = workers.submit(time.sleep, 1.5)
        short = [workers.submit(pid_of) for _ in range(3)]
        for future in short:
            workers.result_of(future)
        assert not long.done()


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
    with pytest.raises(type(error)) as caught, Workers(2) as workers:
        workers.result_of(workers.submit(fail, error))
    assert type(caught.value) is type(error)
    assert caught.value.args == error.args
    assert str(caught.value) == str(error)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes")
def test_an_unexpected_error_tells_where_it_happened() -> None:
    with pytest.raises(KeyError) as caught, Workers(2) as workers:
        workers.result_of(workers.submit(fail, KeyError("d")))
    assert "in fail" in caught.value.__notes__[0]


def test_what_cannot_be_sent_is_an_error() -> None:
    with pytest.raises((TypeError, AttributeError), match="pickle"), Workers(2) as workers:
        workers.result_of(workers.submit(threading.Lock))


def test_an_error_does_not_spoil_the_pool() -> None:
    with Workers(2) as workers:
        with pytest.raises(CopyError, match="lost"):
            list(workers.map(fail, [CopyError("lost")]))
        assert list(workers.map(late_square, [5])) == [25]


@both_ways
def test_a_killed_worker_is_one_clear_error() -> None:
    with pytest.raises(CopyError, match=r"it was killed.*--resume"), Workers(2) as w:
        w.result_of(w.submit(die))


def test_a_killed_worker_is_noticed_at_once() -> None:
    with Workers(2) as workers:
        (pid,) = {workers.result_of(workers.submit(pid_of))}
        futures = [workers.submit(sleep_long) for _ in range(2)]
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(CopyError, match="it was killed"):
            workers.wait(futures)
        assert time.monotonic() - began < 0.5
        workers.kill()


def test_tasks_after_a_killed_worker_get_the_same_error() -> None:
    with Workers(2) as workers:
        with pytest.raises(CopyError, match="it was killed"):
            list(workers.map(die, [0]))
        with pytest.raises(CopyError, match="it was killed"):
            list(workers.map(late_square, range(9)))
        workers.kill()


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


def die_of(_: bytes) -> None:
    die()


def test_tasks_that_fill_the_pipe_do_not_outlive_a_killed_worker() -> None:
    with pytest.raises(CopyError, match="it was killed"), Workers(2) as workers:
        list(workers.map(die_of, [bytes(1_000_000)] * 8))


def test_both_ends_may_fill_the_pipe_at_once() -> None:
    """Neither waits for the other one to read."""
    with Workers(2) as workers:
        futures = [workers.submit(bytes.upper, b"a" * 5_000_000) for _ in range(12)]
        assert {len(workers.result_of(future)) for future in futures} == {5_000_000}


def begin_a_result(_: int = 0) -> None:
    """Write the head of a result into the worker's pipe, as one with a large one does."""
    frame = sys._getframe()
    while "pipe" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    os.write(frame.f_locals["pipe"].fileno(), struct.pack("!i", 10_000) + b"x" * 9)


def begin_a_result_and_die(_: int = 0) -> None:
    begin_a_result()
    die()


def begin_a_result_and_sleep(_: int = 0) -> None:
    begin_a_result()
    sleep_long()


def a_large_result(_: int = 0) -> bytes:
    """So large that nobody has read it when the worker is killed."""
    threading.Timer(0.3, die).start()
    return bytes(100_000_000)


@both_ways
@pytest.mark.parametrize("task", [begin_a_result_and_die, a_large_result])
def test_a_worker_killed_while_it_answers_is_one_clear_error(task: Any) -> None:
    with Workers(2) as workers:
        future = workers.submit(task)
        time.sleep(1)
        with pytest.raises(CopyError, match=r"it was killed.*--resume"):
            workers.result_of(future)
        workers.kill()


def test_killing_ends_workers_that_answer() -> None:
    with Workers(2) as workers:
        future = workers.submit(begin_a_result_and_sleep)
        time.sleep(0.3)
        assert not future.done()
        workers.kill()
    assert not children()


def children() -> list[int]:
    """All processes that this one has started and not waited for."""
    found = []
    for task in threads():
        text = Path(f"/proc/self/task/{task}/children").read_text()
        found += [int(pid) for pid in text.split()]
    return found


def test_killing_ends_what_is_being_done() -> None:
    strangers = set(children())
    with Workers(2) as workers:
        assert list(workers.map(late_square, [1])) == [1]
        pids = set(children()) - strangers
        assert len(pids) == 2
        running = [workers.submit(sleep_long) for _ in range(2)]
        began = time.monotonic()
        workers.kill()
        assert time.monotonic() - began < 10
        assert not any(exists(pid) for pid in pids)
        assert not any(future.done() for future in running), "none came to its end"


def test_an_error_of_the_parent_ends_the_workers() -> None:
    pid = 0

    def work() -> None:
        nonlocal pid
        with Workers(2) as workers:
            pid = workers.result_of(workers.submit(pid_of))
            workers.submit(sleep_long)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert pid
    assert not exists(pid)


def test_leaving_in_peace_waits_for_the_workers() -> None:
    with Workers(2) as workers:
        pid = workers.result_of(workers.submit(pid_of))
        slow = workers.submit(time.sleep, 0.3)
    assert slow.done()
    assert not exists(pid)


def test_a_worker_that_does_not_answer_hinders_nobody_from_leaving() -> None:
    strangers = set(children())
    began = time.monotonic()
    with Workers(2) as workers:
        pids = {workers.result_of(workers.submit(pid_of)) for _ in range(20)}
        pids |= set(children()) - strangers
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
    assert time.monotonic() - began < 10
    assert not any(exists(pid) for pid in pids)


def test_who_waits_looks_up_now_and_then() -> None:
    looked = []
    with Workers(2, lambda: looked.append(time.monotonic())) as workers:
        workers.result_of(workers.submit(time.sleep, 2.5))
    assert looked


def test_a_caller_that_waits_for_all_its_children_is_no_hindrance() -> None:
    """As hosts do that take whatever child has ended."""
    old = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel does it for them
    try:
        with pytest.raises(CopyError, match="it was killed"), Workers(2) as workers:
            workers.result_of(workers.submit(die))
        with Workers(2) as workers:
            assert list(workers.map(late_square, [1])) == [1]
    finally:
        signal.signal(signal.SIGCHLD, old)


@both_ways
def test_workers_leave_interruptions_to_their_parent() -> None:
    with Workers(2) as workers:
        assert workers.result_of(workers.submit(handlers)) == (True, True)


@both_ways
@pytest.mark.parametrize("has_stranger", [False, True])
def test_workers_end_with_their_parent(has_stranger: bool, way: str) -> None:
    """Even if it is killed, so that nobody writes on behind its back; and if another child of it
    lives on, that has its ends of the pipes as well."""
    script = textwrap.dedent(
        f"""
        import os, time
        from pp_to_vpp.run import workers as module
        from tests.run.test_workers import pid_of, sleep_long
        module._has_one_thread = lambda: {way == "fork"}
        workers = module.Workers(2)
        pid = workers.result_of(workers.submit(pid_of))
        workers.submit(sleep_long)
        stranger = os.fork() if {has_stranger} else 0
        if stranger or not {has_stranger}:
            print(pid, stranger, flush=True)
        time.sleep(600)
        """
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as parent:
        assert parent.stdout is not None
        worker, stranger = map(int, parent.stdout.readline().split())
        assert exists(worker)
        parent.kill()
        try:
            assert wait_until_gone(worker)
        finally:
            if stranger:
                os.kill(stranger, signal.SIGKILL)


def refuse(*_: object, **__: object) -> NoReturn:
    raise BlockingIOError(11, "Resource temporarily unavailable")


@both_ways
def test_a_pool_without_processes_is_an_error(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", refuse)
    monkeypatch.setattr(os, "posix_spawn", refuse)
    name = {"fork": "fork", "spawn": "posix_spawn"}[way]
    reason = rf"{name} failed \(Resource temporarily unavailable\).*ulimit.*pids\.max.*--num-max"
    with pytest.raises(CopyError, match=reason), Workers(2) as workers:
        workers.submit(pid_of)


def test_a_worker_without_threads_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    reason = r"starting a thread failed \(can't start new thread\).*ulimit.*--num-max"
    with pytest.raises(CopyError, match=reason), Workers(2) as workers:
        list(workers.map(pid_of, range(20)))


@contextlib.contextmanager
def few_files() -> Iterator[None]:
    """No more than a process has anyway."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_pool_without_pipes_is_an_error() -> None:
    reason = r"socketpair failed \(Too many open files\).*ulimit"
    with few_files(), pytest.raises(CopyError, match=reason), Workers(2) as workers:
        workers.submit(pid_of)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_no_shared_memory_is_needed(tmp_path: Path) -> None:
    case, target = pair(DENSE), tmp_path / "iter_0000001"
    arguments = command(
        "--load-iteration-dir", case.source, "--save-iteration-dir", target, *case.options,
        "--num-max-processing-processes", "2",
    )  # fmt: skip
    mounted = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro none /dev/shm; exec "$@"']
    done = subprocess.run(
        [*mounted, "sh", *arguments], capture_output=True, text=True, env=environment(), cwd="/",
        timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
    assert target.exists()
