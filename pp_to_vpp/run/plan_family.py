"""The plan of one family of ranks, made in a worker: read, prove, lay out anew, check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..checkpoint.copies import with_copies_of
from ..checkpoint.family import Family, RankFiles
from ..container.crc32 import Derivation, derivable
from ..container.extents import Extent
from ..errors import CheckpointError, ConversionError
from ..megatron.megatron import Megatron
from ..megatron.ranks import RankId
from ..source import fingerprint
from ..source.files import FamilyFolders, SourceFile, read_source_rank, source_files
from ..source.fingerprint import Identity
from ..source.proof import check_dropped, proven_family
from ..source.proven import ProvenFamily, check_told, proven, read_one_save
from ..target import check
from ..target.model import UnreadRanks
from ..target.plan import RankPlan, plan_rank
from ..target.request import Target


@dataclass(frozen=True, slots=True)
class PlanJob:
    """A family to be planned."""

    folders: FamilyFolders
    told: Mapping[str, object]
    """What all rank files of the save tell alike."""
    pp_ranks: tuple[int, ...]
    """The target ranks wanted."""
    target: Target
    needs_contents: bool
    """Whether the plans are to be carried out; else only their sizes are returned."""
    block: int = 1
    """Bytes of a block that the target may share with the source; 1 where it cannot."""
    is_verified_in_full: bool = False
    """Whether copying must find the checksum of each tensor, and derive none."""


@dataclass(frozen=True, slots=True)
class PlannedFamily:
    """What planning a family has shown."""

    proven: ProvenFamily
    """The source; of some ranks only those that are needed were read."""
    target: Megatron
    """The run that will load it."""
    ranks: tuple[RankPlan, ...]
    sources: tuple[SourceFile, ...]
    """The source files as they were."""
    left_behind: tuple[str, ...]
    """Files of the checkpoint that no rank of the target gets."""
    derivations: Mapping[Extent, Derivation]
    """Ranges whose checksums follow from others, if all ranks are copied (``crc32.derivable``)."""


def plan_family(job: PlanJob) -> PlannedFamily:
    """Plan the wanted ranks of one family.

    Raises:
        CheckpointError: the source cannot be read, proved or converted.
        LayoutError: the target cannot be built.
    """
    try:
        return _planned(job, job.pp_ranks)
    except UnreadRanks:
        return _planned(job, job.folders.ranks)


def _planned(job: PlanJob, pp_ranks: Iterable[int]) -> PlannedFamily:
    """The plan, made of some source ranks and of those that they need."""
    whole, rounding = _read(job, pp_ranks)
    target = job.target.of(whole.megatron)
    family = whole.weights_only() if job.target.no_save_optim else whole
    check_dropped(family, target)
    family = with_copies_of(family, target)
    plans: list[RankPlan] = []
    keeps_others = target.arguments.dp_size == family.megatron.arguments.dp_size
    for pp_rank in job.pp_ranks:
        others = job.folders.others(pp_rank) if keeps_others else []
        plans.append(plan_rank(family, target, pp_rank, others, job.block))
    for path, offset in check.used_twice(plans, family):
        raise CheckpointError.of(
            path,
            f"two objects of the checkpoint share its bytes at {offset}",
            cure="Megatron saves no such file: use another copy of it",
        )
    if job.is_verified_in_full:
        plans = [plan.cut(_borders(family)) for plan in plans]
    sources = source_files(sorted({path for rank in plans for path in rank.source_paths()}))
    errors = check.check(
        plans,
        family,
        {file.path: file.length for file in sources},
        is_whole=len(job.pp_ranks) == target.layout.pp_size,
    )
    if errors:
        raise ConversionError(*(f"{error}; this is an error of pp_to_vpp" for error in errors))
    return PlannedFamily(
        proven=proven(whole, rounding, job.folders),
        target=target,
        ranks=tuple(plans if job.needs_contents else map(_without_contents, plans)),
        sources=sources if job.needs_contents else (),
        left_behind=tuple(
            f"{rank.files.id.folder}/{name}"
            for pp_rank, rank in family.ranks.items()
            if not keeps_others or pp_rank >= target.layout.pp_size
            for name, _ in job.folders.others(pp_rank)
        ),
        derivations=_derivations(plans, family)
        if job.needs_contents and not job.is_verified_in_full
        else {},
    )


def _read(job: PlanJob, pp_ranks: Iterable[int]) -> tuple[Family, str]:
    """The family's inventory with some source ranks and all that the wanted ranks need, and the
    rounding."""
    files: dict[int, RankFiles] = {}
    needed = set(pp_ranks) & job.folders.ranks.keys() or {0}
    while True:
        files |= read_one_save(job.folders, needed, job.told)
        family, rounding = proven_family(dict(sorted(files.items())))
        own, target = family.megatron, job.target.of(family.megatron)
        wanted = {p for rank in job.pp_ranks for p in own.sources_of(target, rank)}
        wanted |= {own.counterpart(target, rank) for rank in job.pp_ranks}
        needed = wanted - files.keys()
        if not needed:
            return family, rounding


@dataclass(frozen=True, slots=True)
class RankJob:
    """A rank folder of which nothing is wanted but what it is known by."""

    directory: str
    id: RankId
    told: Mapping[str, object] | None
    """What all rank files tell alike; None if another process holds it to the save."""


def identify_rank(job: RankJob) -> Identity:
    """Hold a rank folder to the save, if that is wanted; what it is known by.

    Raises:
        CheckpointError: it is of another save, or cannot be read.
    """
    if job.told is None:
        return fingerprint.of_folder(job.directory, job.id)
    files = read_source_rank(job.directory, job.id)
    check_told([files], job.told)
    return fingerprint.of_rank(files, job.directory)


def _borders(family: Family) -> dict[str, list[int]]:
    """Where tensors begin and end in each file."""
    found: dict[str, set[int]] = {}
    for extent in (tensor.extent for tensor in family.manifest().values()):
        ends = {extent.offset, extent.offset + extent.length}
        found.setdefault(extent.path, set()).update(ends)
    return {path: sorted(borders) for path, borders in found.items()}


def _derivations(plans: Iterable[RankPlan], family: Family) -> Mapping[Extent, Derivation]:
    """What can be derived of what is copied, given the checksums of the source's records."""
    wanted = [extent for plan in plans for extent in plan.extents()]
    records = {
        file.path: tuple(
            (record.extent(file.path), record.crc32) for record in file.records.values()
        )
        for rank in family.ranks.values()
        for file in rank.files.all
    }
    return derivable(wanted, records)


def _without_contents(rank: RankPlan) -> RankPlan:
    files = (replace(file, contents=(), archive=None) for file in rank.files)
    return RankPlan(rank.id, tuple(files))
