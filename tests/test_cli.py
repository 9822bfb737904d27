"""The command line: help, wrong calls, exit statuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from .compare import differences
from .edit import copy_of, set_arguments
from .pairs import pair
from .runs import ROOT, Program, Run, command, environment, run_process

_DENSE = "dense-pp2-v016"
_V2 = ("--target-virtual-pipeline-model-parallel-size", "2")
_FIRST = "--target-first-virtual-pipeline-num-layers-split"
_LAST = "--target-last-virtual-pipeline-num-layers-split"


def test_help_tells_every_option_and_imports_nothing_heavy() -> None:
    run = run_process("--help")
    assert run.status == 0
    for option in (
        "--load-iteration-dir", "--save-iteration-dir", "--pipeline-model-parallel-size",
        "--expert-model-parallel-size", "--tensor-model-parallel-size", _V2[0], _FIRST, _LAST,
        "--target-pipeline-model-parallel-layout",
        "--target-overlap-param-gather-with-optimizer-step", "--num-max-processing-processes",
        "--pipeline-ranks-to-process", "--dry-run", "--verify", "--resume", "--report",
        "--log-file",
    ):  # fmt: skip
        assert option in run.output


def test_a_conversion_imports_neither_torch_nor_megatron(tmp_path: Path) -> None:
    """Even where they are installed: imports are watched from outside."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "megatron.py").write_text("raise SystemExit('megatron was imported')")
    case = pair(_DENSE)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    script = (
        f"import sys; sys.path[:0] = {path.split(os.pathsep)!r}; "
        "from pp_to_vpp.cli import main; "
        f"sys.exit(main(['--load-iteration-dir', {str(case.source)!r}, '--save-iteration-dir', "
        f"{str(tmp_path / 'iter_0000001')!r}, *{list(_V2)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "was imported" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "--load-iteration-dir"),
        (("--load-iteration-dir", "x"), "give --target-virtual"),
        (("--load-iteration-dir", "x", *_V2), "--save-iteration-dir is required"),
        (("--load-iteration-dir", "x", "--dry-run"), "give --target-virtual"),
        (("--load-iteration-dir", "x", "--save-iteration-dir", "y", "--resume"), "give --target"),
        (("--load-iteration-dir", "x", "--dry-run", *_V2, _FIRST, "4", "4"), "or none"),
        (
            ("--load-iteration-dir", "x", "--dry-run", *_V2, _FIRST, "4", _LAST, "4", "4"),
            "one number for each",
        ),
        (
            ("--load-iteration-dir", "x", "--dry-run", *_V2, _FIRST, "4", "0", _LAST, "4", "4"),
            "positive",
        ),
        (("--load-iteration-dir", "x", "--dry-run", _V2[0], "0"), "not a positive number"),
        (("--load-iteration-dir", "x", "--dry-run", *_V2, "--verify", "some"), "--verify"),
        (("--load", "x", "--dry-run", *_V2), "--load-iteration-dir"),
    ],
)
def test_wrong_calls_end_with_2(arguments: tuple[str, ...], reason: str, program: Program) -> None:
    run = program(*arguments)
    assert run.status == 2
    assert reason in run.errors


def test_forgetting_the_target_layout_is_told(program: Program, tmp_path: Path) -> None:
    case = pair(_DENSE)
    run = program("--load-iteration-dir", case.source, "--save-iteration-dir", tmp_path / "new")
    program.refuses(2, run, "there is nothing to verify", "to convert, give --target-virtual")


def test_disagreeing_sizes_are_refused(program: Program, tmp_path: Path) -> None:
    case = pair("moe-pp2ep2-v016")
    for name, wrong in (("pipeline", "4"), ("expert", "1"), ("tensor", "2")):
        run = program.convert(
            case.source, tmp_path / "x", _V2, f"--{name}-model-parallel-size", wrong
        )
        program.refuses(2, run, f"--{name}-model-parallel-size: disagrees", f"found {wrong}")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused(program: Program, tmp_path: Path) -> None:
    case = pair(_DENSE)
    target = tmp_path / "iter_0000001"
    assert program.convert(case.source, target, _V2).status == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run = program.convert(case.source, target, _V2)
    program.refuses(2, run, "the target exists already (2 of 2 rank folders)", "--resume")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_target_inside_the_source_is_refused(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(_DENSE).source, tmp_path)
    for target in (source, source / "vpp"):
        program.refuses(2, program.convert(source, target, _V2), "it lies in the source")


def test_ranks_that_do_not_exist_are_refused(program: Program, tmp_path: Path) -> None:
    run = program.convert(
        pair(_DENSE).source, tmp_path / "x", _V2, "--pipeline-ranks-to-process", "2"
    )
    program.refuses(2, run, "there is no pipeline rank 2", "expected 0 to 1")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--target-virtual-pipeline-model-parallel-size", "3"), "do not divide"),
        (("--target-virtual-pipeline-model-parallel-size", "1"), "already has the layout"),
        (("--target-pipeline-model-parallel-layout", "Et|tL"), "expected 8 of t"),
        (("--target-pipeline-model-parallel-layout", "Et*4|t*4|L"), "3 stages do not make"),
        ((*_V2, "--target-pipeline-model-parallel-layout", "Et*4|t*4L"), "disagrees with the lay"),
        ((*_V2, _FIRST, "3", "2", _LAST, "2", "2"), "must divide evenly"),
        (
            (
                "--target-pipeline-model-parallel-layout", "Ettt|tttttL",
                "--target-overlap-param-gather-with-optimizer-step",
            ),
            "virtual pipeline stages only",
        ),
    ],
)  # fmt: skip
def test_impossible_layouts_end_with_3(
    options: tuple[str, ...], reason: str, program: Program, tmp_path: Path
) -> None:
    run = program.convert(pair(_DENSE).source, tmp_path / "x", options)
    program.refuses(3, run, reason)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_has_the_layout_already_is_refused(program: Program, tmp_path: Path) -> None:
    run = program.convert(pair(_DENSE).truth, tmp_path / "x", _V2)
    program.refuses(3, run, "already has the layout", "virtual pipeline size 2")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), "it holds no rank folders"),
        (("metadata.json", "common.pt", "__0_0.distcp"), "Megatron reshards those by itself"),
        (("mp_rank_00", "mp_rank_01"), "it was saved with PP 1"),
        (("iter_0000001", "latest_checkpointed_iteration.txt"), "checkpoint's root"),
    ],
)
def test_other_folders_are_told_apart(
    names: tuple[str, ...], reason: str, program: Program, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    run = program.convert(tmp_path, tmp_path / "x", _V2)
    program.refuses(4, run, reason)
    program.refuses(4, program.convert(tmp_path / "missing", tmp_path / "x", _V2), "be listed")


def test_missing_folders_are_named(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair("moe-pp2ep2-v016").source, tmp_path)
    shutil.rmtree(source / "mp_rank_00_001_001")
    run = program.convert(source, tmp_path / "x", _V2)
    program.refuses(4, run, "mp_rank_00_001_001: this rank folder is missing")
    shutil.rmtree(source / "mp_rank_00_000_001")
    run = program.convert(source, tmp_path / "x", _V2)
    program.refuses(4, run, "expert_model_parallel_size", "rank 1 is missing")


def test_a_plain_pipeline_of_one_stage_is_refused(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(_DENSE).source, tmp_path)
    set_arguments(source, pipeline_model_parallel_size=1)
    run = program.convert(source, tmp_path / "x", _V2)
    program.refuses(4, run, "pipeline_model_parallel_size 1", "nothing to convert")


def test_logs_and_reports_go_where_they_are_asked_to(program: Program, tmp_path: Path) -> None:
    log = tmp_path / "deep" / "run.log"
    case = pair(_DENSE)
    run = program.convert(case.source, tmp_path / "iter_0000001", _V2, "--log-file", log)
    assert run.status == 0
    text = log.read_text()
    assert re.search(r"INFO mp_rank_00_000: \d+ bytes written", text)
    assert re.search(r"INFO mp_rank_00_001: \d+ bytes written", text)
    refused = program.convert(case.source, tmp_path / "iter_0000001", _V2, "--log-file", log)
    assert refused.status == 2
    assert "ERROR" in log.read_text()


def run_shell(text: str, *arguments: str | Path) -> Run:
    """Run the program by a shell, which puts its arguments in the place of RUN."""
    line = text.replace("RUN", shlex.join(command(*arguments)))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("line", ["RUN | true", "RUN | head -1", "RUN >&-", "RUN 2>&- >/dev/null"])
def test_nobody_has_to_read_what_is_printed(line: str, tmp_path: Path) -> None:
    case = pair(_DENSE)
    target = tmp_path / "iter_0000001"
    paths = ("--load-iteration-dir", case.source, "--save-iteration-dir", target)
    run = run_shell(line, *paths, *_V2)
    assert run.status == 0, run
    assert "Error" not in run.errors
    assert differences(target, case.truth, case.source) == []
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"


def test_output_that_cannot_be_written_is_one_line() -> None:
    run = run_shell(
        "RUN >/dev/full", "--load-iteration-dir", pair(_DENSE).source, *_V2, "--dry-run"
    )
    assert run.status == 5
    assert run.errors.count("\n") == 1
    assert "standard output: cannot be written (No space left on device)" in run.errors


@pytest.mark.parametrize("option", ["--log-file", "--report"])
def test_logs_and_reports_that_cannot_be_written_are_told_first(
    option: str, program: Program, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "iter_0000001"
    for path, reason in ((tmp_path / "file" / "below", "exists"), (tmp_path, "it is a folder")):
        run = program.convert(pair(_DENSE).source, target, _V2, option, path)
        assert run.status == 2
        assert f"{option} {path}: cannot be written" in run.errors
        assert reason in run.errors
        assert not target.exists()


@pytest.mark.parametrize("option", ["--log-file", "--report"])
def test_logs_and_reports_lie_beside_a_checkpoint(
    option: str, program: Program, tmp_path: Path
) -> None:
    """The source is never written, the target holds nothing but itself; by whatever name."""
    source = copy_of(pair(_DENSE).source, tmp_path)
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
    run = program.convert(pair(_DENSE).source, tmp_path / "t" / "iter_0000001", _V2, option, path)
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
        pair(_DENSE).source, tmp_path / "t" / "iter_0000001", _V2, "--log-file", tmp_path / "pipe"
    )
    program.refuses(5, run, "pipe: cannot be written (No such device or address)")


@pytest.mark.parametrize("option", ["--log-file", "--report"])
def test_a_dash_is_standard_output(option: str, tmp_path: Path) -> None:
    """The plan goes to standard error then."""
    paths = ("--load-iteration-dir", pair(_DENSE).source, "--save-iteration-dir")
    run = run_process(*paths, tmp_path / "iter_0000001", *_V2, option, "-")
    assert run.status == 0, run.errors
    if option == "--report":
        assert json.loads(run.output)["kind"] == "conversion"
    else:
        assert all(" INFO " in line for line in run.output.splitlines())
    assert "to write: 2 rank folders" in run.errors
    assert not Path("-").exists()


def test_the_package_runs_as_a_module_and_tells_its_version() -> None:
    run = run_process("--version")
    assert run.status == 0
    assert re.fullmatch(r"pp_to_vpp \d+\.\d+\.\d+\n", run.output)
