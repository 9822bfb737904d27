"""Several processes share one conversion: which one this is, and which rank folders it does.

A launcher starts, watches and ends the processes, and tells each in its environment which of how
many it is. Who does what follows from the sizes of the target's folders alone, so that nobody need
talk: every process deals them out, and takes its own.
"""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import UsageError
from ..megatron.ranks import RankId
from ..options import Options

AUTO = "auto"
_OPTION = "--share"
_NOT_LAUNCHED = "no launcher tells which of how many processes this is"
TOGETHER = f"several processes share one conversion with {_OPTION} {AUTO}"
_MAX_DEFAULT_WORKERS = 8
"""More seldom help: then the file system is what is waited for."""
_NOTICEABLE = 1.01
"""By what factor the largest share may exceed that of a finer deal."""


@dataclass(frozen=True, slots=True)
class Share:
    """This process of several."""

    index: int
    """From 0. The first one waits for the others, and writes the tracker."""
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, slots=True)
class _Launcher:
    """The names of the variables by which a launcher tells a process its place."""

    name: str
    index: str
    counts: tuple[str, ...]
    """The first one that is there tells the number of processes."""
    counts_here: tuple[str, ...]
    """Likewise that of those on this host."""


_LAUNCHERS = (
    _Launcher("torchrun", "RANK", ("WORLD_SIZE",), ("LOCAL_WORLD_SIZE",)),
    _Launcher(
        "mpirun", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_SIZE",)
    ),
    _Launcher("mpirun", "PMI_RANK", ("PMI_SIZE",), ("MPI_LOCALNRANKS",)),
    _Launcher(
        "srun",
        "SLURM_PROCID",
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
    ),
)
"""From the innermost: torchrun and mpirun may run in a Slurm step, which then tells of nodes."""


@dataclass(frozen=True, slots=True)
class Launched:
    """What a launcher tells this process."""

    launcher: str
    share: Share
    here: int
    """Processes on this host."""


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """The place that a launcher gave this process; None if none started it."""
    for launcher in _LAUNCHERS:
        index = _number(environment.get(launcher.index))
        count = _first_number(environment, launcher.counts)
        if index is None or count is None or not index < count:
            continue
        if launcher.name == "srun" and _is_batch_script(environment):
            continue
        here = _first_number(environment, launcher.counts_here) or 1
        return Launched(launcher.name, Share(index, count), min(here, count))
    return None


def _is_batch_script(environment: Mapping[str, str]) -> bool:
    """Whether Slurm runs this as the script of a job, which is one process, and no step of it:
    there too it sets the number of tasks that the job may have."""
    step = {"SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"}
    return "SLURM_JOB_ID" in environment and not step & environment.keys()


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,9}", text) else None


def _first_number(environment: Mapping[str, str], names: Iterable[str]) -> int | None:
    """The number in the first of some variables that is there; of ``4(x2),3`` the largest."""
    for name in names:
        if name in environment:
            parts = re.sub(r"\(x[0-9]+\)", "", environment[name]).split(",")
            numbers = [number for number in map(_number, parts) if number is not None]
            return max(numbers, default=None)
    return None


def _parse(text: str) -> Share:
    """``--share`` by hand, such as ``2/16``.

    Raises:
        UsageError: it is no share.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UsageError(f"{_OPTION}: {text} is neither {AUTO} nor I/N with I from 0 to N-1")
    return Share(int(match[1]), int(match[2]))


def wanted_share(options: Options, environment: Mapping[str, str] = os.environ) -> Share | None:
    """Which process of how many this is to be; None if it does the whole work.

    Only ``--share auto`` reads a launcher's variables: whatever one of its processes starts, and a
    shell in its container, inherits them, and may be the only one that converts.

    Raises:
        UsageError: ``--share`` is no share, or no launcher tells what ``auto`` is.
    """
    if options.share is None:
        return None
    if options.share != AUTO:
        return _parse(options.share)
    told = launched(environment)
    if told is None and not options.is_dry_run:
        raise UsageError.of(
            f"{_OPTION} {AUTO}",
            _NOT_LAUNCHED,
            expected="the variables of torchrun (RANK, WORLD_SIZE), of a Slurm step "
            "(SLURM_PROCID, SLURM_NTASKS), of Open MPI or of another MPI (PMI_RANK, PMI_SIZE)",
            cure=f"start it with torchrun, srun or mpirun, or give {_OPTION} I/N",
        )
    return None if told is None else told.share


def notes(options: Options, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What the user should know about who does the work."""
    told = launched(environment)
    if options.share == AUTO and told is None:
        return [f"{_NOT_LAUNCHED}: this is the plan of all"]
    is_told = options.share is not None or options.pp_ranks is not None
    if is_told or told is None or told.share.count == 1:
        return []
    return [
        f"by the variables of {told.launcher} this is process {told.share.index} of "
        f"{told.share.count}: it does the whole work; with {_OPTION} {AUTO} it would do share "
        f"{told.share}"
    ]


def number_of_workers(options: Options, environment: Mapping[str, str] = os.environ) -> int:
    """Worker processes: as many as the call asks for, else one for each core that this process may
    use. With ``--share auto`` the others of its host, which do the same, have their part."""
    if options.processes is not None:
        return options.processes
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = launched(environment) if options.share == AUTO else None
    return max(1, min(_MAX_DEFAULT_WORKERS, (cores or 1) // (told.here if told else 1)))


@dataclass(order=True, slots=True)
class _Hand:
    """What one process has been dealt."""

    length: int
    index: int
    ranks: list[RankId] = field(default_factory=list, compare=False)


@dataclass(frozen=True, slots=True)
class Dealt:
    """The rank folders of each process, in the order of the processes."""

    hands: tuple[frozenset[RankId], ...]
    lengths: tuple[int, ...]
    """Bytes of each."""

    @property
    def largest_over_mean(self) -> float:
        """1 if all have the same to do."""
        mean = sum(self.lengths) / len(self.lengths)
        return max(self.lengths) / mean if mean else 1.0


def deal(sizes: Mapping[RankId, int], count: int) -> Dealt:
    """Deal rank folders out to processes: the largest first, each to whoever has least.

    The folders of a family stay together, for what is read to plan one is the family, unless that
    would leave one process with noticeably more than the folders dealt singly do.

    Args:
        sizes: bytes of each folder of the target.
        count: processes.
    """
    singly = _Dealer(sizes, count)
    singly.deal([rank] for rank in sizes)
    families: dict[tuple[int, int], list[RankId]] = {}
    for rank in sorted(sizes):
        families.setdefault(rank.family, []).append(rank)
    together, limit = _Dealer(sizes, count), int(singly.largest * _NOTICEABLE)
    rest = together.deal(families.values(), limit)
    together.deal([rank] for family in rest for rank in family)
    return (together if together.largest <= limit else singly).dealt()


class _Dealer:
    def __init__(self, sizes: Mapping[RankId, int], count: int) -> None:
        self._sizes = sizes
        self._hands = [_Hand(0, index) for index in range(count)]  # a heap

    def deal(
        self, units: Iterable[Collection[RankId]], limit: int | None = None
    ) -> list[Collection[RankId]]:
        """Deal units out whole; those by which a hand would pass the limit."""
        rest = []
        lengths = [(sum(self._sizes[rank] for rank in unit), unit) for unit in units]
        for length, unit in sorted(lengths, key=lambda sized: (-sized[0], min(sized[1]))):
            hand = self._hands[0]
            if limit is not None and hand.length + length > limit:
                rest.append(unit)
            else:
                hand.ranks += unit
                hand.length += length
                heapq.heapreplace(self._hands, hand)
        return rest

    @property
    def largest(self) -> int:
        """Bytes of the largest hand."""
        return max(hand.length for hand in self._hands)

    def dealt(self) -> Dealt:
        """What everybody has."""
        hands = sorted(self._hands, key=lambda hand: hand.index)
        return Dealt(
            tuple(frozenset(hand.ranks) for hand in hands), tuple(hand.length for hand in hands)
        )
