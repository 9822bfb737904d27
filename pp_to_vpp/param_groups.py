"""Which param group of the optimizer a parameter belongs to.

Weight decay is off for biases and one-dimensional tensors; experts with buffers of their own and
decoupled learning rates make further groups (optimizer/__init__.py ``_get_param_groups``, 0.6 to
0.19; ``get_standard_config_overrides``, 0.16 to 0.19).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import naming
from .arguments import SavedArguments
from .chunks import Item
from .naming import Section
from .rules import Rules

STEP = "step"
"""Count of optimizer steps, kept in each group by the fused optimizers."""


@dataclass(frozen=True, slots=True)
class GroupKey:
    """What tells one param group of an optimizer from another."""

    decays: bool
    is_expert: bool
    is_decoupled: bool
    """Learning rate of its own for embeddings and output layer."""


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


def _is_embedding_or_output(item: Item, rules: Rules) -> bool:
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
    return len(item.weight.shape) == 2 and not _is_embedding_or_output(item, rules)


def key_of_item(item: Item, arguments: SavedArguments, rules: Rules) -> GroupKey:
    """The group of a parameter."""
    is_flat = item.rest.endswith(".bias") or len(item.weight.shape) == 1
    if arguments.decays_qk_norms and ("q_layernorm." in item.rest or "k_layernorm." in item.rest):
        is_flat = False
    if arguments.skips_embedding_weight_decay and "embedding" in item.rest:
        is_flat = True
    return GroupKey(
        decays=not is_flat,
        is_expert=in_expert_buffer(item, arguments, rules),
        is_decoupled=arguments.decoupled_lr and _is_embedding_or_output(item, rules),
    )


def key_of_group(group: Mapping[Any, Any]) -> GroupKey:
    """The key that a saved group tells of itself.

    From 0.16 a decoupled group is known by ``default_config``, before by ``is_decoupled_lr``.
    """
    return GroupKey(
        decays=group.get("wd_mult") != 0,
        is_expert=group.get("is_expert_parallel") is True,
        is_decoupled=group.get("is_decoupled_lr") is True or group.get("default_config") is False,
    )
