"""Logs and reports: where they go, where they may not, and what is written through."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest

from .edit import copy_of
from .pairs import DENSE, pair
from .runs import Program, run_process

_V2 = ("--target-virtual-pipeline-model-parallel-size", "2")


def test_logs_and_reports_go_where_they_are_asked_to(program: Program, tmp_path: Path) -> None:
    log = tmp_path / "deep" / "run.log"
    case = pair(DENSE)
    run = program.convert(case.source, tmp_path / "iter_0000001", _V2, "--log-file", log)
    assert run.status == 0
    text = log.read_text()
    assert re.search(r"INFO mp_rank_00_000: \d+ bytes written", text)
    assert re.search(r"INFO mp_rank_00_001: \d+ bytes written", text)
    refused = program.convert(case.source, tmp_path / "iter_0000001", _V2, "--log-file", log)
    assert refused.status == 2
    assert "ERROR" in log.read_text()


@pytest.mark.parametrize("option", ["--log-file", "--report"])
def test_logs_and_reports_that_cannot_be_written_are_told_first(
    option: str, program: Program, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "iter_0000001"
    for path, reason in ((tmp_path / "file" / "below", "exists"), (tmp_path, "it is a folder")):
        run = program.convert(pair(DENSE).source, target, _V2, option, path)
        assert run.status == 2
        assert f"{option} {path}: cannot be written" in run.errors
        assert reason in run.errors
        assert not target.exists()


@pytest.mark.parametrize("option", ["--log-file", "--report"])
def test_logs_and_reports_lie_beside_a_checkpoint(
    option: str, program: Program, tmp_path: Path
) -> None:
    """The source is never written, the target holds nothing but itself; by whatever name."""
    source = copy_of(pair(DENSE).source, tmp_path)
    target = tmp_path / "target" / "iter_0000001"
    (tmp_path / "link").symlink_to(source / "mp_rank_00_000" / "model_optim_rng.pt")
    before = {path: path.read_bytes() for path in source.glob("*/*")}
    for path in (
        source / "mp_rank_00_000" / "model_optim_rng.pt",
        source / "report.json",
        tmp_path / "link",
        target / "report.json",
        target / "mp_rank_00_001" / "x",
    ):
        run = program.convert(source, target, _V2, option, path)
        assert run.status == 2
        assert f"{option} {path}: cannot be written (it lies in the checkpoint" in run.errors
        assert not target.exists()
    assert {path: path.read_bytes() for path in source.glob("*/*")} == before


@pytest.mark.parametrize("option", ["--log-file", "--report", "--picture"])
def test_nothing_is_written_into_folders_that_were_given(
    option: str, program: Program, tmp_path: Path
) -> None:
    """A root stands for a checkpoint; another one's iteration folder holds nothing else either."""
    source = copy_of(pair(DENSE).source, tmp_path)
    (source.parent / "latest_checkpointed_iteration.txt").write_text("1")
    other = copy_of(pair(DENSE).source, tmp_path / "other")
    target = tmp_path / "target"
    for folder in (source.parent, target, other, other / "mp_rank_00_000"):
        path = folder / "x.svg"
        run = program.convert(source.parent, target, _V2, option, path)
        assert run.status == 2
        assert f"{option} {path}: cannot be written (it lies in the checkpoint" in run.errors
        assert not path.exists()
    assert not target.exists()


@pytest.mark.parametrize("option", ["--log-file", "--report"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_what_is_no_plain_file_is_written_through(
    option: str, kind: str, program: Program, tmp_path: Path
) -> None:
    path, there = tmp_path / "there", tmp_path / "real"
    there.write_text("old")
    reader = -1
    if kind == "link":
        path.symlink_to(there)
    elif kind == "pipe":
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    else:
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # a null device of our own
        except PermissionError:
            pytest.skip("only root makes devices")
    before = path.lstat()
    run = program.convert(pair(DENSE).source, tmp_path / "t" / "iter_0000001", _V2, option, path)
    assert run.status == 0, run.errors
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    wanted = "bytes written" if option == "--log-file" else '"kind": "conversion"'
    if kind == "link":
        assert wanted in there.read_text()
    elif kind == "pipe":
        assert wanted in os.read(reader, 1 << 16).decode()
        os.close(reader)


def test_a_pipe_that_nobody_reads_is_no_wait(program: Program, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    run = program.convert(
        pair(DENSE).source, tmp_path / "t" / "iter_0000001", _V2, "--log-file", tmp_path / "pipe"
    )
    program.refuses(5, run, "pipe: cannot be written (No such device or address)")


@pytest.mark.parametrize("option", ["--log-file", "--report"])
def test_a_dash_is_standard_output(option: str, tmp_path: Path) -> None:
    """The plan goes to standard error then."""
    paths = ("--load-iteration-dir", pair(DENSE).source, "--save-iteration-dir")
    run = run_process(*paths, tmp_path / "iter_0000001", *_V2, option, "-")
    assert run.status == 0, run.errors
    if option == "--report":
        assert json.loads(run.output)["kind"] == "conversion"
    else:
        assert all(" INFO " in line for line in run.output.splitlines())
    assert "to write: 2 rank folders" in run.errors
    assert not Path("-").exists()
