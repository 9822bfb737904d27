"""The ``distrib_optim.pt`` of a target rank: its optimizers' states in flat buffers.

Holes of the buffers are kept, the padding of bucket ends is not (distrib_optimizer.py
``get_parameter_state_dp_zero``, 0.7 to 0.19; FORMAT 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoint.flat_states import COALESCED, NUMEL, FlatState
from ..container.tensors import FLOAT_STORAGE, flat_tensor, gathered
from ..megatron.buffers import Buffer, RankBuffers
from ..megatron.optimizer_chain import ChainedOptimizer
from .model import TargetRank

_CPU = "cpu"


def flat_root(rank: TargetRank, chain: Sequence[ChainedOptimizer]) -> Any:
    """The content of the file; None where Megatron writes none."""
    if rank.buffers is None:
        return None
    entries = [_entry(rank, optimizer, rank.buffers) for optimizer in chain]
    if all(entry is None for entry in entries):
        return None
    return entries[0] if len(entries) == 1 else entries


def _entry(
    rank: TargetRank, optimizer: ChainedOptimizer, buffers: RankBuffers
) -> dict[Any, Any] | None:
    """One optimizer's buffers under compressed indices; None where another family has them: the
    dense state is in the folders of one expert rank (FORMAT 1.3)."""
    if not rank.family.holds_state(is_expert=optimizer.is_expert):
        return None
    root: dict[Any, Any] = {COALESCED: True}
    for index, (stage, buffer) in enumerate(buffers.of(optimizer)):
        root[index] = _buffer(rank, stage, buffer)
    return root


def _buffer(rank: TargetRank, stage: int, buffer: Buffer) -> dict[Any, Any]:
    parameters = rank.chunks[stage].parameters
    found = [rank.family.states[parameters[index].name] for index in buffer.members]
    states = [state for state in found if isinstance(state, FlatState)]
    entry: dict[str, Any] = {NUMEL: buffer.numel_unpadded}
    for name in states[0].tensors:
        places = zip(buffer.saved_starts, (state.tensors[name] for state in states), strict=True)
        storage = gathered(FLOAT_STORAGE, _CPU, buffer.numel_unpadded, places)
        entry[name] = flat_tensor(storage)
    of_parameters, of_gradients = states[0].dtypes
    # A tuple for each buffer: one that two share would be written once.
    return {(of_parameters, of_gradients): {key: entry[key] for key in states[0].keys}}
