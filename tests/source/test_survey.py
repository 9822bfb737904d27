"""The rank folders of an iteration: what there is, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.source.survey import take_survey

from ..compare import load
from ..edit import copy_of, rewrite, rewrite_all, set_arguments
from ..families import OF_KINDS, iteration, surveyed
from ..pairs import DENSE, MOE, pair


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
def test_a_survey_finds_the_folders(name: str, side: str) -> None:
    """As they stand on the disk, with the iteration that torch finds in them."""
    found = surveyed(name, side)
    folders = sorted(path.name for path in iteration(name, side).iterdir())
    assert [rank.folder for rank in found.ranks] == folders
    assert found.ignored == ()
    first = load(iteration(name, side) / folders[0] / "model_optim_rng.pt")
    assert found.iteration == first["iteration"] == 1
    assert found.arguments.num_layers == first["args"].num_layers
    assert len(found.families) * found.arguments.pp_size == len(folders)
    for key in found.families:
        family = found.family(key)
        assert family.directory == str(iteration(name, side))
        assert list(family.ranks) == list(range(found.arguments.pp_size))
        assert all((rank.pp_rank or 0) == pp_rank for pp_rank, rank in family.ranks.items())
        assert {rank.family for rank in family.ranks.values()} == {key}


def test_entries_beside_the_ranks_are_named(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    (source / "README").write_text("mine")
    (source / "mp_rank_00").mkdir()
    assert take_survey(str(source)).ignored == ("README", "mp_rank_00")


def test_a_release_has_no_iteration(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    rewrite(source / "mp_rank_00_000" / "model_optim_rng.pt", lambda r: r.update(iteration="x"))
    assert take_survey(str(source)).iteration is None


@pytest.mark.parametrize(
    ("arguments", "folders", "reasons"),
    [
        ({"pipeline_model_parallel_size": 1}, (), ["do not fit pipeline_model", "mp_rank_00 for"]),
        ({"pipeline_model_parallel_size": 3}, (), ["rank 2 is missing"]),
        (
            {"expert_model_parallel_size": 2},
            (),
            ["and expert_model", "mp_rank_00_000_000 for PP 2"],
        ),
        ({"tensor_model_parallel_size": 2}, (), ["do not fit tensor_model", "rank 1 is missing"]),
        (
            {},
            ("mp_rank_01_000", "mp_rank_01_001"),
            ["2 folders too many: mp_rank_01_000, mp_rank_01_001"],
        ),
        (
            {},
            ("mp_rank_00_002",),
            ["fit pipeline_model", "too many: mp_rank_00_002; an older save"],
        ),
        ({}, ("mp_rank_00",), ["do not fit pipeline_model", "found mp_rank_00;"]),
        ({}, ("mp_rank_00_000_000",), ["do not fit pipeline_model", "found mp_rank_00_000_000;"]),
        ({}, ("mp_rank_000_001",), ["do not fit pipeline_model", "found mp_rank_000_001;"]),
        ({}, ("mp_rank_01_000",), ["do not fit tensor_model_parallel_size"]),
    ],
)
def test_folders_must_be_those_of_the_arguments(
    arguments: dict[str, int], folders: tuple[str, ...], reasons: list[str], tmp_path: Path
) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    if arguments:
        set_arguments(source, **arguments)
    for folder in folders:
        shutil.copytree(source / "mp_rank_00_000", source / folder)
    with pytest.raises(CheckpointError) as caught:
        take_survey(str(source))
    for reason in reasons:
        assert reason in str(caught.value)


def test_a_whole_family_that_is_missing_is_noticed(tmp_path: Path) -> None:
    """Each number is there, but not each pair of numbers."""
    source = copy_of(pair(MOE).source, tmp_path)
    set_arguments(source, tensor_model_parallel_size=2, expert_tensor_parallel_size=2)
    for pp_rank in range(2):
        shutil.copytree(
            source / f"mp_rank_00_00{pp_rank}_000", source / f"mp_rank_01_00{pp_rank}_000"
        )
    with pytest.raises(CheckpointError, match="mp_rank_01_000_001: this rank folder and its sib"):
        take_survey(str(source))


def test_tensor_ranks_that_were_never_saved_are_told(tmp_path: Path) -> None:
    """As Megatron 0.13.1 saves with TP 2, expert TP 1 and EP 1: tensor rank 1 has no folder."""
    source = copy_of(pair(DENSE).source, tmp_path)
    set_arguments(source, tensor_model_parallel_size=2, expert_tensor_parallel_size=1)
    with pytest.raises(CheckpointError, match="rank 1 is missing; Megatron never saved the others"):
        take_survey(str(source))


def test_rank_files_that_are_no_dictionaries_are_refused(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    rewrite_all(source, lambda _: [1, 2])
    with pytest.raises(CheckpointError, match="no training arguments"):
        take_survey(str(source))
