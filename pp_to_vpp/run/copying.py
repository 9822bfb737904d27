"""The bytes of a task, copied by a worker."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..container import archive
from ..container.crc32 import concatenate, of_zeros
from ..container.extents import Extent, Literal, Piece, Zeros
from ..errors import AT_REST, CopyError
from ..target.plan import FilePlan
from .folders import copy_error

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

    @property
    def length(self) -> int:
        """Bytes that it writes."""
        return sum(move.piece.length for move in self.moves if move.offset is not None)


_buffer: mmap.mmap | None = None


def copy(task: CopyTask) -> tuple[int | None, ...]:
    """Carry out a task; the CRC-32 of each move that wants one.

    Raises:
        CopyError: reading or writing failed.
    """
    found: list[int | None] = []
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(_opened(task.path, os.O_WRONLY))
        extents = [move.piece for move in task.moves if isinstance(move.piece, Extent)]
        sources = {
            path: stack.enter_context(_opened(path, os.O_RDONLY))
            for path in dict.fromkeys(extent.path for extent in extents)
        }
        for extent in extents:
            _advise(sources[extent.path], extent.offset, extent.length, os.POSIX_FADV_WILLNEED)
        for move in task.moves:
            match move.piece:
                case Extent() as extent:
                    found.append(_move(sources[extent.path], target, extent, move, task.path))
                case Literal(data):
                    if move.offset is not None:
                        _write(target, memoryview(data), move.offset, task.path)
                    found.append(zlib.crc32(data))
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
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise copy_error(path, "cannot be opened", error) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _move(source: int, target: int, extent: Extent, move: Move, path: str) -> int | None:
    if move.has_checksum or move.offset is None:
        return _copy_with_checksum(source, target, extent, move.offset, path)
    _copy_in_kernel(source, target, extent, move.offset, path)
    return None


def _copy_with_checksum(
    source: int, target: int, extent: Extent, offset: int | None, path: str
) -> int:
    """Read, checksum and write a range through the worker's buffer."""
    global _buffer  # noqa: PLW0603  (one buffer per worker, allocated when first needed)
    if _buffer is None:
        # Of whole pages: the kernel copies a third slower to addresses a little off.
        # Private: by default a process forked later would share its bytes.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        _buffer = mmap.mmap(-1, _BUFFER_BYTES, flags=flags)
    view = memoryview(_buffer)
    crc32 = done = 0
    while done < extent.length:
        size = min(_BUFFER_BYTES, extent.length - done)
        try:
            count = os.preadv(source, [view[:size]], extent.offset + done)
        except OSError as error:
            raise copy_error(extent.path, "cannot be read", error) from None
        if count == 0:
            raise _source_ended(extent)
        crc32 = zlib.crc32(view[:count], crc32)
        if offset is not None:
            _write(target, view[:count], offset + done, path)
        done += count
    return crc32


def _source_ended(extent: Extent) -> CopyError:
    return CopyError.of(extent.path, "it became shorter while it was copied", cure=AT_REST)


def _copy_in_kernel(source: int, target: int, extent: Extent, offset: int, path: str) -> None:
    """Copy a range without bringing it into the process: some file systems copy on the server, or
    share the blocks. Where the kernel cannot, fall back to reading and writing."""
    done = 0
    while done < extent.length:
        size = min(_KERNEL_COPY_BYTES, extent.length - done)
        try:
            count = os.copy_file_range(source, target, size, extent.offset + done, offset + done)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise copy_error(path, "cannot be written", error) from None
            count = 0
        if count == 0:
            rest = extent.cut(done, extent.length - done)
            _copy_with_checksum(source, target, rest, offset + done, path)
            return
        done += count


def _write(target: int, data: memoryview, offset: int, path: str) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(target, data[done:], offset + done)
        except OSError as error:
            raise copy_error(path, "cannot be written", error) from None


def complete_file(path: str, plan: FilePlan, crc32s: Sequence[int]) -> int:
    """Write what stands around the records and bring the file to disk; its own CRC-32.

    Raises:
        CopyError: writing failed.
    """
    total = position = 0
    parts: list[tuple[int, int, int]] = [
        (offset, sum(piece.length for piece in pieces), crc32)
        for (offset, pieces), crc32 in zip(plan.places(), crc32s, strict=True)
    ]
    with _opened(path, os.O_WRONLY) as target:
        for offset, data in archive.frame(plan.archive, crc32s) if plan.archive else ():
            _write(target, memoryview(data), offset, path)
            parts.append((offset, len(data), zlib.crc32(data)))
        try:
            os.fsync(target)
        except OSError as error:
            raise copy_error(path, "cannot be brought to disk", error) from None
    for offset, length, crc32 in sorted(parts):
        total = concatenate(total, crc32, length)
        position = offset + length
    assert position == plan.length
    return total
