"""Sources of V-shaped schedules: the later chunks stand on the ranks in reverse (FORMAT 4.9).

No fork that has them runs here. But with untied embeddings their checkpoints hold the chunks of
interleaved ones, each whole and with its buffers, on other ranks: what Megatron saved with two
virtual stages is rearranged so, and must convert to what Megatron saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pp_to_vpp.container import torch_file
from pp_to_vpp.container.extents import Extent
from pp_to_vpp.megatron.forms import Order
from pp_to_vpp.source.files import read_torch_file
from pp_to_vpp.source.survey import take_survey

from .compare import differences
from .edit import assemble, copy_of, set_arguments
from .pairs import DEEPSEEK, DENSE, EMPTY, LAYOUT, MOE, NOOP, pair
from .runs import Program

MINDSPEED = {
    "schedules_method": "dualpipev",
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "overlap_p2p_comm": False,
    "align_param_gather": False,
}
FLAGSCALE = {**MINDSPEED, "schedules_method": None, "use_dualpipev": True}
DCU = {**MINDSPEED, "schedules_method": None, "schedule_method": "dualpipev"}
PRIMUS = {"patch_primus_pipeline": True, "pp_algorithm": "zbv-formatted"}
ZERO_BUBBLE = {
    "patch_zero_bubble": True,
    "enable_zero_bubble": True,
    "zero_bubble_v_schedule": True,
}


def _read(extent: Extent) -> bytes:
    data = Path(extent.path).read_bytes()
    return data[extent.offset : extent.offset + extent.length]


def _later_chunks(root: Any) -> Iterator[tuple[Any, Any]]:
    """Where a file holds what belongs to the chunk of the second virtual stage."""
    if "model1" in root:
        yield root, "model1"
        return
    for states in root if isinstance(root, list) else [root]:
        if states is not None:
            yield states, max(key for key in states if isinstance(key, int))


def _exchange(paths: list[Path]) -> None:
    """Reverse the second chunks of the ranks of one family."""
    files = {path: read_torch_file(path) for path in paths if path.exists()}
    for first, last in zip(paths[: len(paths) // 2], reversed(paths), strict=False):
        if first in files:
            places = (_later_chunks(files[path].root) for path in (first, last))
            for (ours, mine), (theirs, yours) in zip(*places, strict=True):
                ours[mine], theirs[yours] = theirs[yours], ours[mine]
    written = {path: assemble(torch_file.encode(of.root, of), _read) for path, of in files.items()}
    for path, data in written.items():
        path.write_bytes(data)


def v_shaped(name: str, folder: Path, **values: Any) -> Path:
    """The truth of a pair, as a V-shaped run with the same chunks would have saved it."""
    source = copy_of(pair(name).truth, folder)
    ranks = take_survey(str(source)).ranks
    for family in {rank.family for rank in ranks}:
        folders = [source / rank.folder for rank in ranks if rank.family == family]
        for file in ("model_optim_rng.pt", "distrib_optim.pt"):
            _exchange([path / file for path in folders])
    set_arguments(source, **values)
    return source


def unlike(target: Path, truth: Path, source: Path, schedule: dict[str, Any]) -> list[str]:
    """Differences from what Megatron saved, but for what the fork's arguments were."""
    found = differences(target, truth, source)
    return [text for text in found if not any(f"/args.{name} " in text for name in schedule)]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        (MOE, MINDSPEED),
        (MOE, ZERO_BUBBLE),
        (NOOP, MINDSPEED),
        (NOOP, FLAGSCALE),
        (NOOP, {**PRIMUS, "decoder_pipeline_manual_split_list": [2, 2, 2, 2]}),
        (LAYOUT, PRIMUS),
        (LAYOUT, {**DCU, "num_layers_to_build": [1, 2, 3, 1]}),
        (EMPTY, PRIMUS),
    ],
)
def test_what_megatron_saved_comes_out(
    name: str, schedule: dict[str, Any], program: Program, tmp_path: Path
) -> None:
    """Interleaved, and plain."""
    case = pair(name)
    source = v_shaped(name, tmp_path, **schedule)
    for truth, options in ((case.truth, case.options), (case.source, back(name))):
        target = tmp_path / truth.parent.name / source.name
        run = program.convert(source, target, options, "--verify", "full")
        assert run.status == 0, run.errors
        assert "V-shaped schedule is dropped: launch without it" in run.output
        assert unlike(target, truth, source, schedule) == []
        arguments = take_survey(str(target)).arguments
        assert arguments.placement.order is Order.INTERLEAVED


def back(name: str) -> tuple[str, ...]:
    """Options that ask for the source's layout of a pair."""
    layouts = {LAYOUT: "Et*4|t*3L", EMPTY: "Ett|t|tL"}
    if name in layouts:
        return ("--target-pipeline-model-parallel-layout", layouts[name])
    return ("--target-virtual-pipeline-model-parallel-size", "1")


def test_the_switches_are_those_of_a_run_without(program: Program, tmp_path: Path) -> None:
    """Nothing else is changed: an algorithm that nothing asks for may stand there."""
    for schedule, off in (
        (MINDSPEED, {"schedules_method": None}),
        (DCU, {"schedule_method": "vanilla"}),
        (FLAGSCALE, {"use_dualpipev": False}),
        (PRIMUS, {"patch_primus_pipeline": False, "pp_algorithm": "zbv-formatted"}),
        (ZERO_BUBBLE, {"patch_zero_bubble": False, "enable_zero_bubble": True}),
    ):
        folder = tmp_path / next(iter(off))
        source = v_shaped(NOOP, folder, **schedule)
        target = folder / "target" / source.name
        assert program.convert(source, target).status == 0
        root = read_torch_file(target / "mp_rank_00_000" / "model_optim_rng.pt").root
        found = root["args"].state
        assert {name: found[name] for name in off} == off
        assert found["virtual_pipeline_model_parallel_size"] == 2
        assert found["overlap_p2p_comm"] is True


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        (DENSE, MINDSPEED, "args.schedules_method is 'dualpipev': a V-shaped schedule with tied"),
        (DENSE, PRIMUS, "args.pp_algorithm is 'zbv-formatted': a V-shaped schedule with tied"),
        (DEEPSEEK, FLAGSCALE, "args.use_dualpipev is True: a V-shaped schedule with multi-token"),
        (
            MOE,
            {**ZERO_BUBBLE, "virtual_pipeline_model_parallel_size": 4},
            "args.zero_bubble_v_schedule is True: a V-shaped schedule with "
            "args.virtual_pipeline_model_parallel_size 4 instead of 2",
        ),
    ],
)
def test_what_its_forks_cannot_train_is_refused(
    name: str, values: dict[str, Any], reason: str, program: Program, tmp_path: Path
) -> None:
    source = v_shaped(name, tmp_path, **values)
    program.refuses(4, program.convert(source, tmp_path / "x" / "iter_0000001"), reason)


def test_the_order_is_held_to_the_chunks(program: Program, tmp_path: Path) -> None:
    """Interleaved chunks that arguments call V-shaped, and V-shaped ones that nothing calls so."""
    interleaved = copy_of(pair(MOE).truth, tmp_path / "interleaved")
    set_arguments(interleaved, **MINDSPEED)
    run = program.convert(interleaved, tmp_path / "x" / "iter_0000001", back(MOE))
    program.refuses(4, run, "the pipeline layout puts head here, but no key does")
    other = v_shaped(MOE, tmp_path / "v", **{**PRIMUS, "pp_algorithm": "zero-bubble"})
    run = program.convert(other, tmp_path / "x" / "iter_0000001", back(MOE))
    program.refuses(4, run, "no rule says which chunk key 'decoder.final_layernorm.weight'")
