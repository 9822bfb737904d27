"""Running the program in tests: through its command line, in this process or its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pp_to_vpp import cli

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """What a run of the program came to."""

    status: int
    output: str
    errors: str


def command(*arguments: str | Path) -> list[str]:
    """The program as a process of its own."""
    return [sys.executable, "-m", "pp_to_vpp", *map(str, arguments)]


def environment() -> dict[str, str]:
    """An environment in which the program is importable from anywhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_process(*arguments: str | Path, timeout: float = 300) -> Run:
    """Run the program as a process of its own."""
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env=environment(),
        cwd="/",
        timeout=timeout,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


class Program:
    """Runs the command line in this process, which does the work too unless told otherwise."""

    def __init__(self, capsys: pytest.CaptureFixture[str], workers: int = 1) -> None:
        self._capsys = capsys
        self._workers = workers

    def __call__(self, *arguments: str | Path, workers: int | None = None) -> Run:
        self._capsys.readouterr()
        count = str(workers or self._workers)
        given = [*map(str, arguments), "--num-max-processing-processes", count]
        try:
            status = cli.main(given)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        captured = self._capsys.readouterr()
        return Run(status, captured.out, captured.err)

    def convert(
        self, source: Path, target: Path, options: Sequence[str] = (), *more: str | Path
    ) -> Run:
        """Convert one folder into another; VPP 2 unless the options ask for something else."""
        asked = list(options) or ["--target-virtual-pipeline-model-parallel-size", "2"]
        return self("--load-iteration-dir", source, "--save-iteration-dir", target, *asked, *more)

    def refuses(self, status: int, run: Run, *reasons: str) -> None:
        """Assert a refusal: its exit status, and lines that are lines, one of which tells why."""
        assert run.status == status, run
        assert "Traceback" not in run.errors
        lines = [line for line in run.errors.splitlines() if line.startswith("pp_to_vpp: error: ")]
        assert lines, run.errors
        for reason in reasons:
            assert reason in run.errors
        assert all(";" in line or ":" in line for line in lines)
