"""What the keys of a model chunk's state dict say: which layer, which section, which buffer.

Nothing here knows a model family. Keys of layers begin with ``decoder.layers.N.`` or
``encoder.layers.N.``, N counting from 0 in each chunk (transformer_block.py, 0.6 to 0.19); all
other keys belong to a section whose chunk follows from the pipeline layout.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Collection
from typing import Any

_LAYER = re.compile(r"(?P<stack>decoder|encoder)\.layers\.(?P<index>[0-9]{1,9})(?P<rest>\..+)?")
_FINAL_NORM = re.compile(r"(?:decoder|encoder)\.final_(?:layernorm|norm)(?:\.|$)")
# A whole component of the key: shared_experts are dense (FORMAT 9.8).
_EXPERT = re.compile(r"(?:^|\.)experts\.")
# Counted as a parameter, one of these would shift all places after it (FORMAT 3.3).
_NOT_A_PARAMETER = re.compile(r"(?:^|\.)(?:_extra_state\d*|router\.expert_bias|router\.qb_beta)$")
_CLIPPED = re.compile(r"(?:^|\.)linear_(?:qkv|q_proj|q_up_proj|kv_up_proj)\.weight$")
_MAMBA_PROJECTION = re.compile(r"(?:^|\.)mixer\.in_proj\.weight$")
_NUMBER = re.compile(r"[0-9]{1,4}")
_KEYS_KEPT = 1 << 13
"""Of a chunk each key is asked about several times, and the layers of all have the same."""

MODEL = "model"
"""What is trained, among the models in a rank file."""
WORD_EMBEDDING, OUTPUT_WEIGHT = "embedding.word_embeddings.weight", "output_layer.weight"
AVERAGE = "ema_model"
"""MindSpeed's moving average of the weights, under the same keys (FORMAT 3.5)."""


def chunk_keys(root: Collection[Any], model: str = MODEL) -> tuple[str, ...]:
    """The keys of the chunks of a model: ``model``, or ``model0``, ``model1``, ..."""
    numbered = [
        key
        for key in root
        if isinstance(key, str) and key.startswith(model) and _NUMBER.fullmatch(key, len(model))
    ]
    return tuple(numbered) or tuple(key for key in (model,) if key in root)


def keys_of_chunks(count: int, model: str = MODEL) -> tuple[str, ...]:
    """The keys under which so many chunks stand."""
    return tuple(f"{model}{v}" for v in range(count)) if count > 1 else (model,)


def all_chunk_keys(root: Collection[Any]) -> tuple[str, ...]:
    """The keys of the chunks of all models in a rank file."""
    return chunk_keys(root) + chunk_keys(root, AVERAGE)


class Section(enum.IntEnum):
    """The parts of a model chunk, in the order of their registration (gpt_model.py).

    The keys of a section stay together; the pipeline layout says which chunk has it.
    """

    EMBEDDING = 0
    MTP_EMBEDDING = 1
    """The copy of the embedding that the chunk of the MTP layers holds."""
    LAYERS = 2
    FINAL_NORM = 3
    MTP = 4
    HEAD = 5
    """``output_layer`` and whatever else stands after the layers of the last chunk."""


@functools.lru_cache(_KEYS_KEPT)
def split_layer(key: str) -> tuple[str, int, str] | None:
    """``decoder.layers.3.mlp.weight`` -> ("decoder", 3, ".mlp.weight"); None for other keys.

    Works for module paths too: ``decoder.layers.3`` -> ("decoder", 3, "").
    """
    match = _LAYER.fullmatch(key)
    if match is None:
        return None
    return match["stack"], int(match["index"]), match["rest"] or ""


def join_layer(stack: str, index: int, rest: str) -> str:
    """The inverse of ``split_layer``."""
    return f"{stack}.layers.{index}{rest}"


def section_by_name(key: str) -> Section | None:
    """The section that a non-layer key or module path belongs to by its name alone.

    None when the name does not tell. EMBEDDING stands for both embeddings: which one it is, the
    chunk knows.
    """
    head = key.partition(".")[0]
    if head == "embedding":
        return Section.EMBEDDING
    if head == "mtp":
        return Section.MTP
    if head == "output_layer":
        return Section.HEAD
    if _FINAL_NORM.match(key):
        return Section.FINAL_NORM
    return None


def global_name(section: Section, key: str) -> str:
    """A name that no other tensor of the model has: the MTP copy of the embedding is another."""
    return f"{key} (MTP copy)" if section is Section.MTP_EMBEDDING else key


def name_in(model: str, name: str) -> str:
    """A name that no other tensor of the family has, from one that is so in its model."""
    return name if model == MODEL else f"{name} ({model})"


@functools.lru_cache(_KEYS_KEPT)
def is_parameter(key: str) -> bool:
    """Whether a tensor of this name is a parameter, trained or frozen.

    Extra states of Transformer Engine may be tensors; the router's bias and its like are buffers
    (moe/router.py, 0.11 to 0.19).
    """
    return _NOT_A_PARAMETER.search(key) is None


@functools.lru_cache(_KEYS_KEPT)
def is_expert(key: str) -> bool:
    """Whether a parameter belongs to a routed expert; shared experts are dense."""
    return _EXPERT.search(key) is not None


def is_scaled_by_qk_clip(key: str) -> bool:
    """Whether MuonClip scales rows of a parameter, apart in the weight and in its main parameter
    (attention.py and multi_latent_attention.py ``clip_qk``, 0.16 and later)."""
    return _CLIPPED.search(key) is not None


def is_mamba_projection(key: str) -> bool:
    """Whether a parameter is the input projection of a Mamba layer."""
    return _MAMBA_PROJECTION.search(key) is not None


def is_word_embedding(key: str) -> bool:
    """The parameter that tied embeddings share with the output layer."""
    return key == WORD_EMBEDDING


def is_output_weight(key: str) -> bool:
    """The parameter that tied embeddings share with the word embeddings."""
    return key == OUTPUT_WEIGHT


def is_of_output_layer(key: str) -> bool:
    """Whether a key stands in the module of that parameter, which comes first there."""
    return key.startswith("output_layer.")
