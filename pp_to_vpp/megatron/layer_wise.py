"""Which data-parallel rank keeps the state of a parameter under a layer-wise optimizer.

Whole parameters are dealt out, each to one rank, smallest first, in turns that go up and down
(layer_wise_optimizer.py ``shard_params`` in 0.16 and 0.17, the ping-pong layout of 0.18 and later).
Each data-parallel rank writes a file of its own, into the folder of its expert rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from .megatron import Megatron
from .optimizer_chain import ChainedOptimizer, Share, items_by_group
from .param_groups import GroupKey
from .parameters import Item, Parameters


def file_ranks(ep_rank: int, megatron: Megatron) -> range:
    """The data-parallel ranks whose files lie in the folders of an expert rank: consecutive ones
    lie in those of consecutive expert ranks."""
    return range(ep_rank, megatron.arguments.dp_size, megatron.arguments.ep_size)


def shares(
    parameters: Parameters,
    groups: Sequence[tuple[ChainedOptimizer, Sequence[GroupKey]]],
    megatron: Megatron,
) -> tuple[Share, ...]:
    """What each data-parallel rank keeps of a rank's parameters.

    Of experts, those of the folder's own expert rank stand for those of all others: they are dealt
    out alike.

    Args:
        parameters: of the rank.
        groups: the optimizers of the chain, with their param groups in order.
        megatron: the run.
    """
    dp_size, ep_size = megatron.arguments.dp_size, megatron.arguments.ep_size
    dealt: list[list[dict[GroupKey, list[Item]]]] = [[{} for _ in groups] for _ in range(dp_size)]
    turns = {False: _up_and_down(dp_size), True: _up_and_down(dp_size // ep_size)}
    queue = list(_in_order(parameters, groups, megatron))
    if dp_size > 1:  # one rank alone keeps them in order
        queue.sort(key=lambda found: found[2].weight.numel)
    for index, key, item in queue:
        turn = next(turns[key.is_expert])
        takers = range(turn * ep_size, (turn + 1) * ep_size) if key.is_expert else (turn,)
        for taker in takers:
            dealt[taker][index].setdefault(key, []).append(item)
    return tuple(dealt)


def _up_and_down(count: int) -> Iterator[int]:
    return itertools.cycle([*range(count), *reversed(range(count))])


def _in_order(
    parameters: Parameters,
    groups: Iterable[tuple[ChainedOptimizer, Sequence[GroupKey]]],
    megatron: Megatron,
) -> Iterator[tuple[int, GroupKey, Item]]:
    """Optimizer, group and item of each parameter: group after group, then as they are named."""
    for index, (optimizer, keys) in enumerate(groups):
        by_key = items_by_group(parameters, optimizer, megatron)
        for key in dict.fromkeys((*keys, *by_key)):
            yield from ((index, key, item) for item in by_key.get(key, ()))
