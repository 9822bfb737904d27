"""The optimizers that a rank chains: which parameters each takes, and its entry in the rank file.

A rank has one optimizer, or a chain: dense parameters, then experts with buffers of their own
(optimizer/__init__.py ``get_megatron_optimizer``). ``model_optim_rng.pt`` has an entry for each: a
dict if there is one, else a list. Optimizers for matrices alone, such as Lion, are chained with an
Adam for all other parameters (``_get_megatron_emerging_optimizer``, 0.18 and later).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .arguments import SavedArguments
from .chunks import Item
from .errors import AS_SAVED, ASK_FOR_SUPPORT, CheckpointError, show
from .param_groups import GroupKey, is_layer_matrix, key_of_group, key_of_item
from .rules import Rules

OPTIMIZER = "optimizer"
"""Key of the entries in ``model_optim_rng.pt``, and of the torch optimizer in each."""
GROUPS = "param_groups"
MAINS = "fp32_from_fp16_params"
STATE = "state"
_ROUTED = "optimizer"
"""Key of param groups that another optimizer than the run's own takes."""
_KNOWN_KEYS = frozenset((OPTIMIZER, STATE, GROUPS, MAINS, "grad_scaler"))
"""Of an optimizer and of the torch optimizer in it (optimizer.py, 0.7 to 0.19)."""


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


def routed_parts(entries: Sequence[OptimizerEntry], vp_size: int) -> tuple[OptimizerPart, ...]:
    """The optimizers of a chain in which some param groups tell that another optimizer than the
    run's own takes them; () if none does. Every rank has them all, in the same order."""
    routed = [any(_ROUTED in group for group in entry.groups) for entry in entries]
    if not any(routed):
        return ()
    return tuple(
        OptimizerPart(
            is_expert=any(key_of_group(group).is_expert for group in entry.groups),
            vp_stages=tuple(range(vp_size)),
            takes_matrices=not is_routed,
        )
        for entry, is_routed in zip(entries, routed, strict=True)
    )


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


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerEntry:
    """What ``model_optim_rng.pt`` holds of one optimizer."""

    node: dict[Any, Any]

    @property
    def inner(self) -> dict[Any, Any]:
        """The torch state dict: in the entry, beside scaler and main parameters, or the entry
        itself (FP32Optimizer)."""
        inner: dict[Any, Any] = self.node.get(OPTIMIZER, self.node)
        return inner

    @property
    def groups(self) -> list[dict[Any, Any]]:
        """The param groups; none where the rank has no parameters for it."""
        groups: list[dict[Any, Any]] = self.inner.get(GROUPS, [])
        return groups

    def replaced(self, inner: Mapping[Any, Any], outer: Mapping[Any, Any]) -> dict[Any, Any]:
        """The entry with other values in the torch state dict and beside it."""
        changed = {**self.inner, **inner}
        if OPTIMIZER not in self.node:
            return changed
        return {**self.node, OPTIMIZER: changed, **outer}


def part_entries(node: Any, where: str) -> list[Any]:
    """The values of the chained optimizers: a list if there are several, else one by itself.

    Raises:
        CheckpointError: neither a list nor a dict.
    """
    if isinstance(node, list):
        return node
    if isinstance(node, Mapping):
        return [node]
    raise CheckpointError.of(
        where, "an optimizer entry is neither a dict nor a list", found=show(node), cure=AS_SAVED
    )


def read_entries(node: Any, where: str) -> tuple[OptimizerEntry, ...]:
    """The entries of a rank's optimizers.

    Raises:
        CheckpointError: an entry is no dict, or has what no known optimizer saves.
    """
    return tuple(_read_entry(entry, where) for entry in part_entries(node, where))


def _read_entry(node: Any, where: str) -> OptimizerEntry:
    if not isinstance(node, dict) or not isinstance(node.get(OPTIMIZER, {}), dict):
        raise unknown_entry(where, node)
    entry = OptimizerEntry(node)
    odd = next((key for key in (*node, *entry.inner) if key not in _KNOWN_KEYS), None)
    if odd is not None:
        raise unknown_entry(where, odd)
    groups: Any = entry.groups
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise unknown_entry(where, GROUPS)
    return entry


def unknown_entry(where: str, odd: Any) -> CheckpointError:
    """The refusal of what could change the layout."""
    cure = ASK_FOR_SUPPORT
    return CheckpointError.of(where, f"unknown optimizer entry {show(odd)}", cure=cure)
