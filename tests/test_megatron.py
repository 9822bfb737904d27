"""Megatron-Core judges the conversion: what it saves under one layout, converted, is what it saves
under the other; and it loads the converted checkpoint into the model that it came from."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from . import compare
from .megatron.command import convert
from .megatron.launch import Megatron, RankError, megatron
from .megatron.resume import RUNS, experiment
from .megatron.spec import Model, Run


def _has_megatron() -> bool:
    try:
        return importlib.util.find_spec("megatron.core") is not None
    except ModuleNotFoundError:
        return False


pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(not _has_megatron(), reason="megatron-core is not installed"),
]

ITERATION = 10
Digests = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that Megatron saved."""

    root: Path
    digests: Digests
    """What the model held, by global name."""

    @property
    def iteration(self) -> Path:
        return self.root / f"iter_{ITERATION:07d}"


Save = Callable[[Run], Saved]


@pytest.fixture(scope="module")
def server() -> Iterator[Megatron]:
    with megatron() as process:
        yield process


@pytest.fixture(scope="module")
def save(server: Megatron, tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Saves the state of ``values.fill`` under a run's layout, each run once."""

    @functools.cache
    def saved(run: Run) -> Saved:
        root = tmp_path_factory.mktemp("saved")
        return Saved(root, _merged(server.run("save", run, root=str(root), iteration=ITERATION)))

    return saved


def _merged(ranks: list[Digests]) -> Digests:
    """What all ranks hold. Ranks that share a parameter must agree about it."""
    merged: Digests = {}
    for rank in ranks:
        for name, record in rank.items():
            known = merged.setdefault(name, {})
            for kind, digest in record.items():
                assert known.setdefault(kind, digest) == digest, f"{kind} of {name} differs by rank"
    return merged


DENSE = Run()
ODD = Run(Model(hidden=40, ffn=88, tied=False), dp=2)
MOE = Run(Model("moe", tied=False), ep=2, dp=2)
DEEPSEEK = Run(Model("deepseek", tied=False), ep=2, dp=2)
LATE_MOE = Run(Model("deepseek", tied=False, leading_dense=4), ep=2, dp=2)
"""The first stage has no experts, but both of the virtual one do."""
BUCKETS = replace(ODD, bucket_size=4000)
GATHERED = Run(Model(layers=8), pp=4, layout="Et|t|t|tttttL")
MTP = Run(Model("deepseek", tied=False, mtp_layers=1), ep=2, dp=2)
MTP_ODD = Run(Model(hidden=40, ffn=88, mtp_layers=2), dp=2)
MTP_STAGES = Run(Model(layers=7, mtp_layers=1), pp=3, layout="Ett|ttt|ttmL")
ACCOUNTED = Run(Model(layers=10), account_for_embedding=True, account_for_loss=True)
UNEVEN = Run(Model(layers=10), pp=2, first_layers=4)


def virtual(run: Run, vpp: int = 2, layout: str | None = None) -> Run:
    """The run with virtual stages."""
    return replace(run, vpp=vpp, layout=layout)


CASES = {
    "dense tied": (DENSE, virtual(DENSE)),
    "dense untied, odd sizes, DP 2": (ODD, virtual(ODD)),
    "dense, PP 4": (replace(DENSE, pp=4), virtual(replace(DENSE, pp=4))),
    "dense, TP 2": (replace(DENSE, tp=2), virtual(replace(DENSE, tp=2))),
    "dense, CP 2": (replace(ODD, dp=1, cp=2), virtual(replace(ODD, dp=1, cp=2))),
    "dense, uneven stages": (UNEVEN, virtual(UNEVEN)),
    "dense, embedding and loss count as layers": (ACCOUNTED, virtual(ACCOUNTED, 3)),
    "dense, buckets": (BUCKETS, virtual(BUCKETS)),
    "dense, number of buckets": (replace(ODD, num_buckets=5), virtual(replace(ODD, num_buckets=5))),
    "dense, gather with the step": (DENSE, replace(virtual(DENSE), overlap_step=True)),
    "MoE EP 2": (MOE, virtual(MOE)),
    "MoE EP 1": (replace(MOE, ep=1), virtual(replace(MOE, ep=1))),
    "MoE TP 2 ETP 1 EP 2": (
        replace(MOE, dp=1, tp=2, etp=1),
        virtual(replace(MOE, dp=1, tp=2, etp=1)),
    ),
    "DeepSeek EP 2": (DEEPSEEK, virtual(DEEPSEEK)),
    "DeepSeek PP 4 EP 2": (replace(LATE_MOE, pp=4), virtual(replace(LATE_MOE, pp=4))),
    "DeepSeek, first stage without experts": (LATE_MOE, virtual(LATE_MOE)),
    "layout, an empty stage": (DENSE, virtual(DENSE, layout="Ettt||tt|tttL")),
    "layout, a chunk of three source stages": (
        GATHERED,
        virtual(GATHERED, layout="Ettt|t|t|t|t|t||L"),
    ),
    "layout to layout": (
        virtual(DENSE, layout="Ettt||tt|tttL"),
        virtual(DENSE, 3, layout="Et|tt|t|tt|tt|L"),
    ),
    "MTP EP 2": (MTP, virtual(MTP)),
    "MTP tied, odd sizes": (MTP_ODD, virtual(MTP_ODD)),
    "MTP, a stage of its own": (MTP_STAGES, virtual(MTP_STAGES, layout="Ett|tt|tt|t|m|L")),
    "back: dense": (virtual(ODD), ODD),
    "back: buckets": (virtual(BUCKETS), BUCKETS),
    "back: MoE": (virtual(MOE), MOE),
    "back: experts leave the first stage": (virtual(LATE_MOE), LATE_MOE),
    "back: MTP": (virtual(MTP), MTP),
    "back: layout": (virtual(GATHERED, layout="Ettt|t|t|t|t|t||L"), GATHERED),
    "VPP 2 to VPP 4": (virtual(MOE), virtual(MOE, 4)),
}


@pytest.mark.parametrize(("source", "target"), CASES.values(), ids=CASES)
def test_megatron_agrees(
    source: Run, target: Run, server: Megatron, save: Save, tmp_path: Path
) -> None:
    before, truth = save(source), save(target)
    converted = convert(before.iteration, tmp_path, target)
    assert compare.differences(converted, truth.iteration, before.iteration) == []
    assert _merged(server.run("load", target, root=str(tmp_path))) == before.digests
    assert truth.digests == before.digests, "the same state was not saved twice"


@pytest.mark.parametrize("damage", ["weight", "moment", "order of layers", "order of keys", "step"])
def test_damage_is_seen(damage: str, server: Megatron, save: Save, tmp_path: Path) -> None:
    """The two judgements above can fail."""
    target = virtual(DENSE)
    truth = save(target)
    shutil.copytree(truth.root, tmp_path, dirs_exist_ok=True)
    iteration = tmp_path / truth.iteration.name
    server.run("damage", Run(pp=1), folder=str(iteration / "mp_rank_00_000"), kind=damage)
    assert len(compare.differences(iteration, truth.iteration, truth.iteration)) in (1, 2)
    loaded = _merged(server.run("load", target, root=str(tmp_path)))
    assert (loaded == truth.digests) == (damage == "order of keys")


def test_a_missing_chunk_stops_loading(server: Megatron, save: Save) -> None:
    """Loading is strict: a run with virtual stages does not take a checkpoint without."""
    with pytest.raises(RankError, match="model0"):
        server.run("load", virtual(DENSE), root=str(save(DENSE).root))


@pytest.mark.parametrize("model", RUNS)
def test_training_goes_on(model: str, server: Megatron, tmp_path: Path) -> None:
    """The losses after PP -> VPP and VPP -> PP are those of a run that was never interrupted."""
    assert list(experiment(server, RUNS[model], tmp_path).problems()) == []
