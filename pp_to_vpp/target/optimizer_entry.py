"""The entries of a target rank's optimizers in ``model_optim_rng.pt``: param groups, step counts,
and the numbered states of optimizers that are not distributed.

A rank chains its optimizers; each has an entry with param groups (distrib_optimizer.py
``state_dict``; optimizer.py for others). Until 0.13 a rank had the groups of its own parameters
only, and loading matched them by position; from 0.14 every rank has all groups (FORMAT 6).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..checkpoint.family import SourceRank
from ..checkpoint.optimizer_entries import (
    GROUPS,
    MAINS,
    OPTIMIZER,
    STATE,
    OptimizerEntry,
    first_groups,
)
from ..checkpoint.plain_states import PlainState
from ..container.tensors import on_device, sharing_lists
from ..errors import ONE_SAVE, CheckpointError, show
from ..megatron.naming import chunk_keys
from ..megatron.optimizer_chain import (
    ChainedOptimizer,
    OptimizerKind,
    Share,
    chain_in_rank_order,
    chain_of,
    first_seen,
    has_expert_optimizer,
    has_optimizer,
    in_rank_order,
    items_by_group,
)
from ..megatron.param_groups import (
    STEP,
    are_sorted,
    bare,
    is_bare,
    keys_of_groups,
    steps,
    tells_of_defaults,
)
from ..megatron.parameters import GroupKey, Item
from .model import TargetRank, device_tag

_TELLING = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "max_lr")
_PARAMS = "params"
"""Numbers of the parameters of a group, in optimizers that save their own state."""


def target_chain(rank: TargetRank) -> tuple[ChainedOptimizer, ...]:
    """The optimizers that Megatron will chain on the target rank; none for a rank without
    parameters, unless it has the groups of others."""
    family = rank.family
    if family.kind is OptimizerKind.NONE or not has_optimizer(rank.parameters, rank.megatron):
        return ()
    # Each layer-wise file has the same chain.
    kinds = dict.fromkeys(own.kind for own in rank.own.optimizers)
    routed = [kind for kind in kinds if kind.takes_matrices is not None]
    if routed:
        chain = [replace(kind, vp_stages=tuple(range(len(rank.chunks)))) for kind in routed]
        first = first_groups(chain, [own.entry for own in rank.own.optimizers])
        return chain_in_rank_order(chain, first, rank.parameters_of_all, rank.megatron)
    has_experts = has_expert_optimizer(
        rank.parameters, rank.megatron, others_have=family.has_expert_optimizer
    )
    return chain_of(rank.parameters, rank.megatron, has_experts=has_experts)


def rank_entries(
    rank: TargetRank, chain: Sequence[ChainedOptimizer], share: Share, *, is_repeated: bool = False
) -> Any:
    """The entries of the chained optimizers with these parameters: a dict for one, a list for
    several, None without any.

    Args:
        rank: the rank.
        chain: its optimizers.
        share: the parameters of each.
        is_repeated: ``model_optim_rng.pt`` repeats them from a layer-wise file.

    Raises:
        CheckpointError: the source has no param groups for what the rank gets.
    """
    entries = [
        EntryWriter(rank, optimizer, by_key, is_repeated=is_repeated).entry()
        for optimizer, by_key in zip(chain, share, strict=True)
    ]
    return entries[0] if len(entries) == 1 else entries or None


def place_entry(root: Mapping[Any, Any], entry: Any | None) -> dict[Any, Any]:
    """The top level of ``model_optim_rng.pt`` with a rank's optimizers, or without any."""
    if entry is None:
        return {key: value for key, value in root.items() if key != OPTIMIZER}
    if OPTIMIZER in root:
        return {**root, OPTIMIZER: entry}
    items = list(root.items())
    items.insert(list(root).index(chunk_keys(root)[-1]) + 1, (OPTIMIZER, entry))
    return dict(items)


class EntryWriter:
    """Builds the entry of one optimizer of a target rank."""

    def __init__(
        self,
        rank: TargetRank,
        optimizer: ChainedOptimizer,
        items: Mapping[GroupKey, Sequence[Item]],
        *,
        is_repeated: bool = False,
    ) -> None:
        self._rank = rank
        self._optimizer = optimizer
        self._by_key = items
        self._is_repeated = is_repeated

    @property
    def template(self) -> OptimizerEntry:
        """The source's first entry of an optimizer like this one.

        Raises:
            CheckpointError: there is none.
        """
        template = next(self._entries(), None)
        if template is None:
            raise CheckpointError.of(
                self._rank.own.files.model.path,
                "no rank of its family has param groups for what this rank gets",
                cure=ONE_SAVE,
            )
        return template

    def entry(self) -> Any:
        """The entry, with the groups that Megatron expects on this rank."""
        template = self.template
        groups = self._groups(template.groups)
        if self._rank.family.kind is OptimizerKind.DISTRIBUTED:
            # The saving rank writes its step into all groups of an optimizer that has parameters.
            has_step = bool(self._by_key)
            groups = [self._with_step(group, has_step=has_step) for group in groups]
            self._check_steps(groups)
            return template.replaced({GROUPS: groups}, {})
        return self._plain_entry(template, groups)

    def _entries(self) -> Iterator[OptimizerEntry]:
        """The source's entries of optimizers like this one, of the same rank first."""
        for source in self._rank.sources:
            yield from self._entries_of(source)

    def _entries_of(self, source: SourceRank) -> Iterator[OptimizerEntry]:
        for other in source.repeated if self._is_repeated else source.optimizers:
            if other.kind.is_like(self._optimizer) and other.entry.groups:
                yield other.entry

    def _groups(self, own: list[dict[Any, Any]]) -> list[dict[Any, Any]]:
        """The param groups in the order of the version.

        Where they are made by rules of the run's own, as in the source. Before they were sorted:
        those of the rank's parameters in first-seen order, then, from 0.14, all others in the order
        in which the ranks of the run bring them.
        """
        odd = next(iter(self._rank.family.odd_groups), None)
        if odd is not None and not self._rank.megatron.rules.keeps_all_groups:
            raise _unknown_order(*odd)
        # By what they say, not by position, loading matches these.
        if odd is not None:
            return [dict(group) for group in own]
        if are_sorted(own):
            return [dict(group) for group in self._sorted_groups()]
        known = dict(zip(keys_of_groups(own), own, strict=True))
        for entry in self._entries():
            for key, group in zip(keys_of_groups(entry.groups), entry.groups, strict=True):
                if key not in known or (is_bare(known[key]) and not is_bare(group)):
                    known[key] = _sharing(group, known.values())
        keys = list(self._by_key)
        self._check_keys(known, keys)
        groups = [known[key] for key in keys]
        if self._rank.megatron.rules.keeps_all_groups:
            others = [key for key in self._keys_of_all(known) if key not in keys]
            ranks = self._rank.parameters_of_all()
            order = first_seen(others, self._optimizer, ranks, self._rank.megatron)
            are_bare = any(map(tells_of_defaults, own))
            groups += [bare(known[key], own) if are_bare else known[key] for key in order]
        return [dict(group) for group in groups]

    def _sorted_groups(self) -> list[dict[Any, Any]]:
        """Those of all ranks, from an entry of the source that has all of them: where the dense
        parameters have two optimizers, one of those may have less."""
        entries = list(self._entries())
        fullest = max(entries, key=lambda entry: len(entry.groups)).groups
        found = keys_of_groups(fullest)
        there = dict.fromkeys(key for entry in entries for key in keys_of_groups(entry.groups))
        wanted = self._keys_of_all(there)
        self._check_keys(found, wanted)
        by_key = {key: of for key, of in zip(found, fullest, strict=True) if key in wanted}
        ranks = self._rank.parameters_of_all
        order = in_rank_order(list(by_key), self._optimizer, ranks, self._rank.megatron)
        return [by_key[key] for key in order]

    def group_keys(self) -> list[GroupKey]:
        """Those of the groups that Megatron expects on this rank, in order."""
        return keys_of_groups(self._groups(self.template.groups))

    def _keys_of_all(self, known: Collection[GroupKey]) -> Collection[GroupKey]:
        """Of the known groups those of the parameters that this optimizer has on any rank."""
        megatron = self._rank.megatron
        if self._optimizer.is_expert or not megatron.arguments.overlaps_param_gather_with_step:
            return known
        ranks = self._rank.parameters_of_all()
        keys = (key for own in ranks for key in items_by_group(own, self._optimizer, megatron))
        return dict.fromkeys(keys)

    def _check_keys(self, known: Collection[GroupKey], wanted: Iterable[GroupKey]) -> None:
        """Each parameter has a group: without one its state would be left behind."""
        missing = [key for key in wanted if key not in known]
        if missing:
            raise CheckpointError.of(
                self._rank.own.files.model.path,
                f"no param group for {missing[0]}",
                cure="the run used a weight-decay or learning-rate rule of its own: it cannot "
                "be converted exactly",
            )

    def _with_step(self, group: dict[Any, Any], *, has_step: bool) -> dict[Any, Any]:
        """The group with the step count that Megatron would have saved.

        Without it the fused optimizers restart their bias correction at 1 (FORMAT 6.3); a group of
        an optimizer that has no parameters here has none.
        """
        if has_step and STEP not in group:
            step = self._step()
            if step is None:
                return group
            numbers = {key: value for key, value in group.items() if key == _PARAMS}
            others = {key: value for key, value in group.items() if key not in numbers}
            return {**others, STEP: step, **numbers}  # torch puts the numbers last
        if not has_step and self._rank.megatron.rules.keeps_all_groups:
            return {key: value for key, value in group.items() if key != STEP}
        return group

    def _step(self) -> Any:
        """The step count of any group that has it, of this rank first; dense or expert, but of the
        same kind of optimizer: others may not count."""
        groups = (
            group
            for source in self._rank.sources
            for other in (*source.optimizers, *source.others)
            if other.kind.takes_matrices == self._optimizer.takes_matrices
            for group in other.entry.groups
        )
        return next((group[STEP] for group in groups if STEP in group), None)

    def _check_steps(self, groups: list[dict[Any, Any]]) -> None:
        """All groups that hold parameters have gone the same steps."""
        found = steps(groups, self._by_key)
        if len(found) > 1:
            raise CheckpointError.of(
                self._rank.own.files.model.path,
                f"param groups have different step counts: {', '.join(sorted(found))}",
                cure=ONE_SAVE,
            )

    def _plain_entry(self, template: OptimizerEntry, groups: list[dict[Any, Any]]) -> Any:
        """A torch state dict renumbered over the target's groups."""
        rank, device = self._rank, device_tag(self._rank)
        stages = {item: stage for stage, items in enumerate(rank.parameters) for item in items}
        # Megatron gives all parameters of a chunk one list of qkv_split_shapes (0.18 and later).
        lists: list[dict[tuple[Any, ...], list[Any]]] = [{} for _ in rank.chunks]
        numbered: dict[int, Any] = {}
        mains: list[list[Any]] = []
        numbered_groups = []
        count = 0
        keys = keys_of_groups(groups)
        self._check_keys(keys, self._by_key)
        for key, group in zip(keys, groups, strict=True):
            items = self._by_key.get(key, [])
            numbers = list(range(count, count + len(items)))
            count += len(items)
            mains.append([])
            for number, item in zip(numbers, items, strict=True):
                state = rank.family.states[item.name]
                assert isinstance(state, PlainState)
                if state.entry is not None:
                    tensors = {name: on_device(part, device) for name, part in state.entry.items()}
                    numbered[number] = tensors
                if state.main_node is not None:
                    main = on_device(state.main_node, device)
                    mains[-1].append(sharing_lists(main, lists[stages[item]]))
            stepped = self._with_step(group, has_step=bool(items))
            numbered_groups.append(
                {name: numbers if name == _PARAMS else value for name, value in stepped.items()}
            )
        self._check_steps(numbered_groups)
        mains_of_groups = {MAINS: mains} if MAINS in template.node else {}
        return template.replaced({STATE: numbered, GROUPS: numbered_groups}, mains_of_groups)


def _unknown_order(rank: SourceRank, entry: OptimizerEntry) -> CheckpointError:
    """The refusal of groups that loading would match by position."""
    shown = "; ".join(
        ", ".join(f"{name} {show(group.get(name))}" for name in _TELLING if name in group)
        for group in entry.groups
    )
    return CheckpointError.of(
        rank.files.model.path,
        f"its param groups ({shown}) are not those that Megatron's rules make of its parameters",
        cure="the run has rules of its own for weight decay or learning rates; Megatron up to 0.13 "
        "matches groups by their order, which cannot be known for the target: "
        "save once with 0.14 or later, which matches them by what they say",
    )


def _sharing(group: dict[Any, Any], others: Collection[dict[Any, Any]]) -> dict[Any, Any]:
    """The group with the tuples of others: torch gives all groups one tuple of default betas."""
    return {
        key: next((other[key] for other in others if other.get(key) == value), value)
        if isinstance(value, tuple)
        else value
        for key, value in group.items()
    }
