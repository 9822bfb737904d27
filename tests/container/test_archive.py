"""The zip container: our offsets are torch's, our files are torch's, and nothing odd is read."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.container import archive
from pp_to_vpp.errors import FormatError

from ..pairs import names, rank_files


def rebuild(data: bytes, alignment: int = archive.ALIGNMENT) -> bytes:
    """Read an archive and lay it out anew."""
    stem, records = archive.read_records(io.BytesIO(data))
    layout = archive.plan_archive(stem, [(r.name, r.length) for r in records.values()], alignment)
    written = bytearray(b"\xee" * layout.length)
    for record, placed in zip(records.values(), layout.records, strict=True):
        payload = data[record.offset : record.offset + record.length]
        written[placed.offset : placed.offset + placed.length] = payload
    for offset, part in archive.frame(layout, [r.crc32 for r in records.values()]):
        written[offset : offset + len(part)] = part
    return bytes(written)


def saved(value: Any) -> bytes:
    """What torch.save makes of a value."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("name", names())
def test_offsets_are_those_that_torch_finds(name: str) -> None:
    for path in rank_files(name)[::3]:
        reader = torch._C.PyTorchFileReader(str(path))
        with path.open("rb") as file:
            stem, records = archive.read_records(file)
        assert stem == path.stem
        assert set(records) == set(reader.get_all_records()), path
        for key, record in records.items():
            assert record.offset == reader.get_record_offset(key), path  # type: ignore[attr-defined]
            assert record.length == len(reader.get_record(key)), path


@pytest.mark.parametrize("name", names())
def test_real_files_come_back_byte_for_byte(name: str) -> None:
    for path in rank_files(name)[::3]:
        data = path.read_bytes()
        assert rebuild(data) == data, path


@given(st.dictionaries(st.text("abc", max_size=3), st.integers(0, 700), max_size=8))
def test_files_of_this_torch_come_back_byte_for_byte(sizes: dict[str, int]) -> None:
    data = saved({name: torch.arange(size) for name, size in sizes.items()})
    assert rebuild(data) == data


_names = st.lists(st.text("abcé/.", min_size=1, max_size=20), unique=True, min_size=1, max_size=6)


@given(_names, st.data())
def test_what_is_laid_out_is_tiled_aligned_and_readable(
    names: list[str], data: st.DataObject
) -> None:
    payloads = {
        name: data.draw(st.binary(max_size=300))
        for name in names
        if ".." not in name.split("/") and "//" not in f"/{name}/"
    }
    alignment = data.draw(st.sampled_from([1, 64, 4096]))
    layout = archive.plan_archive("stem", [(n, len(p)) for n, p in payloads.items()], alignment)
    parts = list(archive.frame(layout, [zlib.crc32(p) for p in payloads.values()]))
    parts += [(r.offset, p) for r, p in zip(layout.records, payloads.values(), strict=True)]
    position = 0
    written = b""
    for offset, part in sorted(parts, key=lambda part: (part[0], len(part[1]))):
        assert offset == position, "no hole, no overlap"
        written += part
        position += len(part)
    assert position == layout.length
    assert all(record.offset % alignment == 0 for record in layout.records)
    with zipfile.ZipFile(io.BytesIO(written)) as standard:
        assert standard.testzip() is None
        assert {name: standard.read(f"stem/{name}") for name in payloads} == payloads


def test_records_beyond_four_gigabytes_are_placed_as_torch_places_them() -> None:
    """Numbers read off a file of torch 2.13 with 4.4e9 bytes in its third record."""
    records = [
        ("data.pkl", 420), (".format_version", 1), (".storage_alignment", 2), ("byteorder", 6),
        ("data/0", 0), ("data/1", 12), ("data/2", 4_400_000_000), ("data/3", 20), ("data/4", 0),
        ("version", 2), (".data/serialization_id", 40),
    ]  # fmt: skip
    layout = archive.plan_archive("big", records)
    assert [record.offset for record in layout.records] == [
        64, 576, 704, 832, 960, 1024, 1152, 4400001280, 4400001408, 4400001472, 4400001600,
    ]  # fmt: skip
    frame = dict(archive.frame(layout, [0] * len(records)))
    wide = frame[layout.records[6].header_offset]
    assert b"\x01\x00\x10\x00" + struct.pack("<2Q", 4_400_000_000, 0) in wide
    later = frame[layout.records[7].header_offset]
    assert b"\x01\x00\x08\x00" + struct.pack("<Q", layout.records[7].header_offset) in later


def _edited(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


def _zip(**options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as written:
        written.writestr("stem/data.pkl", b"x" * 1000)
    return file.getvalue()


def _overlapping() -> bytes:
    """Two entries of the central directory that name one local header."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        written.writestr("stem/a", b"x" * 100)
        written.writestr("stem/b", b"y" * 100)
        written.infolist()[1].header_offset = 0
    return file.getvalue()


_GOOD = saved({"a": torch.arange(100)})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too short"),
        (bytes(100), "no end record"),
        (_GOOD[:-1], "no end record"),
        (_GOOD[: len(_GOOD) // 2], "no end record"),
        (_GOOD[200:], "does not|past|damaged|cut off|fit"),
        (_GOOD + b"more", "no end record"),
        (_zip(compression=zipfile.ZIP_DEFLATED), "compressed"),
        (_edited(_GOOD, b"archive/byteorder", b"archive/../../etc"), "not one that torch writes"),
        (_edited(_GOOD, b"archive/byteorder", b"/rooted/byteorder"), "one leading folder"),
        (_edited(_GOOD, b"archive/byteorder", b"archive/data/0\0\0\0"), "not one that torch"),
        (_overlapping(), "does not agree|overlaps"),
        (_edited(_GOOD, b"PK\x01\x02", b"PK\x01\x03"), "damaged"),
        (_edited(_GOOD, b"PK\x03\x04", b"PK\x03\x05"), "does not agree"),
        (_edited(_GOOD, b"PK\x06\x06", b"PK\x06\x07"), "wrong signature"),
    ],
)
def test_odd_archives_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        archive.read_records(io.BytesIO(data))


def _with_directory(offset: int = 0, size: int = 0, count: int = 1) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, size, offset, 0)


@pytest.mark.parametrize(
    "data",
    [
        _with_directory(size=1 << 31),
        _with_directory(offset=1 << 31),
        _with_directory(count=65535),
        b"x" * 100 + _with_directory(size=100, count=65535),
        b"x" * 56 + struct.pack("<4sLQL", b"PK\x06\x07", 0, 1 << 63, 1) + _with_directory(),
    ],
)
def test_lying_end_records_are_refused_at_once(data: bytes) -> None:
    with pytest.raises(FormatError):
        archive.read_records(io.BytesIO(data))


@given(
    st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 511)), min_size=1, max_size=6),
    st.sampled_from([512, 4096, archive.MAX_DIVISOR]),
)
def test_records_stand_where_they_are_placed(wanted: list[tuple[int, int]], block: int) -> None:
    """In their block; what is not placed stands as torch places it, and zipfile reads all."""
    lengths = [(f"r{i}", length) for i, (length, _) in enumerate(wanted)]
    places = {f"r{i}": (block, 64 * rest % block) for i, (_, rest) in enumerate(wanted) if rest % 3}
    layout = archive.plan_archive("stem", lengths, 64, places)
    data = bytearray(layout.length)
    for offset, part in archive.frame(layout, [zlib.crc32(bytes(length)) for _, length in lengths]):
        data[offset : offset + len(part)] = part
    for (name, _), record in zip(lengths, layout.records, strict=True):
        divisor, rest = places.get(name, (64, 0))
        assert record.offset % divisor == rest
    with zipfile.ZipFile(io.BytesIO(data)) as found:
        assert found.testzip() is None
    stem, records = archive.read_records(io.BytesIO(data))
    assert [(r.name, r.length) for r in records.values()] == lengths
    again = {name: (archive.MAX_DIVISOR, r.offset) for name, r in records.items()}
    again = {name: (d, o % d) for name, (d, o) in again.items()}
    assert archive.plan_archive(stem, lengths, 64, again) == layout
