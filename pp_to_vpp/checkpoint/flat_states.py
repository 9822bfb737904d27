"""The states of the distributed optimizer: flat fp32 tensors in ``distrib_optim.pt``.

They are laid out like the buffers of the chunks (distrib_optimizer.py
``get_parameter_state_dp_zero``, 0.7 to 0.19).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..container.pickling import Global
from ..container.tensors import TensorRef, as_tensor
from ..errors import ANOTHER_COPY, NOT_CONVERTED, ONE_SAVE, CheckpointError, located, show
from ..megatron.buffers import Buffer, RankBuffers
from ..megatron.optimizer_chain import ChainedOptimizer
from ..megatron.parameters import Item
from .chunks import ChunkContents, not_contiguous
from .optimizer_entries import optimizer_entries, unknown_entry

COALESCED = "buckets_coalesced"
NUMEL = "numel_unpadded"
PARAM = "param"
_LEGACY_CURE = (
    "load and save it once with Megatron 0.9 and --ckpt-convert-update-legacy-dist-opt-format"
)


class Unexplained(Exception):  # noqa: N818  (not an error yet: other rules may explain it)
    """The source's files disagree with what a version's rules compute."""


@dataclass(frozen=True, slots=True, eq=False)
class FlatState:
    """State of one parameter in flat tensors, by name."""

    tensors: Mapping[str, TensorRef]
    keys: tuple[str, ...]
    """What its buffer's entry holds, in order: the tensors and ``NUMEL``, mostly the last."""
    dtypes: tuple[Global, Global]
    """Those of its buffer's parameters and gradients, under which the entry stands."""

    @property
    def entries(self) -> tuple[object, ...]:
        """What the file says of it, beside bytes."""
        return (*self.keys, self.dtypes[1])

    @property
    def main(self) -> TensorRef:
        """The fp32 main parameter."""
        return self.tensors[PARAM]


def are_views_of_buffers(contents: Sequence[ChunkContents], buffers: RankBuffers) -> bool:
    """Whether the weights are views of flat buffers, as Megatron saves them with the distributed
    optimizer; False when each has a storage of its own.

    The offsets of views are an oracle for the layout: they must be the computed ones.

    Raises:
        Unexplained: weights share storages, but not as computed.
    """
    pairs = [
        ([content.parameters[index] for index in buffer.members], buffer)
        for content, stage_buffers in zip(contents, buffers.by_stage, strict=True)
        for buffer in stage_buffers
    ]
    odd = [text for items, buffer in pairs for text in _misplaced(items, buffer)]
    if not odd:
        return bool(pairs)
    # What other tools rewrote has a storage for each tensor (FORMAT 2.2).
    owners = [item.weight.storage for items, _ in pairs for item in items]
    if len(set(owners)) == len(owners):
        return False
    raise Unexplained(odd[0])


def _misplaced(items: Sequence[Item], buffer: Buffer) -> Iterator[str]:
    """Members of a buffer that do not lie in it as computed, strangers first."""
    storages = Counter(item.weight.storage for item in items)
    common = storages.most_common(1)[0][0]
    for item in items:
        if item.weight.storage is not common:
            yield (
                f"{item.name} lies outside the flat buffer of its kind, as frozen parameters and "
                "unknown buffers do"
            )
    for item, start in zip(items, buffer.starts, strict=True):
        found = (item.weight.offset, item.weight.storage.numel)
        if found != (start, buffer.numel):
            yield (
                f"{item.name} lies at element {found[0]} of {found[1]} in its storage, computed "
                f"{start} of {buffer.numel}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class RankStates:
    """What the optimizer file of a rank says."""

    by_name: Mapping[str, FlatState]
    """State of each parameter whose optimizer has it in this file."""
    held: tuple[bool, ...]
    """For each optimizer of the chain, whether this file holds its state."""


def read_flat_states(
    root: Any,
    contents: Sequence[ChunkContents],
    chain: Sequence[ChainedOptimizer],
    buffers: RankBuffers,
    where: str,
) -> RankStates:
    """The states in a ``distrib_optim.pt``.

    Raises:
        CheckpointError: the file has an unknown structure.
        Unexplained: a buffer has another size than computed.
    """
    entries = optimizer_entries(root, where)
    if len(entries) != len(chain):
        raise CheckpointError.of(
            where,
            "it holds another number of optimizers than the rank's 'optimizer' entry",
            expected=len(chain),
            found=len(entries),
            cure=ONE_SAVE,
        )
    by_name: dict[str, FlatState] = {}
    for optimizer, entry in zip(chain, entries, strict=True):
        if entry is None:
            continue
        expected = buffers.of(optimizer)
        found = _checked_entry(entry, expected, where)
        for (stage, buffer), (dtypes, tensors, names) in zip(expected, found, strict=True):
            for member, start in zip(buffer.members, buffer.saved_starts, strict=True):
                item = contents[stage].parameters[member]
                if not item.weight.is_contiguous:
                    raise not_contiguous(where, item.name, item.weight)
                numel = item.weight.numel
                own = {name: tensor.segment(start, numel) for name, tensor in tensors.items()}
                by_name[item.name] = FlatState(own, names, dtypes)
    return RankStates(by_name, tuple(entry is not None for entry in entries))


def _checked_entry(
    entry: Any, expected: list[tuple[int, Buffer]], where: str
) -> list[tuple[tuple[Global, Global], dict[str, TensorRef], tuple[str, ...]]]:
    """Dtypes, tensors and names in order of each buffer of one optimizer."""
    if not isinstance(entry, dict) or entry.get(COALESCED) is not True:
        if isinstance(entry, dict) and "per_bucket_numel" in entry:
            what = "its buffers are stored per bucket, as Megatron 0.6 does"
        else:
            what = "it is not the coalesced format of Megatron 0.7 and later"
        raise CheckpointError.of(where, what, cure=_LEGACY_CURE)
    indices = [key for key in entry if key != COALESCED]
    if any(type(index) is not int for index in indices):
        raise unknown_entry(where, next(key for key in indices if type(key) is not int))
    if indices != list(range(len(expected))):
        shown = ", ".join(map(show, indices[:8]))
        raise Unexplained(f"buffers [{shown}] in the file, {len(expected)} computed")
    found = []
    for index, (_, buffer) in enumerate(expected):
        found.append(_checked_buffer(entry[index], buffer, f"{where}, buffer {index}"))
    return found


def _checked_buffer(
    entry: Any, buffer: Buffer, where: str
) -> tuple[tuple[Global, Global], dict[str, TensorRef], tuple[str, ...]]:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise CheckpointError.of(where, "a buffer without exactly one dtype", cure=ANOTHER_COPY)
    ((key, states),) = entry.items()
    dtypes = key if isinstance(key, tuple) else ()
    if len(dtypes) != 2 or not all(isinstance(part, Global) for part in dtypes):
        raise CheckpointError.of(
            where, "its key is no (parameter dtype, gradient dtype)", cure=_LEGACY_CURE
        )
    if dtypes[0].name != buffer.dtype:
        raise Unexplained(f"dtype {dtypes[0].name} in the file, {buffer.dtype} computed")
    if not isinstance(states, dict) or PARAM not in states or NUMEL not in states:
        raise CheckpointError.of(where, f"without '{PARAM}' or '{NUMEL}'", cure=ANOTHER_COPY)
    if states[NUMEL] != buffer.numel_unpadded:
        raise Unexplained(
            f"{show(states[NUMEL])} elements found, {buffer.numel_unpadded} computed ({where})"
        )
    tensors: dict[str, TensorRef] = {}
    for name, value in states.items():
        if name == NUMEL:
            continue
        with located(f"{where}, state {show(name)}"):
            tensor = as_tensor(value)
        if (
            not (isinstance(name, str) and name)
            or tensor is None
            or tensor.dtype != "float32"
            or tensor.shape != (buffer.numel_unpadded,)
            or not tensor.is_contiguous
        ):
            raise CheckpointError.of(
                where,
                f"state {show(name)} is unknown",
                expected=f"a flat float32 tensor of {buffer.numel_unpadded}",
                found=show(value) if tensor is None else f"{tensor.dtype} {tensor.shape}",
                cure=NOT_CONVERTED,
            )
        tensors[name] = tensor
    return dtypes, tensors, tuple(states)
