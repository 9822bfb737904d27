"""Which param group of the optimizer a parameter belongs to.

Weight decay is off for biases and one-dimensional tensors; experts with buffers of their own and
decoupled learning rates make further groups (optimizer/__init__.py ``_get_param_groups``, 0.6 to
0.19; ``get_standard_config_overrides``, 0.16 to 0.19).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..container.pickling import digest
from ..errors import show
from .megatron import Megatron
from .parameters import GroupKey, Item, is_embedding_or_output, is_in_expert_buffer
from .rules import Rules

_DEFAULT = "default_config"
_RATES = ("max_lr", "min_lr")
STEP = "step"
"""Count of optimizer steps, kept in each group by the fused optimizers."""


def key_of_item(item: Item, megatron: Megatron) -> GroupKey:
    """The group of a parameter: the one that the file told, or that of the rules."""
    if item.group is not None:
        return item.group
    arguments = megatron.arguments
    is_flat = item.rest.endswith(".bias") or len(item.weight.shape) == 1
    if arguments.decays_qk_norms and ("q_layernorm." in item.rest or "k_layernorm." in item.rest):
        is_flat = False
    if arguments.skips_embedding_weight_decay and "embedding" in item.rest:
        is_flat = True
    return GroupKey(
        decays=not is_flat,
        is_expert=is_in_expert_buffer(item, megatron),
        is_decoupled=arguments.decoupled_lr and is_embedding_or_output(item, megatron),
    )


def keys_of_groups(groups: Sequence[Mapping[Any, Any]]) -> list[GroupKey]:
    """The keys that the saved groups of an optimizer tell of themselves, each another.

    Unusual multipliers make a group one of the run's own on every rank, whatever siblings it has
    there: up to 0.13 a rank has the groups of its own parameters only.
    """
    keys = [_key_of_group(group) for group in groups]
    taken = {key for key, group in zip(keys, groups, strict=True) if not is_bare(group)}
    for index in (index for index, group in enumerate(groups) if is_bare(group)):
        if keys[index] in taken:  # the other one of them
            keys[index] = replace(keys[index], is_decoupled=True)
        taken.add(keys[index])
    usual = Counter(
        key for key, group in zip(keys, groups, strict=True) if _has_usual_multipliers(group)
    )
    return [
        key
        if usual[key] == 1 and _has_usual_multipliers(group)
        else replace(key, own=digest(identity(group)))
        for key, group in zip(keys, groups, strict=True)
    ]


def _has_usual_multipliers(group: Mapping[Any, Any]) -> bool:
    """Whether those of weight decay and learning rate are the ones that Megatron's rules give."""
    return group.get("wd_mult", 1.0) in (0.0, 1.0) and group.get("lr_mult", 1.0) == 1.0


def _key_of_group(group: Mapping[Any, Any]) -> GroupKey:
    """What a group tells by its usual marks.

    From 0.16 a decoupled group is known by ``default_config``, before by ``is_decoupled_lr``.
    """
    return GroupKey(
        decays=group.get("wd_mult") != 0,
        is_expert=group.get("is_expert_parallel") is True,
        is_decoupled=group.get("is_decoupled_lr") is True or group.get(_DEFAULT) is False,
    )


def are_sorted(groups: Iterable[Mapping[Any, Any]]) -> bool:
    """Whether they are those of all ranks in one order for all: from 0.16, known by the place of a
    key that came shortly before it (FORMAT 6.2)."""
    names = ([name for name in group if name in ("wd_mult", _DEFAULT)] for group in groups)
    return any(of[:1] == [_DEFAULT] for of in names)


def tells_of_defaults(group: Mapping[Any, Any]) -> bool:
    """Whether it says if its learning rates are the usual ones: of main from November 2025 on."""
    return _DEFAULT in group


def is_bare(group: Mapping[Any, Any]) -> bool:
    """Whether a group says no more than that other ranks have parameters in it: before groups were
    sorted, main told neither their learning rates nor whether they are the usual ones, for two
    months (optimizer/__init__.py ``_get_param_groups``)."""
    return tells_of_defaults(group) and _RATES[0] not in group


def bare(group: Mapping[Any, Any], others: Iterable[Mapping[Any, Any]]) -> dict[Any, Any]:
    """A group as the ranks without its parameters had it then: with the usual learning rate, which
    others have."""
    usual = next((other["lr"] for other in others if other.get(_DEFAULT) is True), group["lr"])
    told = {name: value for name, value in group.items() if name not in _RATES}
    return {**told, _DEFAULT: True, "lr": usual}


def identity(group: Mapping[Any, Any]) -> dict[Any, Any]:
    """All that tells a group from its siblings, and is alike wherever it is saved."""
    return {name: value for name, value in group.items() if name not in (STEP, "params")}


def are_explained(
    groups: Sequence[Mapping[Any, Any]], keys: Sequence[GroupKey], rules: Rules
) -> bool:
    """Whether the rules make these groups of a rank's parameters: their number, keys and order.

    A run may have rules of its own: other parameters without weight decay, learning rates scaled
    for some (``no_weight_decay_cond``, ``scale_lr_cond``, ``lr_mult``; config overrides).

    Args:
        groups: as saved, of one optimizer.
        keys: of the rank's parameters that it takes, in first-seen order.
        rules: of the version.
    """
    found = keys_of_groups(groups)
    rates = {
        (key.is_decoupled, group.get("max_lr"), group.get("min_lr"))
        for key, group in zip(found, groups, strict=True)
        if not is_bare(group)
    }
    if any(key.own for key in found):
        return False
    if len(rates) != len({is_decoupled for is_decoupled, *_ in rates}):
        return False
    if are_sorted(groups):
        return set(keys) <= set(found)
    return found[: len(keys)] == list(keys) if rules.keeps_all_groups else found == list(keys)


def steps(groups: Sequence[Mapping[Any, Any]], held: Collection[GroupKey]) -> set[str]:
    """The step counts of the groups that hold parameters, as text: one, in a file of Megatron."""
    keys = zip(groups, keys_of_groups(groups), strict=True)
    return {show(group.get(STEP)) for group, key in keys if {key, key.usual} & set(held)}
