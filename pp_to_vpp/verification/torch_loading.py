"""A written file, opened by ``torch.load`` itself: the loader that training will use.

Classes that are not torch's own become inert stand-ins, so nothing in the file can run.
"""

from __future__ import annotations

import pickle
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from ..container.extents import Extent
from ..container.pickling import as_mapping
from ..container.tensors import TensorRef, tensor_at
from ..container.torch_file import TorchFile

_COMPARED = 16
"""Elements."""
_TORCH_FUNCTIONS = (
    "_rebuild_tensor_v2", "_rebuild_from_type_v2", "_rebuild_parameter",
)  # fmt: skip


def load_torch() -> None:
    """Import torch, which takes a second and hundreds of megabytes."""
    import torch  # noqa: F401


class _StandIn:
    """Any object of a class that is not loaded."""

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object) -> _StandIn:
        """What a class that stands in another one makes."""
        return self

    def _take(self, *_: object, **__: object) -> None:
        """What unpickling gives an object after it is made."""

    __setstate__ = __setitem__ = append = extend = add = update = _take


def _rebuild_npu_tensor(*arguments: Any) -> Any:
    """torch_npu's own tensors: its seventh argument is a format of the device."""
    import torch

    rebuild: Any = torch._utils._rebuild_tensor_v2  # noqa: SLF001  (what the file's own stands for)
    return rebuild(*arguments[:6])


class _Unpickler(pickle.Unpickler):
    """Loads tensors and containers; everything else becomes a stand-in."""

    def find_class(self, module: str, name: str) -> Any:
        known = _known(module, name)
        if (
            known is None
            and module in ("torch._utils", "torch._tensor")
            and (name in _TORCH_FUNCTIONS)
        ):
            return super().find_class(module, name)
        return type(str(name), (_StandIn,), {}) if known is None else known


def _known(module: str, name: str) -> Any:
    """What is loaded as it is, of what files name otherwise than by a function of torch."""
    import torch  # seconds and hundreds of megabytes, for full proof only

    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if name == "_rebuild_npu_tensor":
        return _rebuild_npu_tensor
    return {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "Tensor"): torch.Tensor,
        ("torch", "UntypedStorage"): torch.UntypedStorage,
        ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    }.get((module, name))


def differences(file: TorchFile, read: Callable[[Extent], bytes]) -> Iterator[str]:
    """What ``torch.load`` makes of a file otherwise than this program does.

    Args:
        file: as this program decoded it.
        read: the bytes of a range, as this program finds them.
    """
    import torch

    inert = types.ModuleType("inert_pickle")
    vars(inert).update(Unpickler=_Unpickler, load=pickle.load, loads=pickle.loads)
    try:
        loaded = torch.load(
            file.path, map_location="cpu", mmap=True, weights_only=False, pickle_module=inert
        )
    except Exception as error:
        yield f"torch.load fails: {error}"
        return
    for where, ours, theirs in _pairs(file.root, loaded, "top level", set()):
        tensor = tensor_at(ours)
        if tensor is None:
            yield f"{where}: torch.load finds something else"
        else:
            yield from _compare_tensor(tensor, theirs, where, read)


def _pairs(
    ours: Any, theirs: Any, where: str, seen: set[tuple[int, int]]
) -> Iterator[tuple[str, Any, Any]]:
    """Tensors of both graphs, and the places where the graphs differ (with None), each once."""
    if (id(ours), id(theirs)) in seen:
        return
    seen.add((id(ours), id(theirs)))
    mapping = as_mapping(ours)
    if mapping is not None:
        if not isinstance(theirs, dict) or len(theirs) != len(mapping):
            yield where, None, theirs
            return
        for (key, value), (_, other) in zip(mapping.items(), theirs.items(), strict=True):
            yield from _pairs(value, other, f"{where}: {key}" if type(key) is str else where, seen)
    elif isinstance(ours, (list, tuple)):
        if not isinstance(theirs, (list, tuple)) or len(theirs) != len(ours):
            yield where, None, theirs
            return
        for value, other in zip(ours, theirs, strict=True):
            yield from _pairs(value, other, where, seen)
    elif tensor_at(ours) is not None:
        yield where, ours, theirs


def _compare_tensor(
    ours: TensorRef, theirs: Any, where: str, read: Callable[[Extent], bytes]
) -> Iterator[str]:
    import torch

    shape = tuple(theirs.shape) if isinstance(theirs, torch.Tensor) else None
    dtype = str(getattr(theirs, "dtype", None)).removeprefix("torch.")
    if shape != ours.shape or dtype != ours.dtype:
        yield f"{where}: torch.load finds {dtype} {shape}, not {ours.dtype} {ours.shape}"
    elif ours.numel:
        count = min(_COMPARED, ours.span)
        head = theirs.detach().as_strided((count,), (1,)).contiguous().view(torch.uint8)
        if bytes(head.tolist()) != read(ours.extent.cut(0, head.numel())):
            yield f"{where}: torch.load finds other values"
