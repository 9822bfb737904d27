"""The entries of a rank's optimizers in ``model_optim_rng.pt``.

A dict if there is one optimizer, else a list (FORMAT 6.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..container.pickling import Global, leaves
from ..container.tensors import tensor_at
from ..errors import AS_SAVED, ASK_FOR_SUPPORT, CheckpointError, show
from ..megatron.optimizer_chain import ChainedOptimizer
from ..megatron.param_groups import keys_of_groups
from ..megatron.parameters import GroupKey

OPTIMIZER = "optimizer"
"""Key of the entries in ``model_optim_rng.pt``, and of the torch optimizer in each."""
GROUPS = "param_groups"
MAINS = "fp32_from_fp16_params"
STATE = "state"
_ROUTED = "optimizer"
"""Key of param groups that another optimizer than the run's own takes."""
_KNOWN_KEYS = frozenset((OPTIMIZER, STATE, GROUPS, MAINS, "grad_scaler"))
"""Of an optimizer and of the torch optimizer in it (optimizer.py, 0.7 to 0.19)."""


def routed_chain(entries: Sequence[OptimizerEntry], vp_size: int) -> tuple[ChainedOptimizer, ...]:
    """The optimizers of a chain in which some take matrices alone, as their param groups tell; ()
    if none does. Every rank has them all.

    From 0.18 the groups of all other parameters name their optimizer; before, Muon was the only one
    and is known by its own options.
    """
    groups = [group for entry in entries for group in entry.groups]
    is_named = _names_optimizers(entries)
    if not (is_named or any(map(_is_muon, groups))):
        return ()

    def takes_matrices(entry: OptimizerEntry) -> bool:
        return all(_ROUTED not in g if is_named else _is_muon(g) for g in entry.groups)

    def is_expert(entry: OptimizerEntry) -> bool | None:
        found = {key.is_expert for key in keys_of_groups(entry.groups)}
        return found.pop() if len(found) == 1 else None

    stages = tuple(range(vp_size))
    return tuple(ChainedOptimizer(is_expert(e), stages, takes_matrices(e)) for e in entries)


def _names_optimizers(entries: Iterable[OptimizerEntry]) -> bool:
    """Whether param groups name the optimizer that takes them (0.18 and later)."""
    return any(_ROUTED in group for entry in entries for group in entry.groups)


def first_groups(
    chain: Iterable[ChainedOptimizer], entries: Sequence[OptimizerEntry]
) -> dict[ChainedOptimizer, GroupKey]:
    """What the first param group of each optimizer is known by, of those that have one, where the
    chain stands as they do: from 0.18 on."""
    if not _names_optimizers(entries):
        return {}
    keys = ((o, keys_of_groups(entry.groups)) for o, entry in zip(chain, entries, strict=False))
    return {optimizer: of[0] for optimizer, of in keys if of}


def _is_muon(group: Mapping[Any, Any]) -> bool:
    """Whether Muon takes a group: SGD has a dampening beside its momentum, Adam has betas."""
    names = group.keys()
    return bool(names & {"momentum", "momentum_beta"}) and not names & {"betas", "dampening"}


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


def optimizer_entries(node: Any, where: str) -> list[Any]:
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
    return tuple(_read_entry(entry, where) for entry in optimizer_entries(node, where))


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
    for name, value in ((name, value) for group in groups for name, value in group.items()):
        odd = next((leaf for leaf in leaves(value) if not _is_plain(leaf)), None)
        if odd is not None:
            raise CheckpointError.of(
                where,
                f"entry {show(name)} of a param group holds more than plain values",
                found=show(odd),
                cure=ASK_FOR_SUPPORT,
            )
    return entry


def _is_plain(value: Any) -> bool:
    """Whether it is a number, a text, a dtype, a class or a tensor, such as a learning rate."""
    is_told = value is None or isinstance(value, (bool, int, float, str, Global))
    return is_told or tensor_at(value) is not None


def unknown_entry(where: str, odd: Any) -> CheckpointError:
    """The refusal of what could change the layout."""
    cure = ASK_FOR_SUPPORT
    return CheckpointError.of(where, f"unknown optimizer entry {show(odd)}", cure=cure)
