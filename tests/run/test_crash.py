"""Interruptions: killed, stopped, out of space, two at once. What is there is whole."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pp_to_vpp.megatron.ranks import RankId
from pp_to_vpp.run import copying, schedule, signs, target_folder

from ..edit import copy_of, rewrite
from ..pairs import LAYER_WISE_WIDE, MOE, pair
from ..runs import Program, command, environment, run_process
from ..sizes import NAMES as SIZES
from ..sizes import PIPED, way
from .test_convert import files_of
from .test_signs import mark

KILLS = int(os.environ.get("PP_TO_VPP_KILLS", "6"))
"""The long suite raises this (see CONTRIBUTING.md)."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """What an undisturbed conversion of a pair writes."""

    @functools.cache
    def convert(name: str) -> dict[str, bytes]:
        target = tmp_path_factory.mktemp("undisturbed") / "iter_0000001"
        run = run_process(*_arguments(target, name=name))
        assert run.status == 0, run
        return files_of(target)

    return convert


@pytest.fixture(scope="module")
def undisturbed(written: Callable[[str], dict[str, bytes]]) -> dict[str, bytes]:
    """What an undisturbed conversion writes."""
    return written(MOE)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    """The command line, with worker processes."""
    return Program(capsys, workers=2)


def _arguments(target: Path, *more: str, name: str = MOE) -> list[str | Path]:
    case = way(name) if name in SIZES else pair(name)
    return [
        "--load-iteration-dir", case.source, "--save-iteration-dir", target,
        "--num-max-processing-processes", "2", *case.options, *more,
    ]  # fmt: skip


def start(target: Path, *, name: str = MOE) -> subprocess.Popen[str]:
    """Start a conversion in a process group of its own."""
    return subprocess.Popen(
        command(*_arguments(target, name=name)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd="/",
        start_new_session=True,
    )


def children(pid: int) -> list[int]:
    """The worker processes of a run."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(child) for child in path.read_text().split()]
    except OSError:
        return []


def wait_until_gone(pids: list[int]) -> None:
    """Workers end with their parent."""
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.02)


def wait_until_writing(target: Path, process: subprocess.Popen[str]) -> None:
    """The first temporary folder is there."""
    while process.poll() is None and not [*target.glob(".writing-*")]:
        time.sleep(0.001)


def check_what_is_there(target: Path, undisturbed: dict[str, bytes]) -> None:
    """Published folders are whole, and the tracker is there only when all are."""
    published = (
        {path for path in files_of(target) if path.startswith("mp_rank")}
        if (target.exists())
        else set()
    )
    found = files_of(target) if target.exists() else {}
    for path in published:
        assert found[path] == undisturbed[path]
    folders_there = {path.split("/")[0] for path in published}
    for folder in folders_there:
        assert {p for p in undisturbed if p.startswith(folder + "/")} <= published
    if (target.parent / "latest_checkpointed_iteration.txt").exists():
        assert published == set(undisturbed)


@pytest.mark.parametrize(
    ("victim", "name", "kills"),
    [
        ("parent", MOE, KILLS),
        ("worker", MOE, KILLS),
        ("parent", LAYER_WISE_WIDE, KILLS // 2),
        ("parent", PIPED, KILLS // 2),
    ],
)
def test_killed_at_any_moment_a_rerun_ends_with_the_same_bytes(
    victim: str, name: str, kills: int, tmp_path: Path, written: Callable[[str], dict[str, bytes]]
) -> None:
    chooser = random.Random(victim)
    began = time.monotonic()
    assert run_process(*_arguments(tmp_path / "t" / "iter_0000001", name=name)).status == 0
    duration = time.monotonic() - began
    undisturbed = written(name)
    for kill in range(kills):
        target = tmp_path / str(kill) / "iter_0000001"
        process = start(target, name=name)
        if kill == 0:
            wait_until_writing(target, process)  # one kill comes in time on any machine
        else:
            time.sleep(chooser.uniform(0.05, duration))
        workers = children(process.pid)
        if victim == "parent":
            process.kill()  # knows of an ended child, whose number may be another's by now
        else:
            with contextlib.suppress(ProcessLookupError):
                for worker in workers[:1]:
                    os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        wait_until_gone(workers)
        assert kill or process.returncode
        if victim == "worker" and process.returncode not in (0, None):
            assert process.returncode == 5, errors
            assert "it was killed" in errors
        check_what_is_there(target, undisturbed)
        again = run_process(*_arguments(target, "--resume", name=name))
        assert again.status == 0, again
        assert files_of(target) == undisturbed
        assert [p for p in target.iterdir() if p.name.startswith(".")] == []
        shutil.rmtree(target.parent)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_at_once_and_cleans_up(
    sign: signal.Signals, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    target = tmp_path / "iter_0000001"
    process = start(target)
    while not target.exists() and process.poll() is None:
        time.sleep(0.001)
    began = time.monotonic()
    os.killpg(process.pid, sign)  # as a terminal does: everybody gets it
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the conversion was faster than the signal")
    assert process.returncode == 130, errors
    assert time.monotonic() - began < 5
    assert "Traceback" not in errors
    assert "--resume" in errors
    check_what_is_there(target, undisturbed)
    assert [p for p in target.iterdir() if p.name.startswith(".")] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 10 MB."""
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=10m", "none", str(path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_too_little_space_is_told_before_the_first_byte(small_disk: Path, program: Program) -> None:
    run = program.convert(pair(MOE).source, small_disk / "iter_0000001", pair(MOE).options)
    program.refuses(5, run, "too little free space", "bytes free")
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_is_one_clear_error(
    small_disk: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Space that is there at the start and gone in the middle."""
    monkeypatch.setattr(target_folder, "check_space", lambda *_: None)
    target = small_disk / "iter_0000001"
    run = program.convert(pair(MOE).source, target, pair(MOE).options)
    program.refuses(5, run, "No space left on device", "free some space")
    assert list(target.glob(".*")) == [], "half-written folders are removed"


def test_a_read_only_target_is_one_clear_error(program: Program, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("not a folder")
    run = program.convert(pair(MOE).source, target / "iter_0000001", pair(MOE).options)
    program.refuses(5, run, "cannot be written")


_copy = copying.copy


def copy_and_touch(task: copying.CopyTask) -> tuple[int | None, ...]:
    """Copies in a worker while somebody writes to the source."""
    found = _copy(task)
    os.utime(os.environ["TOUCHED"], ns=(1, 1))
    return found


def test_a_source_that_changes_meanwhile_is_noticed(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy_of(pair(MOE).source, tmp_path)
    touched = source / "mp_rank_00_001_000" / "distrib_optim.pt"
    monkeypatch.setenv("TOUCHED", str(touched))
    monkeypatch.setattr(schedule, "copy", copy_and_touch)
    target = tmp_path / "target" / "iter_0000001"
    run = program.convert(source, target, pair(MOE).options)
    program.refuses(5, run, "the source changed during the run", str(touched))
    assert not target.exists()


def test_a_source_that_is_truncated_before_is_refused(program: Program, tmp_path: Path) -> None:
    for keep in (0, 100, 100_000):
        source = copy_of(pair(MOE).source, tmp_path / str(keep))
        path = source / "mp_rank_00_001_000" / "distrib_optim.pt"
        os.truncate(path, keep)
        run = program.convert(source, tmp_path / "x", pair(MOE).options)
        program.refuses(4, run, str(path))


def test_resuming_keeps_what_is_whole(
    program: Program, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    target = tmp_path / "iter_0000001"
    assert program.convert(pair(MOE).source, target, pair(MOE).options).status == 0
    kept = target / "mp_rank_00_000_000"
    stamps = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    shutil.rmtree(target / "mp_rank_00_001_000")
    run = program.convert(pair(MOE).source, target, pair(MOE).options, "--resume")
    assert run.status == 0
    assert "wrote 1 rank folders" in run.output
    assert "kept 3 from an earlier run" in run.output
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == stamps
    assert files_of(target) == undisturbed


@pytest.mark.parametrize("depth", ["structure", "full"])
def test_resuming_does_not_keep_what_is_wrong(depth: str, program: Program, tmp_path: Path) -> None:
    target = tmp_path / "iter_0000001"
    assert program.convert(pair(MOE).source, target, pair(MOE).options).status == 0
    rewrite(
        target / "mp_rank_00_000_000" / "model_optim_rng.pt", lambda root: root.update(iteration=9)
    )
    more = ("--resume", "--verify", depth)
    run = program.convert(pair(MOE).source, target, pair(MOE).options, *more)
    program.refuses(2, run, "not what this conversion writes (model_optim_rng.pt)", "--resume")


def test_resuming_another_conversion_is_refused(program: Program, tmp_path: Path) -> None:
    target = tmp_path / "iter_0000001"
    assert program.convert(pair(MOE).source, target, pair(MOE).options).status == 0
    shutil.rmtree(target / "mp_rank_00_001_000")
    options = ("--target-virtual-pipeline-model-parallel-size", "4", "--resume")
    run = program.convert(pair(MOE).source, target, options)
    program.refuses(2, run, "pp_to_vpp.json: another conversion writes, or wrote, this target")
    (target / "pp_to_vpp.json").unlink()
    run = program.convert(pair(MOE).source, target, options)
    program.refuses(2, run, "not what this conversion writes")


def _leftover(target: Path, mark: str) -> Path:
    folder = RankId(0, 0, 0).folder
    path = target / f".writing-{folder}.{mark}"
    path.mkdir(parents=True)
    (path / "distrib_optim.pt").write_bytes(b"half")
    return path


def test_leftovers_of_dead_runs_are_cleared(program: Program, tmp_path: Path) -> None:
    target = tmp_path / "iter_0000001"
    process = subprocess.Popen(["true"])
    process.wait()
    dead = [
        _leftover(target, mark(process.pid, "123")),
        _leftover(target, mark(1, "0")),  # the number lives on, the process does not
        _leftover(target, "dead"),
    ]
    elsewhere = _leftover(target, "another-host-5-77")
    for path in (elsewhere, elsewhere / "distrib_optim.pt"):
        os.utime(path, (0, 0))
    assert program.convert(pair(MOE).source, target, pair(MOE).options).status == 0
    assert not any(path.exists() for path in (*dead, elsewhere))


def test_a_second_run_at_the_same_time_is_refused(program: Program, tmp_path: Path) -> None:
    target = tmp_path / "iter_0000001"
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        here = _leftover(target, mark(sleeper.pid))
        run = program.convert(pair(MOE).source, target, pair(MOE).options)
        program.refuses(2, run, "another run is writing rank folders of this target now", "--share")
        assert here.exists()
        shutil.rmtree(here)
        there = _leftover(target, "another-host-5-77")
        run = program.convert(pair(MOE).source, target, pair(MOE).options)
        program.refuses(2, run, "another run is writing rank folders of this target now")
        assert there.exists()
    finally:
        sleeper.kill()
        sleeper.wait()


def test_two_runs_that_start_together_do_no_harm(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    target = tmp_path / "iter_0000001"
    runs = [start(target), start(target)]
    for process in runs:
        process.communicate(timeout=120)
    assert any(process.returncode == 0 for process in runs) or (
        run_process(*_arguments(target, "--resume")).status == 0
    )
    check_what_is_there(target, undisturbed)
    assert files_of(target) == undisturbed


def test_a_resumed_run_waits_for_a_live_one(
    program: Program, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """On this host until its process is gone; what that leaves is taken over at once."""
    target = tmp_path / "iter_0000001"
    with subprocess.Popen(["sleep", "3"]) as other:
        _leftover(target, mark(other.pid))
        began = time.monotonic()
        reaper = threading.Thread(target=other.wait)  # else it stays, dead, in the list
        reaper.start()
        run = program.convert(pair(MOE).source, target, pair(MOE).options, "--resume")
        reaper.join()
    assert run.status == 0, run
    assert time.monotonic() - began > 2
    assert f"waiting: mp_rank_00_000_000: another run is writing it (process {other.pid} of " in (
        run.errors
    )
    assert "until it ends" in run.errors
    assert files_of(target) == undisturbed


def test_a_resumed_run_takes_over_from_a_silent_host(
    program: Program, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "iter_0000001"
    _leftover(target, mark(host="another"))
    monkeypatch.setattr(signs, "SILENT_SECONDS", 3.0)
    run = program.convert(pair(MOE).source, target, pair(MOE).options, "--resume")
    assert run.status == 0, run
    assert "of another, last sign of life" in run.errors
    assert "it is taken over after" in run.errors
    assert files_of(target) == undisturbed


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to make namespaces")
def test_a_run_of_another_host_that_fell_silent_is_taken_over(
    program: Program, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when that one goes on after all, it does no harm, and takes what is there as done."""
    target = tmp_path / "iter_0000001"
    there = subprocess.Popen(
        ["unshare", "--uts", "sh", "-c", 'hostname other-node; exec "$@"', "sh",
         *command(*_arguments(target))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd="/",
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(target.glob(".writing-*")) and there.poll() is None:
        assert time.monotonic() < deadline
    os.killpg(there.pid, signal.SIGSTOP)
    names = [path.name for path in target.glob(".writing-*")]
    monkeypatch.setattr(signs, "SILENT_SECONDS", 3.0)
    run = program.convert(pair(MOE).source, target, pair(MOE).options, "--resume")
    os.killpg(there.pid, signal.SIGCONT)
    _, errors = there.communicate(timeout=60)
    assert run.status == 0, run
    assert all("other-node" in name for name in names)
    assert "of other-node, last sign of life" in run.errors or not names
    assert there.returncode in (0, 5), errors
    assert files_of(target) == undisturbed
