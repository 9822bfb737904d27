"""Starts the processes of Megatron runs.

Importing torch and Megatron takes seconds and a run of a tiny model does not. So one server
process imports them once, and forks the ranks of every run. What a server imports and does with a
job is decided by the module that it runs: this one, or ``tests.sweep.host``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .spec import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    _Actions = Mapping[str, Callable[..., Any]]

TIMEOUT = 300.0
_GRACE = 2.0
"""When one rank has failed the others wait for it; so long they may still report."""


class RankError(Exception):
    """A rank of a run failed; the message is its traceback."""


class Megatron:
    """The server process, seen from a test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, action: str, run: Run, **options: Any) -> list[Any]:
        """Do an action of ``rules`` or ``worker`` in as many processes as the run needs.

        Returns:
            what each rank returned.

        Raises:
            RankError: a rank raised, died, or took too long.
        """
        return self.ask({"action": action, "run": run.to_json(), "options": options})

    def ask(self, job: Mapping[str, Any]) -> list[Any]:
        """Have a job done, by as many processes as it needs.

        Returns:
            what each rank returned.

        Raises:
            RankError: a rank raised, died, or took too long.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RankError("the server is gone; its standard error tells why")
        outcome = json.loads(answer)
        if "failure" in outcome:
            raise RankError(outcome["failure"])
        results: list[Any] = outcome["results"]
        return results


@contextlib.contextmanager
def megatron(
    environment: Mapping[str, str] | None = None, *, builds_models: bool = True
) -> Iterator[Megatron]:
    """The installed Megatron-Core.

    Args:
        environment: variables that it gets besides those of this process.
        builds_models: also does the actions of ``worker``, not only those of ``rules``.
    """
    with server(__name__, *(["--models"] if builds_models else []), **(environment or {})) as found:
        yield found


@contextlib.contextmanager
def server(module: str, *arguments: str, **environment: str) -> Iterator[Megatron]:
    """A module that serves, with its arguments and variables besides those of this process; all
    that it starts ends with the context."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        start_new_session=True,
    )
    try:
        yield Megatron(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def serve(do: Callable[[dict[str, Any]], dict[str, Any]], answers: IO[str]) -> None:
    """Do the job of each line of standard input, until it ends."""
    for line in sys.stdin:
        answers.write(json.dumps(do(json.loads(line))) + "\n")
        answers.flush()


def answering() -> IO[str]:
    """Where answers go. Whatever Megatron prints is none, and goes to standard error."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _serve(answers: IO[str], *, builds_models: bool) -> None:
    import torch

    from . import cpu

    torch.set_num_threads(1)  # also because threads do not survive a fork
    cpu.install()
    from . import rules  # brings Megatron in

    actions = rules.ACTIONS
    if builds_models:
        from . import worker

        cpu.patch_megatron()
        actions = {**actions, **worker.ACTIONS}
    serve(lambda job: _run(job, actions), answers)


def _run(job: dict[str, Any], actions: _Actions) -> dict[str, Any]:
    run = Run.from_json(job["run"])
    return run_world(run.world_size, lambda: actions[job["action"]](run, **job["options"]))


def run_world(size: int, do: Callable[[], Any], seconds: float = TIMEOUT) -> dict[str, Any]:
    """Fork so many ranks, have each of them do something, and wait for them."""
    with tempfile.TemporaryDirectory(prefix="megatron_world_") as folder:

        def do_as_one_of_many(rank: int) -> Any:
            _join_world(rank, size, Path(folder, "store"))
            return do()

        ranks = {_fork_rank(rank, do_as_one_of_many, Path(folder)): rank for rank in range(size)}
        failed = _wait(dict(ranks), time.monotonic() + seconds)
        if failed is not None:
            log = Path(folder, f"{failed}.log")
            return {"failure": f"rank {failed} of {size}:\n{log.read_text()[-6000:]}"}
        return {
            "results": [
                json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)
            ]
        }


def _wait(running: dict[int, int], deadline: float) -> int | None:
    """Wait for all processes (their ranks by process id); the rank that failed first, if any."""
    failed: int | None = None
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            rank = running.pop(process)
            if status and failed is None:
                failed, deadline = rank, time.monotonic() + _GRACE
        elif time.monotonic() > deadline:
            failed = next(iter(running.values())) if failed is None else failed
            for process in running:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            return failed
        else:
            time.sleep(0.005)
    return failed


def _fork_rank(rank: int, do: Callable[[int], Any], folder: Path) -> int:
    """Start one rank; its process id. Its result and its log become files in the folder."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        Path(folder, f"{rank}.json").write_text(json.dumps(do(rank)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _join_world(rank: int, size: int, store: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)


if __name__ == "__main__":
    _serve(answering(), builds_models="--models" in sys.argv)
