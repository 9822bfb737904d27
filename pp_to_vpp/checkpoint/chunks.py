"""The model chunks of a rank file, their keys sorted by layer and section.

A chunk is the ``state_dict()`` of the unwrapped model: an OrderedDict whose key order is the order
of registration, with the module versions of torch in its attribute ``_metadata``
(checkpointing.py ``generate_state_dict``, 0.6 to 0.19).
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..container.pickling import as_mapping
from ..container.tensors import TensorRef, as_tensor
from ..errors import ANOTHER_COPY, AS_SAVED, WITH_A_PATTERN, CheckpointError, located, problem, show
from ..megatron import naming
from ..megatron.layout import ModelChunk, PipelineLayout
from ..megatron.naming import Section
from ..megatron.parameters import Item

METADATA = "_metadata"
_UNPLACED = (
    "it could belong to a layer, or to every chunk: ask for support of it, or remove it from all "
    "files of a copy if the model makes it anew, as it does non-persistent buffers"
)


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """One module path of a chunk's ``_metadata``, placed like an item.

    ``section`` is None for modules that every chunk has; ``after`` is the section behind which
    they stand (-1: before all).
    """

    section: Section | None
    after: int
    layer: int | None
    rest: str
    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class ChunkContents:
    """A model chunk as read from its file."""

    chunk: ModelChunk
    stack: str | None
    """``decoder`` or ``encoder``; None without layers."""
    items: tuple[Item, ...]
    modules: tuple[Module, ...] | None
    """None where the file has no ``_metadata``."""
    average: ChunkContents | None = None
    """The moving average of its weights, if the file has one (FORMAT 3.5)."""
    parameters: tuple[Item, ...] = field(init=False)
    """The trained tensors, in the order of ``named_parameters()``."""

    def __post_init__(self) -> None:
        found = tuple(item for item in self.items if item.is_trained)
        object.__setattr__(self, "parameters", found)

    @property
    def all_items(self) -> tuple[Item, ...]:
        """Those of the average, too."""
        return self.items if self.average is None else self.items + self.average.items


def read_chunks(
    root: Mapping[Any, Any], layout: PipelineLayout, pp_rank: int, where: str
) -> tuple[ChunkContents, ...]:
    """The chunks of one pipeline rank, checked against the layout its arguments tell.

    Raises:
        CheckpointError: chunks, layers or sections are not those of the layout, a key has no known
            place, or moving averages are not those of the chunks.
    """
    chunks = layout.rank_chunks(pp_rank)
    try:
        contents = _read_model(root, chunks, naming.MODEL, where)
    except CheckpointError:
        _check_exchanged(root, layout, pp_rank, where)
        raise
    if not naming.chunk_keys(root, naming.AVERAGE):
        return contents
    averages = _read_model(root, chunks, naming.AVERAGE, where)
    both = list(zip(contents, averages, strict=True))
    for own, average in both:
        _check_alike(own, average, f"{where} ({naming.AVERAGE})")
    return tuple(replace(own, average=average) for own, average in both)


def _check_exchanged(
    root: Mapping[Any, Any], layout: PipelineLayout, pp_rank: int, where: str
) -> None:
    """Say of a file that is not its pipeline rank's whose it is.

    Raises:
        CheckpointError: it is that of another one.
    """
    for other in (rank for rank in range(layout.pp_size) if rank != pp_rank):
        with contextlib.suppress(CheckpointError):
            _read_model(root, layout.rank_chunks(other), naming.MODEL, where)
            break
    else:
        return
    raise CheckpointError.of(
        where,
        "it has the layers of another pipeline rank",
        expected=f"those of pipeline rank {pp_rank}",
        found=f"those of {other}",
        cure="folders were copied or exchanged: copy each again from where it was saved, under "
        "its own name",
    )


def _read_model(
    root: Mapping[Any, Any], chunks: Sequence[ModelChunk], model: str, where: str
) -> tuple[ChunkContents, ...]:
    keys = naming.chunk_keys(root, model)
    expected = naming.keys_of_chunks(len(chunks), model)
    if keys != expected:
        raise CheckpointError.of(
            where,
            "its model chunks are not those its arguments tell",
            expected=", ".join(expected),
            found=", ".join(keys[:8]) or "none",
            cure=AS_SAVED,
        )
    contents = []
    for key, chunk in zip(keys, chunks, strict=True):
        contents.append(_read_chunk(root[key], chunk, model, f"{where} ({key})"))
    return tuple(contents)


def _check_alike(own: ChunkContents, average: ChunkContents, where: str) -> None:
    """An average has the keys of its chunk, in their order, and the shapes; dtypes may differ."""
    ours = [(naming.name_in(naming.AVERAGE, item.name), _shape(item)) for item in own.items]
    theirs = [(item.name, _shape(item)) for item in average.items]
    for wanted, found in itertools.zip_longest(ours, theirs):
        if wanted != found:
            raise CheckpointError.of(
                where,
                "its keys and shapes are not those of the model's own chunk",
                expected="no more keys" if wanted is None else " ".join(wanted),
                found="no more keys" if found is None else " ".join(found),
                cure=AS_SAVED,
            )


def _shape(item: Item) -> str:
    return "no tensor" if item.tensor is None else str(item.tensor.shape)


def _read_chunk(node: Any, chunk: ModelChunk, model: str, where: str) -> ChunkContents:
    mapping = as_mapping(node)
    if mapping is None or not all(isinstance(key, str) for key in mapping):
        raise CheckpointError.of(
            where,
            "a model chunk is no state dict",
            expected="names and tensors",
            found=show(node),
            cure="legacy models (--use-legacy-models) are not supported: convert them to "
            "Megatron-Core models first",
        )
    state = node.state if not isinstance(node, dict) and isinstance(node.state, dict) else {}
    metadata = as_mapping(state.get(METADATA))
    if metadata is not None and not all(isinstance(path, str) for path in metadata):
        raise CheckpointError.of(
            where, "its _metadata has keys that are no names", cure=ANOTHER_COPY
        )
    stacks = _stacks(mapping) or _stacks(metadata or {})  # layers may have no keys
    if len(stacks) > 1:
        raise CheckpointError.of(
            where,
            "it has encoder and decoder layers",
            cure="encoder-decoder models cannot run with virtual pipeline stages",
        )
    stack = stacks.pop() if stacks else None
    _check_kind(mapping, chunk, where)
    _check_layers(mapping, chunk, where)
    _check_letters(mapping, chunk, where)
    placed = _place_keys(mapping, chunk, where)
    items = tuple(
        _make_item(section, layer, rest, stack, mapping[key], model, where)
        for key, (section, layer, rest) in placed.items()
    )
    held = {item.section for item in items} | {Section.FINAL_NORM}  # a model may have no such norm
    missing = [section for section in chunk.sections if section not in held]
    if missing:
        raise CheckpointError.of(
            where,
            f"the pipeline layout puts {missing[0].name.lower()} here, but no key does",
            cure=AS_SAVED,
        )
    modules = None if metadata is None else tuple(_place_modules(metadata, mapping, chunk))
    return ChunkContents(chunk, stack, items, modules)


def _stacks(names: Iterable[str]) -> set[str]:
    return {place[0] for name in names if (place := naming.split_layer(name))}


_NESTED = re.compile(r"(?P<prefix>.+\.)(?:decoder|encoder)\.layers\.[0-9]+\.")
_MIXER = re.compile(r"(?:decoder|encoder)\.layers\.(?P<index>[0-9]{1,9})\.mixer\.")
_MAMBA = "M"


def _check_kind(keys: Iterable[str], chunk: ModelChunk, where: str) -> None:
    """Refuse by their keys what no argument names."""
    names = list(keys)
    nested = {m["prefix"]: None for key in names if (m := _NESTED.match(key))}
    prefixes = [prefix for prefix in nested if not prefix.startswith("mtp.")]
    if prefixes:
        raise CheckpointError.of(
            where,
            f"its layers stand under {' and '.join(prefixes[:3])}, as in multimodal or wrapped "
            "models",
            expected="keys that begin with decoder.layers or encoder.layers",
            cure="virtual stages of such models are not known to work: convert the language "
            "model's own checkpoint, saved without its wrapper",
        )
    for key in names if chunk.letters is None else ():
        if _MIXER.match(key):
            raise CheckpointError.of(
                where,
                f"key {show(key)} is that of a hybrid (Mamba) layer, and no pattern in the "
                "arguments says where layers are: Megatron up to 0.16 cannot run such models with "
                "virtual stages",
                cure=WITH_A_PATTERN,
            )


def _check_letters(keys: Iterable[str], chunk: ModelChunk, where: str) -> None:
    """The layers that a hybrid's pattern calls Mamba, and no others, have a mixer."""
    mixers = {int(m["index"]) for key in keys if (m := _MIXER.match(key))}
    for local, letter in enumerate(chunk.letters or ""):
        if (letter == _MAMBA) != (local in mixers):
            raise CheckpointError.of(
                where,
                f"layer {chunk.layers[local]} {'has' if local in mixers else 'lacks'} the mixer of "
                f"a Mamba layer, but its letter in args.hybrid_layer_pattern is {letter!r}",
                cure=AS_SAVED,
            )


def _check_layers(mapping: Iterable[str], chunk: ModelChunk, where: str) -> None:
    found = sorted({place[1] for key in mapping if (place := naming.split_layer(key))})
    numbered = dict(enumerate(chunk.layers))
    for local in found:
        if numbered.get(local) in chunk.noop_layers:
            raise CheckpointError.of(
                where,
                f"layer {numbered[local]} has keys, but args.noop_layers names it as one without",
                cure=AS_SAVED,
            )
    if found != [local for local, layer in numbered.items() if layer not in chunk.noop_layers]:
        raise CheckpointError.of(
            where,
            "its layers are not those its arguments tell",
            expected=f"{len(chunk.layers)} layers"
            + "".join(f", {layer} without keys" for layer in sorted(chunk.noop_layers)),
            found=f"{len(found)} ({', '.join(map(str, found[:6]))}...)" if found else "none",
            cure=AS_SAVED,
        )


def _place_keys(
    keys: Iterable[str], chunk: ModelChunk, where: str
) -> dict[str, tuple[Section, int | None, str]]:
    """Section, global layer and rest of each key."""
    placed: dict[str, tuple[Section, int | None, str]] = {}
    problems = []
    previous, last = Section.EMBEDDING, ""
    for key in keys:
        place = naming.split_layer(key)
        if place is not None:
            section: Section | None = Section.LAYERS
            layer, rest = chunk.layers[place[1]], place[2]
        else:
            section, layer, rest = _section_in(chunk, key, previous), None, key
        if section is None:
            problems.append(_unplaced(key, chunk, where))
            continue
        if section < previous and _is_unnamed(last):
            problems.append(_unplaced(last, chunk, where))
        elif section < previous:
            # The order of keys is that of parameters, hence of their buffers (FORMAT 3.1).
            problems.append(
                problem(
                    where,
                    f"key {show(key)} stands after keys of {previous.name.lower()}",
                    expected="the order in which Megatron registers modules",
                    cure=AS_SAVED,
                )
            )
        previous, last = section, key
        placed[key] = (section, layer, rest)
    if problems:
        raise CheckpointError(*problems[:8])
    return placed


def _is_unnamed(key: str) -> bool:
    return naming.split_layer(key) is None and naming.section_by_name(key) is None


def _unplaced(key: str, chunk: ModelChunk, where: str) -> str:
    sections = (section.name.lower().replace("_", " ") for section in chunk.sections)
    return problem(
        where,
        f"no rule says which chunk key {show(key)} belongs to",
        expected=f"keys of {', '.join(dict.fromkeys(('layers', *sections)))}",
        cure=_UNPLACED,
    )


def _section_in(chunk: ModelChunk, key: str, previous: Section) -> Section | None:
    """The section of a non-layer key of this chunk; None when it can have no place here."""
    section = _section_of(chunk, key, is_key=True)
    is_told = naming.section_by_name(key) is not None
    if not is_told and section is not Section.HEAD and previous is not Section.EMBEDDING:
        return None
    return section if section in chunk.sections else None


def _section_of(chunk: ModelChunk, name: str, *, is_key: bool) -> Section | None:
    """The section that a name tells. A key whose name says nothing, and the modules above it,
    belong to the first chunk's front or the last chunk's end."""
    section = naming.section_by_name(name)
    if section is None and is_key:
        section = Section.HEAD if Section.HEAD in chunk.sections else Section.EMBEDDING
    if section is Section.EMBEDDING and section not in chunk.sections:
        section = Section.MTP_EMBEDDING
    return section


def _make_item(
    section: Section,
    layer: int | None,
    rest: str,
    stack: str | None,
    value: Any,
    model: str,
    where: str,
) -> Item:
    if layer is None or stack is None:
        name = naming.global_name(section, rest)
    else:
        name = naming.join_layer(stack, layer, rest)
    name = naming.name_in(model, name)
    with located(f"{where}, {name}"):
        tensor = as_tensor(value)
    is_parameter = model == naming.MODEL and naming.is_parameter(rest)
    if tensor is not None:
        is_parameter = is_parameter and tensor.may_be_trained
        if is_parameter and not (tensor.is_contiguous or tensor.has_own_storage):
            raise not_contiguous(where, name, tensor)
    elif is_parameter:
        raise CheckpointError.of(
            where,
            f"{name} is no plain tensor",
            found=show(value),
            cure="weights stored natively in fp8 or as tensor subclasses are not supported: "
            "save without --fp8-param-gather",
        )
    return Item(section, layer, name, rest, value, tensor, is_parameter, model)


def not_contiguous(where: str, name: str, tensor: TensorRef) -> CheckpointError:
    """The refusal of a weight whose elements lie otherwise than can be converted."""
    return CheckpointError.of(
        where,
        f"{name} is not contiguous",
        expected="elements in the order of its dimensions, as Megatron saves them",
        found=f"strides {tensor.stride} for {tensor.shape}, in a storage of {tensor.storage.numel}",
        cure="load it, call .contiguous(), and save it",
    )


def _place_modules(
    metadata: Mapping[str, Any], keys: Iterable[str], chunk: ModelChunk
) -> Iterator[Module]:
    """The chunk's module paths: those of layers and sections move with them, the others are in
    every chunk."""
    loose = [key for key in keys if naming.split_layer(key) is None]
    owners = {key[:i] for key in loose for i, letter in enumerate(key) if letter == "."}
    containers = ("", "decoder", "encoder", "decoder.layers", "encoder.layers")
    after: int = -1
    for path, value in metadata.items():
        place = naming.split_layer(path)
        if place is not None and place[1] < len(chunk.layers):
            after = Section.LAYERS
            yield Module(Section.LAYERS, after, chunk.layers[place[1]], place[2], value)
            continue
        section = _section_of(chunk, path, is_key=path in owners and path not in containers)
        if section is not None:
            after = max(section, Section.MTP_EMBEDDING)
        yield Module(section, after, None, path, value)
