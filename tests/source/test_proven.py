"""What families show together: they are of one save, and somebody holds each state."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.source.proven import FamilyJob, ProvenFamily, check_families, prove
from pp_to_vpp.source.survey import take_survey

from ..edit import copy_of, set_arguments
from ..families import SIDES, families, surveyed
from ..pairs import BERT, LAYER_WISE_WIDE, MOE, PLAIN, pair


def proven(name: str, side: str = "source") -> list[ProvenFamily]:
    """All families of one side."""
    found = surveyed(name, side)
    return [prove(FamilyJob(found.family(key), found.told)) for key in found.families]


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_real_families_fit_together(name: str, side: str) -> None:
    found = proven(name, side)
    check_families(found, "here")
    for one, other in zip(found, families(name, side), strict=True):
        assert (one.source, one.kind) == (other.megatron, other.kind)
        assert one.frozen == other.frozen
        assert len(one.identities) == len(one.folders.ranks)
        assert one.left_behind == ()


def test_families_of_two_saves_do_not() -> None:
    one, other = proven(MOE)
    own = other.source
    rules = replace(own.rules, aligns_parameters=not own.rules.aligns_parameters)
    with pytest.raises(CheckpointError, match=r"written in different ways.*mp_rank_00_000_001"):
        check_families([one, replace(other, source=replace(own, rules=rules))], "here")
    groups = dict.fromkeys(one.groups, "another")
    with pytest.raises(CheckpointError, match=r"a param group differs from that of mp_rank_00_000"):
        check_families([one, replace(other, groups=groups)], "here")
    entries = dict.fromkeys(one.state_entries, ("'param'",))
    with pytest.raises(CheckpointError, match=r"other entries than those of .*found 'param'"):
        check_families([one, replace(other, state_entries=entries)], "here")


def test_one_family_of_those_with_the_same_parameters_holds_their_state() -> None:
    dense = "dense optimizer state of tp rank 0"
    experts = [f"expert optimizer state of etp rank 0 and ep rank {rank}" for rank in (0, 1)]
    found = proven(MOE)
    assert [dict(of.optimizer_states) for of in found] == [
        {dense: True, experts[0]: True},
        {dense: False, experts[1]: True},
    ]
    with pytest.raises(CheckpointError, match=f"no distrib_optim.pt holds the {dense}"):
        check_families(found[1:], "here")
    less = replace(found[1], optimizer_states={dense: False, experts[1]: False})
    with pytest.raises(CheckpointError, match=f"no distrib_optim.pt holds the {experts[1]}"):
        check_families([found[0], less], "here")
    assert proven(PLAIN)[0].optimizer_states == {}


def test_a_family_of_another_save_is_refused() -> None:
    found = surveyed(MOE, "source")
    told = {**found.told, "iteration": 7}
    with pytest.raises(CheckpointError, match="iteration"):
        prove(FamilyJob(found.family((0, 0)), told))


def prove_all(source: Path) -> list[ProvenFamily]:
    found = take_survey(str(source))
    return [prove(FamilyJob(found.family(key), found.told)) for key in found.families]


def exchange(source: Path, one: str, other: str) -> None:
    (source / one).rename(source / "aside")
    (source / other).rename(source / one)
    (source / "aside").rename(source / other)


def copy_over(source: Path, one: str, other: str) -> None:
    shutil.rmtree(source / other)
    shutil.copytree(source / one, source / other)


@pytest.mark.parametrize(
    ("name", "change", "one", "other"),
    [
        (BERT, copy_over, "mp_rank_00_001", "mp_rank_01_001"),
        (BERT, exchange, "mp_rank_00_000", "mp_rank_01_000"),
        (BERT, exchange, "mp_rank_00_000", "mp_rank_00_001"),
        (LAYER_WISE_WIDE, copy_over, "mp_rank_00_000_001", "mp_rank_00_000_000"),
        (LAYER_WISE_WIDE, exchange, "mp_rank_00_001_000", "mp_rank_00_001_001"),
    ],
)
def test_folders_that_are_not_what_their_names_say_are_refused(
    name: str, change: Callable[[Path, str, str], None], one: str, other: str, tmp_path: Path
) -> None:
    """Before their layers are looked at, which are named alike on all ranks."""
    source = copy_of(pair(name).source, tmp_path)
    change(source, one, other)
    with pytest.raises(CheckpointError, match="it is not what its name says") as caught:
        prove_all(source)
    line = caught.value.problems[0]
    assert one in line
    assert other in line


def test_files_that_all_tell_the_same_rank_tell_nothing(tmp_path: Path) -> None:
    source = copy_of(pair(MOE).source, tmp_path)
    set_arguments(source, rank=0)
    assert {of.saver for each in prove_all(source) for of in each.identities.values()} == {0}
