"""The optimizers that a rank chains, and which parameters each takes.

A rank has one optimizer, or a chain: dense parameters, then experts with buffers of their own
(optimizer/__init__.py ``get_megatron_optimizer``). Optimizers for matrices alone, such as Muon, are
chained with an Adam or Lion for all other parameters (muon.py, 0.16 and 0.17;
``_get_megatron_emerging_optimizer``, 0.18 and later).
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from .megatron import Megatron
from .param_groups import key_of_item
from .parameters import GroupKey, Item, Parameters, is_in_expert_buffer, is_layer_matrix


class OptimizerKind(enum.Enum):
    """What a checkpoint holds of its optimizer."""

    NONE = "weights only"
    DISTRIBUTED = "distributed optimizer"
    PLAIN = "non-distributed optimizer"
    LAYER_WISE = "layer-wise optimizer"


@dataclass(frozen=True, slots=True)
class ChainedOptimizer:
    """One optimizer of the chain."""

    is_expert: bool | None
    """Whether it takes the parameters of expert buffers or the others; None for both."""
    vp_stages: tuple[int, ...]
    """The chunks it is responsible for."""
    takes_matrices: bool | None = None
    """Whether it takes the matrices of layers or all other parameters; None for both."""

    def is_like(self, other: ChainedOptimizer) -> bool:
        """Whether both are for the same kind of parameters, of whichever chunks."""
        return replace(self, vp_stages=other.vp_stages) == other


Share: TypeAlias = Sequence[Mapping[GroupKey, Sequence[Item]]]
"""The parameters that the optimizers of a chain hold, for each by param group."""


def has_optimizer(parameters: Parameters, megatron: Megatron) -> bool:
    """Whether a rank with these parameters has an optimizer: without any it has one only for the
    param groups of others."""
    return megatron.rules.keeps_all_groups or any(parameters)


def has_expert_optimizer(parameters: Parameters, megatron: Megatron, *, others_have: bool) -> bool:
    """Whether a rank with these parameters has an optimizer for expert buffers: by newer rules
    every rank has, if any has."""
    return (others_have and megatron.rules.keeps_all_groups) or any(
        is_in_expert_buffer(item, megatron) for items in parameters for item in items
    )


def chain_of(
    parameters: Parameters, megatron: Megatron, *, has_experts: bool
) -> tuple[ChainedOptimizer, ...]:
    """The optimizers of a rank with these parameters, in the order of its entries.

    Overlapping the parameter gather with the step splits off the dense part of the first chunk
    (FORMAT 5.3).
    """
    stages = tuple(range(len(parameters)))
    overlaps = megatron.arguments.overlaps_param_gather_with_step
    dense = [stages[:1], stages[1:]] if overlaps else [stages]
    chain = [ChainedOptimizer(is_expert=False, vp_stages=part) for part in dense]
    if has_experts:
        chain.append(ChainedOptimizer(is_expert=True, vp_stages=stages))
    return tuple(chain)


def items_by_group(
    parameters: Parameters, optimizer: ChainedOptimizer, megatron: Megatron
) -> dict[GroupKey, list[Item]]:
    """The parameters of one optimizer by param group, in first-seen order."""
    by_key: dict[GroupKey, list[Item]] = {}
    for stage in optimizer.vp_stages:
        for item in parameters[stage]:
            key = key_of_item(item, megatron)
            is_taken = optimizer.takes_matrices in (None, is_layer_matrix(item, megatron))
            if is_taken and optimizer.is_expert in (None, key.is_expert):
                by_key.setdefault(key, []).append(item)
    return by_key


def share_of(
    parameters: Parameters, chain: Iterable[ChainedOptimizer], megatron: Megatron
) -> Share:
    """All parameters of a rank, as its optimizers take them."""
    return [items_by_group(parameters, optimizer, megatron) for optimizer in chain]


def in_rank_order(
    keys: Sequence[GroupKey],
    optimizer: ChainedOptimizer,
    ranks: Callable[[], Iterable[Parameters]],
    megatron: Megatron,
) -> list[GroupKey]:
    """The groups of an optimizer as a rank has them, by the versions that sort them.

    They are sorted by what they override, and the sort is stable and does not look at buffers. So
    the group of experts and the other one that overrides the same stand as their first parameters
    do on the rank, or else on the first rank that has some: mostly experts come after a router, but
    not where that is frozen (optimizer/__init__.py ``_get_param_groups``, 0.16 and later).

    Args:
        keys: the groups, sorted, in the order of any rank.
        optimizer: which takes both.
        ranks: parameters of the rank, then of all ranks; not asked for more than it takes.
        megatron: the run.
    """
    runs = [list(run) for _, run in itertools.groupby(keys, key=_without_buffer)]
    return [key for run in runs for key in first_seen(run, optimizer, ranks(), megatron)]


def first_seen(
    keys: Sequence[GroupKey],
    optimizer: ChainedOptimizer,
    ranks: Iterable[Parameters],
    megatron: Megatron,
) -> list[GroupKey]:
    """Groups in the order in which ranks bring their first parameters; those that none brings
    last. One alone has no order, so nobody is asked for it.

    Args:
        keys: the groups.
        optimizer: which takes them.
        ranks: parameters of each; not asked for more than it takes.
        megatron: the run.
    """
    left, found = list(dict.fromkeys(keys)), []
    asked = iter(ranks)
    while len(left) > 1 and (parameters := next(asked, None)) is not None:
        brought = items_by_group(parameters, optimizer, megatron)
        found += [key for key in brought if key in left]
        left = [key for key in left if key not in brought]
    return found + left


def chain_in_rank_order(
    chain: Sequence[ChainedOptimizer],
    first: Mapping[ChainedOptimizer, GroupKey],
    ranks: Callable[[], Iterable[Parameters]],
    megatron: Megatron,
) -> tuple[ChainedOptimizer, ...]:
    """A chain whose elements stand as the first of their groups do: where matrices, or all others,
    have an optimizer for dense parameters and one for experts (optimizer/__init__.py
    ``_get_megatron_emerging_optimizer``, 0.18 and later).

    Args:
        chain: as any rank has it.
        first: the first group of each.
        ranks: see ``in_rank_order``.
        megatron: the run.
    """
    found = list(chain)
    for takes_matrices in (True, False):
        both = [o for o in chain if o.takes_matrices is takes_matrices and o in first]
        keys = [first[optimizer] for optimizer in both]
        if [o.is_expert for o in both] not in ([False, True], [True, False]):
            continue
        if _without_buffer(keys[0]) == _without_buffer(keys[1]):
            taker = replace(both[0], is_expert=None)
            order = in_rank_order(keys, taker, ranks, megatron)
            for place, key in zip(map(chain.index, both), order, strict=True):
                found[place] = replace(taker, is_expert=key.is_expert)
    return tuple(found)


def _without_buffer(key: GroupKey) -> GroupKey:
    return replace(key, is_expert=False)
