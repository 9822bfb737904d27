"""What the benchmark makes is what Megatron could have saved: the program plans it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .runs import ROOT, Program, environment


def make(root: Path, call: str) -> None:
    """Call the maker of checkpoints, as the benchmark does in a process of its own."""
    script = f"from pathlib import Path; from benchmarking import checkpoint as c; {call}"
    arguments = [sys.executable, "-c", script, str(root)]
    subprocess.run(arguments, check=True, cwd=ROOT / "scripts", env=environment(), timeout=120)


@pytest.mark.parametrize("is_layer_wise", [False, True])
def test_the_made_checkpoint_converts(
    is_layer_wise: bool, program: Program, tmp_path: Path
) -> None:
    """Its numbers are those of a state after a step, so that full verification holds."""
    call = f"import sys; c.make(Path(sys.argv[1]), 4_000_000, is_layer_wise={is_layer_wise})"
    make(tmp_path / "made", call)
    (source,) = (tmp_path / "made").iterdir()
    target = tmp_path / "target" / source.name
    run = program.convert(source, target, (), "--verify", "full")
    assert run.status == 0, run


def test_the_simulated_deepseek_v3_is_planned(program: Program, tmp_path: Path) -> None:
    """All its stages, with 2 instead of 64 expert ranks: the first has no experts."""
    call = "import sys; c.V3_EP_SIZE = 2; c.make_deepseek_v3(Path(sys.argv[1]))"
    make(tmp_path / "made", call)
    (source,) = (tmp_path / "made").iterdir()
    report = tmp_path / "plan.json"
    run = program(
        "--load-iteration-dir", source, "--dry-run", "--report", report, "--share", "0/8",
        "--target-pipeline-model-parallel-layout", "Et*3|(tt|)*29m|L",
    )  # fmt: skip
    assert run.status == 0, run
    share = json.loads(report.read_text())["share"]
    assert (share["folders"], share["count"]) == (4, 8)
    assert share["largest_over_mean"] < 1.4
