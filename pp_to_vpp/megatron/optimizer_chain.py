"""The optimizers that a rank chains, and which parameters each takes.

A rank has one optimizer, or a chain: dense parameters, then experts with buffers of their own
(optimizer/__init__.py ``get_megatron_optimizer``). Optimizers for matrices alone, such as Lion, are
chained with an Adam for all other parameters (``_get_megatron_emerging_optimizer``, 0.18 and
later).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .arguments import SavedArguments
from .param_groups import GroupKey, key_of_item
from .parameters import Item, is_layer_matrix
from .rules import Rules


@dataclass(frozen=True, slots=True)
class OptimizerPart:
    """One optimizer of the chain."""

    is_expert: bool
    vp_stages: tuple[int, ...]
    """The chunks it is responsible for."""
    takes_matrices: bool | None = None
    """Whether it takes the matrices of layers or all other parameters; None for both."""

    def is_like(self, other: OptimizerPart) -> bool:
        """Whether both are for the same kind of parameters, of whichever chunks."""
        return replace(self, vp_stages=other.vp_stages) == other


def has_optimizer(parameters: Sequence[Sequence[Item]], rules: Rules) -> bool:
    """Whether a rank with these parameters of each virtual stage has an optimizer: without any it
    has one only for the param groups of others."""
    return rules.keeps_all_groups or any(parameters)


def chained_optimizers(
    vp_size: int, *, has_expert_part: bool, overlaps_param_gather_with_step: bool
) -> tuple[OptimizerPart, ...]:
    """The optimizers of a rank, in the order of its entries.

    Overlapping the parameter gather with the step splits off the dense part of the first chunk.
    """
    stages = tuple(range(vp_size))
    dense = [stages[:1], stages[1:]] if overlaps_param_gather_with_step else [stages]
    parts = [OptimizerPart(is_expert=False, vp_stages=part) for part in dense]
    if has_expert_part:
        parts.append(OptimizerPart(is_expert=True, vp_stages=stages))
    return tuple(parts)


def items_by_group(
    parameters: Sequence[Sequence[Item]],
    part: OptimizerPart,
    arguments: SavedArguments,
    rules: Rules,
) -> dict[GroupKey, list[Item]]:
    """The parameters of one optimizer by param group, in first-seen order; ``parameters`` are
    those of each virtual stage."""
    by_key: dict[GroupKey, list[Item]] = {}
    for stage in part.vp_stages:
        for item in parameters[stage]:
            key = key_of_item(item, arguments, rules)
            is_taken = part.takes_matrices in (None, is_layer_matrix(item, rules))
            if is_taken and key.is_expert == part.is_expert:
                by_key.setdefault(key, []).append(item)
    return by_key


class OptimizerKind(enum.Enum):
    """What a checkpoint holds of its optimizer."""

    NONE = "weights only"
    DISTRIBUTED = "distributed optimizer"
    PLAIN = "non-distributed optimizer"
