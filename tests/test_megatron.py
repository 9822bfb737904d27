"""Megatron-Core judges the conversion: what it saves under one layout, converted, is what it saves
under the other; and it loads the converted checkpoint into the model that it came from."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from . import compare
from .training.cases import CASES, DENSE, virtual
from .training.installed import NEEDS_MEGATRON
from .training.judge import Judge
from .training.launch import RankError
from .training.resume import RUNS, Experiment, experiment, lacking
from .training.spec import Run

pytestmark = NEEDS_MEGATRON


@pytest.mark.parametrize(("source", "target"), CASES.values(), ids=CASES)
def test_megatron_agrees(source: Run, target: Run, judge: Judge, tmp_path: Path) -> None:
    assert list(judge.problems(source, target, tmp_path)) == []


LONG = ("deepseek_v2", "deepseek_v3")
"""Models whose training belongs to the long suite (see CONTRIBUTING.md)."""


@pytest.mark.parametrize("damage", ["weight", "moment", "order of layers", "order of keys", "step"])
def test_damage_is_seen(damage: str, judge: Judge, tmp_path: Path) -> None:
    """The two judgements above can fail."""
    target = virtual(DENSE)
    truth = judge.saved(target)
    shutil.copytree(truth.root, tmp_path, dirs_exist_ok=True)
    iteration = tmp_path / truth.iteration.name
    rank = iteration / "mp_rank_00_000"
    judge.server.run("damage", Run(pp=1), folder=str(rank), kind=damage)
    assert len(compare.differences(iteration, truth.iteration, truth.iteration)) in (1, 2)
    loaded = judge.loaded(target, tmp_path)
    assert (loaded == truth.digests) == (damage == "order of keys")


def test_a_missing_chunk_stops_loading(judge: Judge) -> None:
    """Loading is strict: a run with virtual stages does not take a checkpoint without."""
    with pytest.raises(RankError, match="KeyError: 'model0'"):
        judge.loaded(virtual(DENSE), judge.saved(DENSE).root)


_LOSSES = {i: float(i).hex() for i in range(1, 10)}
_DAMAGE: dict[str, dict[str, Any]] = {
    "the uninterrupted run did not train": {"plain": {1: "0x1p+0"}},
    "VPP is not bit": {"virtual": {**_LOSSES, 5: "0x1.4000001p+2"}},
    "PP after VPP is not bit": {"back": {8: _LOSSES[8], 9: _LOSSES[9]}},
    "do not depend on the optimizer": {"without": {4: _LOSSES[4], 5: _LOSSES[5]}},
}


@pytest.mark.parametrize("said", _DAMAGE)
def test_wrong_losses_are_seen(said: str) -> None:
    """The judgement of training can fail."""
    first, last = ({i: _LOSSES[i] for i in range(n, n + 3)} for n in (4, 7))
    other = {4: _LOSSES[4], 5: _LOSSES[6]}
    right = Experiment(_LOSSES, first, last, control=other, without=other, steps=3)
    assert list(right.problems()) == []
    assert any(said in problem for problem in replace(right, **_DAMAGE[said]).problems())


@pytest.mark.parametrize("model", RUNS)
def test_training_goes_on(model: str, judge: Judge, tmp_path: Path) -> None:
    """The losses after PP -> VPP and VPP -> PP are those of a run that was never interrupted."""
    if model in LONG and not os.environ.get("PP_TO_VPP_LONG"):
        pytest.skip("takes most of a minute: set PP_TO_VPP_LONG=1")
    run, target = RUNS[model]
    (version,) = judge.server.run("version", Run(pp=1))
    lacks = lacking(run, version)
    if lacks is not None:
        pytest.skip(f"{lacks} is not installed")
    assert list(experiment(judge.server, run, target, tmp_path).problems()) == []
