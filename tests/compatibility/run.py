"""Converts checkpoints of every Megatron-Core version that installs, and has each version judge.

    python -m tests.compatibility.run [--versions 0.12.0 0.16 ...] [--cases MTP ...]

Prints a Markdown table. Versions are installed side by side and share the torch of this Python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from ..training.cases import CASES
from ..training.judge import Judge
from ..training.launch import RankError, megatron
from ..training.spec import Run

VERSIONS = ("0.12", "0.13", "0.14", "0.15", "0.16")
"""The newest release of each; later ones need a later Python, earlier ones an earlier numpy."""
_CACHE = Path(__file__).parents[2] / "build" / "megatron"
_CASES = (
    "dense tied",
    "dense tied, odd sizes, DP 3",
    "dense, buckets",
    "MoE EP 2",
    "DeepSeek, first stage without experts",
    "back: experts leave the first stage",
    "MTP EP 2",
    "layout, an empty stage",
)


def install(version: str, cache: Path) -> Path:
    """Put a Megatron-Core release into a folder of its own, unless it is there.

    Raises:
        subprocess.CalledProcessError: pip could not.
    """
    folder = cache / version
    if not folder.exists():
        wanted = version if version.count(".") > 1 else f"{version}.*"
        with tempfile.TemporaryDirectory(prefix="megatron_", dir=cache) as temporary:
            # Without dependencies: torch, numpy and packaging of this Python do for all versions.
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            target = Path(temporary, version)
            subprocess.run([*pip, "--target", str(target), f"megatron-core=={wanted}"], check=True)
            target.rename(folder)
    return folder


def judge_case(judge: Judge, source: Run, target: Run) -> str:
    """What comes of one case, in a few words."""
    try:
        judge.saved(source), judge.saved(target)
    except RankError as error:
        return f"Megatron cannot: {_last_line(error)}"
    with tempfile.TemporaryDirectory(prefix="converted_") as folder:
        try:
            problems = list(judge.problems(source, target, Path(folder)))
        except RuntimeError as error:
            return f"refused: {_last_line(error)}"
        except RankError as error:
            return f"not loaded: {_last_line(error)}"
    return f"different: {len(problems)}, {problems[0]}" if problems else "EQUAL"


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:200].replace("|", "\\|")


def judge_version(version: str, cases: list[str], cache: Path) -> tuple[str, list[str]]:
    """The full version, and what comes of each case."""
    try:
        folder = install(version, cache)
    except subprocess.CalledProcessError:
        return version, ["does not install"] * len(cases)
    with (
        megatron({"PYTHONPATH": str(folder)}) as server,
        tempfile.TemporaryDirectory(prefix="saved_") as saved,
    ):
        try:
            (name,) = server.run("version", Run(pp=1))
        except RankError as error:
            return version, [f"does not run: {_last_line(error)}"] * len(cases)
        if not name.startswith(version):
            raise RuntimeError(f"asked for Megatron-Core {version}, got {name}")
        judge = Judge(server, Path(saved))
        return name, [judge_case(judge, *CASES[case]) for case in cases]


def main() -> int:
    """Judge and print; 1 if a conversion is wrong or refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility.run")
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="V")
    parser.add_argument(
        "--cases", nargs="+", default=_CASES, choices=CASES, metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--cache", type=Path, default=_CACHE, help="where versions are installed")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    print("| Megatron-Core |", " | ".join(given.cases), "|")  # noqa: T201 - a command
    print("|---" * (1 + len(given.cases)), "|", sep="")  # noqa: T201
    is_right = True
    for version in given.versions:
        name, outcomes = judge_version(version, given.cases, given.cache)
        print(f"| {name} |", " | ".join(outcomes), "|", flush=True)  # noqa: T201
        is_right &= all(
            outcome == "EQUAL" or outcome.startswith("Megatron cannot") for outcome in outcomes
        )
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
