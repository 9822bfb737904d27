"""The container of a ``.pt`` file: a zip archive of stored records, as ``torch.save`` writes it.

Each record's data starts on a multiple of the alignment, by padding in its *local* header, which
the central directory does not repeat. A data descriptor follows the data, and the directory always
has its 64-bit form (PyTorch ``caffe2/serialize/inline_container.cc`` over miniz, 1.6 to 2.13).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias

from ..errors import FormatError
from .extents import Extent

ALIGNMENT = 64
"""Bytes; newer files state their own in the record ``.storage_alignment``."""

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_ENTRY = struct.Struct("<4s6H3L5H2L")
_ENTRY_SIGNATURE = b"PK\x01\x02"
_END = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\x05\x06"
_LOCATOR = struct.Struct("<4sLQL")
_LOCATOR_SIGNATURE = b"PK\x06\x07"
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_SIGNATURE = b"PK\x06\x06"
_DESCRIPTOR = struct.Struct("<4s3L")
_DESCRIPTOR64 = struct.Struct("<4sL2Q")
_DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
_EXTRA_HEADER = struct.Struct("<2H")
_ZIP64_EXTRA = 1
_PADDING_EXTRA = b"FB"
_UTF8_NAME = 0x0800
_HAS_DESCRIPTOR = 0x0008
_ENCRYPTED = 0x0001
_MAX32 = 0xFFFFFFFF
_MAX16 = 0xFFFF
_MADE_BY, _NEEDED = 0x031E, 0x002D
"""Versions in the 64-bit end record, as miniz writes them."""
_NO_ARCHIVES = tuple(
    (re.compile(begin, re.IGNORECASE), what, cure)
    for begin, what, cure in (
        (
            rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.",  # the pickled magic number, up to 1.5
            "it is in torch's legacy format (_use_new_zipfile_serialization=False)",
            "load it and save it once with torch.save as it is today",
        ),
        (
            rb"version https?://",
            "it is a Git LFS pointer in place of a file",
            "run git lfs pull in the repository that it is from, and copy the files again",
        ),
        (
            rb"/annex/objects/",
            "it is a git-annex pointer in place of a file",
            "run git annex get in the repository that it is from, and copy the files again",
        ),
        (
            rb"(\xef\xbb\xbf)?\s*<[!?a-z]",
            "it is a page of HTML or XML, as a server sends it in place of a file",
            "read it: it tells why; then download the file again",
        ),
        (
            rb"(\xef\xbb\xbf)?\s*[{\[]\s*[\"{}\[\]]",
            "it is JSON, as a server sends it in place of a file",
            "read it: it tells why; then download the file again",
        ),
        (
            rb"\x1f\x8b|\x28\xb5\x2f\xfd|\xfd7zXZ|BZh",
            "it is compressed as a whole (gzip, zstd, xz or bzip2)",
            "unpack it",
        ),
        (
            rb"[\t\n\r -~]{20,}\Z",
            "it is plain text, no archive",
            "read it: it may tell why; then copy the file again",
        ),
    )
)
"""What files that are no archives begin with, what they are, and what to do."""
_BEGIN = 128
"""Bytes that tell what a file is."""
_MAX_DIRECTORY = 64 << 20
"""Bytes; a real rank file has some kilobytes."""


@dataclass(frozen=True, slots=True)
class Record:
    """One stored record of an archive."""

    name: str
    """Without the archive's own leading folder: ``data.pkl``, ``data/0``."""
    offset: int
    """First byte of the data in the file."""
    length: int
    crc32: int

    @property
    def has_checksum(self) -> bool:
        """torch.save writes 0 when it is told to compute none."""
        return self.crc32 != 0 or self.length == 0

    def extent(self, path: str) -> Extent:
        """Its bytes in the file of that path."""
        return Extent(path, self.offset, self.length)


def read_records(file: BinaryIO) -> tuple[str, dict[str, Record]]:
    """The archive's leading folder and its records by name, in file order.

    Raises:
        FormatError: not a zip file; truncated; deflated, encrypted, overlapping or oddly named
            records.
    """
    entries, directory_offset = _read_directory(file)
    stems = {name.partition("/")[0] for name, *_ in entries}
    if len(stems) != 1:
        raise FormatError("the records do not share one leading folder")
    stem = stems.pop()
    records: dict[str, Record] = {}
    end = 0
    for name, header_offset, length, crc32 in entries:
        short = name.partition("/")[2]
        if not short or short in records or ".." in short.split("/") or "\0" in short:
            raise FormatError(f"record name {name[:80]!r} is not one that torch writes")
        if header_offset < end:
            raise FormatError(f"record {short[:80]!r} overlaps the record before it")
        if header_offset >= directory_offset:
            raise FormatError(f"record {short[:80]!r} starts past the end of the data")
        offset = _data_offset(file, header_offset, name)
        end = offset + length
        if end > directory_offset:
            raise FormatError(f"record {short[:80]!r} ends past the end of the data")
        records[short] = Record(short, offset, length, crc32)
    return stem, records


def read_listed(file: BinaryIO) -> list[Record]:
    """The records in file order, as the directory alone lists them: their offsets are those of
    their headers, of which none is read.

    Raises:
        FormatError: it is no directory of an archive that torch writes.
    """
    entries, _ = _read_directory(file)
    return [Record(name.partition("/")[2], *entry) for name, *entry in entries]


def read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """Bytes of a file; fewer than asked for only where it ends. One call of the system may give
    fewer anywhere, as some network file systems do."""
    file.seek(offset)
    data = file.read(length)
    while data and len(data) < length and (more := file.read(length - len(data))):
        data += more
    return data


def _read_at(file: BinaryIO, offset: int, length: int, what: str) -> bytes:
    data = read_at(file, offset, length)
    if len(data) != length:
        raise FormatError(f"{what} is cut off")
    return data


def _size(file: BinaryIO) -> int:
    """Bytes of a file, which may be an archive.

    Raises:
        FormatError: it begins as what is no archive.
    """
    begin = read_at(file, 0, _BEGIN)
    for pattern, what, cure in _NO_ARCHIVES:
        if pattern.match(begin):
            raise FormatError(what, cure=cure)
    return file.seek(0, 2)


def _read_directory(file: BinaryIO) -> tuple[list[tuple[str, int, int, int]], int]:
    """(name, local header offset, length, CRC-32) of each record in file order; offset of the
    directory."""
    size = _size(file)
    if size < _END.size:
        raise FormatError("the file is too short for a zip archive")
    tail = _END.unpack(_read_at(file, size - _END.size, _END.size, "the end record"))
    if tail[0] != _END_SIGNATURE:
        raise FormatError("no end record of a zip archive: cut off, or no file of torch.save")
    count, directory_size, directory_offset = tail[4:7]
    end_offset = size - _END.size
    locator_offset = end_offset - _LOCATOR.size
    if locator_offset >= _END64.size:
        locator = _LOCATOR.unpack(_read_at(file, locator_offset, _LOCATOR.size, "the locator"))
        if locator[0] == _LOCATOR_SIGNATURE:
            end_offset = locator[2]
            if end_offset > locator_offset - _END64.size:
                raise FormatError("the 64-bit end record lies past the end of the file")
            end64 = _END64.unpack(_read_at(file, end_offset, _END64.size, "the 64-bit end record"))
            if end64[0] != _END64_SIGNATURE:
                raise FormatError("the 64-bit end record has a wrong signature")
            count, directory_size, directory_offset = end64[7:10]
    if directory_offset + directory_size > end_offset or directory_size > _MAX_DIRECTORY:
        raise FormatError("the central directory does not fit into the file")
    data = _read_at(file, directory_offset, directory_size, "the central directory")
    entries, position = [], 0
    for _ in range(count):
        if position + _ENTRY.size > len(data):
            raise FormatError("the central directory is cut off")
        entry, length = _read_entry(data, position)
        entries.append(entry)
        position += length
    return sorted(entries, key=lambda entry: entry[1]), directory_offset


def _read_entry(data: bytes, position: int) -> tuple[tuple[str, int, int, int], int]:
    """One entry of the central directory, and its length in bytes."""
    (signature, _, _, flags, method, _, _, crc32, packed, length, name_length, extra_length,
     comment_length, _, _, _, offset) = _ENTRY.unpack_from(data, position)  # fmt: skip
    start = position + _ENTRY.size
    raw_name = data[start : start + name_length]
    extra = data[start + name_length : start + name_length + extra_length]
    if signature != _ENTRY_SIGNATURE or len(raw_name) + len(extra) != name_length + extra_length:
        raise FormatError("the central directory is damaged")
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"record name {raw_name[:80]!r} is not UTF-8") from None
    length, packed, offset = _widen(extra, length, packed, offset)
    if method != 0 or packed != length:
        raise FormatError(f"record {name[:80]!r} is compressed; torch.save stores records as is")
    if flags & _ENCRYPTED:
        raise FormatError(f"record {name[:80]!r} is encrypted")
    total = _ENTRY.size + name_length + extra_length + comment_length
    return (name, offset, length, crc32), total


def _widen(extra: bytes, *values: int) -> list[int]:
    """Values that do not fit into 32 bits stand, in order, in the 64-bit extra field."""
    wide: list[int] = []
    while len(extra) >= _EXTRA_HEADER.size:
        kind, size = _EXTRA_HEADER.unpack_from(extra)
        if kind == _ZIP64_EXTRA:
            body = extra[_EXTRA_HEADER.size : _EXTRA_HEADER.size + size]
            wide = [value for (value,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8])]
            break
        extra = extra[_EXTRA_HEADER.size + size :]
    widened = []
    for value in values:
        if value == _MAX32 and wide:
            widened.append(wide.pop(0))
        else:
            widened.append(value)
    return widened


def _data_offset(file: BinaryIO, header_offset: int, name: str) -> int:
    """Where the data starts: only the local header knows the padding."""
    encoded = name.encode("utf-8")
    what = f"the header of record {name[:80]!r}"
    data = _read_at(file, header_offset, _LOCAL_HEADER.size + len(encoded), what)
    header = _LOCAL_HEADER.unpack_from(data)
    if header[0] != _LOCAL_SIGNATURE or data[_LOCAL_HEADER.size :] != encoded:
        raise FormatError(f"{what} does not agree with the central directory")
    extra_length: int = header[10]
    return header_offset + len(data) + extra_length


@dataclass(frozen=True, slots=True)
class PlacedRecord:
    """A record of an archive to be written."""

    name: str
    """With the archive's leading folder."""
    header_offset: int
    extra: bytes
    """Extra field of the local header: 64-bit values if needed, then padding."""
    offset: int
    length: int

    @property
    def end(self) -> int:
        """First byte after the data and its descriptor."""
        return self.offset + self.length + (self.descriptor.size if self.length else 0)

    @property
    def is_wide(self) -> bool:
        """Whether its length or its place needs more than 32 bits."""
        return self.length >= _MAX32 or self.header_offset >= _MAX32

    @property
    def flags(self) -> int:
        """General purpose bits: an empty record has no data descriptor."""
        return _UTF8_NAME | (_HAS_DESCRIPTOR if self.length else 0)

    @property
    def descriptor(self) -> struct.Struct:
        """Form of the data descriptor."""
        return _DESCRIPTOR64 if self.is_wide else _DESCRIPTOR


Place: TypeAlias = tuple[int, int]
"""Divisor and rest of the offset of a record's data."""
MAX_DIVISOR = 1 << 15
"""The padding must fit into the extra field of a local header, of 16-bit length."""


@dataclass(frozen=True, slots=True)
class ArchivePlan:
    """Where everything lies in an archive to be written."""

    records: tuple[PlacedRecord, ...]
    directory_offset: int
    length: int
    """Bytes of the whole file."""


def plan_archive(
    stem: str,
    records: Sequence[tuple[str, int]],
    alignment: int = ALIGNMENT,
    places: Mapping[str, Place] | None = None,
) -> ArchivePlan:
    """Place records, given as (name without the leading folder, length), one after the other.

    Each starts on a multiple of the alignment, as near as possible, or where ``places`` says.
    """
    placed: list[PlacedRecord] = []
    position = directory_length = 0
    for short, length in records:
        name = f"{stem}/{short}"
        # miniz makes the local header before it counts the packed bytes: 0 there.
        extra = _wide_extra(length, 0, position)
        bare = position + _LOCAL_HEADER.size + len(name.encode()) + len(extra) + _EXTRA_HEADER.size
        divisor, rest = (places or {}).get(short, (alignment, 0))
        padding = (rest - bare) % divisor
        extra += _PADDING_EXTRA + padding.to_bytes(2, "little") + b"Z" * padding
        placed.append(PlacedRecord(name, position, extra, bare + padding, length))
        directory_length += (
            _ENTRY.size + len(name.encode()) + len(_wide_extra(length, length, position))
        )
        position = placed[-1].end
    end = position + directory_length + _END64.size + _LOCATOR.size + _END.size
    return ArchivePlan(tuple(placed), position, end)


def _wide_extra(length: int, packed_length: int, header_offset: int) -> bytes:
    """The 64-bit extra field, empty when nothing needs it."""
    body = b""
    if length >= _MAX32:
        body += struct.pack("<2Q", length, packed_length)
    if header_offset >= _MAX32:
        body += struct.pack("<Q", header_offset)
    return _EXTRA_HEADER.pack(_ZIP64_EXTRA, len(body)) + body if body else b""


def frame(plan: ArchivePlan, crc32s: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """All bytes of the file that are not record data, as (offset, bytes), given each record's
    CRC-32."""
    directory = b""
    for record, crc32 in zip(plan.records, crc32s, strict=True):
        name = record.name.encode()
        header = _LOCAL_HEADER.pack(
            _LOCAL_SIGNATURE, 0, record.flags, 0, 0, 0, 0, 0, 0, len(name), len(record.extra)
        )
        yield record.header_offset, header + name + record.extra
        if record.length:
            yield (
                record.offset + record.length,
                record.descriptor.pack(_DESCRIPTOR_SIGNATURE, crc32, record.length, record.length),
            )
        extra = _wide_extra(record.length, record.length, record.header_offset)
        length = min(record.length, _MAX32)
        directory += _ENTRY.pack(
            _ENTRY_SIGNATURE, 0, 0, record.flags, 0, 0, 0, crc32, length, length,
            len(name), len(extra),
            0, 0, 0, 0, min(record.header_offset, _MAX32),
        )  # fmt: skip
        directory += name + extra
    count, start = len(plan.records), plan.directory_offset
    yield start, directory + _ends(count, len(directory), start)


def _ends(count: int, size: int, start: int) -> bytes:
    """The end records, 64-bit form and short form."""
    end64 = _END64.pack(
        _END64_SIGNATURE, _END64.size - 12, _MADE_BY, _NEEDED, 0, 0, count, count, size, start
    )
    locator = _LOCATOR.pack(_LOCATOR_SIGNATURE, 0, start + size, 1)
    short_count = min(count, _MAX16)
    end = _END.pack(
        _END_SIGNATURE, 0, 0, short_count, short_count, min(size, _MAX32), min(start, _MAX32), 0
    )
    return end64 + locator + end
