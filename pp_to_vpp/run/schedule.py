"""Copying of planned bytes, shared by the workers in tasks of a few dozen megabytes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..container.crc32 import Derivation, Ledger
from ..container.extents import Extent, Literal, Zeros
from ..target.plan import FilePlan, RankPlan
from .copying import CopyTask, Move, copy
from .folders import TemporaryFolder, create_folder
from .workers import Workers

_TASK_BYTES = 64 << 20
_TASK_MOVES = 512

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class FamilyCopy:
    """The rank folders of one family to be copied, in order."""

    plans: tuple[RankPlan, ...]
    derivations: Mapping[Extent, Derivation]
    """Ranges whose checksums follow from others (see ``crc32.derivable``)."""
    context: Any
    """Handed on to ``finish`` and ``check``."""
    is_checked: bool = False
    """Whether the source is held to what was read of it before any folder is finished."""
    has_checksums: bool = True
    """Whether the records that are written have checksums."""

    @property
    def extents(self) -> Iterator[Extent]:
        """All that is copied."""
        return (extent for plan in self.plans for extent in plan.extents())


def _tasks(plan: RankPlan, folder: TemporaryFolder, copy_of: FamilyCopy) -> Iterator[CopyTask]:
    """The work of one rank folder, in order of its bytes."""
    for file in plan.files:
        path = folder.file(file.name)
        moves: list[Move] = []
        length = 0
        for move in _moves(file, copy_of):
            if moves and (length + move.piece.length > _TASK_BYTES or len(moves) >= _TASK_MOVES):
                yield CopyTask(path, tuple(moves), file.block)
                moves, length = [], 0
            moves.append(move)
            length += move.piece.length
        yield CopyTask(path, tuple(moves), file.block)


def _moves(file: FilePlan, copy_of: FamilyCopy) -> Iterator[Move]:
    is_read = copy_of.has_checksums or copy_of.is_checked
    for offset, pieces in file.places():
        position = offset
        for piece in pieces:
            match piece:
                case Extent():
                    derivation = copy_of.derivations.get(piece)
                    for gap in derivation.gaps if derivation is not None else ():
                        yield from (
                            Move(s, None, has_checksum=True) for s in gap.segments(_TASK_BYTES)
                        )
                    for segment in piece.segments(_TASK_BYTES):
                        yield Move(segment, position, has_checksum=is_read and derivation is None)
                        position += segment.length
                case Literal():
                    yield Move(piece, position, has_checksum=False)
                    position += piece.length
                case Zeros(length):
                    position += length  # the file began as a hole


@dataclass(eq=False, slots=True)
class _FamilyInWork:
    """A family from the first task of its first rank on."""

    copy: FamilyCopy
    ledger: Ledger
    ranks: list[_RankInWork] = field(default_factory=list)
    is_checking: bool = False
    is_checked: bool = False

    @property
    def is_copied(self) -> bool:
        """Whether all bytes of all its ranks are there."""
        are_all = len(self.ranks) == len(self.copy.plans)
        return are_all and all(rank.is_copied for rank in self.ranks)


@dataclass(eq=False, slots=True)
class _RankInWork:
    """A rank folder between its first task and its publication."""

    plan: RankPlan
    folder: TemporaryFolder
    family: _FamilyInWork
    tasks_open: int = 0
    is_submitted: bool = False
    """All its tasks are with the workers."""
    is_finishing: bool = False

    @property
    def is_copied(self) -> bool:
        """Whether all its bytes are there."""
        return self.is_submitted and not self.tasks_open

    def checksums(self) -> tuple[tuple[int, ...], ...] | None:
        """Of each record of each file, if they get any."""
        ledger = self.family.ledger
        if not self.family.copy.has_checksums:
            return None
        return tuple(tuple(map(ledger.of, file.contents)) for file in self.plan.files)

    def known(self) -> Mapping[Extent, int] | None:
        """Those of the ranges of the source, where it was held to them."""
        copy, ledger = self.family.copy, self.family.ledger
        return ledger.known(self.plan.extents()) if copy.is_checked else None


class Copier(Generic[Result]):
    """Copies planned rank folders with a pool of workers.

    ``finish`` runs in a worker when all bytes of a rank are there: it gets the family's context,
    the plan, the temporary folder, the CRC-32 of each record of each file if they get any, and for
    a checked family that of each range of the source; and publishes the folder. ``check`` runs
    before, when all bytes of a checked family are there: it gets the context, and the CRC-32 of
    each range.
    """

    def __init__(
        self,
        workers: Workers,
        save_dir: Path,
        finish: Callable[..., Result],
        advance: Callable[[int], None],
        check: Callable[[Any, Mapping[Extent, int]], None] = lambda _context, _found: None,
    ) -> None:
        self._workers = workers
        self._save_dir = save_dir
        self._finish = finish
        self._advance = advance
        self._check = check
        self._families: list[_FamilyInWork] = []
        """Those that have begun and are to be checked still."""
        self._in_work: list[_RankInWork] = []
        """Folders that exist under a temporary name, in order of their first task."""
        self.written = 0
        """Bytes of records, up to now."""

    def run(self, families: Iterable[FamilyCopy]) -> Iterator[Result]:
        """Copy the folders in order; what ``finish`` returned for each.

        Raises:
            CopyError: reading or writing failed; the temporary folders are gone then.
        """
        try:
            yield from self._run(families)
        except BaseException:
            self._workers.kill()  # nobody may publish a folder that is being removed
            for rank in self._in_work:
                rank.folder.remove()
            raise

    def _run(self, families: Iterable[FamilyCopy]) -> Iterator[Result]:
        copying: dict[Future[tuple[int | None, ...]], tuple[_RankInWork, CopyTask]] = {}
        checking: dict[Future[None], _FamilyInWork] = {}
        finishing: dict[Future[Result], _RankInWork] = {}
        work = self._work(families)
        is_over = False
        while True:
            while not is_over and len(copying) < self._workers.in_hand:
                rank, task = next(work, (None, None))
                if rank is None or task is None:
                    is_over = True
                else:
                    copying[self._workers.submit(copy, task)] = (rank, task)
            for family in self._unchecked():
                found = family.ledger.known(family.copy.extents)
                checking[self._workers.submit(self._check, family.copy.context, found)] = family
            for rank in self._finished():
                context = rank.family.copy.context
                arguments = (context, rank.plan, rank.folder, rank.checksums(), rank.known())
                finishing[self._workers.submit(self._finish, *arguments)] = rank
            if not copying and not checking and not finishing:
                return
            self._workers.wait([*copying, *checking, *finishing])
            for copied in [future for future in copying if future.done()]:
                rank, task = copying.pop(copied)
                crc32s = self._workers.result_of(copied)
                rank.family.ledger.enter((move.piece for move in task.moves), crc32s)
                rank.tasks_open -= 1
                self.written += task.length
                self._advance(task.length)
            for checked in [future for future in checking if future.done()]:
                self._workers.result_of(checked)
                family = checking.pop(checked)
                family.is_checked = True
                self._families.remove(family)
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
        for copy_of in families:
            family = _FamilyInWork(copy_of, Ledger(copy_of.derivations, _TASK_BYTES))
            if copy_of.is_checked:
                self._families.append(family)
            for plan in copy_of.plans:
                yield self._tasks_of(family, plan)

    def _tasks_of(
        self, family: _FamilyInWork, plan: RankPlan
    ) -> Iterator[tuple[_RankInWork, CopyTask]]:
        """Make a rank's folder; its tasks."""
        folder = create_folder(self._save_dir, plan)
        rank = _RankInWork(plan, folder, family)
        family.ranks.append(rank)
        self._in_work.append(rank)
        for task in _tasks(plan, folder, family.copy):
            rank.tasks_open += 1
            yield rank, task
        rank.is_submitted = True

    def _unchecked(self) -> Iterator[_FamilyInWork]:
        """Families whose bytes are all there."""
        for family in self._families:
            if family.is_copied and not family.is_checking:
                family.is_checking = True
                yield family

    def _finished(self) -> Iterator[_RankInWork]:
        """Ranks whose bytes are all there, in order: a checksum may follow from earlier ranks."""
        for rank in self._in_work:
            family = rank.family
            if not rank.is_copied or family.is_checked != family.copy.is_checked:
                return
            if not rank.is_finishing:
                rank.is_finishing = True
                yield rank
