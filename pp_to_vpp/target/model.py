"""The model chunks of a target rank, assembled from the logical model of its family."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.chunks import METADATA, Module
from ..checkpoint.family import Family, SourceRank
from ..container.pickling import Instance, Storage, fresh, ordered_dict
from ..container.tensors import gathered
from ..megatron import naming
from ..megatron.buffers import Buffer, RankBuffers, buffers_of
from ..megatron.layout import ModelChunk
from ..megatron.megatron import Megatron
from ..megatron.naming import Section
from ..megatron.optimizer_chain import OptimizerKind
from ..megatron.parameters import Item, Parameters


@dataclass(frozen=True, slots=True, eq=False)
class TargetChunk:
    """A model chunk to be written: its keys in order."""

    chunk: ModelChunk
    items: tuple[tuple[str, Item], ...]
    """Those of the model itself, and of its moving average under the same keys."""

    @property
    def parameters(self) -> tuple[Item, ...]:
        """The trained tensors, in the order of ``named_parameters()``."""
        return tuple(item for _, item in self.items if item.is_trained)


class UnreadRanks(Exception):  # noqa: N818  (no error: they can be read)
    """What a target rank holds follows from more ranks of the source than those it is made of."""


@dataclass(frozen=True, slots=True, eq=False)
class TargetRank:
    """What a target rank is made of."""

    megatron: Megatron
    """The run that will load it."""
    pp_rank: int
    family: Family
    sources: tuple[SourceRank, ...]
    """The ranks of the family: the counterpart, those that it is made of, then the others."""
    chunks: tuple[TargetChunk, ...]
    """Of each virtual stage."""
    buffers: RankBuffers | None
    """None without the distributed optimizer."""

    @property
    def own(self) -> SourceRank:
        """The counterpart in the source: the same folder, if it is there."""
        return self.sources[0]

    @property
    def parameters(self) -> Parameters:
        """Those of each virtual stage."""
        return [chunk.parameters for chunk in self.chunks]

    def parameters_of_all(self) -> Iterator[Parameters]:
        """Those of this rank, then of all ranks in order.

        Raises:
            UnreadRanks: more than those of this rank are wanted, and not all were read.
        """
        yield self.parameters
        layout = self.megatron.layout
        if len(self.family.ranks) < self.family.layout.pp_size:
            raise UnreadRanks
        for chunks in map(layout.rank_chunks, range(layout.pp_size)):
            yield [target_chunk(self.family, chunk).parameters for chunk in chunks]


def target_rank(family: Family, megatron: Megatron, pp_rank: int) -> TargetRank:
    """Place the items of a family on a target rank.

    Raises:
        LayoutError: Megatron could not build the target's buffers.
    """
    chunks = tuple(target_chunk(family, c) for c in megatron.layout.rank_chunks(pp_rank))
    buffers: RankBuffers | None = None
    if family.shares_storages or family.kind is OptimizerKind.DISTRIBUTED:
        items = [[item for _, item in chunk.items] for chunk in chunks]
        buffers = buffers_of(items, pp_rank, megatron)
    sources = tuple(family.ranks_for(megatron, pp_rank))
    return TargetRank(megatron, pp_rank, family, sources, chunks, buffers)


def target_chunk(family: Family, chunk: ModelChunk) -> TargetChunk:
    """The keys of one target chunk: sections in order of registration, layers numbered from 0."""
    items: list[tuple[str, Item]] = []
    for section in Section:
        if section is Section.LAYERS:
            for local, layer in enumerate(chunk.layers):
                items += [
                    (naming.join_layer(family.stack, local, item.rest), item)
                    for item in (() if layer in chunk.noop_layers else family.layers[layer])
                ]
        elif section in chunk.sections:
            items += [(fresh(item.rest), item) for item in family.sections.get(section, ())]
    return TargetChunk(chunk, tuple(items))


class StateDictWriter:
    """Builds the chunk dictionaries of one target rank over storages of its own."""

    def __init__(self, rank: TargetRank) -> None:
        self._rank = rank
        self._device = device_tag(rank)
        self._copies: dict[Storage, Storage] = {}

    def chunks(self) -> list[Instance]:
        """The OrderedDict of each chunk; its weights are views of buffers if the source's are."""
        chunks, buffers = self._rank.chunks, self._rank.buffers
        if buffers is None or not self._rank.family.shares_storages:
            return [self._chunk(chunk, ()) for chunk in chunks]
        return [self._chunk(*both) for both in zip(chunks, buffers.by_stage, strict=True)]

    def averages(self) -> list[Instance]:
        """The same of the moving averages: each tensor has a storage of its own."""
        return [self._chunk(chunk, (), naming.AVERAGE) for chunk in self._rank.chunks]

    def _chunk(
        self, target: TargetChunk, buffers: tuple[Buffer, ...], model: str = naming.MODEL
    ) -> Instance:
        views: dict[Item, Instance] = {}
        for buffer in buffers:
            views |= self._views(target.parameters, buffer)
        entries = {
            key: views[item] if item in views else self._detached(item)
            for key, item in target.items
            if item.model == model
        }
        modules = self._modules(target.chunk, model)
        state = None if modules is None else {METADATA: ordered_dict(modules)}
        return ordered_dict(entries, state)

    def _views(self, parameters: tuple[Item, ...], buffer: Buffer) -> dict[Item, Instance]:
        members = [parameters[index] for index in buffer.members]
        tensors = [item.weight for item in members]
        places = list(zip(buffer.starts, tensors, strict=True))
        storage = gathered(tensors[0].storage.type, self._device, buffer.numel, places)
        return {
            item: tensor.moved(storage, start)
            for item, (start, tensor) in zip(members, places, strict=True)
        }

    def _detached(self, item: Item) -> Any:
        """The value without bytes it does not cover, on this rank's device."""
        tensor = item.tensor
        if tensor is None:
            return item.value
        storage = tensor.storage
        location = storage.location if storage.location == "cpu" else self._device
        if tensor.span != storage.numel:
            return tensor.moved(Storage(storage.type, location, tensor.span, (tensor.extent,)), 0)
        if location == storage.location:
            return item.value
        copy = Storage(storage.type, location, storage.numel, storage.content)
        return tensor.moved(self._copies.setdefault(storage, copy), 0)

    def _modules(self, chunk: ModelChunk, model: str) -> dict[str, Any] | None:
        """``_metadata`` of the chunk: module path -> versions, in order of registration."""
        family = self._rank.family
        chunks = [content for rank in family.ranks.values() for content in rank.contents]
        known = [c if model == naming.MODEL else c.average for c in chunks]
        found = [content.modules for content in known if content and content.modules is not None]
        if len(found) < len(known):
            return None
        common, sections, layers = _sorted_modules(itertools.chain.from_iterable(found))
        placed: dict[str, Any] = {}
        for after in (-1, *Section):
            here: list[Module] = []
            if after == Section.LAYERS:
                for local, layer in enumerate(chunk.layers):
                    for module in layers.get(layer, ()):
                        path = naming.join_layer(family.stack, local, module.rest)
                        placed[path] = _versions(module)
            elif after in chunk.sections:
                own = sections.get(after)
                if own is None and after == Section.MTP_EMBEDDING:
                    own = sections.get(Section.EMBEDDING)  # which it is made of
                here += own or ()
            here += (module for module in common if module.after == after)
            placed |= {fresh(module.rest): _versions(module) for module in here}
        return placed


def _sorted_modules(
    modules: Iterable[Module],
) -> tuple[list[Module], dict[int, list[Module]], dict[int, list[Module]]]:
    """Modules that every chunk has, those of each section, and those of each layer."""
    common: dict[str, Module] = {}
    sections: dict[int, list[Module]] = {}
    layers: dict[int, list[Module]] = {}
    for module in modules:
        if module.layer is not None:
            layers.setdefault(module.layer, []).append(module)
        elif module.section is not None:
            sections.setdefault(module.section, []).append(module)
        elif module.rest not in common or module.after > common[module.rest].after:
            common[module.rest] = module
    return list(common.values()), sections, layers


def _versions(module: Module) -> Any:
    """A module's entry; each chunk has a dict of its own."""
    return dict(module.value) if isinstance(module.value, dict) else module.value


def device_tag(rank: TargetRank) -> str:
    """The device of the rank's own tensors: the target's tensors carry it too."""
    own = (item for content in rank.own.contents for item in content.items)
    for item in itertools.chain(own, rank.family.items()):
        if item.tensor is not None:
            return item.tensor.storage.location
    return "cpu"


def replace_chunks(
    root: Mapping[Any, Any], chunks: list[Instance], model: str = naming.MODEL
) -> dict[Any, Any]:
    """The top level of a rank file with the chunks of a model, if it has it, replaced in place."""
    old = naming.chunk_keys(root, model)
    replaced: dict[Any, Any] = {}
    for key, value in root.items():
        if key not in old:
            replaced[key] = value
        elif key == old[0]:
            keys = naming.keys_of_chunks(len(chunks), model)
            replaced.update(zip(keys, chunks, strict=True))
    return replaced
