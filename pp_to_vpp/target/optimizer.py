"""All that a target rank folder holds of its optimizers: the entry in ``model_optim_rng.pt``, and
the files beside it.

Under a layer-wise optimizer other layers on a rank mean that other data-parallel ranks keep them,
so states move between the folders of expert ranks too (``megatron.layer_wise``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.optimizer_entries import OPTIMIZER
from ..errors import NOT_CONVERTED, CheckpointError
from ..megatron import layer_wise
from ..megatron.optimizer_chain import ChainedOptimizer, OptimizerKind, share_of
from ..megatron.ranks import OPTIMIZER_FILE, layer_wise_file
from .flat_file import flat_root
from .model import TargetRank
from .optimizer_entry import EntryWriter, rank_entries, target_chain


@dataclass(frozen=True, slots=True)
class TargetOptimizer:
    """What is to be written of a rank's optimizers."""

    chain: tuple[ChainedOptimizer, ...]
    entry: Any
    """Of ``model_optim_rng.pt``; None if it has none."""
    files: Mapping[str, Any]
    """Contents of the files beside it, by name."""
    elsewhere: frozenset[str] = frozenset()
    """Parameters whose states go into the folders of other expert ranks."""


def target_optimizer(rank: TargetRank) -> TargetOptimizer:
    """The optimizers of a target rank.

    Raises:
        CheckpointError: the source has no param groups for what the rank gets, or groups that
            nobody can tell the parameters of.
    """
    chain = target_chain(rank)
    if rank.family.kind is OptimizerKind.LAYER_WISE:
        return _layer_wise(rank, chain)
    flat = flat_root(rank, chain)
    share = share_of(rank.parameters, chain, rank.megatron)
    return TargetOptimizer(
        chain, rank_entries(rank, chain, share), {} if flat is None else {OPTIMIZER_FILE: flat}
    )


def _layer_wise(rank: TargetRank, chain: Sequence[ChainedOptimizer]) -> TargetOptimizer:
    for source, _ in rank.family.odd_groups:
        raise CheckpointError.of(
            source.files.model.path,
            "the param groups beside it are not those that Megatron's rules make of its parameters",
            cure="which parameters they hold decides which data-parallel rank keeps them, and "
            f"nothing tells: {NOT_CONVERTED}",
        )
    groups = [EntryWriter(rank, optimizer, {}).group_keys() for optimizer in chain]
    dealt = layer_wise.shares(rank.parameters, zip(chain, groups, strict=True), rank.megatron)
    own = layer_wise.file_ranks(rank.own.files.id.ep_rank or 0, rank.megatron)
    files = {layer_wise_file(dp): rank_entries(rank, chain, dealt[dp]) for dp in own}
    shares = (by_key for dp in own for by_key in dealt[dp])
    held = {item.name for by_key in shares for items in by_key.values() for item in items}
    names = {item.name for items in rank.parameters for item in items}
    entry = None
    if OPTIMIZER in rank.own.root:
        entry = rank_entries(rank, chain, dealt[own[0]], is_repeated=True)
    return TargetOptimizer(tuple(chain), entry, files, frozenset(names - held))
