"""Copying of planned bytes, shared by the workers in tasks of a few dozen megabytes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..container.crc32 import Derivation, Ledger
from ..container.extents import Extent, Literal, Zeros
from ..target.plan import FilePlan, RankPlan
from .copying import CopyTask, Move, copy
from .folders import TemporaryFolder, create_folder, remove_own
from .workers import QUEUED_PER_WORKER, Workers

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
    """Handed on to ``finish``."""


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
                        yield from (
                            Move(s, None, has_checksum=True) for s in gap.segments(_TASK_BYTES)
                        )
                    for segment in piece.segments(_TASK_BYTES):
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
    ledger: Ledger
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
                files = rank.plan.files
                crc32s = tuple(tuple(map(rank.ledger.of, file.contents)) for file in files)
                arguments = (rank.context, rank.plan, rank.folder, crc32s)
                finishing[self._workers.submit(self._finish, *arguments)] = rank
            if not copying and not finishing:
                return
            self._workers.wait([*copying, *finishing])
            for copied in [future for future in copying if future.done()]:
                rank, task = copying.pop(copied)
                found = self._workers.result_of(copied)
                rank.ledger.enter((move.piece for move in task.moves), found)
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
            ledger = Ledger(family.derivations, _TASK_BYTES)
            for plan in family.plans:
                yield self._tasks_of(family, plan, ledger)

    def _tasks_of(
        self, family: FamilyCopy, plan: RankPlan, ledger: Ledger
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
