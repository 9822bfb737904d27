"""The bytes of a task and of a whole file, against the stupid concatenation of the pieces."""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.container import archive
from pp_to_vpp.container.extents import Extent, Literal, Piece
from pp_to_vpp.errors import CopyError
from pp_to_vpp.run import copying
from pp_to_vpp.run.copying import CopyTask, Move
from pp_to_vpp.target.plan import FilePlan

from ..examples import examples

Crcs = tuple[tuple[int, ...], ...]
"""Of each record of each file of a rank."""
Known = Mapping[Extent, int] | None
"""Of what was read of the source."""


def placed(piece: Piece, folder: Path) -> Piece:
    """A piece with the path of its source."""
    if isinstance(piece, Extent):
        return Extent(str(folder / piece.path), piece.offset, piece.length)
    return piece


def file_plan(name: str, records: list[list[Piece]], folder: Path) -> FilePlan:
    """A file of one record as it is, one of several as an archive."""
    contents = tuple(tuple(placed(piece, folder) for piece in record) for record in records)
    lengths = [sum(piece.length for piece in record) for record in contents]
    if len(records) == 1:
        return FilePlan(name, lengths[0], contents, None)
    layout = archive.plan_archive(
        "stem", [(f"r{i}", length) for i, length in enumerate(lengths)], 64
    )
    return FilePlan(name, layout.length, contents, layout)


def concatenated(records: list[list[Piece]], sources: dict[str, bytes]) -> list[bytes]:
    """The bytes of each record, by the definition of a piece."""
    found = []
    for record in records:
        data = b""
        for piece in record:
            if isinstance(piece, Extent):
                data += sources[piece.path][piece.offset : piece.offset + piece.length]
            else:
                data += piece.data if isinstance(piece, Literal) else bytes(piece.length)
        found.append(data)
    return found


def whole_file(plan: FilePlan, records: list[bytes]) -> bytes:
    """The bytes of a file from those of its records."""
    if plan.archive is None:
        return records[0]
    data = bytearray(plan.length)
    parts = [(r.offset, d) for r, d in zip(plan.archive.records, records, strict=True)]
    for offset, part in (*parts, *archive.frame(plan.archive, list(map(zlib.crc32, records)))):
        data[offset : offset + len(part)] = part
    return bytes(data)


def write_sources(sources: dict[str, bytes], folder: Path) -> None:
    for name, data in sources.items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, 0])
def test_where_the_kernel_cannot_copy_bytes_are_read_and_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some of the bytes, too."""
    real, calls = os.copy_file_range, itertools.count()

    def stubborn(source: int, target: int, size: int, *offsets: int) -> int:
        if next(calls) == 0:
            return real(source, target, min(size, 100), *offsets)
        if number:
            raise OSError(number, "no")
        return 0

    monkeypatch.setattr(os, "copy_file_range", stubborn)
    data = os.urandom(100_000)
    write_sources({"a": data, "b": bytes(120_000)}, tmp_path)
    move = Move(Extent(str(tmp_path / "a"), 7, 90_000), 11, has_checksum=False)
    assert copying.copy(CopyTask(str(tmp_path / "b"), (move,))) == (None,)
    assert (tmp_path / "b").read_bytes() == bytes(11) + data[7:90_007] + bytes(29_989)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_no_reason_to_read_and_write(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", full)
    write_sources({"a": b"abc", "b": b""}, tmp_path)
    move = Move(Extent(str(tmp_path / "a"), 0, 3), 0, has_checksum=False)
    with pytest.raises(CopyError, match=f"b: cannot be written.*{os.strerror(number)}"):
        copying.copy(CopyTask(str(tmp_path / "b"), (move,)))
    assert (tmp_path / "b").read_bytes() == b""


@pytest.mark.parametrize("has_checksum", [True, False])
def test_a_source_that_ends_too_early_is_told(has_checksum: bool, tmp_path: Path) -> None:
    write_sources({"a": b"abc", "b": b""}, tmp_path)
    move = Move(Extent(str(tmp_path / "a"), 1, 3), 0, has_checksum=has_checksum)
    with pytest.raises(CopyError, match=r"a: it became shorter"):
        copying.copy(CopyTask(str(tmp_path / "b"), (move,)))


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_sources({"b": b""}, tmp_path)
    move = Move(Extent(str(tmp_path / "a"), 0, 3), 0, has_checksum=True)
    with pytest.raises(CopyError, match=r"a: cannot be opened \(No such file"):
        copying.copy(CopyTask(str(tmp_path / "b"), (move,)))
    with pytest.raises(CopyError, match=r"c: cannot be opened \(No such file"):
        copying.copy(CopyTask(str(tmp_path / "c"), (move,)))


def test_what_is_read_for_its_checksum_alone_is_not_written(tmp_path: Path) -> None:
    write_sources({"a": b"abcdef", "b": b"......"}, tmp_path)
    extent = Extent(str(tmp_path / "a"), 2, 3)
    task = CopyTask(str(tmp_path / "b"), (Move(extent, None, has_checksum=True),))
    assert copying.copy(task) == (zlib.crc32(b"cde"),)
    assert task.length == 0
    assert (tmp_path / "b").read_bytes() == b"......"


def test_short_reads_and_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may do less than it is asked to."""
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: pwrite(f, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda f, views, at: preadv(f, [views[0][:5]], at))
    data = os.urandom(1000)
    write_sources({"a": data, "b": b""}, tmp_path)
    moves = (
        Move(Extent(str(tmp_path / "a"), 10, 500), 0, has_checksum=True),
        Move(Literal(data[:100]), 500, has_checksum=False),
    )
    crc32s = copying.copy(CopyTask(str(tmp_path / "b"), moves))
    assert crc32s == (zlib.crc32(data[10:510]), zlib.crc32(data[:100]))
    assert (tmp_path / "b").read_bytes() == data[10:510] + data[:100]


_records = st.lists(st.lists(st.binary(max_size=40), max_size=3), min_size=1, max_size=5)


@examples(50)
@given(_records)
def test_completing_a_file_puts_the_archive_around_its_records(texts: list[list[bytes]]) -> None:
    """The file is whole then, and its checksum is that of its bytes."""
    pieces: list[list[Piece]] = [[Literal(text) for text in record] for record in texts]
    with tempfile.TemporaryDirectory() as name:
        plan = file_plan("f", pieces, Path(name))
        records = concatenated(pieces, {})
        path = Path(name) / "f"
        with path.open("wb") as file:
            file.truncate(plan.length)
            for (offset, _), data in zip(plan.places(), records, strict=True):
                file.seek(offset)
                file.write(data)
        found = copying.complete_file(str(path), plan, [zlib.crc32(data) for data in records])
        assert path.read_bytes() == whole_file(plan, records)
        assert found == zlib.crc32(path.read_bytes())


def test_a_file_that_does_not_reach_the_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    write_sources({"f": b"abc"}, tmp_path)
    plan = FilePlan("f", 3, ((Literal(b"abc"),),), None)
    with pytest.raises(CopyError, match=r"f: cannot be brought to disk \(Input/output error\)"):
        copying.complete_file(str(tmp_path / "f"), plan, [zlib.crc32(b"abc")])
