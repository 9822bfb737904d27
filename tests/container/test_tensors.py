"""Tensor descriptions: what they cover, and which are impossible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.container.extents import Extent, Zeros
from pp_to_vpp.container.pickling import Global, Instance, Storage
from pp_to_vpp.container.tensors import (
    TensorRef,
    as_tensor,
    flat_tensor,
    gathered,
    item_bytes,
    sharing_lists,
    storage_item_bytes,
    tensor_at,
    unwrap_tensor,
)
from pp_to_vpp.errors import FormatError

_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_STORAGE = Storage(Global("torch", "FloatStorage"), "cpu", 100, (Extent("f", 64, 400),))


def node(*arguments: Any) -> Instance:
    """A call of torch's rebuild function."""
    return Instance(_REBUILD, (*arguments, False, None))


@given(st.lists(st.integers(0, 4), max_size=4), st.integers(0, 3), st.randoms())
def test_span_and_contiguity_are_torchs(shape: list[int], offset: int, random: Any) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)
    numbers = torch.arange(300)[offset : offset + torch.Size(shape).numel()]
    tensor = numbers.reshape(shape).permute(order)
    storage = Storage(Global("torch", "LongStorage"), "cpu", 300, (Extent("f", 0, 2400),))
    found = as_tensor(node(storage, offset, tuple(tensor.shape), tuple(tensor.stride())))
    assert found is not None
    assert found.numel == tensor.numel()
    if tensor.numel():
        assert found.is_contiguous == tensor.is_contiguous()
        assert found.span == int(tensor.max() - tensor.min()) + 1


def test_a_view_is_its_bytes() -> None:
    tensor = as_tensor(node(_STORAGE, 10, (2, 3), (3, 1)))
    assert tensor is not None
    assert tensor.extent == Extent("f", 64 + 40, 24)
    assert (tensor.dtype, tensor.item_bytes, tensor.numel) == ("float32", 4, 6)
    other = Storage(_STORAGE.type, "cpu", 6, (Extent("g", 0, 24),))
    moved = as_tensor(tensor.moved(other, 0))
    assert moved is not None
    assert moved.extent == Extent("g", 0, 24)
    assert moved.shape == (2, 3)


def test_flat_tensors_cover_their_storage() -> None:
    tensor = as_tensor(flat_tensor(_STORAGE))
    assert tensor is not None
    assert tensor.shape == (100,)
    assert (tensor.extent,) == _STORAGE.content


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "uint8", "bool", "complex64"]
)
def test_sizes_of_elements_are_torchs(dtype: str) -> None:
    assert item_bytes(dtype) == torch.empty(0, dtype=getattr(torch, dtype)).element_size()


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (Global("torch", "BFloat16Storage"), 2),
        (Global("torch.storage", "UntypedStorage"), 1),
        (Global("torch", "NoStorage"), None),
        (Global("other", "FloatStorage"), None),
    ],
)
def test_only_torchs_storages_are_known(kind: Global, size: int | None) -> None:
    assert storage_item_bytes(kind) == size


_KINDS = st.sampled_from(["FloatStorage", "BFloat16Storage", "LongStorage", "ByteStorage"]).map(
    lambda name: Global("torch", name)
)
_SOURCE = bytes(torch.randint(1, 256, (4096,), generator=torch.Generator().manual_seed(3)).tolist())
"""What all files hold: no zeros, few repetitions."""


def bytes_at(extent: Extent) -> bytes:
    return _SOURCE[extent.offset : extent.offset + extent.length]


def flat(kind: Global, path: str, first: int, before: int, numel: int) -> TensorRef:
    """A flat tensor ``before`` elements into a storage that starts at byte ``first``."""
    size = storage_item_bytes(kind) or 0
    storage = Storage(kind, "cpu", before + numel, (Extent(path, first, (before + numel) * size),))
    tensor = as_tensor(node(storage, before, (numel,), (1,)))
    assert tensor is not None
    return tensor


@given(_KINDS, st.integers(0, 99), st.integers(0, 50), st.integers(0, 50), st.data())
def test_segments_are_slices(
    kind: Global, first: int, before: int, numel: int, data: st.DataObject
) -> None:
    whole = flat(kind, "f", first, before, numel)
    start = data.draw(st.integers(0, numel))
    count = data.draw(st.integers(0, numel - start))
    part = whole.segment(start, count)
    assert (part.shape, part.numel, part.dtype) == ((count,), count, whole.dtype)
    assert part.is_contiguous
    size = whole.item_bytes
    assert bytes_at(part.extent) == bytes_at(whole.extent)[start * size : (start + count) * size]
    inner = data.draw(st.integers(0, count))
    assert (
        part.segment(inner, count - inner).extent
        == whole.segment(start + inner, count - inner).extent
    )


@given(_KINDS, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), max_size=6), st.data())
def test_gathered_tensors_lie_at_their_places_among_zeros(
    kind: Global, sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Given as (hole before, elements), in any order."""
    places: list[tuple[int, TensorRef]] = []
    position = 0
    for hole, numel in sizes:
        first, before = data.draw(st.integers(0, 99)), data.draw(st.integers(0, 9))
        places.append((position + hole, flat(kind, data.draw(_PATHS), first, before, numel)))
        position += hole + numel
    numel = position + data.draw(st.integers(0, 9))
    storage = gathered(kind, "cuda:3", numel, data.draw(st.permutations(places)))
    size = storage_item_bytes(kind) or 0
    wanted = bytearray(numel * size)
    for start, tensor in places:
        wanted[start * size : (start + tensor.numel) * size] = bytes_at(tensor.extent)
    found = b""
    for piece in storage.content:
        assert isinstance(piece, Extent | Zeros)
        found += bytes_at(piece) if isinstance(piece, Extent) else bytes(piece.length)
    assert found == wanted
    assert (storage.type, storage.location, storage.numel) == (kind, "cuda:3", numel)


_PATHS = st.sampled_from(["f", "g"])


@pytest.mark.parametrize(
    "arguments",
    [
        (_STORAGE, 0, (101,), (1,)),
        (_STORAGE, 99, (2,), (1,)),
        (_STORAGE, 0, (2,), (100,)),
        (_STORAGE, -1, (1,), (1,)),
        (_STORAGE, 0, (-1,), (1,)),
        (_STORAGE, 99, (5,), (-1,)),
        (_STORAGE, 0, (1, 1), (1,)),
        (_STORAGE, True, (1,), (1,)),
        (_STORAGE, 0, (10**30,), (1,)),
        (_STORAGE, 0, [1], [1]),
        (None, 0, (1,), (1,)),
        (_STORAGE, 0, (1,) * 65, (1,) * 65),
    ],
)
def test_impossible_views_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(FormatError):
        as_tensor(node(*arguments))


def test_other_objects_are_no_tensors() -> None:
    assert as_tensor(None) is None
    assert as_tensor(Instance(Global("os", "system"), ("x",))) is None
    with pytest.raises(FormatError):
        as_tensor(Instance(_REBUILD, (_STORAGE,)))


def test_tensors_with_attributes_are_unwrapped() -> None:
    inner = node(_STORAGE, 0, (4,), (1,)).arguments
    wrapped = Instance(
        Global("torch._tensor", "_rebuild_from_type_v2"),
        (_REBUILD, Global("torch", "Tensor"), inner, {"tensor_model_parallel": True}),
    )
    tensor = unwrap_tensor(wrapped)
    assert tensor is not None
    assert tensor.shape == (4,)
    assert as_tensor(wrapped) is None


@pytest.mark.parametrize("place", ["hooks", "format", "attributes", "parameter"])
def test_a_tensor_that_carries_another_is_refused(place: str) -> None:
    """Its bytes would be copied where nobody knows them."""
    flat = node(_STORAGE, 0, (4,), (1,))
    stranger = [("deep", {"down": Instance(Global("a", "B"), (flat,))})]
    if place == "hooks":
        found = Instance(_REBUILD, (*flat.arguments[:5], stranger))
    elif place == "format":
        npu = Global("torch_npu.utils.storage", "_rebuild_npu_tensor")
        found = Instance(npu, (*flat.arguments, _STORAGE))
    elif place == "attributes":
        factory = Global("torch._tensor", "_rebuild_from_type_v2")
        arguments = (_REBUILD, Global("torch", "Tensor"), flat.arguments, {"mine": stranger})
        found = Instance(factory, arguments)
    else:
        found = Instance(Global("torch._utils", "_rebuild_parameter"), (flat, True, stranger))
    with pytest.raises(FormatError, match="a tensor that carries another one"):
        unwrap_tensor(found)
    assert tensor_at(found) is None


def test_an_attribute_may_hold_itself() -> None:
    knot: list[Any] = []
    knot.append(knot)
    flat = node(_STORAGE, 0, (4,), (1,))
    assert as_tensor(Instance(_REBUILD, (*flat.arguments[:5], knot))) is not None


def test_lists_of_attributes_are_shared() -> None:
    """By tensors that carry equal ones; what is no such tensor stays as it is."""
    split = [8, 8, 8]

    def carrying(attributes: object) -> Instance:
        factory = Global("torch._tensor", "_rebuild_from_type_v2")
        return Instance(factory, (Global("a", "b"), Global("c", "d"), (), attributes))

    lists: dict[tuple[Any, ...], list[Any]] = {}
    one, other, third = (
        sharing_lists(carrying({"split": list(values), "flag": True}), lists).arguments[-1]
        for values in (split, split, [4])
    )
    assert one == other == {"split": split, "flag": True}
    assert one["split"] is other["split"]
    assert one["split"] is not split
    assert third == {"split": [4], "flag": True}
    odd = [None, carrying(None), Instance(Global("x", "y"), ())]
    for value in odd:
        assert sharing_lists(value, lists) is value
    named = carrying({"names": ["a"]})
    assert sharing_lists(named, lists).arguments[-1]["names"] is named.arguments[-1]["names"]
