"""The optimizer of a target rank: its entry in ``model_optim_rng.pt`` and its ``distrib_optim.pt``.

A rank chains its optimizers; each has an entry with param groups (distrib_optimizer.py
``state_dict``; optimizer.py for others). Until 0.13 a rank had the groups of its own parameters
only, and loading matched them by position; from 0.14 every rank has all groups.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.family import Family, RankInventory
from ..checkpoint.flat_states import COALESCED, NUMEL, FlatState
from ..checkpoint.optimizer_entries import GROUPS, MAINS, OPTIMIZER, STATE, OptimizerEntry
from ..checkpoint.plain_states import PlainState
from ..container.pickling import Storage
from ..container.tensors import FLOAT_STORAGE, flat_tensor, sharing_lists
from ..errors import ONE_SAVE, CheckpointError, show
from ..megatron.buffers import Buffer, RankBuffers
from ..megatron.naming import chunk_keys
from ..megatron.optimizer_chain import (
    OptimizerKind,
    OptimizerPart,
    chained_optimizers,
    has_optimizer,
    items_by_group,
)
from ..megatron.param_groups import STEP, GroupKey, key_of_group
from ..megatron.parameters import Item
from .model import TargetChunk, fill

_FLOAT_BYTES = 4
_CPU = "cpu"
_PARAMS = "params"
"""Numbers of the parameters of a group, in optimizers that save their own state."""


@dataclass(frozen=True, slots=True, eq=False)
class TargetOptimizer:
    """What a target rank's optimizers are made of."""

    family: Family
    ranks: Sequence[RankInventory]
    """Those of the source: the same folder, then those that it is made of, then the others."""
    chunks: Sequence[TargetChunk]
    buffers: RankBuffers | None
    """None without the distributed optimizer."""
    overlaps_param_gather_with_step: bool

    @property
    def own(self) -> RankInventory:
        """The same folder of the source."""
        return self.ranks[0]

    @property
    def _parameters(self) -> list[tuple[Item, ...]]:
        """Those of each virtual stage."""
        return [chunk.parameters for chunk in self.chunks]

    def parts(self) -> tuple[OptimizerPart, ...]:
        """The optimizers that Megatron will chain on the target rank; none for a rank without
        parameters, unless it has the groups of others."""
        if not has_optimizer(self._parameters, self.family.rules):
            return ()
        stages = tuple(range(len(self.chunks)))
        if any(part.takes_matrices is not None for part in self.own.parts):
            return tuple(replace(part, vp_stages=stages) for part in self.own.parts)
        return chained_optimizers(
            len(stages),
            has_expert_part=self.family.chains_expert_part(self._parameters),
            overlaps_param_gather_with_step=self.overlaps_param_gather_with_step,
        )

    def placed_entry(self, root: Mapping[Any, Any]) -> dict[Any, Any]:
        """The top level of ``model_optim_rng.pt`` with this rank's optimizers, or without any."""
        if not self.parts():
            return {key: value for key, value in root.items() if key != OPTIMIZER}
        if OPTIMIZER in root:
            return {**root, OPTIMIZER: self.entry()}
        before = list(root).index(chunk_keys(root)[-1]) + 1
        items = list(root.items())
        items.insert(before, (OPTIMIZER, self.entry()))
        return dict(items)

    def entry(self) -> Any:
        """The value of ``optimizer`` in ``model_optim_rng.pt``."""
        entries = [self._part_entry(part) for part in self.parts()]
        return entries[0] if len(entries) == 1 else entries

    def flat_root(self) -> Any:
        """The content of ``distrib_optim.pt``; None where Megatron writes no such file."""
        if self.buffers is None:
            return None
        entries = [self._flat_part(part, self.buffers) for part in self.parts()]
        if all(entry is None for entry in entries):
            return None
        return entries[0] if len(entries) == 1 else entries

    def _flat_part(self, part: OptimizerPart, buffers: RankBuffers) -> dict[Any, Any] | None:
        """One optimizer's buffers under compressed indices; None where another family has them."""
        if not self.family.holds_state(is_expert=part.is_expert):
            return None
        root: dict[Any, Any] = {COALESCED: True}
        for index, (stage, buffer) in enumerate(buffers.of_part(part)):
            root[index] = self._flat_buffer(self.chunks[stage].parameters, buffer)
        return root

    def _flat_buffer(self, parameters: tuple[Item, ...], buffer: Buffer) -> dict[Any, Any]:
        members = [parameters[index] for index in buffer.members]
        found = [self.family.states[item.name] for item in members]
        flat = [state.parts for state in found if isinstance(state, FlatState)]
        length = buffer.numel_unpadded * _FLOAT_BYTES
        tensors: dict[str, Any] = {}
        for name in flat[0]:
            places = zip(buffer.saved_starts, flat, strict=True)
            content = fill(((start * _FLOAT_BYTES, parts[name]) for start, parts in places), length)
            storage = Storage(FLOAT_STORAGE, _CPU, buffer.numel_unpadded, content)
            tensors[name] = flat_tensor(storage)
        keys = (rank.buffer_keys for rank in self.family.ranks.values())
        parameter_dtype, gradient_dtype = next(k[buffer.dtype] for k in keys if buffer.dtype in k)
        return {(parameter_dtype, gradient_dtype): {**tensors, NUMEL: buffer.numel_unpadded}}

    def _part_entry(self, part: OptimizerPart) -> Any:
        """The entry of one optimizer, with the groups that Megatron expects on this rank."""
        template = self._template(part)
        by_key = items_by_group(self._parameters, part, self.family.arguments, self.family.rules)
        groups = self._groups(part, template.groups, tuple(by_key))
        if self.family.kind is OptimizerKind.DISTRIBUTED:
            # The saving rank writes its step into all groups of an optimizer that has parameters.
            groups = [self._with_step(part, group, has_step=bool(by_key)) for group in groups]
            self._check_steps(groups, by_key)
            return template.replaced({GROUPS: groups}, {})
        return self._plain_entry(part, template, groups, by_key)

    def _entries(self, part: OptimizerPart) -> Iterator[OptimizerEntry]:
        """The source's entries of optimizers like this one, of the same rank first."""
        for rank in self.ranks:
            yield from self._entries_of(rank, part)

    @staticmethod
    def _entries_of(rank: RankInventory, part: OptimizerPart) -> Iterator[OptimizerEntry]:
        for other, entry in zip(rank.parts, rank.entries, strict=True):
            if other.is_like(part) and entry.groups:
                yield entry

    def _template(self, part: OptimizerPart) -> OptimizerEntry:
        """The source entry to start from."""
        for entry in self._entries(part):
            return entry
        raise CheckpointError.of(
            self.own.files.model.path,
            "no rank of its family has param groups for what this rank gets",
            cure=ONE_SAVE,
        )

    def _groups(
        self, part: OptimizerPart, own: list[dict[Any, Any]], keys: tuple[GroupKey, ...]
    ) -> list[dict[Any, Any]]:
        """The param groups in the order of the version.

        Sorted from 0.16 (known by ``default_config``): as in the source. Before: those of the
        rank's parameters in first-seen order, then, from 0.14, all others in the order in which
        the ranks of the run bring them: that of the first rank where this one brings none.
        """
        if any("default_config" in group for group in own):
            return [dict(group) for group in own]
        known = {key_of_group(group): group for group in own}
        for entry in self._entries(part):
            for group in entry.groups:
                if key_of_group(group) not in known:
                    known[key_of_group(group)] = _sharing(group, known.values())
        missing = [key for key in keys if key not in known]
        if missing:
            raise CheckpointError.of(
                self.own.files.model.path,
                f"no param group for {missing[0]}",
                cure="the run used a weight-decay or learning-rate rule of its own: it cannot "
                "be converted exactly",
            )
        groups = [known[key] for key in keys]
        if self.family.rules.keeps_all_groups:
            first = self.own if keys else self.family.ranks.get(0, self.own)
            order = [
                key_of_group(g) for entry in self._entries_of(first, part) for g in entry.groups
            ]
            groups += [known[key] for key in dict.fromkeys(order) if key not in keys]
        return [dict(group) for group in groups]

    def _with_step(
        self, part: OptimizerPart, group: dict[Any, Any], *, has_step: bool
    ) -> dict[Any, Any]:
        """The group with the step count that Megatron would have saved.

        Without it the fused optimizers restart their bias correction at 1 (FORMAT 6.3); a group of
        an optimizer that has no parameters here has none.
        """
        if has_step and STEP not in group:
            step = self._step(part)
            if step is None:
                return group
            numbers = {key: value for key, value in group.items() if key == _PARAMS}
            others = {key: value for key, value in group.items() if key not in numbers}
            return {**others, STEP: step, **numbers}  # torch puts the numbers last
        if not has_step and self.family.rules.keeps_all_groups:
            return {key: value for key, value in group.items() if key != STEP}
        return group

    def _check_steps(self, groups: list[dict[Any, Any]], held: Container[GroupKey]) -> None:
        """All groups that hold parameters have gone the same steps."""
        steps = {show(group.get(STEP)) for group in groups if key_of_group(group) in held}
        if len(steps) > 1:
            raise CheckpointError.of(
                self.own.files.model.path,
                f"param groups have different step counts: {', '.join(sorted(steps))}",
                cure=ONE_SAVE,
            )

    def _step(self, part: OptimizerPart) -> Any:
        """The step count of any group that has it, of this rank first; dense or expert, but of the
        same kind of optimizer: others may not count."""
        groups = (
            group
            for rank in self.ranks
            for other, entry in zip(rank.parts, rank.entries, strict=True)
            if other.takes_matrices == part.takes_matrices
            for group in entry.groups
        )
        return next((group[STEP] for group in groups if STEP in group), None)

    def _plain_entry(
        self,
        part: OptimizerPart,
        template: OptimizerEntry,
        groups: list[dict[Any, Any]],
        by_key: Mapping[GroupKey, list[Item]],
    ) -> Any:
        """A torch state dict renumbered over the target's groups."""
        stages = {item: stage for stage, items in enumerate(self._parameters) for item in items}
        # Megatron gives all parameters of a chunk one list of qkv_split_shapes (0.18 and later).
        lists: list[dict[tuple[Any, ...], list[Any]]] = [{} for _ in self.chunks]
        numbered: dict[int, Any] = {}
        mains: list[list[Any]] = []
        numbered_groups = []
        count = 0
        for group in groups:
            items = by_key.get(key_of_group(group), [])
            found = [self.family.states[item.name] for item in items]
            plain = [state for state in found if isinstance(state, PlainState)]
            numbers = list(range(count, count + len(items)))
            count += len(items)
            mains.append([])
            for number, item, state in zip(numbers, items, plain, strict=True):
                if state.state is not None:
                    numbered[number] = state.state
                if state.main is not None:
                    mains[-1].append(sharing_lists(state.main, lists[stages[item]]))
            stepped = self._with_step(part, group, has_step=bool(items))
            numbered_groups.append(
                {key: numbers if key == _PARAMS else value for key, value in stepped.items()}
            )
        self._check_steps(numbered_groups, by_key)
        mains_of_groups = {MAINS: mains} if MAINS in template.node else {}
        return template.replaced({STATE: numbered, GROUPS: numbered_groups}, mains_of_groups)


def _sharing(group: dict[Any, Any], others: Collection[dict[Any, Any]]) -> dict[Any, Any]:
    """The group with the tuples of others: torch gives all groups one tuple of default betas."""
    return {
        key: next((other[key] for other in others if other.get(key) == value), value)
        if isinstance(value, tuple)
        else value
        for key, value in group.items()
    }
