"""The command line: help, wrong calls, exit statuses."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from .compare import differences
from .compatibility.minimums import PROMISES, interpreter
from .edit import copy_of, set_arguments
from .pairs import DENSE, MOE, pair
from .runs import ROOT, Program, Run, command, environment, run_process

_V2 = ("--target-virtual-pipeline-model-parallel-size", "2")
_FIRST = "--target-first-virtual-pipeline-num-layers-split"
_LAST = "--target-last-virtual-pipeline-num-layers-split"


def test_help_tells_every_option() -> None:
    run = run_process("--help")
    assert run.status == 0
    for option in (
        "--load-iteration-dir", "--save-iteration-dir", "--pipeline-model-parallel-size",
        "--expert-model-parallel-size", "--tensor-model-parallel-size", _V2[0], _FIRST, _LAST,
        "--target-pipeline-model-parallel-layout",
        "--target-overlap-param-gather-with-optimizer-step", "--num-max-processing-processes",
        "--pipeline-ranks-to-process", "--dry-run", "--verify", "--resume", "--report",
        "--log-file", "--follow-links", "--share",
    ):  # fmt: skip
        assert option in run.output


def test_the_oldest_python_promised_starts_it() -> None:
    """Without any package; conversions are for ``tests.compatibility.minimums``."""
    python = interpreter(PROMISES["python"])
    if python is None:
        pytest.skip(f"there is no Python {PROMISES['python']} here")
    words = [python, "-m", "pp_to_vpp", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_conversion_imports_neither_torch_nor_megatron(tmp_path: Path) -> None:
    """Even where they are installed: imports are watched from outside."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "megatron.py").write_text("raise SystemExit('megatron was imported')")
    case = pair(DENSE)
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
        (("--load-iteration-dir", "x", "--resume"), "give --target-virtual"),
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
        (("--load-iteration-dir", "x", "--dry-run", _V2[0], "two"), "two is no number"),
        (
            ("--load-iteration-dir", "x", *_V2, "--pipeline-ranks-to-process", "0,1"),
            "0,1 is no number (numbers of a list stand apart: 0 1 2)",
        ),
        (
            ("--load-iteration-dir", "x", "--target-virtual-pipeline-size", "2"),
            "did you mean --target-virtual-pipeline-model-parallel-size?",
        ),
    ],
)
def test_wrong_calls_end_with_2(arguments: tuple[str, ...], reason: str, program: Program) -> None:
    run = program(*arguments)
    assert run.status == 2
    assert reason in run.errors
    assert len(run.errors.splitlines()) <= 4


def test_folders_may_begin_with_a_tilde(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which shells leave alone after an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    source = copy_of(pair(DENSE).source, tmp_path)
    run = program(f"--load-iteration-dir=~/{source.relative_to(tmp_path)}", "--dry-run", *_V2)
    assert run.status == 0, run
    assert str(source) in run.output


def test_a_dry_run_looks_at_the_target(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run would: what would be refused after hours in a queue is refused now."""
    case, target = pair(DENSE), tmp_path / "iter_0000001"
    dry = (case.source, target, _V2, "--dry-run")
    assert program.convert(*dry).status == 0
    full = SimpleNamespace(f_bavail=3, f_frsize=1, f_bsize=4096, f_blocks=9)
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    program.refuses(5, program.convert(*dry), "too little free space")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    assert program.convert(case.source, target, _V2).status == 0
    program.refuses(2, program.convert(*dry), "the target exists already")
    assert program.convert(*dry, "--resume").status == 0
    (tmp_path / "file").touch()
    run = program.convert(case.source, tmp_path / "file" / "iter_0000001", _V2, "--dry-run")
    program.refuses(5, run, f"{tmp_path / 'file'}: the target cannot be written")


def test_paths_print_where_the_output_lacks_their_letters(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path).rename(tmp_path / "é")
    bare = {**environment(), "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        command("--load-iteration-dir", source, "--dry-run", *_V2),
        capture_output=True, text=True, env=bare, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert "dry run: nothing was written" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a device that is always full")
def test_a_log_on_a_full_disk_is_one_line(program: Program, tmp_path: Path) -> None:
    """After a whole conversion."""
    case, full = pair(DENSE), tmp_path / "full"
    os.mknod(full, 0o600 | stat.S_IFCHR, os.makedev(1, 7))
    target = tmp_path / "t" / "iter_0000001"
    run = program.convert(case.source, target, _V2, "--log-file", full)
    program.refuses(5, run, f"--log-file {full}: cannot be written (No space left on device)")
    assert len(list(target.glob("mp_rank_*"))) == 2


def test_quiet_says_nothing_and_verbose_more(program: Program, tmp_path: Path) -> None:
    case = pair(DENSE)
    run = program.convert(case.source, tmp_path / "q" / "iter_0000001", _V2, "--quiet")
    assert (run.status, run.output, run.errors) == (0, "", "")
    run = program.convert(case.source, tmp_path / "q" / "iter_0000001", _V2, "--quiet")
    program.refuses(2, run, "the target exists already")
    run = program.convert(case.source, tmp_path / "v" / "iter_0000001", _V2, "--verbose")
    assert "mp_rank_00_000 and its family: read" in run.errors
    assert "mp_rank_00_001: " in run.errors
    assert "s from its first byte" in run.errors


def test_the_root_of_a_checkpoint_is_taken_for_its_iteration(
    program: Program, tmp_path: Path
) -> None:
    """Of source and target; without a tracker the last iteration is named."""
    case, root = pair(DENSE), tmp_path / "ckpt"
    shutil.copytree(case.source, root / "iter_0000007")
    (root / "iter_0000009").mkdir()
    call = ("--load-iteration-dir", root, "--save-iteration-dir", tmp_path / "vpp")
    program.refuses(4, program(*call, *_V2), "such as iter_0000009")
    (root / "latest_checkpointed_iteration.txt").write_text("8")
    program.refuses(4, program(*call, *_V2), "not there, expected folder iter_0000008")
    (root / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert program(*call, *_V2).status == 0
    target = tmp_path / "vpp" / "iter_0000007"
    assert differences(target, case.truth, case.source) == []
    assert (tmp_path / "vpp" / "latest_checkpointed_iteration.txt").read_text() == "7"
    assert "verified (structure)" in program(*call).output
    assert str(target) in program("--load-iteration-dir", tmp_path / "vpp").output


def test_a_source_alone_is_described(program: Program) -> None:
    run = program("--load-iteration-dir", pair(MOE).source)
    assert run.status == 0, run
    lines = run.output.splitlines()
    assert lines[0].startswith(f"checkpoint: {pair(MOE).source} (iteration 1, 4 rank folders, 8 f")
    assert lines[1].startswith("written by: Megatron-Core 0.16 or later, before 0.18")
    assert "    pp0  vp0  E 0-3" in run.output
    assert "    --target-virtual-pipeline-model-parallel-size 2" in lines
    assert "        launch Megatron with: --num-layers-per-virtual-pipeline-stage 2" in lines


def test_what_moves_is_drawn(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    call = ("--load-iteration-dir", pair(MOE).source)
    for options in ((*_V2, "--dry-run"), ()):
        path = tmp_path / f"{len(options)}.svg"
        assert program(*call, *options, "--picture", path).status == 0
        assert "pp1" in path.read_text()
    shared = ("--share", "1/2", "--picture", tmp_path / "shared.svg")
    assert program(*call, *_V2, "--dry-run", *shared).status == 0
    assert not (tmp_path / "shared.svg").exists()  # the first process draws it
    link = tmp_path / "link.svg"
    link.symlink_to(tmp_path / "linked")
    assert program(*call, "--picture", link).status == 0
    assert (link.is_symlink(), (tmp_path / "linked").read_bytes()[:5]) == (True, b"<?xml")
    inside = (*call, *_V2, "--dry-run", "--picture", pair(MOE).source / "x.svg")
    program.refuses(2, program(*inside), "--picture", "lies in the checkpoint")
    run = program(*call, "--picture", tmp_path / "x.gif")
    program.refuses(2, run, "no format that can be drawn")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM])
def test_signals_leave_nothing_behind(number: int, tmp_path: Path) -> None:
    """As when the terminal is closed."""
    target = tmp_path / "iter_0000001"
    process = subprocess.Popen(
        command("--load-iteration-dir", pair(MOE).source, "--save-iteration-dir", target, *_V2),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd="/",
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()  # the plan stands
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, 0), errors
    if process.returncode:
        assert "interrupted; run again with --resume" in errors
    assert not target.exists() or list(target.glob(".*")) == []


def test_disagreeing_sizes_are_refused(program: Program, tmp_path: Path) -> None:
    case = pair(MOE)
    for name, wrong in (("pipeline", "4"), ("expert", "1"), ("tensor", "2")):
        run = program.convert(
            case.source, tmp_path / "x", _V2, f"--{name}-model-parallel-size", wrong
        )
        program.refuses(2, run, f"--{name}-model-parallel-size: disagrees", f"found {wrong}")
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_do_not_exist_are_refused(program: Program, tmp_path: Path) -> None:
    run = program.convert(
        pair(DENSE).source, tmp_path / "x", _V2, "--pipeline-ranks-to-process", "2"
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
    run = program.convert(pair(DENSE).source, tmp_path / "x", options)
    program.refuses(3, run, reason)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_has_the_layout_already_is_refused(program: Program, tmp_path: Path) -> None:
    run = program.convert(pair(DENSE).truth, tmp_path / "x", _V2)
    program.refuses(3, run, "already has the layout", "virtual pipeline size 2")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), "it holds no rank folders"),
        (("metadata.json", "common.pt", "__0_0.distcp"), "Megatron reshards those by itself"),
        (("mp_rank_0", "mp_rank_1"), "expected folders named mp_rank_TT, mp_rank_TT_PPP or"),
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
    source = copy_of(pair(MOE).source, tmp_path)
    shutil.rmtree(source / "mp_rank_00_001_001")
    run = program.convert(source, tmp_path / "x", _V2)
    program.refuses(4, run, "mp_rank_00_001_001: this rank folder is missing")
    shutil.rmtree(source / "mp_rank_00_000_001")
    run = program.convert(source, tmp_path / "x", _V2)
    program.refuses(4, run, "expert_model_parallel_size", "rank 1 is missing")


def test_folders_that_are_not_those_of_one_stage_are_refused(
    program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    set_arguments(source, pipeline_model_parallel_size=1)
    run = program.convert(source, tmp_path / "x", _V2)
    program.refuses(4, run, "do not fit pipeline_model_parallel_size", "like mp_rank_00 for PP 1")


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
    case = pair(DENSE)
    target = tmp_path / "iter_0000001"
    paths = ("--load-iteration-dir", case.source, "--save-iteration-dir", target)
    run = run_shell(line, *paths, *_V2)
    assert run.status == 0, run
    assert "Error" not in run.errors
    assert differences(target, case.truth, case.source) == []
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"


def test_output_that_cannot_be_written_is_one_line() -> None:
    run = run_shell("RUN >/dev/full", "--load-iteration-dir", pair(DENSE).source, *_V2, "--dry-run")
    assert run.status == 5
    assert run.errors.count("\n") == 1
    assert "standard output: cannot be written (No space left on device)" in run.errors


def test_the_package_runs_as_a_module_and_tells_its_version() -> None:
    run = run_process("--version")
    assert run.status == 0
    assert re.fullmatch(r"pp_to_vpp \d+\.\d+\.\d+\n", run.output)


def test_help_waits_for_no_package() -> None:
    """numpy alone takes four times as long to import as ``--help`` needs."""
    code = "import sys, pp_to_vpp.cli; print({'numpy', 'torch', 'tqdm'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert run.stdout == "set()\n"
