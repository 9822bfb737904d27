"""Saved arguments: read with their types checked, patched as the target run would save them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pp_to_vpp.container.pickling import Global, Instance
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron import rounding
from pp_to_vpp.megatron.arguments import (
    SavedArguments,
    namespace_values,
    patch_arguments,
    read_arguments,
)
from pp_to_vpp.megatron.forms import Ends, Even, HybridPattern, LayoutString
from pp_to_vpp.megatron.placement import Placement

_BASE = {
    "num_layers": 8,
    "pipeline_model_parallel_size": 2,
    "tensor_model_parallel_size": 2,
    "data_parallel_size": 6,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "overlap_p2p_comm": False,
    "align_param_gather": False,
}


def namespace(**values: Any) -> Instance:
    """A saved argparse.Namespace."""
    state = {**_BASE, **values}
    return Instance(Global("argparse", "Namespace"), (), by_new=True, state=state)


def read(**values: Any) -> SavedArguments:
    """What the arguments say."""
    return read_arguments({"args": namespace(**values)}, "file")


def test_what_a_version_did_not_know_has_the_meaning_it_had() -> None:
    found = read()
    assert (found.ep_size, found.etp_size, found.cp_size) == (1, 2, 1)
    assert found.placement == Placement()
    assert found.ties_embeddings
    assert (found.dense_replicas, found.expert_replicas) == (6, 6)


def test_replicas() -> None:
    found = read(
        context_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        num_distributed_optimizer_instances=3,
    )
    assert found.optimizer_instances == 3
    assert found.dense_replicas == 6 * 2
    assert found.expert_replicas == 2 * 2 * 6 // (1 * 4)


def test_the_placement_is_read() -> None:
    found = read(
        virtual_pipeline_model_parallel_size=2,
        decoder_first_pipeline_num_layers=3,
        decoder_last_pipeline_num_layers_split=[3, 2],
        decoder_last_pipeline_num_layers=5,
    )
    assert found.placement == Placement(2, Ends(3, 5, first_split=(2, 1), last_split=(3, 2)))


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ({}, Even()),
        ({"account_for_loss_in_pipeline_split": True}, Even(counts_loss=True)),
        (
            {
                "account_for_embedding_in_pipeline_split": True,
                "decoder_first_pipeline_num_layers": None,
            },
            Even(counts_embedding=True),
        ),
        ({"decoder_first_pipeline_num_layers": 2}, Ends(first=2)),
        ({"decoder_last_pipeline_num_layers": 0}, Ends(last=0)),
        (
            {"pipeline_model_parallel_layout": "Et|tL", "decoder_last_pipeline_num_layers": 2},
            LayoutString("Et|tL"),
        ),
    ],
)
def test_the_placement_has_one_form(given: dict[str, Any], form: object) -> None:
    assert read(**given).placement.form == form


@pytest.mark.parametrize("counted", ["embedding", "loss"])
@pytest.mark.parametrize("end", ["first", "last"])
def test_two_forms_at_once_are_refused(counted: str, end: str) -> None:
    both = {
        f"account_for_{counted}_in_pipeline_split": True,
        f"decoder_{end}_pipeline_num_layers": 2,
    }
    with pytest.raises(CheckpointError, match=r"^file: .* Megatron takes one of the two"):
        read(**both)


@pytest.mark.parametrize(
    ("chunks", "vp_size"), [((), 1), (("model",), 1), (("model0", "model1", "model2"), 3)]
)
def test_virtual_stages_that_no_argument_names_are_those_of_the_chunks(
    chunks: tuple[str, ...], vp_size: int
) -> None:
    """What unit tests and tools save has few arguments, in a SimpleNamespace."""
    state = {"num_layers": 8, "pipeline_model_parallel_size": 2}
    node = Instance(Global("types", "SimpleNamespace"), (), by_new=True, state=state)
    root = {"args": node, **dict.fromkeys(chunks)}
    assert read_arguments(root, "file").placement.vp_size == vp_size
    root["args"] = namespace()
    assert read_arguments(root, "file").placement.vp_size == 1, "what is named holds"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 10**9),
        ("num_layers", "8"),
        ("num_layers", 8.0),
        ("num_layers", True),
        ("num_layers", 0),
        ("pipeline_model_parallel_size", -1),
        ("data_parallel_size", 10**400),
        ("use_distributed_optimizer", "yes"),
        ("pipeline_model_parallel_layout", ["E"]),
        ("decoder_first_pipeline_num_layers_split", [1, "2"]),
    ],
)
def test_absurd_arguments_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"args.{name} is no"):
        read(**{name: value})


@pytest.mark.parametrize(
    ("kinds", "misnumbers"),
    [
        ({}, False),
        ({"num_experts": 4, "moe_layer_freq": 1}, False),
        ({"num_experts": 4, "moe_layer_freq": [1] * 8}, False),
        ({"num_experts": None, "moe_layer_freq": 2}, False),
        ({"num_experts": 4, "moe_layer_freq": 2}, True),
        ({"num_experts": 4, "moe_layer_freq": [0, 0, *[1] * 6]}, True),
        ({"heterogeneous_layers_config_path": "layers.json"}, True),
    ],
)
def test_kinds_by_numbers_and_a_last_stage_alone_are_refused_where_numbers_are_wrong(
    kinds: dict[str, Any], misnumbers: bool
) -> None:
    """FORMAT 4.3; the argument that came with the cure shows that they are right."""
    virtual = {"virtual_pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 4}
    both = {"decoder_first_pipeline_num_layers": 4}
    assert read(**kinds).misnumbers_kinds is misnumbers
    assert not read(**kinds, rope_type="rope").misnumbers_kinds
    read(**kinds, **virtual, rope_type="rope")
    read(**kinds, **virtual, **both)
    read(**kinds, decoder_last_pipeline_num_layers=4)
    if misnumbers:
        with pytest.raises(CheckpointError, match=r"0\.11 to 0\.13 counts wrongly then"):
            read(**kinds, **virtual)
    else:
        read(**kinds, **virtual)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, False),
        ({"num_experts": 4}, False),
        ({"num_experts": 4, "moe_layer_freq": 1}, False),
        ({"num_experts": 4, "moe_layer_freq": 7}, False),
        ({"num_experts": 4, "moe_layer_freq": 2}, True),
        ({"num_experts": None, "moe_layer_freq": 2}, False),
        ({"num_experts": 4, "moe_layer_freq": [*[0] * 7, 1]}, False),
        ({"num_experts": 4, "moe_layer_freq": [*[1] * 7, 0]}, True),
        ({"experimental_attention_variant": "dsa"}, True),
        ({"heterogeneous_layers_config_path": "layers.json"}, True),
    ],
)
def test_the_last_layer_of_eight_may_be_of_a_kind_of_its_own(
    values: dict[str, Any], expected: bool
) -> None:
    assert read(**values).last_kind_is_its_own is expected


def test_dtypes_of_main_parameters_are_those_of_the_precision_aware_optimizer() -> None:
    half = Global("torch", "float16")
    assert read(main_params_dtype=half).main_params_dtype == ""
    precise = {"use_precision_aware_optimizer": True}
    assert read(**precise).main_params_dtype == "float32"
    assert read(**precise, main_params_dtype=half).main_params_dtype == "float16"
    assert read().ways == rounding.WAYS
    assert read(**precise).ways == (*rounding.WAYS, rounding.REMAINDERS)
    assert read(**precise, main_params_dtype=half).ways == (*rounding.WAYS, rounding.HALVES)
    with pytest.raises(CheckpointError, match=r"args\.main_params_dtype is no dtype"):
        read(**precise, main_params_dtype="fp16")


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        read(num_layers="x", data_parallel_size="y")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    "node", [None, {}, Instance(Global("os", "system"), ("x",)), namespace(x=1).factory]
)
def test_only_a_namespace_holds_arguments(node: object) -> None:
    with pytest.raises(CheckpointError, match="no training arguments"):
        namespace_values(node, "file")


def patched(
    source: dict[str, Any], placement: Placement, *, overlap: bool = False
) -> dict[Any, Any]:
    """Attributes after patching."""
    node = namespace(**source)
    arguments = read_arguments({"args": node}, "file")
    target = replace(arguments, placement=placement, overlaps_param_gather_with_step=overlap)
    result = patch_arguments(node, arguments, target)
    assert list(node.state)[: len(_BASE)] == list(_BASE), "the source is left alone"
    return namespace_values(result, "file")


def test_interleaving_turns_its_defaults_on() -> None:
    found = patched({}, Placement(2))
    assert found["virtual_pipeline_model_parallel_size"] == 2
    assert found["num_layers_per_virtual_pipeline_stage"] == 2
    assert found["overlap_p2p_comm"] is True
    assert found["align_param_gather"] is True
    assert list(found) == list(_BASE), "nothing is added that the version does not know"


def test_plain_pipelines_turn_them_off() -> None:
    found = patched(
        {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}, Placement(1)
    )
    assert found["virtual_pipeline_model_parallel_size"] is None
    assert found["overlap_p2p_comm"] is False


def test_other_interleavings_keep_the_users_choice() -> None:
    source = {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": False}
    assert patched(source, Placement(4))["overlap_p2p_comm"] is False


def test_a_layout_string_replaces_the_other_forms() -> None:
    source = {
        "pipeline_model_parallel_layout": None,
        "account_for_embedding_in_pipeline_split": True,
        "num_virtual_stages_per_pipeline_rank": None,
        "overlap_param_gather_with_optimizer_step": False,
    }
    found = patched(source, Placement(2, LayoutString("Ettt|t|t|tttL")), overlap=True)
    assert found["pipeline_model_parallel_layout"] == "Ettt|t|t|tttL"
    assert found["account_for_embedding_in_pipeline_split"] is False
    assert found["num_layers_per_virtual_pipeline_stage"] is None
    assert found["overlap_param_gather_with_optimizer_step"] is True


def test_uneven_stages_are_told_by_their_number() -> None:
    source = {"decoder_first_pipeline_num_layers": 2, "num_virtual_stages_per_pipeline_rank": None}
    found = patched(source, Placement(2, Ends(first=2)))
    assert found["num_virtual_stages_per_pipeline_rank"] == 2
    assert found["num_layers_per_virtual_pipeline_stage"] is None


def test_the_forks_splits_are_added() -> None:
    placement = Placement(2, Ends(5, 3, first_split=(3, 2), last_split=(2, 1)))
    found = patched({}, placement)
    assert found["decoder_first_pipeline_num_layers_split"] == [3, 2]
    assert found["decoder_last_pipeline_num_layers_split"] == [2, 1]


def test_a_hybrids_pattern_is_its_placement() -> None:
    source = {
        "num_layers": 6,
        "hybrid_layer_pattern": "M*M-M*",
        "hybrid_override_pattern": "M*M-M*",
        "decoder_first_pipeline_num_layers": 2,
    }
    own = read(**source).placement
    assert own == Placement(1, HybridPattern("M*M-M*", Ends(first=2)))
    found = patched(source, Placement(2, HybridPattern("M*||M-|M*")))
    assert found["hybrid_layer_pattern"] == "M*||M-|M*"
    assert found["hybrid_override_pattern"] is None, "Megatron takes one of the two"
    assert found["decoder_first_pipeline_num_layers"] is None
    assert found["virtual_pipeline_model_parallel_size"] == 2
    assert found["num_layers_per_virtual_pipeline_stage"] is None
    flags = Placement(2, HybridPattern("M*||M-|M*")).launch_flags(6, 2)
    assert flags == "--hybrid-layer-pattern 'M*||M-|M*'"


@pytest.mark.parametrize("name", ["is_hybrid_model", "hybrid_override_pattern"])
def test_hybrids_without_a_pattern_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"args.{name} is .* up to 0.16 cannot run"):
        read(**{name: True})
    assert read(**{name: True, "hybrid_layer_pattern": "M*M*M*M*"}).placement.vp_size == 1


def test_splits_that_a_version_did_not_know_come_and_go() -> None:
    """There and back again, the arguments are the source's."""
    source = {"decoder_last_pipeline_num_layers": None}
    split = Placement(2, Ends(first_split=(2, 2), last_split=(3, 1)))
    there = patched(source, split)
    assert there["decoder_first_pipeline_num_layers_split"] == [2, 2]
    assert there["decoder_last_pipeline_num_layers_split"] == [3, 1]
    assert list(patched(there, Placement(1))) == [*_BASE, *source]
