"""Families read from their files: the rules that explain them, and files that none explain."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest

from pp_to_vpp.checkpoint.family import RankFiles
from pp_to_vpp.checkpoint.optimizer_entries import OPTIMIZER
from pp_to_vpp.checkpoint.reading import megatron_of
from pp_to_vpp.container.pickling import as_mapping, ordered_dict
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.naming import Section
from pp_to_vpp.megatron.optimizer_chain import OptimizerKind
from pp_to_vpp.megatron.rules import CHANGES

from ..families import (
    KINDS,
    SIDES,
    edited,
    families,
    family,
    files_of,
    of_kind,
    read_family,
    with_arguments,
    without_argument,
)
from ..pairs import DEEPSEEK, DENSE, LAYOUT, LION, MOE, PLAIN, WEIGHTS, names


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_kinds_told_in_advance_are_those_of_the_files(name: str, side: str) -> None:
    """What ``of_kind`` goes by when tests are collected."""
    assert set(KINDS) <= set(names())
    expected = KINDS.get(name, OptimizerKind.DISTRIBUTED)
    assert (name, side) in of_kind(expected)
    for of in families(name, side):
        assert of.kind is expected


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_the_rules_found_are_the_likeliest(name: str, side: str) -> None:
    """Those that the signs in the arguments tell: real versions need no second guess."""
    run = family(name, side).megatron
    for change in CHANGES:
        assert getattr(run.rules, change.rule) == (change.sign in run.arguments.names), change


def test_wrong_signs_are_overruled_by_the_files() -> None:
    """A version between releases: the argument is not there yet, the behaviour is."""
    of = family(LAYOUT, "source")
    assert of.megatron.rules.aligns_parameters
    older = {p: without_argument(files, "deterministic_mode") for p, files in files_of(of).items()}
    found = next(read_family(older))
    assert "deterministic_mode" not in found.megatron.arguments.names
    assert found.megatron.rules == of.megatron.rules


def test_only_the_rules_asked_for_are_tried() -> None:
    of = family(LAYOUT, "source")
    (same,) = read_family(files_of(of), of.megatron.rules)
    assert same.megatron.rules == of.megatron.rules
    other = replace(of.megatron.rules, aligns_parameters=not of.megatron.rules.aligns_parameters)
    with pytest.raises(CheckpointError, match=r"no known layout .* 1 ways tried"):
        list(read_family(files_of(of), other))


def test_all_rules_that_explain_are_given() -> None:
    """Where sizes hide a difference, the bytes must tell."""
    of = family(DENSE, "source")
    found = [one.megatron.rules for one in itertools.islice(read_family(files_of(of)), 5)]
    assert found[0] == of.megatron.rules
    assert len(set(found)) == len(found) > 1


@pytest.mark.parametrize("version", [2.0, 3, "3.0", 3.5])
def test_other_checkpoint_versions_are_refused(version: object) -> None:
    files = edited(family(DENSE, "source").ranks[0].files, checkpoint_version=version)
    with pytest.raises(CheckpointError, match=r"unsupported checkpoint version, expected 3\.0"):
        next(read_family({0: files}))


def test_a_list_is_no_rank_file() -> None:
    files = family(DENSE, "source").ranks[0].files
    with pytest.raises(CheckpointError, match="it is no dictionary, found a list of 1"):
        next(read_family({0: replace(files, model=replace(files.model, root=[1]))}))


def test_siblings_must_hold_the_same_kind() -> None:
    of = family(WEIGHTS, "source")
    entry = family(DENSE, "source").ranks[1].root[OPTIMIZER]
    mixed = {0: of.ranks[0].files, 1: edited(of.ranks[1].files, optimizer=entry)}
    with pytest.raises(CheckpointError, match="its siblings hold distributed optimizer, it does"):
        next(read_family(mixed))


def test_an_optimizer_file_needs_its_entry() -> None:
    files = edited(family(DENSE, "source").ranks[0].files, optimizer=None)
    with pytest.raises(CheckpointError, match="no 'optimizer' entry although distrib_optim"):
        next(read_family({0: files}))


@pytest.mark.parametrize("pp_rank", [0, 1])
@pytest.mark.parametrize("name", [DENSE, MOE])
def test_an_entry_needs_its_optimizer_file(name: str, pp_rank: int) -> None:
    files = files_of(family(name, "source"))
    files[pp_rank] = replace(files[pp_rank], optimizer=None)
    with pytest.raises(CheckpointError, match=r"distrib_optim\.pt beside it is missing"):
        next(read_family(files))


def test_an_optimizer_that_lost_its_groups_is_refused() -> None:
    files = files_of(family(LION, "source"))
    entry = as_mapping(files[0].model.root)["optimizer"]  # type: ignore[index]
    bare = {**entry[0], OPTIMIZER: {**entry[0][OPTIMIZER], "param_groups": []}}
    files[0] = edited(files[0], optimizer=[bare, *entry[1:]])
    with pytest.raises(CheckpointError, match="belongs to no parameter"):
        list(read_family(files))


def test_optimizers_must_be_as_many_as_computed() -> None:
    of = family(DENSE, "source")
    entry = of.ranks[0].root[OPTIMIZER]
    files = {p: edited(f, optimizer=[entry] * 3) for p, f in files_of(of).items()}
    with pytest.raises(CheckpointError, match="3 optimizers in the file, 1 computed"):
        next(read_family(files))


def test_a_missing_expert_optimizer_is_not_explained() -> None:
    """By any rules: each says that a rank with experts has one."""
    of = family(MOE, "source")
    files = {}
    for pp_rank, rank in of.ranks.items():
        assert rank.files.optimizer is not None
        less = replace(rank.files.optimizer, root=rank.files.optimizer.root[0])
        changed = edited(rank.files, optimizer=rank.root[OPTIMIZER][0])
        files[pp_rank] = replace(changed, optimizer=less)
    with pytest.raises(CheckpointError):
        next(read_family(files))


def test_impossible_placements_are_told_with_their_file() -> None:
    files = with_arguments(family(DENSE, "source").ranks[0].files, num_layers=7)
    with pytest.raises(CheckpointError, match=r"model_optim_rng\.pt: .*7 layers do not divide"):
        next(read_family({0: files}))


def test_the_layout_is_that_of_the_own_arguments() -> None:
    for name, side in SIDES:
        of = family(name, side)
        for rank in of.ranks.values():
            assert megatron_of(rank.files, of.megatron.rules) == of.megatron


def test_the_final_norm_follows_the_layers_by_newer_rules() -> None:
    """With MTP on a stage of its own, as a layout string may ask for."""
    of = family(DEEPSEEK, "source")
    files = with_arguments(
        of.ranks[0].files,
        pipeline_model_parallel_layout="Et*4|t*4||mL",
        virtual_pipeline_model_parallel_size=2,
    )
    for follows, holder in ((True, 1), (False, 3)):
        layout = megatron_of(files, replace(of.megatron.rules, mtp_may_stand_alone=follows)).layout
        assert [Section.FINAL_NORM in chunk.sections for chunk in layout.chunks].index(
            True
        ) == holder


def test_plain_weights_may_have_storages_of_their_own() -> None:
    of = family(PLAIN, "source")
    assert not of.shares_storages
    assert all(rank.buffers is None for rank in of.ranks.values())
    assert family(WEIGHTS, "source").shares_storages
    assert family(WEIGHTS, "source").kind is OptimizerKind.NONE


def test_a_trained_parameter_that_lies_elsewhere_is_not_explained() -> None:
    """Taken for a frozen one, it is missed in the buffer."""
    of = family(DENSE, "source")
    chunk = as_mapping(of.ranks[0].root["model"]) or {}
    stranger = as_mapping(family(PLAIN, "source").ranks[0].root["model"]) or {}
    key = "decoder.layers.2.mlp.linear_fc2.weight"
    node = ordered_dict({**chunk, key: stranger[key]})
    files: Mapping[int, RankFiles] = {0: edited(of.ranks[0].files, model=node)}
    with pytest.raises(CheckpointError, match=r"no known layout.* lies at element .* computed"):
        list(read_family(files))
