"""What the rank files of one (tp, ep) family hold, under names that no pipeline layout changes.

This is the reading direction, and it trusts nothing: layers are counted against the layout that
the arguments tell, buffer sizes against the stored ones, storage offsets against the computed
ones. Values are compared by whoever can read files, from the ``samples``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from ..container.extents import Extent
from ..container.pickling import is_same
from ..container.tensors import TensorRef
from ..container.torch_file import TorchFile
from ..megatron import naming
from ..megatron.buffers import RankBuffers
from ..megatron.layout import PipelineLayout
from ..megatron.megatron import Megatron
from ..megatron.naming import Section
from ..megatron.optimizer_chain import ChainedOptimizer, OptimizerKind
from ..megatron.param_groups import are_explained, identity, is_bare, keys_of_groups
from ..megatron.parameters import GroupKey, Item, Parameters
from ..megatron.ranks import RankId
from .chunks import ChunkContents
from .flat_states import FlatState
from .layer_wise_states import LayerWiseFiles
from .optimizer_entries import OptimizerEntry
from .plain_states import PlainState
from .top_level import without_optimizer


@dataclass(frozen=True, slots=True, eq=False)
class RankFiles:
    """The decoded files of one rank folder."""

    id: RankId
    model: TorchFile
    """``model_optim_rng.pt``."""
    optimizer: TorchFile | None
    """``distrib_optim.pt``, if there is one."""
    layer_wise: LayerWiseFiles = field(default_factory=LayerWiseFiles)
    dense: TorchFile | None = None
    """The ``distrib_optim.pt`` of another expert rank, where that has the state of the dense
    parameters and this folder has not."""

    @property
    def all(self) -> tuple[TorchFile, ...]:
        """Those that are there."""
        flat = () if self.optimizer is None else (self.optimizer,)
        return (self.model, *flat, *self.layer_wise.own.values())


@dataclass(frozen=True, slots=True, eq=False)
class SourceOptimizer:
    """One optimizer of a rank, as its files tell."""

    kind: ChainedOptimizer
    entry: OptimizerEntry
    """In ``model_optim_rng.pt``, or in a layer-wise file."""
    items: Mapping[GroupKey, Sequence[Item]]
    """The parameters that it has there, by param group."""
    holds_state: bool
    """Its state is in ``distrib_optim.pt`` of this folder."""


@dataclass(frozen=True, slots=True, eq=False)
class SourceRank:
    """One rank's files, understood."""

    files: RankFiles
    root: Mapping[Any, Any]
    """Top level of ``model_optim_rng.pt``."""
    contents: tuple[ChunkContents, ...]
    """The chunk of each virtual stage."""
    optimizers: tuple[SourceOptimizer, ...]
    """Those chained on this rank, in each layer-wise file of its folder if there are any; empty for
    weights only."""
    buffers: RankBuffers | None = None
    """Flat buffers; None without the distributed optimizer."""
    shares_storages: bool = False
    """Weights are views of the flat buffers."""
    others: tuple[SourceOptimizer, ...] = ()
    """Those in the layer-wise files that lie in folders of other expert ranks."""
    repeated: tuple[SourceOptimizer, ...] = ()
    """Those that ``model_optim_rng.pt`` repeats from a layer-wise file."""
    copies: Mapping[str, PlainState] = field(default_factory=dict)
    """The states in them, by global name."""
    elsewhere: frozenset[str] = frozenset()
    """Parameters whose states lie in layer-wise files that were not read."""

    @property
    def parameters(self) -> Parameters:
        """Those of each virtual stage."""
        return [content.parameters for content in self.contents]

    def weights_only(self) -> SourceRank:
        """The same without optimizer (checkpointing.py ``generate_state_dict``, all versions)."""
        return SourceRank(
            files=RankFiles(self.files.id, self.files.model, None),
            root=without_optimizer(self.root),
            contents=self.contents,
            optimizers=(),
            buffers=self.buffers,
            shares_storages=self.shares_storages,
        )


class TensorName(NamedTuple):
    """What a tensor of a checkpoint is called wherever it lies."""

    parameter: str
    """Global name."""
    kind: str
    """Of the optimizer state; "" for the weight itself."""

    def __str__(self) -> str:
        return f"{self.parameter} [{self.kind}]" if self.kind else self.parameter


class StateKind(NamedTuple):
    """Optimizer states that have the same entries."""

    of_matrices: bool | None
    """See ``ChainedOptimizer.takes_matrices``."""
    dtype: str
    """Of the parameters, in flat buffers."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A parameter's weight and its fp32 main parameter: the first must be the second, rounded."""

    name: str
    dtype: str
    weight: Extent
    main: Extent


@dataclass(frozen=True, eq=False)
class Family:
    """The ranks of one (tp, ep) and the logical model they hold together.

    Where only some ranks were read, ``layers`` and ``sections`` hold only theirs.
    """

    megatron: Megatron
    """The run that saved it."""
    kind: OptimizerKind
    ranks: Mapping[int, SourceRank]
    """By pipeline rank."""
    layers: Mapping[int, tuple[Item, ...]]
    """Items of each decoder layer, by global number."""
    sections: Mapping[Section, tuple[Item, ...]]
    states: Mapping[str, FlatState | PlainState]
    """Optimizer state by global name."""
    made: frozenset[str] = frozenset()
    """Names of the items that are copies of the word embedding, where the files have none."""

    @property
    def layout(self) -> PipelineLayout:
        """Where the layers are."""
        return self.megatron.layout

    @property
    def any_rank(self) -> SourceRank:
        """One of the ranks, for what is alike in all."""
        return next(iter(self.ranks.values()))

    @cached_property
    def stack(self) -> str:
        """What all layers stand in (see ``ChunkContents.stack``)."""
        found = (content.stack for rank in self.ranks.values() for content in rank.contents)
        return next((stack for stack in found if stack is not None), "decoder")

    @property
    def shares_storages(self) -> bool:
        """Weights are views of flat buffers."""
        return any(rank.shares_storages for rank in self.ranks.values())

    @property
    def routes_matrices(self) -> bool:
        """Its optimizers take matrices, or all other parameters."""
        optimizers = (own for rank in self.ranks.values() for own in rank.optimizers)
        return any(own.kind.takes_matrices is not None for own in optimizers)

    @property
    def has_expert_optimizer(self) -> bool:
        """Some rank has an optimizer for expert buffers."""
        optimizers = (own for rank in self.ranks.values() for own in rank.optimizers)
        return any(own.kind.is_expert for own in optimizers)

    @cached_property
    def group_identities(self) -> Mapping[tuple[object, GroupKey], dict[Any, Any] | None]:
        """What tells each param group from its siblings, as the first rank that has it does; None
        where no rank that was read tells it all."""
        found: dict[tuple[object, GroupKey], dict[Any, Any] | None] = {}
        for own in (own for rank in self.ranks.values() for own in rank.optimizers):
            groups = own.entry.groups
            for key, group in zip(keys_of_groups(groups), groups, strict=True):
                place = (own.kind.takes_matrices, key)
                if found.get(place) is None:
                    found[place] = None if is_bare(group) else identity(group)
        return found

    def kept_states(self) -> Iterator[tuple[StateKind, Item, FlatState | PlainState]]:
        """The optimizer states that were read, with their parameters."""
        is_flat = self.kind is OptimizerKind.DISTRIBUTED
        for rank in self.ranks.values():
            for own in (*rank.optimizers, *rank.others):
                for item in (item for items in own.items.values() for item in items):
                    state = self.states.get(item.name)
                    if state is not None:
                        # In flat buffers the dtype of gradients follows from that of parameters.
                        dtype = item.weight.dtype if is_flat else ""
                        yield StateKind(own.kind.takes_matrices, dtype), item, state

    @cached_property
    def state_entries(self) -> Mapping[StateKind, tuple[str, tuple[object, ...]]]:
        """A parameter of each kind, and what its state has beside bytes, as all others must."""
        found: dict[StateKind, tuple[str, tuple[object, ...]]] = {}
        for kind, item, state in self.kept_states():
            found.setdefault(kind, (item.name, state.entries))
        return found

    def lost_groups(self) -> Iterator[tuple[str, str]]:
        """Path and text about ranks without a param group that the same optimizer has on others,
        where it has those of all ranks everywhere (optimizer/__init__.py ``gathered_params_key``,
        0.14 and later)."""
        if not self.megatron.rules.keeps_all_groups:
            return
        places = [
            (rank.files.model.path, own.kind, keys_of_groups(own.entry.groups))
            for rank in self.ranks.values()
            for own in rank.optimizers
        ]
        known: dict[ChainedOptimizer, dict[GroupKey, None]] = {}
        for _, kind, keys in places:
            known.setdefault(kind, {}).update(dict.fromkeys(keys))
        for path, kind, keys in places:
            for key in (key for key in known[kind] if key not in keys):
                yield path, f"it lacks a param group that others have ({key})"

    @cached_property
    def odd_groups(self) -> tuple[tuple[SourceRank, OptimizerEntry], ...]:
        """The ranks and entries whose param groups the rules do not make of their parameters, or
        are other ones than those of the same key on other ranks."""
        odd: list[tuple[SourceRank, OptimizerEntry]] = []
        is_numbered = self.kind is OptimizerKind.PLAIN  # then main parameters tell who is in which
        for rank in self.ranks.values():
            for own in rank.optimizers:
                groups = own.entry.groups
                is_odd = not is_numbered and not are_explained(
                    groups, list(own.items), self.megatron.rules
                )
                for key, group in zip(keys_of_groups(groups), groups, strict=True):
                    known = self.group_identities[own.kind.takes_matrices, key]
                    is_odd |= not (is_bare(group) or is_same(known, identity(group)))
                if is_odd:
                    odd.append((rank, own.entry))
        return tuple(odd)

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that are not trained."""
        return frozenset(item.name for item in self.items() if item.is_frozen)

    @property
    def elsewhere(self) -> frozenset[str]:
        """Parameters whose states lie in the folders of other expert ranks, which were not read."""
        return frozenset().union(*(rank.elsewhere for rank in self.ranks.values()))

    def holds_state(self, *, is_expert: bool | None) -> bool:
        """Whether the optimizer files of this family hold the state of the dense or the expert
        parameters. Only one family of those with the same parameters does."""
        optimizers = (own for rank in self.ranks.values() for own in rank.optimizers)
        return any(own.holds_state and own.kind.is_expert == is_expert for own in optimizers)

    def weights_only(self) -> Family:
        """The same as its run would have saved it with ``--no-save-optim``."""
        ranks = {pp_rank: rank.weights_only() for pp_rank, rank in self.ranks.items()}
        return replace(self, kind=OptimizerKind.NONE, ranks=ranks, states={})

    def ranks_for(self, target: Megatron, pp_rank: int) -> list[SourceRank]:
        """The ranks, for making one of another run: the counterpart, those that hold what it
        needs, then the others; so what comes first does not depend on which others were read."""
        own = self.megatron.counterpart(target, pp_rank)
        needed = self.megatron.sources_of(target, pp_rank)
        return [self.ranks[p] for p in dict.fromkeys((own, *needed, *self.ranks))]

    def items(self) -> Iterator[Item]:
        """All items that were read."""
        for layer in self.layers.values():
            yield from layer
        for section in self.sections.values():
            yield from section

    def items_in(self, layout: PipelineLayout, pp_rank: int) -> Iterator[Item]:
        """Those that a pipeline rank of a layout holds."""
        chunks = layout.rank_chunks(pp_rank)
        for layer in (layer for chunk in chunks for layer in chunk.layers):
            yield from self.layers.get(layer, ())
        for section in (section for chunk in chunks for section in chunk.sections):
            yield from self.sections.get(section, ())

    def manifest(self, items: Iterable[Item] | None = None) -> dict[TensorName, TensorRef]:
        """Every tensor that belongs to some items, or to all: weights, buffers, optimizer state."""
        found: dict[TensorName, TensorRef] = {}
        for item in self.items() if items is None else items:
            if item.tensor is not None:
                found[TensorName(item.name, "")] = item.tensor
            state = self.states.get(item.name)
            for kind, tensor in state.tensors.items() if state is not None else ():
                found[TensorName(item.name, kind)] = tensor
        return found

    def values(self, item: Item) -> tuple[Any, Mapping[Any, Any]]:
        """What belongs to an item beside tensors: a value that is none, and the numbers in its
        optimizer state."""
        state = self.states.get(item.name)
        numbers = state.values if isinstance(state, PlainState) else {}
        return (item.value if item.tensor is None else None), numbers

    def copies(self) -> Iterator[tuple[TensorName, Extent, Extent]]:
        """Tensors of states that the files hold twice, which must be alike."""
        for rank in self.ranks.values():
            for name, copy in rank.copies.items():
                tensors = self.states[name].tensors
                for kind, tensor in copy.tensors.items():
                    yield TensorName(name, kind), tensor.extent, tensors[kind].extent

    def samples(self) -> Iterator[Sample]:
        """For each parameter with an fp32 main parameter, what must agree: nothing else ties a
        parameter to its state (FORMAT 7.6, FORMAT 7.7)."""
        for item in self.items():
            if self.megatron.arguments.clips_qk and naming.is_scaled_by_qk_clip(item.rest):
                continue
            state = self.states.get(item.name)
            main = None if state is None else state.main
            if main is not None and item.tensor is not None:
                yield Sample(item.name, item.tensor.dtype, item.tensor.extent, main.extent)
