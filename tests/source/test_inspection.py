"""What looking at a family shows: its bytes, by stage, are those of its tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pp_to_vpp.source.inspection import StageBytes, look_at
from pp_to_vpp.source.proven import FamilyJob

from ..compare import load
from ..families import families, iteration, surveyed
from ..pairs import DENSE, EMPTY, FROZEN, HYBRID_MOE, LAYER_WISE, MOE, NOOP, WEIGHTS


@pytest.mark.parametrize("side", ["source", "truth"])
@pytest.mark.parametrize("name", [DENSE, MOE, EMPTY, HYBRID_MOE, LAYER_WISE, NOOP, WEIGHTS])
def test_the_bytes_of_stages_are_those_of_the_weights(name: str, side: str) -> None:
    """As torch loads them."""
    survey = surveyed(name, side)
    for key, family in zip(survey.families, families(name, side), strict=True):
        look = look_at(FamilyJob(survey.family(key), survey.told))
        assert look.proven.source == family.megatron
        assert look.samples == len(list(family.samples()))
        folders = [
            iteration(name, side) / rank.folder for rank in survey.family(key).ranks.values()
        ]
        sizes = [path.stat().st_size for folder in folders for path in folder.iterdir()]
        assert (look.files, look.length) == (len(sizes), sum(sizes))
        for pp_rank, rank in survey.family(key).ranks.items():
            root = load(iteration(name, side) / rank.folder / "model_optim_rng.pt")
            chunks = [root[k] for k in root if k.startswith("model")]
            for vp_stage, chunk in enumerate(chunks):
                tensors = [v for v in chunk.values() if isinstance(v, torch.Tensor)]
                weights = sum(tensor.nbytes for tensor in tensors)
                assert look.stages[pp_rank, vp_stage].weights == weights


def test_state_that_families_share_counts_once() -> None:
    """Twelve bytes for each expert's parameter, and for each dense one of the first expert rank."""
    survey = surveyed(MOE, "source")
    looks = [look_at(FamilyJob(survey.family(key), survey.told)) for key in survey.families]
    trained = 0
    for path in iteration(MOE, "source").glob("*/model_optim_rng.pt"):
        for key, value in load(path)["model"].items():
            is_held = ".experts." in key or path.parent.name.endswith("_000")
            trained += value.numel() if is_held and isinstance(value, torch.Tensor) else 0
    found = sum(stage.optimizer for look in looks for stage in look.stages.values())
    assert found == 12 * trained


def test_kinds_of_state_are_named() -> None:
    def states(name: str) -> set[str]:
        survey = surveyed(name, "source")
        look = look_at(FamilyJob(survey.family(survey.families[0]), survey.told))
        return {kind for kind, _ in look.states}

    assert states(DENSE) == {"param", "exp_avg", "exp_avg_sq"}
    assert "momentum_buffer" in states(LAYER_WISE)
    assert states(WEIGHTS) == set()
    assert StageBytes(1, 2) + StageBytes(3, 4) == StageBytes(4, 6)


def test_frozen_parameters_are_counted() -> None:
    survey = surveyed(FROZEN, "source")
    look = look_at(FamilyJob(survey.family(survey.families[0]), survey.told))
    assert len(look.proven.frozen) > 0
    assert Path(look.proven.folders.directory) == iteration(FROZEN, "source")
