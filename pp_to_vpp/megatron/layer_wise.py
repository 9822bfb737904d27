"""Which data-parallel rank keeps the state of a parameter under a layer-wise optimizer.

Whole parameters are dealt out, each to one rank, smallest first, in turns that go up and down
(layer_wise_optimizer.py ``shard_params`` in 0.16 and 0.17, the ping-pong layout of 0.18 and later).
Each data-parallel rank writes a file of its own, into the folder of its expert rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from .megatron import Megatron
from .optimizer_chain import ChainedOptimizer, Share, items_by_group
from .parameters import GroupKey, Item, Parameters

_Item = TypeVar("_Item")


def file_ranks(ep_rank: int, megatron: Megatron) -> range:
    """The data-parallel ranks whose files lie in the folders of an expert rank: consecutive ones
    lie in those of consecutive expert ranks."""
    return range(ep_rank, megatron.arguments.dp_size, megatron.arguments.ep_size)


def deal(sizes: Sequence[tuple[int, bool]], dp_size: int, ep_size: int) -> list[list[int]]:
    """The parameters that each data-parallel rank keeps, in the order of its file.

    Args:
        sizes: elements of each parameter, and whether it is an expert's: param group after param
            group of the whole chain. Experts of one expert rank stand for those of all others,
            which are dealt out alike.
        dp_size: data-parallel ranks.
        ep_size: expert ranks, one after the other among them.

    Returns:
        Indices into ``sizes``.
    """
    order = list(range(len(sizes)))
    if dp_size > 1:  # one rank alone keeps them as they are
        order.sort(key=lambda index: sizes[index][0])
    turns = {False: _up_and_down(dp_size), True: _up_and_down(dp_size // ep_size)}
    dealt: list[list[int]] = [[] for _ in range(dp_size)]
    for index in order:
        _, is_expert = sizes[index]
        turn = next(turns[is_expert])
        width = ep_size if is_expert else 1
        for dp_rank in range(turn * width, (turn + 1) * width):
            dealt[dp_rank].append(index)
    return dealt


def gathered(dealt: Sequence[Sequence[_Item]]) -> list[_Item]:
    """What was dealt out to some ranks, in the order in which it was, until one has no more."""
    left = [iter(own) for own in dealt]
    found: list[_Item] = []
    for turn in _up_and_down(len(dealt)):
        try:
            found.append(next(left[turn]))
        except StopIteration:
            break
    return found


def _up_and_down(count: int) -> Iterator[int]:
    return itertools.cycle([*range(count), *reversed(range(count))])


def shares(
    parameters: Parameters,
    groups: Iterable[tuple[ChainedOptimizer, Sequence[GroupKey]]],
    megatron: Megatron,
) -> tuple[Share, ...]:
    """What each data-parallel rank keeps of a rank's parameters (see ``deal``).

    Args:
        parameters: of the rank.
        groups: the optimizers of the chain, with their param groups in order.
        megatron: the run.
    """
    arguments = megatron.arguments
    chain = list(groups)
    queue = list(in_order(parameters, chain, megatron))
    sizes = [(item.weight.numel, key.is_expert) for _, key, item in queue]
    found: list[Share] = []
    for indices in deal(sizes, arguments.dp_size, arguments.ep_size):
        share: list[dict[GroupKey, list[Item]]] = [{} for _ in chain]
        for place, key, item in (queue[index] for index in indices):
            share[place].setdefault(key, []).append(item)
        found.append(share)
    return tuple(found)


def in_order(
    parameters: Parameters,
    groups: Iterable[tuple[ChainedOptimizer, Sequence[GroupKey]]],
    megatron: Megatron,
) -> Iterator[tuple[int, GroupKey, Item]]:
    """Optimizer, group and item of each parameter: group after group, then as they are named."""
    for index, (optimizer, keys) in enumerate(groups):
        by_key = items_by_group(parameters, optimizer, megatron)
        for key in dict.fromkeys((*keys, *by_key)):
            yield from ((index, key, item) for item in by_key.get(key, ()))
