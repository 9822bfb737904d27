"""Which parameters of a rank are trained, and which param groups hold them, as its files tell.

A frozen parameter (``requires_grad`` is False) is in no flat buffer, so its weight has a storage of
its own; it has neither state nor param group (distributed_data_parallel.py and
optimizer/__init__.py, 0.7 to 0.19). Which ones are frozen no argument tells: each answer is held to
the sizes, offsets and bytes of the files, and there must be one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

from ..container.pickling import as_mapping
from ..container.tensors import TensorRef, tensor_at
from ..megatron.buffers import bucket_policy
from ..megatron.layout import ModelChunk
from ..megatron.megatron import Megatron
from ..megatron.optimizer_chain import ChainedOptimizer, items_by_group
from ..megatron.param_groups import keys_of_groups
from ..megatron.parameters import GroupKey, Item, is_in_expert_buffer
from ..megatron.rounding import SIXTEEN_BIT
from ..megatron.rules import candidates
from .chunks import ChunkContents
from .flat_states import NUMEL, PARAM, Unexplained
from .optimizer_entries import MAINS, STATE, OptimizerEntry
from .plain_states import state_shapes

Agreement: TypeAlias = Callable[[TensorRef, TensorRef], bool]
"""Whether a weight can follow from a main parameter of its run, by samples of their bytes."""
_MAX_ANSWERS = 64
_Main = TypeVar("_Main")


def answers(
    contents: tuple[ChunkContents, ...],
    optimizers: Sequence[Any] | None,
    megatron: Megatron,
    agree: Agreement,
) -> Iterator[tuple[ChunkContents, ...]]:
    """The chunks of a rank with its frozen parameters marked, in each way that storages allow.

    Weights that share a storage are in a buffer, so those beside them are frozen. Where none of a
    kind shares one, all are frozen, or one is a buffer by itself: one that a tensor of the
    optimizer files has the size and the bytes of. A file in which nothing shares may also be one
    that was rewritten, with nothing frozen.

    Args:
        contents: of the rank.
        optimizers: top levels of the optimizer files that hold states of its parameters: its own,
            and that of another expert rank; None for weights alone.
        megatron: the run.
        agree: compares bytes.

    Raises:
        Unexplained: no file at hand tells whether a parameter is a buffer by itself.
    """
    frozen: set[Item] = set()
    open_kinds: list[tuple[ModelChunk, bool, list[Item]]] = []
    is_any_shared = False
    for content in contents:
        kinds: dict[tuple[bool, str], list[Item]] = {}
        for item in content.parameters:
            kind = (is_in_expert_buffer(item, megatron), item.weight.dtype)
            kinds.setdefault(kind, []).append(item)
        for (is_expert, _), items in kinds.items():
            own = _with_own_storages(items)
            is_any_shared |= len(own) < len(items)
            if len(own) < len(items):
                frozen.update(own)
            else:
                open_kinds.append((content.chunk, is_expert, items))
    if not is_any_shared or not (frozen or open_kinds):
        yield contents
    if not (frozen or open_kinds):
        return
    choices = [_choices(*kind, optimizers, megatron, agree) for kind in open_kinds]
    for chosen in itertools.islice(itertools.product(*choices), _MAX_ANSWERS):
        left = (
            [item for item in items if item is not lone]
            for (_, _, items), lone in zip(open_kinds, chosen, strict=True)
        )
        yield marked(contents, frozen.union(*left))


def _choices(
    chunk: ModelChunk,
    is_expert: bool,  # noqa: FBT001
    items: Sequence[Item],
    optimizers: Sequence[Any] | None,
    megatron: Megatron,
    agree: Agreement,
) -> list[Item | None]:
    """Which of the parameters of a kind, that share no storage, may be a buffer by itself; None
    for none of them.

    Without their states, one that is alone of its kind is taken for trained, in weights alone
    unless its storage is that of no buffer, and others for frozen if none could be a buffer.

    Raises:
        Unexplained: one could be, and no file at hand tells.
    """
    entries = [root if isinstance(root, list) else [root] for root in optimizers or ()]
    if any(own and own[-1 if is_expert else 0] is not None for own in entries):
        mains = [main for own in entries for entry in own for main in _flat_mains(entry)]
        return [None, *_lone(items, mains, agree)]
    if len(items) == 1:
        return [items[0]] if optimizers is not None else [items[0], None]
    divisor = bucket_policy(chunk, 0, megatron).divisor(is_expert=is_expert)
    for item in items:
        if optimizers is not None and item.weight.numel % divisor == 0:
            raise Unexplained(f"no file at hand tells whether {item.name} is frozen")
    return [None]


def without_trained(
    contents: tuple[ChunkContents, ...], megatron: Megatron
) -> tuple[ChunkContents, ...]:
    """The chunks of a rank without an optimizer, by the rules of a version that gives none to
    ranks without trained parameters (FORMAT 6.2): all are frozen.

    Where nothing but the missing entry shows it, the signs of the version must say so too: other
    versions give every rank an optimizer. If that is not so, nothing is marked.
    """
    items = [item for content in contents for item in content.parameters]
    if megatron.arguments.uses_distributed_optimizer:
        is_proved = len(_with_own_storages(items)) == len(items)
    else:
        is_proved = not next(candidates(megatron.arguments.names)).keeps_all_groups
    return marked(contents, items) if is_proved else contents


def _with_own_storages(items: Sequence[Item]) -> list[Item]:
    """Those that fill a storage which no other has."""
    users = Counter(item.weight.storage for item in items)
    return [
        item
        for item in items
        if users[item.weight.storage] == 1 and item.weight.storage.numel == item.weight.numel
    ]


def _lone(items: Sequence[Item], mains: Sequence[TensorRef], agree: Agreement) -> list[Item]:
    """The items that could be a whole buffer."""
    return [
        item
        for item in items
        if any(main.numel == item.weight.numel and agree(item.weight, main) for main in mains)
    ]


def _flat_mains(entry: Any) -> Iterator[TensorRef]:
    """The flat main parameters in an entry of an optimizer file, of whatever it is sure to hold."""
    for buffer in (as_mapping(entry) or {}).values():
        for states in (as_mapping(buffer) or {}).values():
            known = as_mapping(states) or {}
            main = tensor_at(known.get(PARAM))
            if main is not None and known.get(NUMEL) == main.numel:
                yield main


def marked(
    contents: tuple[ChunkContents, ...], frozen: Collection[Item]
) -> tuple[ChunkContents, ...]:
    """The chunks with these items marked as frozen."""
    return tuple(
        replace(
            content,
            items=tuple(
                replace(item, is_frozen=True) if item in frozen else item for item in content.items
            ),
        )
        for content in contents
    )


def told_groups(
    contents: tuple[ChunkContents, ...],
    entries: Sequence[OptimizerEntry],
    chain: Sequence[ChainedOptimizer],
    megatron: Megatron,
    agree: Agreement,
) -> tuple[ChunkContents, ...]:
    """The chunks of a rank whose optimizer is not distributed, with the group that each parameter
    is in by its main parameter; those in none are frozen.

    In each group the main parameters of the 16-bit weights stand in the order of the parameters;
    so do the states of all, by number, and those of the others can be told by their shapes. There
    must be one way to find them there.

    Raises:
        Unexplained: there is none, or more than one.
    """
    told: dict[Item, GroupKey] = {}
    parameters = [content.parameters for content in contents]
    for optimizer, entry in zip(chain, entries, strict=True):
        by_key = items_by_group(parameters, optimizer, megatron)
        taken = {item for items in by_key.values() for item in items}
        candidates = [item for items in parameters for item in items if item in taken]
        states, mains = entry.inner.get(STATE), entry.node.get(MAINS)
        mains = [[] for _ in entry.groups] if mains is None else mains
        if not isinstance(mains, list) or len(mains) != len(entry.groups):
            raise Unexplained("no main parameters tell the groups of parameters")
        has_shape = partial(_may_have, states, optimizer.takes_matrices is True)
        for key, group, own in zip(keys_of_groups(entry.groups), entry.groups, mains, strict=True):
            numbers, nodes = group.get("params"), own if isinstance(own, list) else [None]
            found = only_alignment(
                [tensor_at(node) for node in nodes], candidates, partial(may_be_main, agree)
            )
            if isinstance(numbers, list) and len(numbers) > len(found):
                others = [i for i in candidates if i in found or i.weight.dtype not in SIXTEEN_BIT]
                found = only_alignment(numbers, others, has_shape)
            for item in found:
                if told.setdefault(item, key) is not key:
                    raise Unexplained(f"{item.name} could be in two param groups")
    return tuple(
        replace(content, items=tuple(_told(item, told) for item in content.items))
        for content in contents
    )


def _may_have(states: Any, of_matrices: bool, item: Item, number: object) -> bool:  # noqa: FBT001
    """Whether the state of a number can be that of an item, by the shapes of its tensors."""
    state = states.get(number) if isinstance(states, dict) and type(number) is int else None
    shapes = state_shapes(item, of_matrices=of_matrices)
    tensors = (tensor_at(node) for node in (as_mapping(state) or {}).values())
    return all(tensor.shape in shapes for tensor in tensors if tensor is not None)


def may_be_main(agree: Agreement, item: Item, main: TensorRef | None) -> bool:
    """Whether a tensor can be the main parameter of an item, by form and samples."""
    weight = item.weight
    if main is None or weight.dtype not in SIXTEEN_BIT or main.dtype != "float32":
        return False
    return (main.shape, main.order) == (weight.shape, weight.order) and agree(weight, main)


def _told(item: Item, told: Mapping[Item, GroupKey]) -> Item:
    if not item.is_parameter:
        return item
    return replace(item, group=told[item]) if item in told else replace(item, is_frozen=True)


def only_alignment(
    mains: Sequence[_Main], candidates: Sequence[Item], fits: Callable[[Item, _Main], bool]
) -> list[Item]:
    """The candidates that main parameters, or states, belong to, in their order.

    There is one way if taking the first that fits for each, from the front, gives the same as
    taking the last, from the end.

    Raises:
        Unexplained: there is no way, or more than one.
    """
    first = _first_fits(mains, candidates, fits)
    last = _first_fits(mains[::-1], candidates[::-1], fits)
    if first is None or last is None:
        raise Unexplained("no way to tell the trained parameters by their values")
    for one, other in zip(first, last[::-1], strict=True):
        if one is not other:
            raise Unexplained(
                "more than one way to tell the trained parameters by their values: "
                f"{one.name} may be one, or {other.name}"
            )
    return first


def _first_fits(
    mains: Sequence[_Main], candidates: Sequence[Item], fits: Callable[[Item, _Main], bool]
) -> list[Item] | None:
    """For each main parameter the first candidate after the one before; None if one has none."""
    queue = iter(candidates)
    found = []
    for main in mains:
        item = next((item for item in queue if fits(item, main)), None)
        if item is None:
            return None
        found.append(item)
    return found
