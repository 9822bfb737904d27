"""Tensors of an inert object graph: shape, dtype and the bytes they cover."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .extents import Piece, cut_pieces
from .pickling import Global, Instance, Storage

ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1,
    "BoolStorage": 1, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16,
    "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4, "UntypedStorage": 1,
}  # fmt: skip
"""Bytes of one element, by the storage class that torch.save names."""

_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip

FLOAT_STORAGE = Global("torch", "FloatStorage")
_REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_WITH_ATTRIBUTES = Global("torch._tensor", "_rebuild_from_type_v2")
_REBUILD_ARGUMENTS = 6
_MAX_DIMENSIONS = 64
_MAX_SIZE = 1 << 62


class TensorError(ValueError):
    """A tensor whose description is impossible."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A dense tensor as a view of a storage: element offset, shape and strides."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    node: Instance

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> str:
        """``bfloat16`` and the like."""
        return _DTYPES.get(self.storage.type.name, self.storage.type.name)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.storage.type.name]

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last one that the tensor covers."""
        if not self.numel:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in C order without holes."""
        expected = 1
        for n, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if n != 1 and step != expected:
                return False
            expected *= n
        return True

    def content(self) -> tuple[Piece, ...]:
        """The bytes it covers, first to last element."""
        start, length = self.offset * self.item_bytes, self.span * self.item_bytes
        return cut_pieces(self.storage.content, start, length)

    def moved(self, storage: Storage, offset: int) -> Instance:
        """The node of the same tensor as a view of another storage."""
        _, _, *rest = self.node.arguments
        return Instance(self.node.factory, (storage, offset, *rest))


def as_tensor(node: Any) -> TensorRef | None:
    """The tensor that a node rebuilds, None when it is no plain tensor.

    Raises:
        TensorError: negative or non-integer sizes, or a view that leaves its storage.
    """
    if not isinstance(node, Instance) or node.factory != _REBUILD_TENSOR:
        return None
    if len(node.arguments) != _REBUILD_ARGUMENTS or node.by_new:
        raise TensorError("a tensor with unknown arguments")
    storage, offset, shape, stride = node.arguments[:4]
    if not isinstance(storage, Storage) or storage.type.name not in ITEM_BYTES:
        raise TensorError("a tensor without a storage of a known type")
    if not (isinstance(shape, tuple) and isinstance(stride, tuple)) or len(shape) != len(stride):
        raise TensorError("a tensor whose shape and strides do not agree")
    if len(shape) > _MAX_DIMENSIONS:
        raise TensorError(f"a tensor of {len(shape)} dimensions")
    if any(type(n) is not int or not 0 <= n < _MAX_SIZE for n in (offset, *shape, *stride)):
        raise TensorError("a tensor with a negative or absurd size, stride or offset")
    tensor = TensorRef(storage, offset, shape, stride, node)
    if offset + tensor.span > storage.numel:
        raise TensorError(
            f"a tensor of elements {offset} to {offset + tensor.span} in a storage of "
            f"{storage.numel}"
        )
    return tensor


def unwrap_tensor(node: Any) -> TensorRef | None:
    """Like ``as_tensor``, also for a tensor that carries Python attributes."""
    if isinstance(node, Instance) and node.factory == _REBUILD_WITH_ATTRIBUTES:
        match node.arguments:
            case (Global() as rebuild, Global(), tuple() as arguments, _):
                return as_tensor(Instance(rebuild, arguments))
            case _:
                return None
    return as_tensor(node)


def sharing_lists(node: Any, lists: dict[tuple[Any, ...], list[Any]]) -> Any:
    """A tensor whose Python attributes share their lists of numbers with those in ``lists``, which
    gathers them; any other node as it is."""
    if not isinstance(node, Instance) or node.factory != _REBUILD_WITH_ATTRIBUTES:
        return node
    attributes = node.arguments[-1]
    if not isinstance(attributes, dict):
        return node
    shared = {
        name: lists.setdefault((name, *value), list(value))
        if isinstance(value, list) and all(type(part) is int for part in value)
        else value
        for name, value in attributes.items()
    }
    return replace(node, arguments=(*node.arguments[:-1], shared))


def flat_tensor(storage: Storage) -> Instance:
    """A one-dimensional tensor over a whole storage."""
    shape, stride = (storage.numel,), tuple([1])  # noqa: C409  (a new tuple, as torch makes it)
    hooks = Instance(Global("collections", "OrderedDict"), ())
    return Instance(_REBUILD_TENSOR, (storage, 0, shape, stride, False, hooks))
