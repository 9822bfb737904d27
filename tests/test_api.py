"""The program as a library: the same results, checks and errors as the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pp_to_vpp
from pp_to_vpp.api import Conversion, Folder

from .compare import differences
from .edit import copy_of, rewrite
from .pairs import DENSE, HYBRID, MOE, pair
from .runs import environment


def test_a_checkpoint_is_inspected_planned_converted_and_verified(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case, target = pair(MOE), tmp_path / "iter_0000001"
    told: list[tuple[str, int, int]] = []

    def progress(phase: str, done: int, total: int) -> None:
        told.append((phase, done, total))

    found = pp_to_vpp.inspect(case.source, processes=2)
    assert isinstance(found.source.layout, pp_to_vpp.PipelineLayout)
    assert found.source.layout.vp_size == 1
    wanted = pp_to_vpp.plan(str(case.source), target, virtual_pipeline_model_parallel_size=2)
    assert wanted.launch_flags == "--num-layers-per-virtual-pipeline-stage 2"
    assert not target.exists()
    done = pp_to_vpp.convert(
        case.source, target, virtual_pipeline_model_parallel_size=2, verify="full",
        progress=progress, processes=2,
    )  # fmt: skip
    assert done.written == wanted.length == sum(f.stat().st_size for f in target.glob("*/*"))
    assert differences(target, case.truth, case.source) == []
    verified = pp_to_vpp.verify(case.source, str(target), progress=progress)
    assert verified.layouts == done.layouts
    assert verified.depth.value == "full"
    assert list(dict.fromkeys(phase for phase, _, _ in told)) == ["plan", "copy", "verify"]
    last = {phase: (done, total) for phase, done, total in told}
    assert all(done == total for done, total in last.values())
    assert capfd.readouterr().out == ""


def test_layouts_by_the_names_of_megatron(tmp_path: Path) -> None:
    text = "Ettt|tt|t|ttL"
    found = pp_to_vpp.plan(pair(DENSE).source, pipeline_model_parallel_layout=text)
    assert found.launch_flags == f"--pipeline-model-parallel-layout '{text}'"
    assert str(found.target.layout) == "virtual pipeline size 2, layers 3 2 1 2"
    text = pair(HYBRID).options[-1]
    found = pp_to_vpp.plan(pair(HYBRID).source, tmp_path / "new", hybrid_layer_pattern=text)
    assert text in found.launch_flags


@pytest.mark.parametrize(
    ("asked", "kind", "reason"),
    [
        ({"virtual_pipeline_model_parallel_size": 3}, pp_to_vpp.LayoutError, "do not divide"),
        ({"virtual_pipeline_model_parallel_size": 0}, pp_to_vpp.UsageError, "not a positive"),
        ({}, pp_to_vpp.UsageError, "no target layout; pass virtual_pipeline_model_parallel_size, "),
        ({"verify": "some"}, pp_to_vpp.UsageError, "no such depth, expected none, structure, full"),
        (
            {"virtual_pipeline_model_parallel_size": 2, "share": "2/2"},
            pp_to_vpp.UsageError,
            "neither auto nor I/N",
        ),
        (
            {"virtual_pipeline_model_parallel_size": 2, "pipeline_ranks_to_process": [7]},
            pp_to_vpp.UsageError,
            "there is no pipeline rank 7",
        ),
    ],
)
def test_it_refuses_what_the_command_line_refuses(
    asked: Conversion, kind: type[pp_to_vpp.ConversionError], reason: str
) -> None:
    with pytest.raises(kind, match=reason) as caught:
        pp_to_vpp.plan(pair(DENSE).source, **asked)
    assert isinstance(caught.value, pp_to_vpp.ConversionError)
    assert caught.value.problems


@pytest.mark.parametrize("source", ["missing", Path("missing")])
def test_a_source_that_is_not_there(source: Folder, tmp_path: Path) -> None:
    with pytest.raises(pp_to_vpp.CheckpointError, match="cannot be listed"):
        pp_to_vpp.inspect(tmp_path / source)
    with pytest.raises(pp_to_vpp.UsageError, match="nothing to verify"):
        pp_to_vpp.verify(pair(DENSE).source, tmp_path / "none")


def test_a_conversion_needs_a_layout(tmp_path: Path) -> None:
    """The command line verifies with the same words."""
    with pytest.raises(pp_to_vpp.UsageError, match="no target layout; pass virtual_pipeline"):
        pp_to_vpp.convert(pair(DENSE).truth, tmp_path / "out")
    with pytest.raises(pp_to_vpp.UsageError, match="no target layout; pass virtual_pipeline"):
        pp_to_vpp.plan(pair(DENSE).truth, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_keyword_is_a_wrong_keyword() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'vpp'"):
        pp_to_vpp.plan(pair(DENSE).source, vpp=2)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        pp_to_vpp.other  # type: ignore[attr-defined]  # noqa: B018


def test_a_program_keeps_its_threads_and_processes(tmp_path: Path) -> None:
    """And three conversions at a time in its threads succeed, and one in a process of its pool."""
    command = [sys.executable, "-m", "tests.guest", str(pair(MOE).source), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=120, check=False
    )
    assert (done.stdout, done.stderr) == ("done\n", "")
    targets = [path / pair(MOE).source.name for path in tmp_path.iterdir()]
    assert len(targets) == 4
    for target in targets:
        assert differences(target, pair(MOE).truth, pair(MOE).source) == []


def test_the_source_is_read_anew_by_every_call(tmp_path: Path) -> None:
    """Though the process that reads it is the same."""
    source = copy_of(pair(DENSE).source, tmp_path)
    assert pp_to_vpp.inspect(source, processes=1).iteration == 1
    path = source / "mp_rank_00_001" / "model_optim_rng.pt"
    rewrite(path, lambda root: root.update(iteration=9))
    with pytest.raises(pp_to_vpp.CheckpointError, match="mp_rank_00_001"):
        pp_to_vpp.inspect(source, processes=1)


def test_importing_it_is_nothing_to_wait_for() -> None:
    """Neither numpy nor torch, which a caller may not want yet."""
    script = "import sys, pp_to_vpp; print(sorted({'numpy', 'torch', 'tqdm'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(),
        check=True,
    )  # fmt: skip
    assert done.stdout == "[]\n"
