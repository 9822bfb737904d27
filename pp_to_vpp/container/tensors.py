"""Tensors of an inert object graph: shape, dtype and the bytes they cover."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import FormatError
from .extents import Extent, Piece, Zeros
from .pickling import Global, Instance, Storage

_STORAGES = {
    "DoubleStorage": ("float64", 8), "FloatStorage": ("float32", 4), "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1), "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16), "QInt8Storage": ("qint8", 1),
    "QUInt8Storage": ("quint8", 1), "QInt32Storage": ("qint32", 4),
    "UntypedStorage": ("untyped", 1),
}  # fmt: skip
"""Dtype and bytes of one element, by the storage class that torch.save names."""
_ITEM_BYTES = dict(_STORAGES.values())

FLOAT_BYTES = _ITEM_BYTES["float32"]
FLOAT_STORAGE = Global("torch", "FloatStorage")
_REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_WITH_ATTRIBUTES = Global("torch._tensor", "_rebuild_from_type_v2")
_REBUILD_NPU_TENSOR = "_rebuild_npu_tensor"
"""torch_npu's, in torch_npu.utils.storage and elsewhere: one argument more, a device format."""
_REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_ARGUMENTS = 6
_MAX_DIMENSIONS = 64
_MAX_SIZE = 1 << 62


def item_bytes(dtype: str) -> int:
    """Bytes of one element of a dtype."""
    return _ITEM_BYTES[dtype]


def storage_item_bytes(kind: Global) -> int | None:
    """Bytes of one element of a storage class; None for classes that are none of torch."""
    if kind.module not in ("torch", "torch.storage"):
        return None
    return _STORAGES.get(kind.name, ("", None))[1]


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
        return _STORAGES[self.storage.type.name][0]

    @property
    def form(self) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Dtype, shape and strides: what equal bytes mean the same with."""
        return self.dtype, self.shape, self.stride

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return _STORAGES[self.storage.type.name][1]

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last one that the tensor covers."""
        last = 0
        for n, step in zip(self.shape, self.stride, strict=True):
            if not n:
                return 0
            last += (n - 1) * step
        return 1 + last

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in C order without holes."""
        expected = 1
        for n, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if n != 1 and step != expected:
                return False
            expected *= n
        return True

    @property
    def order(self) -> tuple[int, ...]:
        """How its elements lie: the strides of dimensions with more than one."""
        return tuple(step for n, step in zip(self.shape, self.stride, strict=True) if n != 1)

    @property
    def has_own_storage(self) -> bool:
        """Whether it fills its storage, each element once, in whatever order of its dimensions."""
        dimensions = sorted(zip(self.stride, self.shape, strict=True))
        expected = 1
        for step, n in dimensions:
            if n != 1 and step != expected:
                return False
            expected *= n
        return self.storage.numel == self.numel

    @property
    def may_be_trained(self) -> bool:
        """Whether torch lets it require gradients: floating point and complex tensors alone."""
        return self.dtype.startswith(("float", "bfloat", "complex"))

    @property
    def extent(self) -> Extent:
        """The bytes it covers in the file that it was read from, first to last element."""
        size = self.item_bytes
        return self.storage.extent.cut(self.offset * size, self.span * size)

    def segment(self, start: int, numel: int) -> TensorRef:
        """The flat tensor of some elements of this flat one."""
        return TensorRef(self.storage, self.offset + start, (numel,), self.stride, self.node)

    def moved(self, storage: Storage, offset: int) -> Instance:
        """The node of the same tensor as a view of another storage."""
        return _moved(self.node, storage, offset)


def _moved(node: Instance, storage: Storage, offset: int) -> Instance:
    if node.factory == _REBUILD_PARAMETER:
        data, *others = node.arguments
        return Instance(node.factory, (_moved(data, storage, offset), *others))
    _, _, *rest = node.arguments
    return Instance(node.factory, (storage, offset, *rest))


def as_tensor(node: Any) -> TensorRef | None:
    """The tensor that a node rebuilds, None when it is no plain tensor.

    Raises:
        FormatError: negative or non-integer sizes, a view that leaves its storage, or another
            storage beside it.
    """
    if not isinstance(node, Instance):
        return None
    if node.factory == _REBUILD_PARAMETER and node.arguments:
        inner = as_tensor(node.arguments[0])
        _check_holds_none(node.arguments[1:])
        return None if inner is None else replace(inner, node=node)
    is_npu = (
        isinstance(node.factory, Global)
        and node.factory.name == _REBUILD_NPU_TENSOR
        and node.factory.module.startswith("torch_npu")
    )
    if node.factory != _REBUILD_TENSOR and not is_npu:
        return None
    if len(node.arguments) != _ARGUMENTS + is_npu or node.by_new:
        raise FormatError("a tensor with unknown arguments")
    storage, offset, shape, stride, *rest = node.arguments
    _check_holds_none(rest)
    if not isinstance(storage, Storage) or storage_item_bytes(storage.type) is None:
        raise FormatError("a tensor without a storage of a known type")
    if not (isinstance(shape, tuple) and isinstance(stride, tuple)) or len(shape) != len(stride):
        raise FormatError("a tensor whose shape and strides do not agree")
    if len(shape) > _MAX_DIMENSIONS:
        raise FormatError(f"a tensor of {len(shape)} dimensions")
    if any(type(n) is not int or not 0 <= n < _MAX_SIZE for n in (offset, *shape, *stride)):
        raise FormatError("a tensor with a negative or absurd size, stride or offset")
    tensor = TensorRef(storage, offset, shape, stride, node)
    if offset + tensor.span > storage.numel:
        raise FormatError(
            f"a tensor of elements {offset} to {offset + tensor.span} in a storage of "
            f"{storage.numel}"
        )
    return tensor


def _check_holds_none(parts: Sequence[Any]) -> None:
    """What a tensor carries besides itself holds no bytes of another: nobody would know them.

    Raises:
        FormatError: it does.
    """
    pending, seen = list(parts), set()
    while pending:
        part = pending.pop()
        if not part or id(part) in seen:  # mostly an empty dict of hooks
            continue
        seen.add(id(part))
        match part:
            case Storage():
                raise FormatError("a tensor that carries another one")
            case dict():
                pending += (*part, *part.values())
            case list() | tuple():
                pending += part
            case Instance():
                pending += (part.arguments, part.entries, part.appended, part.state)
            case _:
                pass


def unwrap_tensor(node: Any) -> TensorRef | None:
    """Like ``as_tensor``, also for a tensor that carries Python attributes."""
    if isinstance(node, Instance) and node.factory == _REBUILD_WITH_ATTRIBUTES:
        match node.arguments:
            case (Global() as rebuild, Global(), tuple() as arguments, attributes):
                _check_holds_none([attributes])
                return as_tensor(Instance(rebuild, arguments))
            case _:
                return None
    return as_tensor(node)


def tensor_at(node: Any) -> TensorRef | None:
    """Like ``unwrap_tensor``; None also for what is damaged: whoever must understand it says so."""
    try:
        return unwrap_tensor(node)
    except FormatError:
        return None


def on_device(node: Any, device: str) -> Any:
    """A tensor's node with its storage on another device; what lies on the CPU, and what is no
    tensor, as it is."""

    def moved(storage: Storage) -> Storage:
        if storage.location in ("cpu", device):
            return storage
        return replace(storage, location=device)

    return _over(node, moved)


def duplicated(node: Any) -> Any:
    """A tensor's node over a storage of its own with the same bytes; what is no tensor, as it
    is."""
    return _over(node, replace)


def _over(node: Any, changed: Callable[[Storage], Storage]) -> Any:
    """A node with its storages changed."""
    match node:
        case Storage():
            return changed(node)
        case Instance():
            arguments = _over(node.arguments, changed)
            return node if arguments is node.arguments else replace(node, arguments=arguments)
        case tuple():
            parts = tuple(_over(part, changed) for part in node)
            is_same = all(one is other for one, other in zip(parts, node, strict=True))
            return node if is_same else parts
        case _:
            return node


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


def gathered(
    kind: Global, location: str, numel: int, places: Iterable[tuple[int, TensorRef]]
) -> Storage:
    """A storage of ``numel`` elements with the bytes of tensors of its kind at their places, and
    zeros between and behind them, as in Megatron's own (FORMAT 2.2)."""
    size = storage_item_bytes(kind) or 0
    pieces: list[Piece] = []
    position = 0
    for start, tensor in sorted(places, key=lambda place: place[0]):
        if start > position:
            pieces.append(Zeros((start - position) * size))
        pieces.append(tensor.extent)
        position = start + tensor.numel
    if numel > position:
        pieces.append(Zeros((numel - position) * size))
    return Storage(kind, location, numel, tuple(pieces))


def flat_tensor(storage: Storage) -> Instance:
    """A one-dimensional tensor over a whole storage."""
    shape, stride = (storage.numel,), tuple([1])  # noqa: C409  (a new tuple, as torch makes it)
    hooks = Instance(Global("collections", "OrderedDict"), ())
    return Instance(_REBUILD_TENSOR, (storage, 0, shape, stride, False, hooks))
