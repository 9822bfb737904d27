"""Model chunks of a target rank, held to the very objects that Megatron saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pp_to_vpp.checkpoint.family import Family
from pp_to_vpp.container.extents import Extent, Zeros
from pp_to_vpp.container.pickling import Global, Instance, Storage, as_mapping, ordered_dict
from pp_to_vpp.container.tensors import as_tensor, flat_tensor
from pp_to_vpp.megatron.megatron import Megatron
from pp_to_vpp.megatron.naming import AVERAGE, MODEL, chunk_keys
from pp_to_vpp.target import model
from pp_to_vpp.target.model import StateDictWriter, replace_chunks, target_chunk, target_rank

from ..edit import pieces_of
from ..families import SIDES, families, family, opposite, target_of
from ..pairs import DENSE, LAYOUT, MOE, pair


def outline(node: Any) -> Any:
    """A graph as plain values in order, its tensors as what they are views of."""
    tensor = as_tensor(node)
    if tensor is not None:
        return ("tensor", outline(tensor.storage), tensor.offset, tensor.shape, tensor.stride)
    if isinstance(node, Storage):
        return ("storage", node.type, node.location, node.numel)
    if isinstance(node, dict):
        return {"dict": [(outline(key), outline(value)) for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        return (type(node).__name__, [outline(item) for item in node])
    if isinstance(node, Instance):
        mapping = as_mapping(node)
        items = None if mapping is None else outline(mapping)
        return (str(node.factory), outline(node.arguments), items, outline(node.state))
    return node


def chunk_nodes(of: Family, pp_rank: int) -> list[Any]:
    """The chunks in a rank's file."""
    root = of.ranks[pp_rank].root
    return [root[key] for key in chunk_keys(root)]


def written(of: Family, target: Megatron, pp_rank: int) -> list[Instance]:
    """The chunks that are to be written for a rank."""
    return StateDictWriter(target_rank(of, target, pp_rank)).chunks()


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_chunks_are_those_that_megatron_saved(name: str, side: str) -> None:
    """Keys and modules in order, shapes, devices, and each weight's place in its buffer."""
    target = target_of(name, opposite(side))
    for of, truth in zip(families(name, side), families(name, opposite(side)), strict=True):
        for pp_rank in of.ranks:
            ours, theirs = written(of, target, pp_rank), chunk_nodes(truth, pp_rank)
            for one, other in zip(ours, theirs, strict=True):
                assert outline(one) == outline(other)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_target_chunks_have_the_keys_of_the_truth(name: str, side: str) -> None:
    for of, truth in zip(families(name, side), families(name, opposite(side)), strict=True):
        for pp_rank, rank in truth.ranks.items():
            for content, node in zip(rank.contents, chunk_nodes(truth, pp_rank), strict=True):
                found = target_chunk(of, content.chunk)
                assert [key for key, _ in found.items] == list(as_mapping(node) or {})
                assert [item.name for _, item in found.items] == [i.name for i in content.items]
                assert [i.name for i in found.parameters] == [i.name for i in content.parameters]


@pytest.mark.parametrize("name", [DENSE, MOE])
def test_the_bytes_of_a_weight_stay_its_own(name: str) -> None:
    """Cut out of its new buffer, it comes from where it was."""
    of, target = family(name, "source"), target_of(name, "truth")
    sources = {item.name: item.tensor for item in of.items()}
    for pp_rank in of.ranks:
        chunks = [target_chunk(of, chunk) for chunk in target.layout.rank_chunks(pp_rank)]
        for chunk, node in zip(chunks, written(of, target, pp_rank), strict=True):
            values = (as_mapping(node) or {}).values()
            for (_, item), value in zip(chunk.items, values, strict=True):
                tensor = as_tensor(value)
                if tensor is not None:
                    source = sources[item.name]
                    assert source is not None
                    assert pieces_of(tensor) == (source.extent,)


def test_weights_of_one_buffer_share_one_storage() -> None:
    of, target = family(MOE, "source"), target_of(MOE, "truth")
    for node in written(of, target, 1):
        tensors = [as_tensor(value) for value in (as_mapping(node) or {}).values()]
        storages = {id(tensor.storage) for tensor in tensors if tensor is not None}
        assert len(storages) == 2, "dense and experts"


def storage_of(numel: int, location: str = "cpu") -> Storage:
    return Storage(
        Global("torch", "FloatStorage"), location, numel, (Extent("somewhere", 64, 4 * numel),)
    )


def with_value(of: Family, value: Any) -> tuple[Family, str]:
    """A family in which a buffer that is no parameter has another value, and the buffer's key."""
    layer = of.layers[5]
    item = next(item for item in layer if not item.is_parameter)
    changed = replace(item, value=value, tensor=as_tensor(value))
    items = tuple(changed if one is item else one for one in layer)
    return replace(of, layers={**of.layers, 5: items}), item.rest


def test_tensors_beside_the_buffers_leave_what_is_not_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A view of a larger storage gets one of its own, on the device of its rank."""
    monkeypatch.setattr(model, "device_tag", lambda *_: "cuda:3")
    whole = as_tensor(flat_tensor(storage_of(10, "cuda:1")))
    assert whole is not None
    storage, hooks = whole.storage, whole.node.arguments[5]
    view = Instance(whole.node.factory, (storage, 2, (3,), (1,), False, hooks))
    of, rest = with_value(family(DENSE, "source"), view)
    tensor = as_tensor(found_in(of, rest))
    assert tensor is not None
    assert (tensor.offset, tensor.storage.numel, tensor.shape) == (0, 3, (3,))
    assert tensor.storage.location == "cuda:3"
    assert pieces_of(tensor) == (Extent("somewhere", 64 + 8, 12),)


@pytest.mark.parametrize(
    ("before", "after"), [("cpu", "cpu"), ("cuda:1", "cuda:3"), ("cuda:3", "cuda:3")]
)
def test_devices_become_those_of_the_rank(
    before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was on the CPU stays there."""
    monkeypatch.setattr(model, "device_tag", lambda *_: "cuda:3")
    of, rest = with_value(family(DENSE, "source"), flat_tensor(storage_of(4, before)))
    tensor = as_tensor(found_in(of, rest))
    assert tensor is not None
    assert tensor.storage.location == after
    assert pieces_of(tensor) == (Extent("somewhere", 64, 16),)


def found_in(of: Family, rest: str) -> Any:
    """What is written for the key of layer 5 (the second on virtual stage 1 of rank 0)."""
    target = target_of(DENSE, "truth")
    return (as_mapping(written(of, target, 0)[1]) or {})[f"decoder.layers.1{rest}"]


def test_without_metadata_none_is_written() -> None:
    of = family(DENSE, "source")
    rank = of.ranks[1]
    bare = replace(rank, contents=tuple(replace(c, modules=None) for c in rank.contents))
    changed = replace(of, ranks={**of.ranks, 1: bare})
    assert all(node.state is None for node in written(changed, target_of(DENSE, "truth"), 0))
    assert all(node.state for node in written(of, target_of(DENSE, "truth"), 0))


@pytest.mark.parametrize("model", [MODEL, AVERAGE])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("old", [1, 2, 4])
def test_chunks_stand_where_chunks_stood(count: int, old: int, model: str) -> None:
    keys, names = (
        [model] if number == 1 else [f"{model}{stage}" for stage in range(number)]
        for number in (old, count)
    )
    other = {f"{'ema_' if model == MODEL else ''}model": 4}
    root = {"args": 1, "version": 3.0, **dict.fromkeys(keys, "old"), "optimizer": 2, **other}
    before = list(root)
    chunks = [ordered_dict({"stage": stage}) for stage in range(count)]
    found = replace_chunks(root, chunks, model)
    assert list(found) == ["args", "version", *names, "optimizer", *other]
    assert [found[name] for name in names] == chunks
    assert list(root) == before
    assert replace_chunks({"args": 1}, chunks, model) == {"args": 1}


def test_zeros_are_only_where_nobody_is() -> None:
    """The holes of an odd model, between parameters that start at multiples of 64."""
    of = family(LAYOUT, "source")
    assert pair(LAYOUT).options
    for node in written(of, target_of(LAYOUT, "truth"), 0):
        tensors = [t for value in (as_mapping(node) or {}).values() if (t := as_tensor(value))]
        parts = [t for t in tensors if t.dtype == "bfloat16"]
        storage = parts[0].storage
        used = sum(t.numel for t in parts) * 2
        holes = sum(piece.length for piece in storage.content if isinstance(piece, Zeros))
        assert holes > 0
        assert used + holes == storage.numel * 2
        assert all(t.offset % 64 == 0 for t in parts)
