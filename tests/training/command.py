"""The program under test, by its command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .spec import Run


def command(source: Path, iteration: Path, target: Run) -> list[str]:
    """Converts an iteration folder into the pipeline layout of a run."""
    folders = ["--load-iteration-dir", str(source), "--save-iteration-dir", str(iteration)]
    processes = ["--num-max-processing-processes", "2"]
    return ["-m", "pp_to_vpp", *folders, *target.target_options, *processes]


def convert(source: Path, root: Path, target: Run) -> Path:
    """Convert an iteration folder; the iteration folder of the result.

    Raises:
        RuntimeError: the program refused or failed; the message is what it said.
    """
    iteration = root / source.name
    done = subprocess.run(
        [sys.executable, *command(source, iteration, target)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr.strip()}")
    return iteration
