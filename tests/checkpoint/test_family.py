"""The inventory of a family: what its files hold, under the rules that explain them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pp_to_vpp.checkpoint.family import Family, RankFiles, TensorName, layout_of
from pp_to_vpp.checkpoint.optimizer_entries import OPTIMIZER
from pp_to_vpp.container.pickling import Instance, as_mapping, ordered_dict
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.naming import Section
from pp_to_vpp.megatron.optimizer_chain import OptimizerKind
from pp_to_vpp.megatron.ranks import MODEL_FILE, OPTIMIZER_FILE
from pp_to_vpp.megatron.rules import CHANGES

from ..compare import load
from ..families import KINDS, SIDES, families, family, files_read, of_kind, opposite, read_family
from ..pairs import DEEPSEEK, DENSE, FORK, LAYOUT, MOE, PLAIN, WEIGHTS, names

STATE_FILES = {
    OptimizerKind.DISTRIBUTED: OPTIMIZER_FILE,
    OptimizerKind.PLAIN: MODEL_FILE,
    OptimizerKind.LAYER_WISE: r"layer_wise_optimizer_[0-3].pt",
}
"""Where the optimizer states of each kind are."""


def files_of(of: Family) -> dict[int, RankFiles]:
    return {pp_rank: rank.files for pp_rank, rank in of.ranks.items()}


def edited(files: RankFiles, **changes: Any) -> RankFiles:
    """Rank files with other entries at the top of the model file; None takes one away."""
    root = {**(as_mapping(files.model.root) or {}), **changes}
    kept = {key: value for key, value in root.items() if value is not None}
    return replace(files, model=replace(files.model, root=kept))


def with_arguments(files: RankFiles, **changes: Any) -> RankFiles:
    node = (as_mapping(files.model.root) or {})["args"]
    args = Instance(node.factory, node.arguments, node.by_new, state={**node.state, **changes})
    return edited(files, args=args)


def without_argument(files: RankFiles, name: str) -> RankFiles:
    node = (as_mapping(files.model.root) or {})["args"]
    state = {key: value for key, value in node.state.items() if key != name}
    return edited(files, args=Instance(node.factory, node.arguments, node.by_new, state=state))


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_families_hold_the_whole_model(name: str, side: str) -> None:
    for of in families(name, side):
        arguments = of.megatron.arguments
        assert set(of.layers) == set(range(arguments.num_layers)) - arguments.noop_layers
        held = {section for chunk in of.layout.chunks for section in chunk.sections}
        assert set(of.sections) == held
        items = list(of.items())
        assert len(items) == sum(len(c.items) for r in of.ranks.values() for c in r.contents)
        assert len({item.name for item in items}) == len(items)
        assert all(item.layer == layer for layer, found in of.layers.items() for item in found)
        assert of.any_rank is of.ranks[0]


@pytest.mark.parametrize("name", names())
def test_both_sides_are_one_model(name: str) -> None:
    """Layer by layer: keys, shapes and states, whichever rank they were on."""
    for source, truth in zip(families(name, "source"), families(name, "truth"), strict=True):
        for layer, items in source.layers.items():
            ours = [(item.name, shape(item), item.name in source.states) for item in items]
            theirs = [
                (item.name, shape(item), item.name in truth.states) for item in truth.layers[layer]
            ]
            assert ours == theirs
        assert (source.kind, source.megatron.rules) == (truth.kind, truth.megatron.rules)
        for is_expert in (False, True):
            held = source.holds_state(is_expert=is_expert)
            assert held == truth.holds_state(is_expert=is_expert)
        assert source.has_expert_optimizer == truth.has_expert_optimizer


def shape(item: Any) -> object:
    return None if item.tensor is None else (item.tensor.dtype, item.tensor.shape)


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


@pytest.mark.parametrize("pp_rank", [0, 1, 2, 3])
def test_a_part_of_the_ranks_holds_its_part(pp_rank: int) -> None:
    of = family(FORK, "truth")
    part = next(read_family({pp_rank: of.ranks[pp_rank].files}))
    chunks = of.layout.rank_chunks(pp_rank)
    assert sorted(part.layers) == [layer for chunk in chunks for layer in chunk.layers]
    assert set(part.sections) == {section for chunk in chunks for section in chunk.sections}
    assert part.layout == of.layout
    assert {item.name for item in part.items() if item.is_parameter} == set(part.states)


@pytest.mark.parametrize("name", names())
def test_samples_are_all_parameters_with_states(name: str) -> None:
    """In one family at least: another may hold frozen experts alone."""
    has_any = any(any(of.samples()) for of in families(name, "source"))
    assert has_any is (family(name, "source").kind is not OptimizerKind.NONE)
    for of in families(name, "source"):
        found = {sample.name: sample for sample in of.samples()}
        assert set(found) == set(of.states)
        for item in of.items():
            if item.name in found:
                sample = found[item.name]
                assert item.tensor is not None
                assert (sample.weight, sample.dtype) == (item.tensor.extent, item.tensor.dtype)
                assert sample.main.length == 4 * item.tensor.numel
                where = sample.main.path.rpartition("/")[2]
                assert re.fullmatch(STATE_FILES[of.kind], where)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_a_manifest_names_every_tensor(name: str, side: str) -> None:
    """Weights and buffers as torch counts them, states as the optimizer files hold them."""
    for of in families(name, side):
        found = of.manifest()
        weights = {key.parameter: tensor for key, tensor in found.items() if not key.kind}
        assert weights == {item.name: item.tensor for item in of.items() if item.tensor is not None}
        loaded = [load(Path(rank.files.model.path)) for rank in of.ranks.values()]
        chunks = [root[key] for root in loaded for key in root if key.startswith("model")]
        values = [value for chunk in chunks for value in chunk.values()]
        assert len(weights) == sum(isinstance(value, torch.Tensor) for value in values)
        kinds: dict[str, set[str]] = {}
        for key in found:
            if key.kind:
                kinds.setdefault(key.parameter, set()).add(key.kind)
        assert set(kinds) == set(of.states)
        for parameter, state in of.states.items():
            assert kinds[parameter] == set(state.tensors)
            for kind, tensor in state.tensors.items():
                assert found[TensorName(parameter, kind)] is tensor
        assert len({str(key) for key in found}) == len(found)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_tensors_of_a_manifest_lie_in_their_files(name: str, side: str) -> None:
    """Each in one of its own family, apart from all others."""
    for of in families(name, side):
        sizes = {file.path: Path(file.path).stat().st_size for file in files_read(of)}
        places: list[tuple[str, int, int]] = []
        for key, tensor in of.manifest().items():
            extent = tensor.extent
            assert extent.path in sizes, key
            assert 0 <= extent.offset <= extent.offset + extent.length <= sizes[extent.path], key
            assert extent.length == tensor.numel * tensor.item_bytes, key
            where = extent.path.rpartition("/")[2]
            assert re.fullmatch(STATE_FILES[of.kind] if key.kind else MODEL_FILE, where), key
            places.append((extent.path, extent.offset, extent.offset + extent.length))
        for (path, _, end), (next_path, start, _) in itertools.pairwise(sorted(places)):
            assert path != next_path or end <= start


@pytest.mark.parametrize("name", names())
def test_manifests_of_both_sides_are_alike(name: str) -> None:
    """Names, dtypes and shapes: no layout changes them."""
    for source, truth in zip(families(name, "source"), families(name, "truth"), strict=True):
        ours, theirs = source.manifest(), truth.manifest()
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            other = theirs[key]
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), key


def test_a_manifest_of_some_items() -> None:
    of = family(DENSE, "source")
    found = of.manifest(of.layers[1])
    assert found
    assert found == {
        key: tensor
        for key, tensor in of.manifest().items()
        if key.parameter.startswith("decoder.layers.1.")
    }
    assert of.manifest([]) == {}


def test_tensors_are_told_apart_by_name_and_kind() -> None:
    assert str(TensorName("a.weight", "")) == "a.weight"
    assert str(TensorName("a.weight", "exp_avg")) == "a.weight [exp_avg]"


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_items_in_a_layout_are_those_of_its_ranks(name: str, side: str) -> None:
    """Of the own one what each rank file holds, of the other side's what its rank files hold."""
    for of, other in zip(families(name, side), families(name, opposite(side)), strict=True):
        for there in (of, other):
            for pp_rank, rank in there.ranks.items():
                found = [item.name for item in of.items_in(there.layout, pp_rank)]
                held = [item.name for content in rank.contents for item in content.items]
                assert sorted(found) == sorted(held)
        everything = [item for p in of.ranks for item in of.items_in(of.layout, p)]
        assert {id(item) for item in everything} == {id(item) for item in of.items()}


def test_items_in_a_layout_are_only_those_that_were_read() -> None:
    """A part of the ranks gives its part of a rank of another layout."""
    of, layout = family(DENSE, "source"), family(DENSE, "truth").layout
    part = next(read_family({1: of.ranks[1].files}))
    read = {item.name for item in part.items()}
    for pp_rank in of.ranks:
        wanted = [item.name for item in of.items_in(layout, pp_rank)]
        found = [item.name for item in part.items_in(layout, pp_rank)]
        assert found == [name for name in wanted if name in read]
        assert 0 < len(found) < len(wanted)


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
            assert layout_of(rank.files, of.megatron.rules) == of.layout


def test_the_final_norm_follows_the_layers_by_newer_rules() -> None:
    """With MTP on a stage of its own, as a layout string may ask for."""
    of = family(DEEPSEEK, "source")
    files = with_arguments(
        of.ranks[0].files,
        pipeline_model_parallel_layout="Et*4|t*4||mL",
        virtual_pipeline_model_parallel_size=2,
    )
    for follows, holder in ((True, 1), (False, 3)):
        layout = layout_of(files, replace(of.megatron.rules, mtp_may_stand_alone=follows))
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
