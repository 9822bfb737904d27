"""A ``.pt`` file as a whole: the archive's records around one pickled object graph."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FormatError
from . import archive, pickling
from .archive import MAX_DIVISOR, ArchivePlan, Place, Record
from .crc32 import of_bytes
from .extents import Extent, Literal, Piece, join_pieces
from .pickling import Global, Storage
from .tensors import storage_item_bytes

_PICKLE = "data.pkl"
_DATA = "data/"
_VERSION = "version"
_ALIGNMENT = ".storage_alignment"
_FORMAT = ".format_version"
_READ, _COMPUTABLE = b"0", b"1"
_IDENTITY = ".data/serialization_id"
_MAX_PICKLE = 256 << 20
_MAX_SMALL = 1 << 12
_IDENTITY_DIGITS = 40


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A decoded file. Tensor bytes stay where they are."""

    path: str
    root: Any
    """The object graph (see ``pickling.load``)."""
    stem: str
    """Leading folder of the record names."""
    records: Mapping[str, Record]
    small: Mapping[str, bytes]
    """The records that are no tensor data, other than the pickle."""


def decode(
    path: str, stem: str, records: Mapping[str, Record], read: Callable[[Record], bytes]
) -> TorchFile:
    """Decode a file from its records.

    Args:
        path: of the file; extents of storages refer to it.
        stem: leading folder of the record names.
        records: by name without that folder.
        read: the bytes of one record. Called for small records only.

    Raises:
        FormatError: a record is missing, damaged or of another format.
    """
    for name in (_PICKLE, _VERSION):
        if name not in records:
            raise FormatError(f"record {name!r} is missing: no file of torch.save")
    if "constants.pkl" in records:
        raise FormatError("it is a TorchScript archive, not a checkpoint")
    small = {
        name: _read_checked(record, read)
        for name, record in records.items()
        if not name.startswith(_DATA)
    }
    if small.get("byteorder", b"little") != b"little":
        raise FormatError("its tensors are big-endian")

    def make_storage(kind: Global, key: str, location: str, numel: int) -> Storage:
        record = records.get(_DATA + key)
        if record is None:
            raise FormatError(f"record 'data/{key[:40]}' is missing")
        size = storage_item_bytes(kind)
        if size is None:
            raise FormatError(f"storages of type {kind} are unknown")
        if record.length != numel * size:
            raise FormatError(
                f"record 'data/{key[:40]}' has {record.length} bytes, not those of {numel} elements"
            )
        return Storage(kind, location, numel, (record.extent(path),))

    root = pickling.load(small.pop(_PICKLE), make_storage)
    return TorchFile(path, root, stem, records, small)


def _read_checked(record: Record, read: Callable[[Record], bytes]) -> bytes:
    limit = _MAX_PICKLE if record.name == _PICKLE else _MAX_SMALL
    if record.length > limit:
        raise FormatError(f"record {record.name!r} of {record.length} bytes is absurdly large")
    data = read(record)
    if record.has_checksum and of_bytes(data) != record.crc32:
        raise FormatError(f"record {record.name!r} is damaged: its CRC-32 is wrong")
    return data


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """A file to be written: what each record consists of, and where it lies."""

    archive: ArchivePlan
    contents: tuple[tuple[Piece, ...], ...]
    """The bytes of each record."""


def encode(root: Any, template: TorchFile, block: int = 1) -> EncodedFile:
    """Lay out a file for an object graph, with the same kinds of records as ``template``.

    The result is a function of its arguments alone; Megatron's own file for the same graph differs
    from it in the serialization id at most, and where blocks are to be shared in the padding.

    Args:
        root: the graph.
        template: a file of the same version of torch.
        block: bytes of a block that the file may share with those it is made of; 1 where it cannot.
            Each record then stands so that most of its bytes stand in their block as there.

    Raises:
        FormatError: the graph cannot be pickled.
    """
    pickled, storages = pickling.dump(root)
    names = list(template.records)
    old_data = [name for name in names if name.startswith(_DATA)]
    data = [f"{_DATA}{i}" for i in range(len(storages))]
    contents = {name: storage.content for name, storage in zip(data, storages, strict=True)}
    if old_data == sorted(old_data) and len(old_data) > 10:
        data.sort()  # older versions of torch sort the names as strings
    small = [name for name in names if not name.startswith(_DATA)]
    tail = small.index(_VERSION)  # the data stands before it
    records: dict[str, tuple[Piece, ...]] = {}
    for name in (*small[:tail], *data, *small[tail:]):
        records[name] = contents.get(name) or (Literal(template.small.get(name, b"")),)
    records[_PICKLE] = (Literal(pickled),)
    if _IDENTITY in records:
        old = template.small[_IDENTITY]
        digest = hashlib.sha256(pickled + old).digest()
        number = int.from_bytes(digest, "big") % 10**_IDENTITY_DIGITS
        records[_IDENTITY] = (Literal(b"%040d" % number),)
    joined = {name: join_pieces(list(pieces)) for name, pieces in records.items()}
    alignment = _alignment(template)
    places = _places(joined, alignment, block)
    if _FORMAT in records:
        # From version 1 on, torch may compute where records stand instead of reading it
        # (torch 2.7, serialization.py ``_load``, config.load.calculate_storage_offsets).
        stated = template.small[_FORMAT]
        unpadded = _COMPUTABLE if stated == _READ else stated
        joined[_FORMAT] = (Literal(_READ if places else unpadded),)
    sizes = [(name, sum(piece.length for piece in pieces)) for name, pieces in joined.items()]
    plan = archive.plan_archive(template.stem, sizes, alignment, places)
    return EncodedFile(plan, tuple(joined.values()))


def _places(
    records: Mapping[str, tuple[Piece, ...]], alignment: int, block: int
) -> dict[str, Place]:
    """Where in its block each record shares most with what it is made of, if it can."""
    found: dict[str, Place] = {}
    for name, pieces in records.items():
        shared: Counter[int] = Counter()
        position = 0
        for piece in pieces:
            if isinstance(piece, Extent):
                rest = (piece.offset - position) % block
                shared[rest] += piece.blocks(rest + position, block).length
            position += piece.length
        best = max(shared, key=lambda rest: shared[rest], default=0)
        if shared[best] and best % alignment == 0 and block % alignment == 0:
            found[name] = block, best
    return found


def archive_of(file: TorchFile) -> tuple[ArchivePlan, list[int]]:
    """Where the records of a file stand, padded as torch pads them, and their CRC-32.

    Raises:
        FormatError: the file states an absurd alignment.
    """
    sizes = [(name, record.length) for name, record in file.records.items()]
    places = {name: (MAX_DIVISOR, r.offset % MAX_DIVISOR) for name, r in file.records.items()}
    plan = archive.plan_archive(file.stem, sizes, _alignment(file), places)
    return plan, [record.crc32 for record in file.records.values()]


def _alignment(template: TorchFile) -> int:
    stated = template.small.get(_ALIGNMENT)
    if stated is None:
        return archive.ALIGNMENT
    if not stated.isdigit() or not 0 < int(stated) <= 1 << 15:
        raise FormatError("its record '.storage_alignment' is no sensible number")
    return int(stated)
