"""The states of an optimizer that is not distributed: a torch state dict, and main parameters.

Megatron saves them in ``model_optim_rng.pt`` (optimizer.py ``state_dict``, 0.7 to 0.19): states by
number of the parameter, counted over the param groups, and the fp32 main parameters of the 16-bit
weights of each group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..container.pickling import is_same
from ..container.tensors import TensorRef, unwrap_tensor
from ..errors import AS_SAVED, NOT_CONVERTED, CheckpointError, located, show
from ..megatron.optimizer_chain import ChainedOptimizer, Share
from ..megatron.param_groups import keys_of_groups
from ..megatron.parameters import Item
from ..megatron.rounding import SIXTEEN_BIT
from .chunks import not_contiguous
from .flat_states import Unexplained
from .optimizer_entries import MAINS, STATE, OptimizerEntry

MAIN = "main parameter"
"""Name of the main parameter among the tensors of a state."""


@dataclass(frozen=True, slots=True, eq=False)
class PlainState:
    """State of one parameter of a non-distributed optimizer."""

    entry: Any
    """Entry of the torch state dict, None if it had none."""
    main_node: Any
    """Its tensor in ``fp32_from_fp16_params``, None for parameters that are fp32 themselves."""
    tensors: Mapping[str, TensorRef]
    """Those of both, by name."""

    @property
    def entries(self) -> tuple[object, ...]:
        """Names of what the entry holds."""
        return tuple(self.entry or ())

    @property
    def values(self) -> dict[Any, Any]:
        """What the entry holds beside tensors, such as a step count."""
        return {
            name: value for name, value in (self.entry or {}).items() if name not in self.tensors
        }

    def is_like(self, other: PlainState) -> bool:
        """Whether two states hold the same but for the bytes of tensors."""
        forms, others = (
            [(name, tensor.form) for name, tensor in state.tensors.items()]
            for state in (self, other)
        )
        both = self.values, other.values  # most have none
        return forms == others and (not any(both) or is_same(*both))

    @property
    def main(self) -> TensorRef | None:
        """The main parameter, whose elements lie as those of the weight."""
        return self.tensors.get(MAIN)


def read_plain_states(
    entries: Sequence[OptimizerEntry],
    chain: Sequence[ChainedOptimizer],
    share: Share,
    where: str,
    *,
    leaves_experts: bool = False,
) -> dict[str, PlainState]:
    """The states of a non-distributed optimizer, by global name of the parameter.

    Args:
        entries: of the chained optimizers.
        chain: those optimizers.
        share: the parameters that each has there.
        where: the file, for messages.
        leaves_experts: they are those of another rank, and their states are not wanted.

    Raises:
        CheckpointError: the entry has an unknown structure.
        Unexplained: groups or shapes are not those of the parameters.
    """
    found: dict[str, PlainState] = {}
    for optimizer, entry, own in zip(chain, entries, share, strict=True):
        by_key = dict(own)
        states, mains = _plain_entry(entry, where)
        for index, (key, group) in enumerate(
            zip(keys_of_groups(entry.groups), entry.groups, strict=True)
        ):
            items = by_key.pop(key, [])
            numbers = group.get("params")
            if not isinstance(numbers, list) or len(numbers) != len(items):
                raise Unexplained(f"param group {index} does not have {len(items)} parameters")
            # fp32 parameters are their own mains and have none here (FORMAT 6.4).
            halves = [item for item in items if item.weight.dtype in SIXTEEN_BIT]
            group_mains = mains[index] if mains is not None and index < len(mains) else []
            if not isinstance(group_mains, list) or len(group_mains) != len(halves):
                raise Unexplained(
                    f"param group {index} does not have {len(halves)} main parameters"
                )
            if leaves_experts and key.is_expert:
                continue
            queue = iter(group_mains)
            for item, number in zip(items, numbers, strict=True):
                main = next(queue, None) if item.weight.dtype in SIXTEEN_BIT else None
                state = states.get(number)
                shapes = state_shapes(item, of_matrices=optimizer.takes_matrices is True)
                tensors = _checked_tensors(item, main, state, shapes, where)
                found[item.name] = PlainState(state, main, tensors)
        if by_key:
            raise Unexplained(f"no param group for {sum(map(len, by_key.values()))} parameters")
    return found


def _plain_entry(entry: OptimizerEntry, where: str) -> tuple[Mapping[Any, Any], list[Any] | None]:
    """State by parameter number, and main parameters of each group."""
    states, mains = entry.inner.get(STATE), entry.node.get(MAINS)
    if not isinstance(states, dict) or not (mains is None or isinstance(mains, list)):
        raise CheckpointError.of(
            where,
            "the optimizer entry is of an unknown kind",
            expected="'state' and 'param_groups' of a torch optimizer",
            found=show(entry.node),
            cure=NOT_CONVERTED,
        )
    _check_numbers(entry, states, where)
    return states, mains


def _check_numbers(entry: OptimizerEntry, states: Mapping[Any, Any], where: str) -> None:
    """Each number is that of one parameter, and each state has one of them."""
    lists = [group.get("params") for group in entry.groups]
    numbers = [number for own in lists if isinstance(own, list) for number in own]
    counts = Counter(number for number in numbers if type(number) is int)
    for number in numbers:
        if type(number) is not int or counts[number] != 1:
            what = f"{show(number)} is not the number of one parameter"
            raise CheckpointError.of(where, what, cure=AS_SAVED)
    lone = next((number for number in states if number not in counts), None)
    if lone is not None:
        what = f"state {show(lone)} belongs to no parameter"
        raise CheckpointError.of(where, what, cure=AS_SAVED)


def state_shapes(item: Item, *, of_matrices: bool) -> set[tuple[int, ...]]:
    """The shapes that states may have: the parameter's, or none. Optimizers for matrices also keep
    factors for rows and columns (emerging_optimizers: soap.py, adaptive_muon.py)."""
    shape = item.weight.shape
    if not of_matrices:
        return {shape, ()}
    rows, columns = shape
    factors = {(rows, rows), (columns, columns), (rows, 1), (1, columns), (1,)}
    return {shape, (), *factors}


def _checked_tensors(
    item: Item, main: Any, state: Any, shapes: set[tuple[int, ...]], where: str
) -> dict[str, TensorRef]:
    """The tensors of a state, each of one of the shapes; the main parameter of the parameter's."""
    if not (state is None or isinstance(state, dict)):
        raise Unexplained(f"{item.name}: its state is {show(state)}")
    values = dict(state or {})
    values[MAIN] = main
    tensors: dict[str, TensorRef] = {}
    for name, value in values.items():
        with located(f"{where}, {item.name}, {show(name)}"):
            tensor = unwrap_tensor(value)
        if tensor is None:
            continue
        if not (isinstance(name, str) and name) or (name == MAIN and value is not main):
            raise Unexplained(f"{item.name}: a state called {show(name)}")
        if tensor.shape not in ({item.weight.shape} if name == MAIN else shapes):
            raise Unexplained(f"{item.name} of shape {item.weight.shape}: {show(name)} differs")
        tensors[name] = tensor
    if main is not None and (MAIN not in tensors or tensors[MAIN].dtype != "float32"):
        raise Unexplained(f"{item.name}: its main parameter is no float32 tensor")
    if main is not None and tensors[MAIN].order != item.weight.order:
        odd = item.weight if tensors[MAIN].is_contiguous else tensors[MAIN]
        what = item.name if odd is item.weight else f"the main parameter of {item.name}"
        raise not_contiguous(where, what, odd)
    return tensors
