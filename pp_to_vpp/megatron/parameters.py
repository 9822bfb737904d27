"""The keys of a model chunk under names that no layout changes, and what Megatron marks on the
parameters among them: expert, shared, embedding or output, matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ..container.tensors import TensorRef
from . import naming
from .megatron import Megatron
from .naming import Section


@dataclass(frozen=True, slots=True)
class GroupKey:
    """What tells one param group of an optimizer from another."""

    decays: bool
    is_expert: bool
    is_decoupled: bool
    """Learning rate of its own for embeddings and output layer."""
    own: str = ""
    """Digest of all that the group says of itself, where the rest does not tell it from others."""

    def __str__(self) -> str:
        """For messages."""
        words = ["experts" if self.is_expert else "no experts"]
        words.append("with weight decay" if self.decays else "without weight decay")
        words += ["with a learning rate of their own"] * self.is_decoupled
        return f"{' '.join(words)}" + (", by rules of the run's own" if self.own else "")

    @property
    def usual(self) -> GroupKey:
        """Without what is its own."""
        return replace(self, own="")


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
    """Trained or frozen."""
    model: str = naming.MODEL
    """Which one it belongs to: ``naming.MODEL`` or ``naming.AVERAGE``."""
    is_frozen: bool = False
    """``requires_grad`` is False: it is in no buffer, no param group, and has no state."""
    group: GroupKey | None = None
    """The param group that the file tells it is in, where no rule does."""

    @property
    def is_trained(self) -> bool:
        """Whether an optimizer has it."""
        return self.is_parameter and not self.is_frozen

    @property
    def weight(self) -> TensorRef:
        """The tensor of a parameter."""
        assert self.tensor is not None
        return self.tensor


Items: TypeAlias = Sequence[Sequence[Item]]
"""All of a rank, for each virtual stage in order."""

Parameters: TypeAlias = Sequence[Sequence[Item]]
"""The trained ones of a rank, for each virtual stage in the order of ``named_parameters()``."""


def is_in_expert_buffer(item: Item, megatron: Megatron) -> bool:
    """Whether a parameter lies in an expert buffer (``param.allreduce`` is False): with expert
    parallelism, or by newer rules when experts have a tensor-parallel size of their own."""
    arguments = megatron.arguments
    own_groups = arguments.ep_size > 1 or (
        megatron.rules.separates_experts_by_tp and arguments.etp_size != arguments.tp_size
    )
    return own_groups and naming.is_expert(item.rest)


def is_shared_embedding(item: Item, megatron: Megatron) -> bool:
    """``param.shared_embedding``: the weight that several pipeline stages keep in step
    (language_module.py ``setup_embeddings_and_output_layer``)."""
    arguments = megatron.arguments
    if item.section is Section.EMBEDDING:
        is_active = arguments.ties_embeddings or bool(arguments.mtp_num_layers)
        is_active &= arguments.pp_size > 1  # one stage alone has nobody to keep in step with
    else:
        is_active = item.section in megatron.embedding_copies
    is_word = naming.is_word_embedding(item.rest) or naming.is_output_weight(item.rest)
    return is_active and is_word


def is_embedding_or_output(item: Item, megatron: Megatron) -> bool:
    """``param.is_embedding_or_output_parameter`` (language_module.py)."""
    if item.section is Section.HEAD:
        return naming.is_output_weight(item.rest)
    holds_embedding = item.section is Section.EMBEDDING or (
        item.section is Section.MTP_EMBEDDING and megatron.rules.marks_mtp_embedding
    )
    return holds_embedding and naming.is_word_embedding(item.rest)


def is_layer_matrix(item: Item, megatron: Megatron) -> bool:
    """Whether an optimizer for matrices alone takes a parameter (muon.py, 0.16 and 0.17;
    emerging_optimizers.py ``_is_nonlinear_or_embedding``, 0.18 and later)."""
    if megatron.rules.keeps_mamba_from_muon and naming.is_mamba_projection(item.rest):
        return False
    return len(item.weight.shape) == 2 and not is_embedding_or_output(item, megatron)
