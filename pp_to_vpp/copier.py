"""Copying of planned bytes, shared by the workers in tasks of a few dozen megabytes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from . import archive, checksum
from .checksum import Derivation
from .errors import AT_REST, CopyError
from .folders import TemporaryFolder, copy_error, create_folder, remove_own
from .plan import FilePlan, RankPlan
from .types import Extent, Literal, Piece, Zeros
from .workers import QUEUED_PER_WORKER, Workers

_TASK_BYTES = 64 << 20
_TASK_MOVES = 512
_BUFFER_BYTES = 256 << 10
"""Fits into the second-level cache: read, checksum and write touch main memory once each."""
_KERNEL_COPY_BYTES = 32 << 20
"""Per call, so that a signal is not kept waiting."""

Result = TypeVar("Result")


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
                    found.append(checksum.of_zeros(length))  # the file began as a hole
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
        for offset, data in archive.frame(plan.layout, crc32s) if plan.layout else ():
            _write(target, memoryview(data), offset, path)
            parts.append((offset, len(data), zlib.crc32(data)))
        try:
            os.fsync(target)
        except OSError as error:
            raise copy_error(path, "cannot be brought to disk", error) from None
    for offset, length, crc32 in sorted(parts):
        total = checksum.concatenate(total, crc32, length)
        position = offset + length
    assert position == plan.length
    return total


@dataclass(frozen=True, slots=True)
class FamilyCopy:
    """The rank folders of one family to be copied, in order."""

    plans: tuple[RankPlan, ...]
    derivations: Mapping[Extent, Derivation]
    """Ranges whose checksums follow from others (see ``checksum.derivable``)."""
    context: Any
    """Handed on to ``finish``."""


class _Ledger:
    """CRC-32 of the ranges of one family, as they become known."""

    def __init__(self, derivations: Mapping[Extent, Derivation]) -> None:
        self.derivations = derivations
        self._segments: dict[Extent, int] = {}

    def enter(self, task: CopyTask, crc32s: tuple[int | None, ...]) -> None:
        """Take down what a task found."""
        for move, crc32 in zip(task.moves, crc32s, strict=True):
            if isinstance(move.piece, Extent) and crc32 is not None:
                self._segments[move.piece] = crc32

    def of(self, piece: Piece) -> int:
        """The checksum of a piece whose bytes have all been copied."""
        match piece:
            case Literal(data):
                return zlib.crc32(data)
            case Zeros(length):
                return checksum.of_zeros(length)
            case Extent():
                if piece in self.derivations:
                    return self.derivations[piece].solve(self._of_extent)
                return self._of_extent(piece)

    def _of_extent(self, extent: Extent) -> int:
        joined = 0
        for segment in _segments(extent):
            joined = checksum.concatenate(joined, self._segments[segment], segment.length)
        return joined

    def of_records(self, plan: RankPlan) -> tuple[tuple[int, ...], ...]:
        """The checksum of each record of each file."""
        return tuple(
            tuple(self._of_pieces(pieces) for pieces in file.contents) for file in plan.files
        )

    def _of_pieces(self, pieces: tuple[Piece, ...]) -> int:
        joined = 0
        for piece in pieces:
            joined = checksum.concatenate(joined, self.of(piece), piece.length)
        return joined


def _segments(extent: Extent) -> Iterator[Extent]:
    """An extent in parts of a task's size: large files are shared by all workers."""
    for start in range(0, extent.length, _TASK_BYTES):
        yield extent.cut(start, min(_TASK_BYTES, extent.length - start))


def _tasks(
    plan: RankPlan, folder: TemporaryFolder, derivations: Mapping[Extent, Derivation]
) -> Iterator[CopyTask]:
    """The work of one rank folder, in order of its bytes."""
    for file in plan.files:
        path = folder.file(file.name)
        moves: list[Move] = []
        length = 0
        for move in _moves(file, derivations):
            if moves and (length + move.piece.length > _TASK_BYTES or len(moves) >= _TASK_MOVES):
                yield CopyTask(path, tuple(moves))
                moves, length = [], 0
            moves.append(move)
            length += move.piece.length
        yield CopyTask(path, tuple(moves))


def _moves(file: FilePlan, derivations: Mapping[Extent, Derivation]) -> Iterator[Move]:
    for offset, pieces in file.places():
        position = offset
        for piece in pieces:
            match piece:
                case Extent():
                    derivation = derivations.get(piece)
                    for gap in derivation.gaps if derivation is not None else ():
                        yield from (Move(s, None, has_checksum=True) for s in _segments(gap))
                    for segment in _segments(piece):
                        yield Move(segment, position, has_checksum=derivation is None)
                        position += segment.length
                case Literal():
                    yield Move(piece, position, has_checksum=False)
                    position += piece.length
                case Zeros(length):
                    position += length  # the file began as a hole


@dataclass(eq=False, slots=True)
class _RankInWork:
    """A rank folder between its first task and its publication."""

    plan: RankPlan
    folder: TemporaryFolder
    ledger: _Ledger
    context: Any
    tasks_open: int = 0
    is_submitted: bool = False
    """All its tasks are with the workers."""
    is_finishing: bool = False


class Copier(Generic[Result]):
    """Copies planned rank folders with a pool of workers.

    ``finish`` runs in a worker when all bytes of a rank are there: it gets the family's context,
    the plan, the temporary folder, and the CRC-32 of each record of each file, and publishes the
    folder.
    """

    def __init__(
        self,
        workers: Workers,
        save_dir: Path,
        finish: Callable[[Any, RankPlan, TemporaryFolder, tuple[tuple[int, ...], ...]], Result],
        advance: Callable[[int], None],
    ) -> None:
        self._workers = workers
        self._save_dir = save_dir
        self._finish = finish
        self._advance = advance
        self._in_work: list[_RankInWork] = []
        """Folders that exist under a temporary name, in order of their first task."""

    def run(self, families: Iterable[FamilyCopy]) -> Iterator[Result]:
        """Copy the folders in order; what ``finish`` returned for each.

        Raises:
            CopyError: reading or writing failed; the temporary folders are gone then.
        """
        try:
            yield from self._run(families)
        except BaseException:
            self._workers.kill()  # nobody may publish a folder that is being removed
            remove_own(self._save_dir)
            raise

    def _run(self, families: Iterable[FamilyCopy]) -> Iterator[Result]:
        copying: dict[Future[tuple[int | None, ...]], tuple[_RankInWork, CopyTask]] = {}
        finishing: dict[Future[Result], _RankInWork] = {}
        work = self._work(families)
        is_over = False
        while True:
            while not is_over and len(copying) < QUEUED_PER_WORKER * self._workers.count:
                rank, task = next(work, (None, None))
                if rank is None or task is None:
                    is_over = True
                else:
                    copying[self._workers.submit(copy, task)] = (rank, task)
            for rank in self._finished():
                crc32s = rank.ledger.of_records(rank.plan)
                arguments = (rank.context, rank.plan, rank.folder, crc32s)
                finishing[self._workers.submit(self._finish, *arguments)] = rank
            if not copying and not finishing:
                return
            self._workers.wait([*copying, *finishing])
            for copied in [future for future in copying if future.done()]:
                rank, task = copying.pop(copied)
                rank.ledger.enter(task, self._workers.result_of(copied))
                rank.tasks_open -= 1
                self._advance(task.length)
            for finished in [future for future in finishing if future.done()]:
                result = self._workers.result_of(finished)
                self._in_work.remove(finishing.pop(finished))
                yield result

    def _work(self, families: Iterable[FamilyCopy]) -> Iterator[tuple[_RankInWork, CopyTask]]:
        """Every task, in turn from as many folders as there are workers: a file system lets one
        writer at a time into a file."""
        waiting = self._ranks(families)
        turns: deque[Iterator[tuple[_RankInWork, CopyTask]]] = deque()
        while True:
            turns.extend(itertools.islice(waiting, self._workers.count - len(turns)))
            if not turns:
                return
            tasks = turns.popleft()
            for found in itertools.islice(tasks, 1):
                yield found
                turns.append(tasks)

    def _ranks(
        self, families: Iterable[FamilyCopy]
    ) -> Iterator[Iterator[tuple[_RankInWork, CopyTask]]]:
        """The tasks of each rank, in order of planning."""
        for family in families:
            ledger = _Ledger(family.derivations)
            for plan in family.plans:
                yield self._tasks_of(family, plan, ledger)

    def _tasks_of(
        self, family: FamilyCopy, plan: RankPlan, ledger: _Ledger
    ) -> Iterator[tuple[_RankInWork, CopyTask]]:
        """Make a rank's folder; its tasks."""
        folder = create_folder(self._save_dir, plan)
        rank = _RankInWork(plan, folder, ledger, family.context)
        self._in_work.append(rank)
        for task in _tasks(plan, folder, family.derivations):
            rank.tasks_open += 1
            yield rank, task
        rank.is_submitted = True

    def _finished(self) -> Iterator[_RankInWork]:
        """Ranks whose bytes are all there, in order: a checksum may follow from earlier ranks."""
        for rank in self._in_work:
            if rank.tasks_open or not rank.is_submitted:
                return
            if not rank.is_finishing:
                rank.is_finishing = True
                yield rank
