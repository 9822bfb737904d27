"""What Megatron marks on a parameter: expert, shared, embedding or output, matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..container.tensors import TensorRef
from . import naming
from .arguments import SavedArguments
from .naming import Section
from .pipeline import ModelChunk
from .rules import Rules


def in_expert_buffer(item: Item, arguments: SavedArguments, rules: Rules) -> bool:
    """Whether a parameter lies in an expert buffer (``param.allreduce`` is False): with expert
    parallelism, or by newer rules when experts have a tensor-parallel size of their own."""
    own_groups = arguments.ep_size > 1 or (
        rules.separates_experts_by_tp and arguments.etp_size != arguments.tp_size
    )
    return own_groups and naming.is_expert(item.rest)


def have_experts(
    parameters: Iterable[Iterable[Item]], arguments: SavedArguments, rules: Rules
) -> bool:
    """Whether any parameter of a rank's chunks lies in an expert buffer."""
    return any(in_expert_buffer(item, arguments, rules) for items in parameters for item in items)


def is_embedding_or_output(item: Item, rules: Rules) -> bool:
    """``param.is_embedding_or_output_parameter`` (language_module.py)."""
    if item.section is Section.HEAD:
        return naming.is_output_weight(item.rest)
    holds_embedding = item.section is Section.EMBEDDING or (
        item.section is Section.MTP_EMBEDDING and rules.marks_mtp_embedding
    )
    return holds_embedding and naming.is_word_embedding(item.rest)


def is_layer_matrix(item: Item, rules: Rules) -> bool:
    """Whether an optimizer for matrices alone takes a parameter (emerging_optimizers.py
    ``_is_nonlinear_or_embedding``, 0.18 and later)."""
    return len(item.weight.shape) == 2 and not is_embedding_or_output(item, rules)


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One key of a chunk, under a name that no pipeline layout changes."""

    section: Section
    layer: int | None
    """Global number, for items of a layer."""
    name: str
    """Global name: unique in the family of ranks with one (tp, ep)."""
    rest: str
    """The key without stack and layer number, or the whole key outside layers."""
    value: Any
    tensor: TensorRef | None
    is_parameter: bool

    @property
    def weight(self) -> TensorRef:
        """The tensor of a parameter."""
        assert self.tensor is not None
        return self.tensor


def is_shared_embedding(item: Item, chunk: ModelChunk, arguments: SavedArguments) -> bool:
    """``param.shared_embedding``: the weight that several pipeline stages keep in step
    (language_module.py ``setup_embeddings_and_output_layer``)."""
    if item.section in (Section.EMBEDDING, Section.MTP_EMBEDDING):
        is_active = arguments.ties_embeddings or arguments.mtp_num_layers > 0
        return is_active and naming.is_word_embedding(item.rest)
    return (
        item.section is Section.HEAD
        and naming.is_output_weight(item.rest)
        and arguments.ties_embeddings
        and Section.MTP not in chunk.sections
    )
