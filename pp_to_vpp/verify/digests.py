"""Rank folders read in full: digests, checksums, weights held to their main parameters."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.family import Family, RankFiles, Sample, read_family, samples
from ..checkpoint.flat_states import FlatState
from ..checkpoint.plain_states import PlainState
from ..container.extents import Extent, Piece
from ..megatron import rounding
from ..megatron.parameters import Item
from ..source.files import SampleReader

_READ_BYTES = 4 << 20


def _ranges(item: Item, family: Family) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """Every range of bytes that belongs to an item: the tensor, and its optimizer state."""
    if item.tensor is not None:
        yield item.name, item.tensor.content()
    state = family.states.get(item.name)
    if isinstance(state, FlatState):
        for name, pieces in state.parts.items():
            yield f"{item.name} [{name}]", pieces
    elif isinstance(state, PlainState):
        for name, tensor in state.tensors().items():
            yield f"{item.name} [{name}]", tensor.content()


def _chunks(extent: Extent) -> Iterator[bytes]:
    """The bytes of an extent, some megabytes at a time.

    Raises:
        CheckpointError: the file is shorter or cannot be read.
    """
    with SampleReader() as reader:
        for start in range(0, extent.length, _READ_BYTES):
            size = min(_READ_BYTES, extent.length - start)
            yield reader.read(extent.path, extent.offset + start, size)


def _unlike_their_mains(wanted: Iterable[Sample]) -> Iterator[Sample]:
    """Weights that are not their fp32 main parameter rounded, or all cut off; every element."""
    possible = set(rounding.WAYS)
    for sample in wanted:
        ways = set(rounding.WAYS)
        for weight, main in _pairs(sample, rounding.item_bytes(sample.dtype)):
            ways &= rounding.explain(sample.dtype, [weight], [main]).ways
        if possible & ways:
            possible &= ways
        else:
            yield sample


def _pairs(sample: Sample, width: int) -> Iterator[tuple[bytes, bytes]]:
    """Weight and main parameter, some megabytes at a time."""
    (weight,), (main,) = sample.weight, sample.main
    if not isinstance(weight, Extent) or not isinstance(main, Extent):
        raise TypeError("tensors in a file are extents")
    items = _READ_BYTES // 4
    with SampleReader() as reader:
        for start in range(0, weight.length // width, items):
            count = min(items, weight.length // width - start)
            yield (
                reader.read(weight.path, weight.offset + start * width, count * width),
                reader.read(main.path, main.offset + start * 4, count * 4),
            )


@dataclass(frozen=True, slots=True)
class Digests:
    """What reading a rank's files in full has shown."""

    by_label: Mapping[str, bytes]
    """SHA-256 of every weight and optimizer state, by global name."""
    damaged: tuple[tuple[str, str], ...]
    """Path and text about each record whose bytes are not those that were written."""
    length: int
    """Bytes read."""


def digest_rank(files: RankFiles) -> Digests:
    """Read all tensor records of a rank folder once.

    Raises:
        CheckpointError: the files cannot be read or understood.
    """
    family = next(read_family({files.rank.pp_rank: files}))
    labels: dict[Extent, list[str]] = {}
    for item in family.items():
        for label, pieces in _ranges(item, family):
            for piece in pieces:
                if isinstance(piece, Extent):
                    labels.setdefault(piece, []).append(label)
    by_label: dict[str, bytes] = {}
    damaged: list[tuple[str, str]] = []
    total = 0
    for file in files.files:
        for record in file.records.values():
            whole = Extent(file.path, record.offset, record.length)
            parts = sorted(
                (e for e in labels if e.path == file.path and _is_inside(e, whole)),
                key=lambda extent: extent.offset,
            )
            crc32 = _read_record(whole, parts, labels, by_label)
            total += record.length
            if record.has_checksum and crc32 != record.crc32:
                names = [label for part in parts for label in labels[part]]
                damaged.append((file.path, _damage(record.name, names, family)))
    return Digests(by_label, tuple(damaged), total)


def _is_inside(extent: Extent, whole: Extent) -> bool:
    return whole.offset <= extent.offset < whole.offset + whole.length


def _read_record(
    whole: Extent,
    parts: Sequence[Extent],
    labels: Mapping[Extent, list[str]],
    by_label: dict[str, bytes],
) -> int:
    """Digest the parts of a record, in one pass over it; the CRC-32 of all of it."""
    crc32 = 0
    position = whole.offset
    end = whole.offset + whole.length
    for part in (*parts, Extent(whole.path, end, 0)):
        for data in _chunks(Extent(whole.path, position, part.offset - position)):
            crc32 = zlib.crc32(data, crc32)
        found = hashlib.sha256()
        for data in _chunks(part):
            crc32 = zlib.crc32(data, crc32)
            found.update(data)
        for label in labels.get(part, ()):
            by_label[label] = found.digest()
        position = part.offset + part.length
    return crc32


def _damage(record: str, labels: Sequence[str], family: Family) -> str:
    """What is said of a damaged record: the parameter too, where its main parameter betrays it."""
    held = set(labels)
    suspects = (
        sample
        for sample in samples(family)
        if sample.name in held or f"{sample.name} [param]" in held
    )
    guilty = next(_unlike_their_mains(suspects), None)
    if guilty is not None:
        owner = f"parameter {guilty.name}"
    elif labels:
        owner = f"{labels[0]}" + (f" or one of {len(labels) - 1} more" if labels[1:] else "")
    else:
        owner = "no parameter"
    return (
        f"record {record!r} is damaged ({owner}): its bytes do not have the CRC-32 they were "
        "written with"
    )
