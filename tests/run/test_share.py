"""Several processes, one conversion: who is who, who does what, and that it ends in the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pp_to_vpp.errors import UsageError
from pp_to_vpp.megatron.ranks import TRACKER, RankId
from pp_to_vpp.options import Options
from pp_to_vpp.run import share
from pp_to_vpp.run.share import Launched, Share, deal, launched, wanted_share
from pp_to_vpp.source import fingerprint
from pp_to_vpp.source.files import read_rank, sizes_in
from pp_to_vpp.source.survey import take_survey

from ..pairs import BERT, MOE, pair
from ..runs import ROOT, Program, command, environment, run_process
from .test_convert import files_of
from .test_crash import children

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
BATCH = {**STEP, "SLURM_JOB_ID": "7"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "launcher", "here"),
    [
        (TORCHRUN, "torchrun", 2),
        (STEP, "srun", 1),
        ({**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "srun", 2),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, "srun", 3),
        (OPEN_MPI, "mpirun", 2),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, "mpirun", 1),
        # torchrun and mpirun in a step of one task for each node
        ({**TORCHRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"},
         "torchrun", 2),
        ({**OPEN_MPI, **BATCH, "SLURM_PROCID": "0"}, "mpirun", 2),
    ],
)  # fmt: skip
def test_launchers_tell_each_process_its_place(
    environment: Mapping[str, str], launcher: str, here: int
) -> None:
    """And only ``auto`` asks them: others than their own processes have the variables too."""
    assert launched(environment) == Launched(launcher, Share(1, 4), here)
    assert wanted_share(_asking("auto"), environment) == Share(1, 4)
    assert wanted_share(_asking("0/3"), environment) == Share(0, 3)
    assert wanted_share(_asking(None), environment) is None
    (note,) = share.notes(_asking(None), environment)
    assert f"the variables of {launcher} this is process 1 of 4" in note
    assert note.endswith("with --share auto it would do share 1/4")
    by_hand = Options(Path("source"), pp_ranks=[0])
    for options in (_asking("auto"), _asking("0/3"), by_hand):
        assert share.notes(options, environment) == []


def _asking(text: str | None, *, is_dry_run: bool = False) -> Options:
    return Options(Path("source"), share=text, is_dry_run=is_dry_run)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH,  # the script of a job is one process
        {"RANK": "1"},
        {"RANK": "x", "WORLD_SIZE": "4"},
        {"RANK": "4", "WORLD_SIZE": "4"},
        {"RANK": "-1", "WORLD_SIZE": "4"},
    ],
)
def test_without_a_launcher_auto_is_an_error(environment: Mapping[str, str]) -> None:
    """Unless nothing is written: then all is planned, and a note says so."""
    assert launched(environment) is None
    with pytest.raises(UsageError, match=r"no launcher tells.*torchrun, srun or mpirun"):
        wanted_share(_asking("auto"), environment)
    assert wanted_share(_asking("auto", is_dry_run=True), environment) is None
    assert share.notes(_asking("auto", is_dry_run=True), environment) != []
    assert wanted_share(_asking(None), environment) is None
    assert wanted_share(_asking("3/4"), environment) == Share(3, 4)
    assert share.notes(_asking(None), environment) == []


def test_a_launcher_of_one_process_hinders_nobody() -> None:
    one = {"RANK": "0", "WORLD_SIZE": "1"}
    assert wanted_share(_asking(None), one) is None
    assert wanted_share(_asking("2/3"), one) == Share(2, 3)
    assert wanted_share(_asking("auto"), one) == Share(0, 1)
    assert share.notes(_asking(None), one) == []


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "a/b", "1/0", "1/4/2", "", "1 / 4"])
def test_shares_that_are_none_are_refused(text: str, program: Program, tmp_path: Path) -> None:
    run = program.convert(tmp_path, tmp_path / "x", (), f"--share={text}")
    program.refuses(2, run, f"--share: {text} is neither auto nor I/N")


def test_workers_share_the_cores_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With those who do the same; who is alone has all that it may use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    assert share.number_of_workers(_asking(None), {}) == 8
    assert share.number_of_workers(_asking("auto"), TORCHRUN) == 6
    assert share.number_of_workers(_asking(None), TORCHRUN) == 8
    assert share.number_of_workers(Options(Path("source"), processes=3), TORCHRUN) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1))
    assert share.number_of_workers(_asking("auto"), TORCHRUN) == 1


RANKS = st.builds(RankId, st.integers(0, 3), st.integers(0, 7), st.integers(0, 3))


@given(st.dictionaries(RANKS, st.integers(1, 1000), max_size=60), st.integers(1, 20))
@settings(max_examples=200)
def test_every_folder_is_dealt_once_and_evenly(sizes: dict[RankId, int], count: int) -> None:
    """No process has more than the mean and one folder: what dealing singly ensures."""
    dealt = deal(sizes, count)
    assert sorted(rank for hand in dealt.hands for rank in hand) == sorted(sizes)
    assert len(dealt.hands) == count
    for hand, length in zip(dealt.hands, dealt.lengths, strict=True):
        assert length == sum(sizes[rank] for rank in hand)
    bound = (sum(sizes.values()) / count + max(sizes.values(), default=0)) * 1.01
    assert max(dealt.lengths) <= bound
    assert deal(dict(reversed(sizes.items())), count) == dealt, "every process deals alike"


def test_families_stay_together_where_that_is_even() -> None:
    sizes = {RankId(0, pp, ep): 100 for pp in range(4) for ep in range(8)}
    hands = deal(sizes, 4).hands
    assert all(len({rank.family for rank in hand}) == 2 for hand in hands)
    assert deal(sizes, 5).largest_over_mean == pytest.approx(7 / 6.4)
    assert deal(sizes, 40).lengths.count(0) == 8
    assert deal({}, 3).largest_over_mean == 1


def _arguments(target: Path, *more: str) -> list[str | Path]:
    return [
        "--load-iteration-dir", pair(MOE).source, "--save-iteration-dir", target,
        "--num-max-processing-processes", "1", *pair(MOE).options, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a single run writes."""
    target = tmp_path_factory.mktemp("single") / "iter_0000001"
    assert run_process(*_arguments(target)).status == 0
    return files_of(target)


def _check(target: Path, undisturbed: dict[str, bytes]) -> None:
    """The bytes of a single run, its tracker, and nothing else."""
    assert files_of(target) == undisturbed
    assert (target.parent / TRACKER).read_text() == "1"
    assert [path.name for path in target.iterdir() if path.name.startswith(".")] == []


def _start(target: Path, variables: Mapping[str, str], *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*_arguments(target, *more)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**environment(), **variables}, cwd="/",
    )  # fmt: skip


def _end(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


@pytest.mark.parametrize("count", [4, 6])  # as many as there are folders, and more
def test_torchrun_shares(count: int, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    target = tmp_path / "iter_0000001"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--master-port",
                "0", "--nproc-per-node", str(count)]  # fmt: skip
    arguments = map(str, _arguments(target, "--share", "auto"))
    done = subprocess.run(
        [*torchrun, "-m", "pp_to_vpp", *arguments], capture_output=True, text=True,
        env=environment(), cwd=ROOT, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _check(target, undisturbed)


def test_what_torchrun_starts_may_convert_alone(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """One of its processes starts the program, which inherits the variables; where it starts
    another one, that is told how they share."""
    target, script = tmp_path / "iter_0000001", tmp_path / "trains.py"
    script.write_text(
        "import os, subprocess, sys\n"
        "for _ in range(2 if os.environ['RANK'] == '0' else 0):\n"
        "    done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "    print('status', done.returncode, done.stdout, done.stderr, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--master-port", "0",
         "--nproc-per-node", "2", script, *command(*_arguments(target))],
        capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, first, second = done.stdout.split("status ")
    assert first.startswith("0 "), first
    assert "with --share auto it would do share 0/2" in first
    assert second.startswith("2 "), second
    assert "the target exists already (4 of 4 rank folders)" in second
    assert "share one conversion with --share auto" in second
    _check(target, undisturbed)


def _is_program(pid: int) -> bool:
    """Whether it is the program, and not torchrun at work for itself."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"pp_to_vpp" in words and b"torch.distributed.run" not in words


def test_torchrun_starts_all_again_when_one_is_lost(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """``--max-restarts`` goes on with ``--resume``."""
    target = tmp_path / "iter_0000001"
    arguments = map(str, _arguments(target, "--share", "auto", "--resume"))
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--master-port", "0",
         "--nproc-per-node", "2", "--max-restarts", "2", "-m", "pp_to_vpp", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**environment(), "LOGLEVEL": "INFO"},
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not (started := [pid for pid in children(torchrun.pid) if _is_program(pid)]):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(started[0], signal.SIGKILL)
    _, errors = torchrun.communicate(timeout=200)
    assert torchrun.returncode == 0, errors
    assert "attempts left" in errors, "one was lost"
    assert files_of(target) == undisturbed
    assert (target.parent / TRACKER).read_text() == "1"


@pytest.mark.parametrize(
    ("launcher", "count"), [("srun", 4), ("mpirun", 3), ("by hand", 2), ("by hand", 16)]
)
def test_processes_share(
    launcher: str, count: int, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "iter_0000001"
    processes = []
    for index in range(count):
        variables = {
            "srun": {"SLURM_PROCID": str(index), "SLURM_NTASKS": str(count)},
            "mpirun": {"OMPI_COMM_WORLD_RANK": str(index), "OMPI_COMM_WORLD_SIZE": str(count)},
            "by hand": {},
        }[launcher]
        option = f"{index}/{count}" if launcher == "by hand" else "auto"
        processes.append(_start(target, variables, "--share", option))
    outputs = _end(processes)
    assert "names 1" in outputs[0]
    assert outputs[0].startswith("source: ")
    for index, output in enumerate(outputs[1:], 1):
        (line,) = (line for line in output.splitlines() if " INFO " not in line)
        assert line.startswith(f"share {index}/{count}: wrote ")
    _check(target, undisturbed)


def test_one_is_killed_and_started_again(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """The first process goes on waiting meanwhile."""
    target = tmp_path / "iter_0000001"
    first, lost = (_start(target, {}, "--share", f"{index}/2", "--resume") for index in (0, 1))
    time.sleep(0.4)  # anywhere: before, in or after its work
    lost.send_signal(signal.SIGKILL)
    lost.communicate(timeout=60)
    _end([_start(target, {}, "--share", "1/2", "--resume"), first])
    assert files_of(target) == undisturbed
    assert (target.parent / TRACKER).read_text() == "1"


def test_who_is_not_there_is_not_waited_for_for_ever(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pp_to_vpp.run import target_folder

    monkeypatch.setattr(target_folder, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(target_folder, "_LOOK_SECONDS", 0.1)
    case, target = pair(MOE), tmp_path / "iter_0000001"
    run = program.convert(case.source, target, case.options, "--share", "0/2")
    program.refuses(5, run, "2 rank folders of other processes are still to come", "--resume")
    assert len(list(target.glob("mp_rank_*"))) == 2, "what is done is kept"
    assert not (tmp_path / TRACKER).exists()
    second = program.convert(case.source, target, case.options, "--share", "1/2")
    assert (second.status, (tmp_path / TRACKER).exists()) == (0, False)
    last = program.convert(case.source, target, case.options, "--share", "0/2", "--resume")
    assert (last.status, (tmp_path / TRACKER).read_text()) == (0, "1")


def test_verification_is_shared_too(program: Program, tmp_path: Path) -> None:
    case, target = pair(MOE), tmp_path / "iter_0000001"
    assert program.convert(case.source, target, case.options).status == 0
    told = []
    for index in range(3):
        run = program(
            "--load-iteration-dir", case.source, "--save-iteration-dir", target,
            "--share", f"{index}/3",
        )  # fmt: skip
        assert run.status == 0, run
        told.append(int(run.output.split("verified (structure): ")[1].split()[0]))
    assert sorted(told) == [1, 1, 2]


def test_a_folder_has_one_fingerprint_read_or_not() -> None:
    """Processes that share read each other's folders by their directories alone."""
    source = pair(MOE).source
    for rank in take_survey(str(source)).ranks:
        listed = fingerprint.of_folder(str(source), rank)
        assert (
            listed.fingerprint
            == fingerprint.of_rank(read_rank(str(source), rank), str(source)).fingerprint
        )


def test_the_first_process_reads_what_others_have_read(program: Program, tmp_path: Path) -> None:
    """Here two folders of another process, which has not begun, have exchanged names."""
    case, source, target = pair(BERT), tmp_path / "source", tmp_path / "iter_0000001"
    shutil.copytree(case.source, source)
    ranks = take_survey(str(source)).ranks
    hands = deal({rank: sum(sizes_in(source / rank.folder)) for rank in ranks}, 2).hands
    one, other = sorted(source / rank.folder for rank in hands[1])
    one.rename(tmp_path / "one")
    other.rename(one)
    (tmp_path / "one").rename(other)
    first = ("--share", "0/2")
    assert program.convert(source, target, case.options, *first, "--dry-run").status == 0
    run = program.convert(source, target, case.options, *first)
    program.refuses(4, run, f"{one.name}: it is not what its name says")
    assert not (tmp_path / TRACKER).exists()
