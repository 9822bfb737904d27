"""Hostile files are refused in a line: nothing in them runs, time and memory stay small.

The files are committed; ``python -m tests.hostile.make`` makes them anew.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pp_to_vpp import cli
from pp_to_vpp.container.pickling import Global, Instance

from .edit import copy_of, rewrite
from .fuzz import forked
from .hostile import make
from .pairs import BUCKETS, pair
from .runs import Run, environment

FILES = sorted(path.stem for path in make.FOLDER.glob("*.pt"))
_SECONDS = 30
_MEGABYTES = 2048
_LIMITED = f"""
import resource, runpy
resource.setrlimit(resource.RLIMIT_AS, ({_MEGABYTES << 20}, {_MEGABYTES << 20}))
runpy.run_module("pp_to_vpp", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a real checkpoint for all tests of this module."""
    real = pair(BUCKETS).source
    return copy_of(real, tmp_path_factory.mktemp("hostile"))


def arguments(source: Path, target: Path, options: Sequence[str]) -> list[str]:
    """The command line of a conversion."""
    asked = options or ("--target-virtual-pipeline-model-parallel-size", "2")
    folders = ("--load-iteration-dir", str(source), "--save-iteration-dir", str(target))
    return [*folders, *asked, "--num-max-processing-processes", "1"]


def run_process(source: Path, target: Path, *options: str) -> Run:
    """The program as a process with limits, where code of a checkpoint would leave a canary."""
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, *arguments(source, target, options)],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment() | {"OPENBLAS_NUM_THREADS": "1"},
        cwd=target.parent.parent,
        timeout=_SECONDS,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def run_forked(source: Path, target: Path, *options: str) -> Run:
    """The same without the time to start Python."""
    return forked.run(
        lambda: cli.main(arguments(source, target, options)),
        target.parent.parent,
        seconds=_SECONDS,
        megabytes=_MEGABYTES,
    )


def assert_refused(run: Run, status: int, target: Path, named: str) -> None:
    """A refusal is its exit status and a plain line; nothing ran, nothing is published."""
    assert "Traceback" not in run.errors, run.errors[-2000:]
    assert run.status == status, (run.status, run.errors[-2000:])
    lines = [line for line in run.errors.splitlines() if line.startswith("pp_to_vpp: error: ")]
    assert any(named in line for line in lines), run.errors[-2000:]
    assert len(run.errors) < 50_000, "a refusal is for people"
    assert all(line.isprintable() for line in lines)
    assert not target.parent.exists()
    assert not (target.parent.parent / make.CANARY).exists(), "code of a checkpoint ran"


def assert_file_is_refused(
    name: str, source: Path, tmp_path: Path, run: Callable[..., Run]
) -> None:
    """Put a hostile file in its place, run, and put the real one back."""
    rank, file = {
        "model": ("mp_rank_00_000", "model_optim_rng.pt"),
        "optim": ("mp_rank_00_001", "distrib_optim.pt"),
    }[name.partition("-")[0]]
    path = source / rank / file
    before = path.read_bytes()
    shutil.copyfile(make.FOLDER / f"{name}.pt", path)
    target = tmp_path / "target" / source.name
    try:
        done = run(source, target)
    finally:
        path.write_bytes(before)
    named = "tell no possible placement" if name in make.IMPOSSIBLE else str(source)
    assert_refused(done, 4, target, named)


@pytest.mark.parametrize("name", FILES)
def test_hostile_files_are_refused(name: str, source: Path, tmp_path: Path) -> None:
    assert_file_is_refused(name, source, tmp_path, run_forked)


@pytest.mark.parametrize("name", FILES[::5])
def test_processes_refuse_them_too(name: str, source: Path, tmp_path: Path) -> None:
    assert_file_is_refused(name, source, tmp_path, run_process)


@pytest.mark.parametrize("name", make.LAYOUTS)
def test_hostile_layouts_are_refused(name: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target" / source.name
    option = f"--target-pipeline-model-parallel-layout={make.LAYOUTS[name]}"
    assert_refused(run_process(source, target, option), 3, target, "layout")


def test_the_files_are_those_that_the_script_makes() -> None:
    made = dict(make.cases())
    assert sorted(made) == FILES
    for name, content in made.items():
        assert (make.FOLDER / f"{name}.pt").read_bytes() == content, name
    assert sum(map(len, made.values())) < 1_500_000


def hold_itself(root: dict[str, Any]) -> None:
    root["rng_state"] = make.cycle()


def nest(root: dict[str, Any]) -> None:
    root["rng_state"] = nested(60)


def nested(depth: int) -> Any:
    """Lists of two that are one: 2**depth ways lead to the last."""
    made: list[Any] = []
    for _ in range(depth):
        made = [made, made]
    return made


ODD: dict[str, Callable[[dict[str, Any]], None]] = {"hold_itself": hold_itself, "nest": nest}


def run_full(source: Path, target: Path) -> Run:
    """A conversion with torch, whose libraries alone take gigabytes of addresses."""
    options = ("--target-virtual-pipeline-model-parallel-size", "2", "--verify", "full")
    return forked.run(
        lambda: cli.main(arguments(source, target, options)),
        target.parent.parent,
        seconds=_SECONDS,
        megabytes=1 << 16,
    )


@pytest.mark.parametrize(
    "case", [f"{depth}-{edit}" for depth in ("structure", "full") for edit in ODD]
)
def test_odd_objects_are_carried_or_refused(case: str, source: Path, tmp_path: Path) -> None:
    """What belongs to no layer is carried as it is, and nothing in it runs."""
    depth, _, edit = case.partition("-")
    own = copy_of(source, tmp_path)
    rewrite(own / "mp_rank_00_001" / "model_optim_rng.pt", ODD[edit])
    target = tmp_path / "target" / source.name
    options = ("--target-virtual-pipeline-model-parallel-size", "2", "--verify", depth)
    run = run_process(own, target, *options) if depth == "structure" else run_full(own, target)
    assert run.status in (0, 4), run.errors
    assert "Traceback" not in run.errors
    assert not (tmp_path / make.CANARY).exists()


SYSTEM = Instance(Global("posix", "system"), (f"touch {make.CANARY}",))


def in_arguments(root: dict[str, Any]) -> None:
    root["args"].state["own"] = [{"x": SYSTEM}]


def in_rng_state(root: dict[str, Any]) -> None:
    root["rng_state"] = SYSTEM


def in_a_group(root: dict[str, Any]) -> None:
    root["optimizer"]["optimizer"]["param_groups"][0]["own"] = SYSTEM


def not_called(root: dict[str, Any]) -> None:
    root["args"].state["own"] = SYSTEM.factory


@pytest.mark.parametrize("edit", [in_arguments, in_rng_state, in_a_group, not_called])
def test_what_would_act_is_named_and_not_carried_on(
    edit: Callable[[dict[str, Any]], None], source: Path, tmp_path: Path
) -> None:
    own = copy_of(source, tmp_path)
    path = own / "mp_rank_00_001" / "model_optim_rng.pt"
    rewrite(path, edit)
    target = tmp_path / "target" / source.name
    run = run_forked(own, target)
    assert_refused(run, 4, target, f"{path}: it calls or names posix.system")
