"""Rank folders read in full: digests, checksums, weights held to their main parameters."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.family import Family, RankFiles, Sample, TensorName
from ..container.extents import Extent
from ..container.tensors import FLOAT_BYTES, item_bytes
from ..megatron import rounding
from ..megatron.ranks import RankId
from ..source.files import RangeReader, read_rank, with_dense_states
from ..source.proof import likeliest_family

_COMPARED = 1 << 20
"""Elements at a time."""


@dataclass(frozen=True, slots=True)
class Digests:
    """What reading a rank's files in full has shown."""

    by_name: Mapping[TensorName, bytes]
    """SHA-256 of every tensor of the model and its optimizer."""
    damaged: tuple[tuple[str, str], ...]
    """Path and text about each record whose bytes are not those that were written."""
    is_layer_wise: bool
    """States of the folder's family lie in the folders of other expert ranks, too."""


def digest_rank(files: RankFiles, family: Family) -> Digests:
    """Read all tensor records of a rank folder once.

    Args:
        files: of the folder.
        family: its inventory.

    Raises:
        CheckpointError: the files cannot be read.
    """
    names: dict[Extent, list[TensorName]] = {}
    for name, tensor in family.manifest().items():
        names.setdefault(tensor.extent, []).append(name)
    by_name: dict[TensorName, bytes] = {}
    damaged: list[tuple[str, str]] = []
    with RangeReader() as reader:
        for file in files.all:
            for record in file.records.values():
                whole = Extent(file.path, record.offset, record.length)
                parts = sorted(
                    (e for e in names if e.path == file.path and _is_inside(e, whole)),
                    key=lambda extent: extent.offset,
                )
                crc32, digests = _read_record(reader, whole, parts)
                held = [name for part in parts for name in names[part]]
                by_name |= {n: d for p, d in digests.items() for n in names[p]}
                if record.has_checksum and crc32 != record.crc32:
                    damaged.append((file.path, _damage(record.name, held, family)))
    return Digests(by_name, tuple(damaged), bool(files.layer_wise))


def digest_folder(job: tuple[str, RankId]) -> Digests:
    """``digest_rank`` of a rank folder, given as iteration folder and rank.

    Raises:
        CheckpointError: the files cannot be read or understood.
    """
    files = with_dense_states(read_rank(*job), job[0])
    return digest_rank(files, likeliest_family({files.id.pp_rank: files})[0])


def _is_inside(extent: Extent, whole: Extent) -> bool:
    return whole.offset <= extent.offset < whole.offset + whole.length


def _read_record(
    reader: RangeReader, whole: Extent, parts: Sequence[Extent]
) -> tuple[int, dict[Extent, bytes]]:
    """CRC-32 of a record and digests of its parts, in one pass over it."""
    crc32, position = 0, whole.offset
    digests: dict[Extent, bytes] = {}
    for part in (*parts, Extent(whole.path, whole.offset + whole.length, 0)):
        for data in reader.chunks(Extent(whole.path, position, part.offset - position)):
            crc32 = zlib.crc32(data, crc32)
        found = hashlib.sha256()
        for data in reader.chunks(part):
            crc32 = zlib.crc32(data, crc32)
            found.update(data)
        digests[part] = found.digest()
        position = part.offset + part.length
    del digests[part]  # the end of the record
    return crc32, digests


def _damage(record: str, names: Sequence[TensorName], family: Family) -> str:
    """What is said of a damaged record: the parameter too, where its main parameter betrays it."""
    held = {name.parameter for name in names}
    suspects = (sample for sample in family.samples() if sample.name in held)
    guilty = next(unlike_their_mains(suspects), None)
    if guilty is not None:
        owner = f"parameter {guilty.name}"
    elif names:
        owner = f"{names[0]}" + (f" or one of {len(names) - 1} more" if names[1:] else "")
    else:
        owner = "no parameter"
    return (
        f"record {record!r} is damaged ({owner}): its bytes do not have the CRC-32 they were "
        "written with"
    )


def unlike_their_mains(wanted: Iterable[Sample]) -> Iterator[Sample]:
    """Weights that are not their fp32 main parameter rounded, or all cut off; every element.

    Raises:
        CheckpointError: a file cannot be read.
    """
    possible = set(rounding.WAYS)
    with RangeReader() as reader:
        for sample in wanted:
            ways = set(rounding.WAYS)
            for weight, main in _pairs(reader, sample):
                ways &= rounding.explain(sample.dtype, [weight], [main]).ways
            if possible & ways:
                possible &= ways
            else:
                yield sample


def _pairs(reader: RangeReader, sample: Sample) -> Iterator[tuple[bytes, bytes]]:
    """Weight and main parameter, some megabytes at a time."""
    width = item_bytes(sample.dtype)
    numel = sample.weight.length // width
    for start in range(0, numel, _COMPARED):
        count = min(_COMPARED, numel - start)
        weight = sample.weight.cut(start * width, count * width)
        main = sample.main.cut(start * FLOAT_BYTES, count * FLOAT_BYTES)
        yield reader.read(weight), reader.read(main)
