"""Has every Megatron-Core version that installs judge: our rules of that version, one by one, and
conversions of its checkpoints.

    python -m tests.compatibility.run [--versions 0.9 0.16 ...] [--cases MTP ...]

Prints a Markdown table. Versions are installed side by side and share the torch of this Python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from ..training.agreement import GROUP_RUNS, PROPERTIES, disagreement, groups_agree, release
from ..training.cases import CASES
from ..training.judge import Judge
from ..training.launch import Megatron, RankError, megatron
from ..training.spec import Run

VERSIONS = ("0.7", "0.8", "0.9", "0.10", "0.11", "0.12", "0.13", "0.14", "0.15", "0.16")
"""The newest release of each; later ones need a later Python."""
_BUILDS_MODELS = (0, 12)
"""Earlier ones are asked for their rules alone: their models need an earlier numpy."""
_RULES = (*PROPERTIES, "param groups")
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
            packages = [f"megatron-core=={wanted}"]
            if release(version) < (0, 9):
                packages.append("setuptools<81")  # the last with pkg_resources
            subprocess.run([*pip, "--target", str(target), *packages], check=True)
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


def judge_rules(server: Megatron, version: str) -> list[str]:
    """What comes of each rule, in a few words."""
    found = []
    for name, (since, _) in PROPERTIES.items():
        if release(version) < release(since):
            found.append("not asked")
            continue
        problem = disagreement(server, name, version)
        found.append("EQUAL" if problem is None else f"different: {problem[:300]}")
    return found


def judge_groups(server: Megatron, version: str) -> str:
    """What comes of the param groups of all runs."""
    if release(version) < _BUILDS_MODELS:
        return "not asked"
    for name, run in GROUP_RUNS.items():
        try:
            groups_agree(server, run, version)
        except AssertionError as error:
            return f"different: {name}: {str(error)[:300]}"
        except RankError as error:
            return f"Megatron cannot: {name}: {_last_line(error)}"
    return "EQUAL"


def judge_version(version: str, cases: list[str], cache: Path) -> tuple[str, list[str]]:
    """The full version, and what comes of each rule and case."""
    columns = len(_RULES) + len(cases)
    try:
        folder = install(version, cache)
    except subprocess.CalledProcessError:
        return version, ["does not install"] * columns
    builds_models = release(version) >= _BUILDS_MODELS
    with (
        megatron({"PYTHONPATH": str(folder)}, builds_models=builds_models) as server,
        tempfile.TemporaryDirectory(prefix="saved_") as saved,
    ):
        try:
            (name,) = server.run("version", Run(pp=1))
        except RankError as error:
            return version, [f"does not run: {_last_line(error)}"] * columns
        if not name.startswith(version):
            raise RuntimeError(f"asked for Megatron-Core {version}, got {name}")
        outcomes = [*judge_rules(server, name), judge_groups(server, name)]
        if not builds_models:
            return name, outcomes + ["not asked"] * len(cases)
        judge = Judge(server, Path(saved))
        return name, outcomes + [judge_case(judge, *CASES[case]) for case in cases]


def main() -> int:
    """Judge and print; 1 if a rule is another, or a conversion is wrong or refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility.run")
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="V")
    parser.add_argument(
        "--cases", nargs="*", default=_CASES, choices=CASES, metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--cache", type=Path, default=_CACHE, help="where versions are installed")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    columns = [*_RULES, *given.cases]
    print("| Megatron-Core |", " | ".join(columns), "|")  # noqa: T201 - a command
    print("|---" * (1 + len(columns)), "|", sep="")  # noqa: T201
    is_right = True
    for version in given.versions:
        name, outcomes = judge_version(version, given.cases, given.cache)
        print(f"| {name} |", " | ".join(outcomes), "|", flush=True)  # noqa: T201
        is_right &= all(
            outcome in ("EQUAL", "not asked") or outcome.startswith("Megatron cannot")
            for outcome in outcomes
        )
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
