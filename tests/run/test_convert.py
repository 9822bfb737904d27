"""Whole conversions, held to what Megatron itself saved."""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from pp_to_vpp.container.pickling import Global, Instance
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.forms import Ends, Even, HybridPattern, LayoutString, Listed
from pp_to_vpp.run.convert import fingerprint_source
from pp_to_vpp.source.survey import take_survey

from ..compare import differences
from ..converted import converted
from ..edit import copy_of, rewrite_all
from ..inline import Inline
from ..pairs import (
    BERT,
    DENSE,
    EXPERTS_FIRST,
    FROZEN_DECOUPLED,
    LAYER_WISE_WIDE,
    MOE,
    OVERLAP,
    OVERLAP_EMPTY,
    OVERLAP_EMPTY_MOE,
    OWN_RATES,
    names,
    pair,
)
from ..runs import Program


def files_of(iteration: Path) -> dict[str, bytes]:
    """Every file of an iteration folder, by its path in it."""
    return {
        str(path.relative_to(iteration)): path.read_bytes()
        for path in sorted(iteration.glob("*/*"))
    }


def leftovers(root: Path) -> list[Path]:
    """Temporary names that a run must not leave behind."""
    return [path for path in root.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("name", names())
def test_converting_the_source_gives_the_truth(name: str) -> None:
    """Files are not larger than Megatron's either: one storage per buffer, one object of each
    string."""
    case, target = pair(name), converted(name)
    assert differences(target, case.truth, case.source) == []
    for path in sorted(target.glob("*/*.pt")):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None, "every record has its true CRC-32"
    slack = 128 if "--target-overlap" in " ".join(case.options) else 0
    for name_in_it, data in files_of(case.truth).items():
        found = (target / name_in_it).stat().st_size
        assert abs(found - len(data)) <= slack, name_in_it
    assert leftovers(target.parent) == []


@pytest.mark.parametrize("name", names())
def test_there_and_back_again(name: str, program: Program, tmp_path: Path) -> None:
    """PP -> VPP -> PP gives back tensors, keys, param groups and file sizes."""
    case, back = pair(name), tmp_path / "iter_0000001"
    assert program.convert(converted(name), back, options_for(case.source)).status == 0
    assert differences(back, case.source, case.source) == []
    for path, data in files_of(case.source).items():
        assert (back / path).stat().st_size == len(data), path


def test_the_overlap_flag_alone_is_a_conversion(program: Program, tmp_path: Path) -> None:
    """It changes which optimizers a rank chains, hence both files, and no layer's place."""
    case = pair(OVERLAP)
    without, again = tmp_path / "without" / "iter_0000001", tmp_path / "again" / "iter_0000001"
    direct = tmp_path / "direct" / "iter_0000001"
    assert program.convert(case.truth, without).status == 0
    assert program.convert(case.source, direct).status == 0
    assert differences(without, direct, case.truth) == []
    flag = "--target-overlap-param-gather-with-optimizer-step"
    assert program.convert(without, again, (), flag).status == 0
    assert differences(again, case.truth, case.truth) == []
    refused = program.convert(case.truth, tmp_path / "no" / "iter_0000001", (), flag)
    program.refuses(3, refused, "already has the layout")


@pytest.mark.parametrize(
    "name", [OVERLAP_EMPTY, OVERLAP_EMPTY_MOE, EXPERTS_FIRST, FROZEN_DECOUPLED]
)
def test_groups_follow_from_all_ranks(name: str, program: Program, tmp_path: Path) -> None:
    """One rank alone tells neither which groups its optimizer has, where the first chunks have one
    of their own and it holds no layers anywhere, nor the order of groups that it has nothing of."""
    case, target = pair(name), tmp_path / "iter_0000001"
    for pp_rank in reversed(range(len({path.name[:14] for path in case.truth.glob("mp_*")}))):
        one = ("--pipeline-ranks-to-process", str(pp_rank))
        assert program.convert(case.source, target, case.options, *one).status == 0
    assert differences(target, case.truth, case.source) == []


def few_arguments(root: dict[str, Any]) -> None:
    """What Megatron's and its forks' unit tests save: a SimpleNamespace that names little."""
    kept = (
        "num_layers", "pipeline_model_parallel_size", "tensor_model_parallel_size", "save",
        "expert_model_parallel_size", "use_distributed_optimizer", "load",
        "untie_embeddings_and_output_weights", "num_virtual_stages_per_pipeline_rank",
    )  # fmt: skip
    values = root["args"].state
    state = {name: values[name] for name in kept}
    root["args"] = Instance(Global("types", "SimpleNamespace"), (), by_new=True, state=state)


@pytest.mark.parametrize("name", [DENSE, MOE])
def test_few_arguments_are_enough(name: str, program: Program, tmp_path: Path) -> None:
    case = pair(name)
    source, truth = copy_of(case.source, tmp_path / "s"), copy_of(case.truth, tmp_path / "t")
    rewrite_all(source, few_arguments)
    rewrite_all(truth, few_arguments)
    there, back = tmp_path / "there" / source.name, tmp_path / "back" / source.name
    assert program.convert(source, there, (), "--verify", "full").status == 0
    assert differences(there, truth, source) == []
    assert program.convert(there, back, options_for(source), "--verify", "full").status == 0
    assert differences(back, source, source) == []


def options_for(iteration: Path) -> list[str]:
    """Options that ask for the layout that a checkpoint has."""
    placement = take_survey(str(iteration)).arguments.placement
    options = ["--target-virtual-pipeline-model-parallel-size", str(placement.vp_size)]
    match placement.form:
        case LayoutString(text):
            return ["--target-pipeline-model-parallel-layout", text]
        case HybridPattern(text):
            return ["--target-hybrid-layer-pattern", text]
        case Ends(first_split=first, last_split=last):
            for end, split in (("first", first), ("last", last)):
                if split is not None:
                    words = map(str, split)
                    options += [f"--target-{end}-virtual-pipeline-num-layers-split", *words]
        case Even() | Listed():
            pass
    return options


def test_output_does_not_depend_on_the_workers(program: Program, tmp_path: Path) -> None:
    case = pair(MOE)
    found = []
    for workers in (1, 3):
        target = tmp_path / str(workers) / "iter_0000001"
        options: list[str | Path] = ["--load-iteration-dir", case.source]
        options += ["--save-iteration-dir", target]
        assert program(*options, *case.options, workers=workers).status == 0
        found.append(files_of(target))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", [MOE, LAYER_WISE_WIDE])
def test_nodes_may_share_the_work(name: str, program: Program, tmp_path: Path) -> None:
    case = pair(name)
    whole, shared = tmp_path / "whole" / "iter_0000001", tmp_path / "shared" / "iter_0000001"
    assert program.convert(case.source, whole, case.options).status == 0
    tracker = shared.parent / "latest_checkpointed_iteration.txt"
    run = program.convert(case.source, shared, case.options, "--pipeline-ranks-to-process", "1")
    assert run.status == 0
    assert sorted(path.name for path in shared.iterdir()) == [
        "mp_rank_00_001_000",
        "mp_rank_00_001_001",
        "pp_to_vpp.json",
    ]
    assert not tracker.exists()
    assert "still to come" in run.output
    run = program.convert(case.source, shared, case.options, "--pipeline-ranks-to-process", "0")
    assert run.status == 0
    assert tracker.read_text() == "1"
    assert files_of(shared) == files_of(whole)


def test_nodes_agree_on_groups_of_the_runs_own(program: Program, tmp_path: Path) -> None:
    """Up to 0.13 the ranks have other groups; what a node leaves behind nobody else would miss."""
    case = pair(OWN_RATES)
    target = tmp_path / case.truth.name
    for rank in ("0", "1"):
        run = program.convert(
            case.source, target, case.options, "--verify", "none",
            "--pipeline-ranks-to-process", rank,
        )  # fmt: skip
        assert run.status == 0, run.errors
    assert differences(target, case.truth, case.source) == []


def test_dataloader_files_are_copied_and_others_named(program: Program, tmp_path: Path) -> None:
    case = pair(DENSE)
    source = copy_of(case.source, tmp_path)
    rank = source / "mp_rank_00_001"
    (rank / "train_dataloader_dprank000.pt").write_bytes(b"loader state" * 1000)
    (rank / "notes.txt").write_text("mine")
    (source / "README").write_text("mine too")
    target = tmp_path / "iter_0000001"
    run = program.convert(source, target, case.options)
    assert run.status == 0
    copied = target / "mp_rank_00_001" / "train_dataloader_dprank000.pt"
    assert copied.read_bytes() == b"loader state" * 1000
    assert "not copied, no part of a checkpoint: mp_rank_00_001/notes.txt" in run.output
    assert "not copied, no part of a checkpoint: README" in run.output


def test_a_dry_run_writes_nothing_and_tells_everything(program: Program, tmp_path: Path) -> None:
    case = pair(MOE)
    target = tmp_path / "out" / "iter_0000001"
    report = tmp_path / "plan.json"
    dry = program.convert(case.source, target, case.options, "--dry-run", "--report", report)
    assert dry.status == 0
    assert not target.parent.exists()
    assert "nothing was written" in dry.output
    assert "--num-layers-per-virtual-pipeline-stage 2" in dry.output
    assert program.convert(case.source, target, case.options).status == 0
    planned = {
        f"{rank['folder']}/{file['name']}": file["bytes"]
        for rank in json.loads(report.read_text())["ranks"]
        for file in rank["files"]
    }
    assert planned == {path: len(data) for path, data in files_of(target).items()}


def test_the_report_tells_what_was_written(program: Program, tmp_path: Path) -> None:
    case = pair(DENSE)
    target, path = tmp_path / "iter_0000001", tmp_path / "report.json"
    assert program.convert(case.source, target, case.options, "--report", path).status == 0
    report = json.loads(path.read_text())
    assert report["kind"] == "conversion"
    assert report["verification"] == "structure"
    assert report["source"]["layers"] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert report["target"]["layers"] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    written = files_of(target)
    for rank in report["ranks"]:
        assert not rank["kept"]
        for file in rank["files"]:
            data = written.pop(f"{rank['folder']}/{file['name']}")
            assert file["bytes"] == len(data)
            assert file["crc32"] == f"{zlib.crc32(data):08x}"
    assert not written
    assert report["bytes"] == report["bytes_written"]


def test_the_source_is_left_alone(program: Program, tmp_path: Path) -> None:
    case = pair(DENSE)
    before = files_of(case.source)
    stamps = {path: path.stat().st_mtime_ns for path in case.source.rglob("*")}
    assert program.convert(case.source, tmp_path / "iter_0000001", case.options).status == 0
    assert files_of(case.source) == before
    assert {path: path.stat().st_mtime_ns for path in case.source.rglob("*")} == stamps


def test_folders_that_no_plan_needs_are_what_their_names_say_too(tmp_path: Path) -> None:
    """Where a run does a part, most are read for their identity alone, each by itself."""
    source = copy_of(pair(BERT).source, tmp_path)
    assert fingerprint_source(Inline(), take_survey(str(pair(BERT).source)))
    shutil.rmtree(source / "mp_rank_01_001")
    shutil.copytree(source / "mp_rank_00_001", source / "mp_rank_01_001")
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001: it is not .* as mp_rank_00_001,"):
        fingerprint_source(Inline(), take_survey(str(source)))
