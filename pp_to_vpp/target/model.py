"""The model chunks of a target rank, assembled from the logical model of its family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.chunks import METADATA, Module
from ..checkpoint.family import Family
from ..container.extents import Piece, Zeros
from ..container.pickling import Instance, Storage, fresh, ordered_dict
from ..megatron import naming
from ..megatron.buffers import Buffer
from ..megatron.naming import Section
from ..megatron.parameters import Item
from ..megatron.pipeline import ModelChunk


@dataclass(frozen=True, slots=True, eq=False)
class TargetChunk:
    """A model chunk to be written: its keys in order."""

    chunk: ModelChunk
    items: tuple[tuple[str, Item], ...]

    @property
    def parameters(self) -> tuple[Item, ...]:
        """The trained tensors, in the order of ``named_parameters()``."""
        return tuple(item for _, item in self.items if item.is_parameter)


def target_chunk(family: Family, chunk: ModelChunk) -> TargetChunk:
    """The keys of one target chunk: sections in order of registration, layers numbered from 0."""
    stack = family.any_rank.contents[0].stack
    items: list[tuple[str, Item]] = []
    for section in Section:
        if section is Section.LAYERS:
            for local, layer in enumerate(chunk.layers):
                items += [
                    (naming.join_layer(stack, local, item.rest), item)
                    for item in family.layers[layer]
                ]
        elif section in chunk.sections:
            items += [(fresh(item.rest), item) for item in family.sections.get(section, ())]
    return TargetChunk(chunk, tuple(items))


def fill(parts: Iterable[tuple[int, tuple[Piece, ...]]], length: int) -> tuple[Piece, ...]:
    """Pieces at their places, in bytes, with zeros between and behind them."""
    filled: list[Piece] = []
    position = 0
    for start, pieces in sorted(parts, key=lambda part: part[0]):
        if start > position:
            filled.append(Zeros(start - position))
        filled += pieces
        position = start + sum(piece.length for piece in pieces)
    if length > position:
        filled.append(Zeros(length - position))
    return tuple(filled)


class StateDictWriter:
    """Builds the chunk dictionaries of one target rank over storages of its own."""

    def __init__(self, family: Family, pp_rank: int) -> None:
        self._family = family
        self._device = _device_tag(family, pp_rank)
        self._copies: dict[Storage, Storage] = {}

    def chunk(self, target: TargetChunk, buffers: tuple[Buffer, ...] | None) -> Instance:
        """The OrderedDict of one chunk. With ``buffers`` its weights become views of them."""
        views: dict[Item, Instance] = {}
        for buffer in buffers or ():
            views |= self._views(target.parameters, buffer)
        entries = {
            key: views[item] if item in views else self._detached(item)
            for key, item in target.items
        }
        modules = self._modules(target.chunk)
        state = None if modules is None else {METADATA: ordered_dict(modules)}
        return ordered_dict(entries, state)

    def _views(self, parameters: tuple[Item, ...], buffer: Buffer) -> dict[Item, Instance]:
        members = [parameters[index] for index in buffer.members]
        tensors = [item.weight for item in members]
        size = tensors[0].item_bytes
        places = zip(buffer.starts, tensors, strict=True)
        content = fill(((start * size, t.content()) for start, t in places), buffer.numel * size)
        storage = Storage(tensors[0].storage.type, self._device, buffer.numel, content)
        return {
            item: tensor.moved(storage, start)
            for item, tensor, start in zip(members, tensors, buffer.starts, strict=True)
        }

    def _detached(self, item: Item) -> Any:
        """The value without bytes it does not cover, on this rank's device."""
        tensor = item.tensor
        if tensor is None:
            return item.value
        storage = tensor.storage
        location = self._device if storage.location.startswith("cuda") else storage.location
        if tensor.span != storage.numel:
            return tensor.moved(Storage(storage.type, location, tensor.span, tensor.content()), 0)
        if location == storage.location:
            return item.value
        copy = Storage(storage.type, location, storage.numel, storage.content)
        return tensor.moved(self._copies.setdefault(storage, copy), 0)

    def _modules(self, chunk: ModelChunk) -> dict[str, Any] | None:
        """``_metadata`` of the chunk: module path -> versions, in order of registration."""
        known = [c for rank in self._family.ranks.values() for c in rank.contents]
        if any(content.modules is None for content in known):
            return None
        common, sections, layers = _sorted_modules(m for c in known for m in c.modules or ())
        placed: dict[str, Any] = {}
        for after in (-1, *Section):
            here: list[Module] = []
            if after == Section.LAYERS:
                for local, layer in enumerate(chunk.layers):
                    for module in layers.get(layer, ()):
                        path = naming.join_layer(known[0].stack, local, module.rest)
                        placed[path] = _versions(module)
            elif after in chunk.sections:
                here += sections.get(after, ())
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


def _device_tag(family: Family, pp_rank: int) -> str:
    """The device of the rank's own tensors: the target's tensors carry it too."""
    own = [item for content in family.ranks[pp_rank].contents for item in content.items]
    for item in (*own, *family.items()):
        if item.tensor is not None:
            return item.tensor.storage.location
    return "cpu"


def replace_chunks(root: Mapping[Any, Any], chunks: list[Instance]) -> dict[Any, Any]:
    """The top level of a rank file with its model chunks replaced in place."""
    old = naming.chunk_keys(root)
    replaced: dict[Any, Any] = {}
    for key, value in root.items():
        if key not in old:
            replaced[key] = value
        elif key == old[0]:
            for stage, chunk in enumerate(chunks):
                replaced["model" if len(chunks) == 1 else f"model{stage}"] = chunk
    return replaced
