"""``--no-save-optim``: the target that Megatron itself saves with its own flag of that name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pp_to_vpp.options import MANIFEST

from .compare import differences, load
from .edit import copy_of, flip_byte
from .pairs import DENSE, FROZEN, HYBRID_MOE, LAYER_WISE, MOE, PLAIN, WEIGHTS, pair
from .runs import Program

_V2 = ("--target-virtual-pipeline-model-parallel-size", "2")
_FULL = ("--no-save-optim", "--verify", "full")


def differing(target: Path, side: str) -> list[str]:
    """What is not as Megatron saved it, but for the folder that it was saved to."""
    case = pair(WEIGHTS)
    truth = case.truth if side == "truth" else case.source
    return [line for line in differences(target, truth, case.source) if "args.save " not in line]


@pytest.mark.parametrize("name", [DENSE, WEIGHTS])
def test_it_is_what_megatron_saves_with_its_flag(
    name: str, program: Program, tmp_path: Path
) -> None:
    """The values of all pairs follow from names alone: these two hold the same weights."""
    target = tmp_path / "iter_0000001"
    run = program.convert(pair(name).source, target, _V2, *_FULL)
    assert run.status == 0, run
    assert differing(target, "truth") == []
    assert [path.name for path in target.glob("*/*")] == ["model_optim_rng.pt"] * 2
    assert "launch Megatron with: --num-layers-per-virtual-pipeline-stage 2 --no-load-optim" in (
        run.output
    )
    assert "without optimizer state" in run.output


@pytest.mark.parametrize("name", [MOE, PLAIN, LAYER_WISE, FROZEN, HYBRID_MOE])
def test_the_weights_are_those_of_a_whole_conversion(
    name: str, program: Program, tmp_path: Path
) -> None:
    case, target = pair(name), tmp_path / "iter_0000001"
    run = program.convert(case.source, target, case.options, *_FULL)
    assert run.status == 0, run
    for path in target.glob("*/*"):
        assert path.name == "model_optim_rng.pt"
        ours, whole = load(path), load(case.truth / path.parent.name / path.name)
        gone = [key for key in whole if key not in ours]
        assert {"optimizer", "opt_param_scheduler"} >= set(gone) >= {"opt_param_scheduler"}
        assert ours["args"].no_save_optim is True
        chunks = [key for key in ours if key.startswith("model")]
        assert chunks == [key for key in whole if key.startswith("model")]
        for key in chunks:
            assert list(ours[key]) == list(whole[key])
            for one, other in zip(ours[key].values(), whole[key].values(), strict=True):
                if isinstance(one, torch.Tensor):
                    assert one.dtype == other.dtype
                    assert one.equal(other)
    both = ("--load-iteration-dir", case.source, "--save-iteration-dir", target)
    assert program(*both, *_FULL).status == 0
    program.refuses(6, program(*both), "(no_save_optim), expected False, found True")
    (target / MANIFEST).unlink()
    run = program(*both)
    program.refuses(6, run, "it holds no optimizer state", "add --no-save-optim if it was to")
    assert len(run.errors.splitlines()) <= 8


def test_the_layout_may_stay(program: Program, tmp_path: Path) -> None:
    """Only to leave out the optimizer; a target with it would be a copy."""
    case, target = pair(DENSE), tmp_path / "iter_0000001"
    options = ("--target-virtual-pipeline-model-parallel-size", "1")
    program.refuses(3, program.convert(case.source, target, options), "already has the layout")
    run = program.convert(case.source, target, options, *_FULL)
    assert run.status == 0, run
    assert differing(target, "source") == []
    assert "launch Megatron with: --no-load-optim\n" in run.output


def test_it_is_another_conversion(program: Program, tmp_path: Path) -> None:
    case, target = pair(DENSE), tmp_path / "iter_0000001"
    ranks = ("--pipeline-ranks-to-process",)
    assert program.convert(case.source, target, _V2, "--no-save-optim", *ranks, "0").status == 0
    assert json.loads((target / MANIFEST).read_text())["target"]["no_save_optim"] is True
    run = program.convert(case.source, target, _V2, *ranks, "1")
    program.refuses(2, run, "another conversion", "no_save_optim")
    run = program.convert(case.source, target, _V2, "--no-save-optim", *ranks, "1")
    assert run.status == 0, run
    run = program.convert(case.source, target, _V2, *_FULL, "--resume")
    assert run.status == 0, run
    assert "kept 2 from an earlier run" in run.output


def test_a_flipped_byte_is_found(program: Program, tmp_path: Path) -> None:
    case, target = pair(DENSE), tmp_path / "iter_0000001"
    assert program.convert(case.source, target, _V2, "--no-save-optim").status == 0
    path = copy_of(target, tmp_path / "other") / "mp_rank_00_001" / "model_optim_rng.pt"
    flip_byte(path, path.stat().st_size // 2)
    run = program(
        "--load-iteration-dir", case.source, "--save-iteration-dir", path.parents[1], *_FULL
    )
    program.refuses(6, run, "mp_rank_00_001")
