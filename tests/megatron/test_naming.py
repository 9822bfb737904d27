"""Keys: which layer, which section, which buffer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.megatron import naming
from pp_to_vpp.megatron.naming import Section


@given(
    st.sampled_from(["decoder", "encoder"]),
    st.integers(0, 10**6),
    st.text("abc.0123456789_", min_size=1).map(lambda text: f".{text}"),
)
def test_layer_keys_come_back(stack: str, index: int, rest: str) -> None:
    assert naming.split_layer(naming.join_layer(stack, index, rest)) == (stack, index, rest)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("decoder.layers.3.mlp.linear_fc1.weight", ("decoder", 3, ".mlp.linear_fc1.weight")),
        ("decoder.layers.3", ("decoder", 3, "")),
        ("encoder.layers.10.x.layers.2.y", ("encoder", 10, ".x.layers.2.y")),
        ("mtp.layers.0.transformer_layer.mlp.weight", None),  # FORMAT 9.9
        ("decoder.layers", None),
        ("decoder.layers.x.weight", None),
        ("decoder.layers.1²", None),
        ("xdecoder.layers.1.weight", None),
    ],
)
def test_only_the_stacks_layers_are_layers(key: str, place: object) -> None:
    assert naming.split_layer(key) == place


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("embedding.word_embeddings.weight", Section.EMBEDDING),
        ("decoder.final_layernorm.weight", Section.FINAL_NORM),
        ("encoder.final_layernorm", Section.FINAL_NORM),
        ("decoder.final_norm.weight", Section.FINAL_NORM),
        ("mtp.layers.0.final_layernorm.weight", Section.MTP),
        ("output_layer._extra_state", Section.HEAD),
        ("lm_head.dense.weight", None),
        ("embeddings.weight", None),
        ("decoder.final_layernorms", None),
    ],
)
def test_sections(key: str, section: Section | None) -> None:
    assert naming.section_by_name(key) is section


@pytest.mark.parametrize(
    ("key", "is_parameter"),
    [
        (".mlp.linear_fc1.weight", True),
        (".mlp.linear_fc1._extra_state", False),
        (".mlp.experts.linear_fc1._extra_state12", False),
        (".mlp.router.expert_bias", False),
        (".mlp.router.qb_beta", False),
        (".mlp.router.weight", True),
        (".mlp.xrouter.expert_bias", True),
        ("output_layer._extra_state", False),
    ],
)
def test_parameters(key: str, is_parameter: bool) -> None:
    assert naming.is_parameter(key) is is_parameter


@pytest.mark.parametrize(
    ("key", "is_expert"),
    [
        (".mlp.experts.local_experts.3.linear_fc1.weight", True),
        (".mlp.experts.linear_fc1.weight10", True),
        ("mtp.layers.0.mtp_model_layer.mlp.experts.weight1", True),
        (".mlp.shared_experts.linear_fc1.weight", False),  # FORMAT 9.8
        (".mlp.router.weight", False),
    ],
)
def test_experts(key: str, is_expert: bool) -> None:
    assert naming.is_expert(key) is is_expert


def test_the_mtp_copy_of_the_embedding_has_a_name_of_its_own() -> None:
    key = "embedding.word_embeddings.weight"
    names = {naming.global_name(section, key) for section in Section}
    assert names == {key, f"{key} (MTP copy)"}
