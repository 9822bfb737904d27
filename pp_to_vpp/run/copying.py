"""The bytes of a task, copied by a worker."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..container import archive
from ..container.crc32 import concatenate, of_bytes, of_zeros
from ..container.extents import Extent, Literal, Piece, Zeros
from ..errors import AT_REST, CopyError, refusals, refused
from ..target.plan import FilePlan

_BUFFER_BYTES = 256 << 10
"""Fits into the second-level cache: read, checksum and write touch main memory once each."""
_KERNEL_COPY_BYTES = 32 << 20
"""Per call, so that a signal is not kept waiting."""


@dataclass(frozen=True, slots=True)
class Move:
    """One range to be copied, or only to be read for its checksum."""

    piece: Piece
    offset: int | None
    """Where it goes in the target file; None if it goes nowhere."""
    has_checksum: bool
    """Whether its CRC-32 is to be computed."""


@dataclass(frozen=True, slots=True)
class CopyTask:
    """Moves into one file."""

    path: str
    moves: tuple[Move, ...]
    block: int = 1
    """Bytes of a block that the file may share with those it is made of; 1 where it cannot."""

    @property
    def length(self) -> int:
        """Bytes that it writes."""
        return sum(move.piece.length for move in self.moves if move.offset is not None)

    def read_extents(self) -> Iterator[Extent]:
        """What is read of the source: all but the blocks that may be shared."""
        for extent, move in ((m.piece, m) for m in self.moves if isinstance(m.piece, Extent)):
            is_read = move.has_checksum or move.offset is None
            if is_read or not extent.blocks(move.offset or 0, self.block).length:
                yield extent


def copy(task: CopyTask) -> tuple[int | None, ...]:
    """Carry out a task; the CRC-32 of each move that wants one.

    Raises:
        CopyError: reading or writing failed.
    """
    found: list[int | None] = []
    # Of whole pages: the kernel copies a third slower to addresses a little off.
    # Private: by default a process forked later would share its bytes.
    buffer = mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(_opened(task.path, os.O_WRONLY))
        extents = [move.piece for move in task.moves if isinstance(move.piece, Extent)]
        sources = {
            path: stack.enter_context(_opened(path, os.O_RDONLY))
            for path in dict.fromkeys(extent.path for extent in extents)
        }
        for extent in task.read_extents():
            _advise(sources[extent.path], extent.offset, extent.length, os.POSIX_FADV_WILLNEED)
        for move in task.moves:
            match move.piece:
                case Extent() as extent:
                    files = _Files(sources[extent.path], target, task.path, task.block, buffer)
                    found.append(files.move(extent, move))
                case Literal(data):
                    if move.offset is not None:
                        _write(target, memoryview(data), move.offset, task.path)
                    found.append(of_bytes(data))
                case Zeros(length):
                    found.append(of_zeros(length))  # the file began as a hole
        # Starts writing out what is there, so that the end need not wait for all of it, and lets go
        # of what is on disk: terabytes must not push everything else out of the page cache.
        _advise(target, 0, 0, os.POSIX_FADV_DONTNEED)
    return tuple(found)


def _advise(descriptor: int, offset: int, length: int, advice: int) -> None:
    with contextlib.suppress(OSError):  # only advice
        os.posix_fadvise(descriptor, offset, length, advice)


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    with refusals(path, "cannot be opened"):
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        with refusals(path, "cannot be closed"):  # network file systems write at last then
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Files:
    """The ends of a copy."""

    source: int
    target: int
    path: str
    """Of the target."""
    block: int
    buffer: mmap.mmap

    def move(self, extent: Extent, move: Move) -> int | None:
        """Copy a range, or only read it; its checksum, if that is wanted."""
        offset = move.offset
        if offset is None:
            return self._read(extent, None)
        if not move.has_checksum:
            for part in _around(extent, self._blocks(extent, offset)):
                self._copy_in_kernel(part, offset + part.offset - extent.offset)
            return None
        blocks = self._blocks(extent, offset)
        if not blocks.length:
            return self._read(extent, offset)
        crc32 = 0
        for part in _around(extent, blocks):
            place = offset + part.offset - extent.offset
            if part == blocks:
                self._copy_in_kernel(part, place)
            crc32 = self._read(part, None if part == blocks else place, crc32)
        return crc32

    def _blocks(self, extent: Extent, offset: int) -> Extent:
        return extent.blocks(offset, self.block)

    def _read(self, extent: Extent, offset: int | None, crc32: int = 0) -> int:
        """Read, checksum and write a range through the buffer; the checksum of what came before it
        and of the range."""
        view = memoryview(self.buffer)
        done = 0
        while done < extent.length:
            size = min(_BUFFER_BYTES, extent.length - done)
            with refusals(extent.path, "cannot be read"):
                count = os.preadv(self.source, [view[:size]], extent.offset + done)
            if count == 0:
                raise CopyError.of(
                    extent.path, "it became shorter while it was copied", cure=AT_REST
                )
            crc32 = of_bytes(view[:count], crc32)
            if offset is not None:
                _write(self.target, view[:count], offset + done, self.path)
            done += count
        return crc32

    def _copy_in_kernel(self, extent: Extent, offset: int) -> None:
        """Copy a range without bringing it into the process: some file systems copy on the server,
        or share whole blocks. Where the kernel cannot, fall back to reading and writing."""
        done = 0
        while done < extent.length:
            size = min(_KERNEL_COPY_BYTES, extent.length - done)
            try:
                count = os.copy_file_range(
                    self.source, self.target, size, extent.offset + done, offset + done
                )
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                    raise refused(self.path, "cannot be written", error, CopyError) from None
                count = 0
            if count == 0:
                self._read(extent.cut(done, extent.length - done), offset + done)
                return
            done += count


def _around(extent: Extent, blocks: Extent) -> Iterator[Extent]:
    """The blocks in an extent, and what lies before and behind them."""
    before = blocks.offset - extent.offset
    after = before + blocks.length
    parts = extent.cut(0, before), blocks, extent.cut(after, extent.length - after)
    return (part for part in parts if part.length)


def _write(target: int, data: memoryview, offset: int, path: str) -> None:
    done = 0
    while done < len(data):
        with refusals(path, "cannot be written"):
            done += os.pwrite(target, data[done:], offset + done)


def complete_file(path: str, plan: FilePlan, crc32s: Sequence[int] | None) -> int | None:
    """Write what stands around the records and bring the file to disk; its own CRC-32, if those of
    its records are known.

    Raises:
        CopyError: writing failed.
    """
    written = crc32s or [0] * len(plan.contents)
    parts = [
        (offset, sum(piece.length for piece in pieces), crc32)
        for (offset, pieces), crc32 in zip(plan.places(), written, strict=True)
    ]
    with _opened(path, os.O_WRONLY) as target:
        for offset, data in archive.frame(plan.archive, written) if plan.archive else ():
            _write(target, memoryview(data), offset, path)
            parts.append((offset, len(data), of_bytes(data)))
        with refusals(path, "cannot be brought to disk"):
            os.fsync(target)
    total = 0
    for _, length, crc32 in sorted(parts):
        total = concatenate(total, crc32, length)
    assert sum(length for _, length, _ in parts) == plan.length
    return None if crc32s is None else total
