"""Tensor descriptions: what they cover, and which are impossible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.container.extents import Extent
from pp_to_vpp.container.pickling import Global, Instance, Storage
from pp_to_vpp.container.tensors import (
    TensorError,
    as_tensor,
    flat_tensor,
    sharing_lists,
    unwrap_tensor,
)

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
    assert tensor.content() == (Extent("f", 64 + 40, 24),)
    assert (tensor.dtype, tensor.item_bytes, tensor.numel) == ("float32", 4, 6)
    other = Storage(_STORAGE.type, "cpu", 6, (Extent("g", 0, 24),))
    moved = as_tensor(tensor.moved(other, 0))
    assert moved is not None
    assert moved.content() == (Extent("g", 0, 24),)
    assert moved.shape == (2, 3)


def test_flat_tensors_cover_their_storage() -> None:
    tensor = as_tensor(flat_tensor(_STORAGE))
    assert tensor is not None
    assert tensor.shape == (100,)
    assert tensor.content() == _STORAGE.content


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
    with pytest.raises(TensorError):
        as_tensor(node(*arguments))


def test_other_objects_are_no_tensors() -> None:
    assert as_tensor(None) is None
    assert as_tensor(Instance(Global("os", "system"), ("x",))) is None
    with pytest.raises(TensorError):
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
