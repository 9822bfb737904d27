"""A whole run on one page: survey, plan, check, copy, verify, publish."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..container.extents import Extent
from ..errors import AT_REST, CopyError
from ..megatron.layout import PipelineLayout
from ..megatron.ranks import MODEL_FILE, RankId
from ..options import CRC32, Depth, Options
from ..source import fingerprint
from ..source.files import FamilyFolders, sizes_in
from ..source.fingerprint import Identity
from ..source.inspection import facts, oddities
from ..source.proven import FamilyJob, check_alike, check_families, check_savers, prove
from ..source.survey import Survey, take_survey
from ..target import request
from ..target.plan import RankPlan
from ..verification.compare import Proof, prepare
from . import folders, manifest, signs, target_folder
from .cloning import shared_block
from .finishing import FinishContext, KeptJob, RankDone, check_copied, check_kept, finish_rank
from .listener import Listener, Phase, read_families
from .plan import Part, Plan
from .plan_family import PlanJob, PlannedFamily, RankJob, identify_rank, plan_family
from .schedule import Copier, FamilyCopy
from .share import AUTO, Share, deal, number_of_workers, wanted_share
from .share import notes as share_notes
from .siblings import Siblings
from .workers import Workers

log = logging.getLogger("pp_to_vpp")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has done."""

    plan: Plan
    ranks: tuple[RankDone, ...]
    seconds: float
    depth: Depth
    checksums: str
    """Of the records written."""
    tracker: str
    """What became of the tracker file."""
    left_behind: tuple[Path, ...] = ()
    """What could not be removed of earlier runs."""

    @property
    def layouts(self) -> tuple[PipelineLayout, PipelineLayout]:
        """Of source and target."""
        return self.plan.layouts

    @property
    def written(self) -> int:
        """Bytes written by this run."""
        return sum(rank.length for rank in self.ranks if not rank.was_kept)


def plan(options: Options, listener: Listener) -> Plan:
    """A conversion as it would be: the source is read and proved, the target, if one is named,
    looked at, and nothing is written.

    Raises:
        ConversionError: whatever would prevent it.
    """
    with _planned(options, listener) as run:
        if options.save_dir is not None:
            run.check_target(options.save_dir)
        return run.plan


def convert(options: Options, listener: Listener) -> Outcome:
    """Convert a checkpoint.

    Raises:
        ConversionError: whatever prevents it. Nothing that is not whole has been published.
    """
    began, save_dir = time.monotonic(), options.save_dir
    assert save_dir is not None, "options were checked"
    with (
        Siblings(
            options.load_dir, save_dir, wanted_share(options), is_launched=options.share == AUTO
        ) as siblings,
        _planned(options, listener) as run,
    ):
        done = run.write(save_dir, siblings)
    ranks = run.plan.folders
    if target_folder.is_whole(save_dir, ranks):
        manifest.finish(save_dir, run.plan.manifest, options.depth)
        siblings.forget()
    tracker = "left to the first process"
    if run.plan.writes_tracker:
        tracker = target_folder.write_tracker(save_dir, ranks)
    return Outcome(
        plan=run.plan,
        ranks=tuple(sorted(done, key=lambda rank: rank.id)),
        seconds=time.monotonic() - began,
        depth=options.depth,
        checksums=options.checksums,
        tracker=tracker,
        left_behind=_left_behind(save_dir, run.plan.ranks),
    )


def _left_behind(save_dir: Path, own: Sequence[RankPlan]) -> tuple[Path, ...]:
    """What cannot be removed even now; a look at the end that fails is no harm."""
    with suppress(CopyError):
        folders.clear_leftovers(save_dir, [plan.id.folder for plan in own])
        return folders.left_behind(save_dir)
    return ()


@contextmanager
def _planned(options: Options, listener: Listener) -> Iterator[_Run]:
    """A run whose plan stands, with its workers.

    Raises:
        ConversionError: what is asked for cannot be.
    """
    share = wanted_share(options)
    survey = take_survey(str(options.load_dir), follow_links=options.follow_links)
    pp_ranks = request.wanted_ranks(options, survey.arguments)
    if options.save_dir is not None:
        target_folder.check_place(options.load_dir, options.save_dir)
    target = request.wanted_target(options, survey.arguments)
    prepare(options.depth)
    block = _block(options.save_dir, survey)
    pp_size = target.pp_size or survey.arguments.pp_size
    members = [survey.family(key) for key in survey.families]
    part = None if share is None else _part_of(share, members, pp_ranks, pp_size)
    wanted = {
        index: tuple(p for p in pp_ranks if part is None or each.at(p, pp_size) in part.ranks)
        for index, each in enumerate(members)
    }
    # Who has nothing to do knows the target by one family all the same.
    read = [index for index, own in wanted.items() if own] or [0]
    count = number_of_workers(options)
    if options.is_dry_run:
        count = min(count, len(survey.families))
    with Workers(count, listener.looked) as workers:
        jobs = [
            PlanJob(
                members[index],
                survey.told,
                wanted[index],
                target,
                not options.is_dry_run,
                block,
                options.depth is Depth.FULL,
            )
            for index in read
        ]
        families = read_families(workers, plan_family, jobs, listener)
        proven = [family.proven for family in families]
        (check_families if part is None else check_alike)(proven, survey.path)
        known = {rank: of for family in proven for rank, of in family.identities.items()}
        known_by = manifest.manifest_of(
            fingerprint_source(workers, survey, known, is_shared=share is not None),
            survey.iteration,
            (families[0].proven.source, families[0].target),
            block,
            options,
        )
        found = _plan_of(options, survey, families, known_by, part)
        listener.planned(found)
        yield _Run(workers, options, found, families, listener)


def _part_of(
    share: Share, families: Iterable[FamilyFolders], pp_ranks: Sequence[int], pp_size: int
) -> Part:
    """What one of several processes does. The bytes of the source decide, which every process
    knows before it has read anything; a family of the target has as many."""
    sizes: dict[RankId, int] = {}
    for family in families:
        source = {
            p: sum(sizes_in(Path(family.directory) / rank.folder))
            for p, rank in family.ranks.items()
        }
        mean = sum(source.values()) // pp_size
        is_same = len(source) == pp_size
        sizes |= {family.at(p, pp_size): source[p] if is_same else mean for p in pp_ranks}
    dealt = deal(sizes, share.count)
    own = dealt.hands[share.index]
    awaited = {rank: size for rank, size in sizes.items() if rank not in own}
    return Part(share, own, dealt.largest_over_mean, awaited)


def _block(save_dir: Path | None, survey: Survey) -> int:
    """Bytes of the blocks that the target may share with the source; 1 if it cannot. A conversion
    that has begun goes on as it began."""
    if save_dir is None:
        return 1
    found = manifest.read_manifest(save_dir)
    if found is not None:
        return manifest.block_of(found)
    first = Path(survey.path) / survey.ranks[0].folder / MODEL_FILE
    return shared_block(first, save_dir)


def _plan_of(
    options: Options,
    survey: Survey,
    families: Sequence[PlannedFamily],
    known_by: Mapping[str, Any],
    part: Part | None,
) -> Plan:
    first = families[0]
    proven = [family.proven for family in families]
    ranks = tuple(rank for family in families for rank in family.ranks)
    shared = sum(rank.shared for rank in ranks)
    return Plan(
        survey=survey,
        save_dir=options.save_dir,
        source=proven[0].source,
        target=first.target,
        no_save_optim=options.no_save_optim,
        manifest=known_by,
        ranks=ranks,
        facts=facts(survey.arguments, proven[0]),
        notes=(
            *request.notes(proven[0].source, first.target),
            *share_notes(options),
            *target_folder.notes(options.save_dir, survey.iteration),
            *([f"{shared} bytes are shared with the source, and need no room"] if shared else []),
            *(
                f"not copied, for it is of other ranks: {name}"
                for f in families
                for name in f.left_behind
            ),
            *oddities(survey, proven),
        ),
        part=part,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A run whose plan stands, at its target."""

    workers: Workers
    options: Options
    plan: Plan
    families: Sequence[PlannedFamily]
    listener: Listener

    def check_target(self, save_dir: Path) -> set[RankId]:
        """Hold what is there to this conversion, and the room to what is missing; the own rank
        folders that are there. A dry run only looks.

        Raises:
            UsageError: another conversion has the target, or it exists.
            CopyError: there is too little room.
        """
        resume = self.options.resume
        manifest.check(save_dir, self.plan.manifest)
        self._check_others(save_dir)
        own = self.plan.ranks
        if self.options.is_dry_run:
            there = target_folder.filled(save_dir, own, resume=resume)
        else:
            there = target_folder.existing(save_dir, own, self.listener, resume=resume)
        target_folder.check_space(save_dir, [plan for plan in own if plan.id not in there])
        return there

    def _check_others(self, save_dir: Path) -> None:
        target_folder.check_others(
            self.workers, save_dir, self.plan.folders, self.plan.ranks, self.plan.target
        )

    def write(self, save_dir: Path, siblings: Siblings) -> list[RankDone]:
        """Keep what is there, copy what is missing."""
        there = self.check_target(save_dir)
        is_first = manifest.claim(save_dir, self.plan.manifest)
        try:
            with signs.Heartbeat(save_dir), folders.shown_at_work(save_dir, self.plan.part):
                done = self._copy(save_dir, there, siblings)
        except BaseException:
            if is_first:
                manifest.withdraw(save_dir)
            raise
        manifest.claim(save_dir, self.plan.manifest)  # it is there still, and ours
        if self.plan.writes_tracker:  # of processes that share, who waited for all reads all
            self._check_others(save_dir)
        return done

    def _check_source(self) -> None:
        """Answer what only all families together can show, before the first process ends what
        several have shared: each of them has read its own.

        Raises:
            CheckpointError: they are not of one save, or optimizer state is missing.
        """
        survey = self.plan.survey
        families = [family.proven for family in self.families]
        read = {each.name for each in families if len(each.identities) == len(each.folders.ranks)}
        rest = [FamilyJob(survey.family(key), survey.told) for key in survey.families]
        rest = [job for job in rest if min(job.folders.ranks.values()).folder not in read]
        families = [each for each in families if each.name in read]
        families += self.workers.map(prove, rest)
        check_families(families, survey.path)
        known = {rank: of for family in families for rank, of in family.identities.items()}
        found = fingerprint_source(self.workers, survey, known)
        if found != self.plan.manifest["source"]["fingerprint"]:
            raise CopyError.of(survey.path, "the source changed during the run", cure=AT_REST)

    def _copy(self, save_dir: Path, there: set[RankId], siblings: Siblings) -> list[RankDone]:
        families = self.families
        depth, listener = self.options.depth, self.listener
        proofs = [
            Proof.of(family.proven, family.target, depth, no_save_optim=self.options.no_save_optim)
            for family in families
        ]
        kept = [
            KeptJob(save_dir, plan, proof)
            for family, proof in zip(families, proofs, strict=True)
            for plan in family.ranks
            if plan.id in there
        ]
        if kept:
            listener.began(Phase.CHECK, sum(job.plan.length for job in kept))
        done = []
        known: dict[tuple[int, int], dict[Extent, int]] = {}
        for rank, found in self.workers.map(check_kept, kept):
            listener.advanced(rank.length)
            log.debug("%s: kept, %.1f s", rank.id.folder, rank.seconds)
            done.append(rank)
            known.setdefault(rank.id.family, {}).update(found)
        others = target_folder.Others(save_dir, self.plan.awaited, listener, siblings.check)
        missing = sum(plan.length for plan in self.plan.ranks if plan.id not in there)
        read_back = missing if depth is Depth.FULL else 0
        awaited = sum(self.plan.awaited.values())
        listener.began(Phase.COPY, missing + read_back + awaited)
        copier = Copier(self.workers, save_dir, finish_rank, listener.advanced, check_copied)
        copies = _copies(
            zip(families, proofs, strict=True),
            there,
            known,
            has_checksums=self.options.checksums == CRC32,
        )
        for rank in copier.run(copies):
            listener.advanced(rank.length if read_back else 0)
            listener.finished(rank.id.folder)
            log.info("%s: %d bytes written", rank.id.folder, rank.length)
            log.debug("%s: %.1f s from its first byte", rank.id.folder, rank.seconds)
            done.append(rank)
            others.look()
            siblings.check()
        listener.advanced(missing - copier.written)  # what frames the records
        if self.plan.awaited:
            self._check_source()
        siblings.has_done_its_part()
        others.wait()
        return done


def _copies(
    families: Iterable[tuple[PlannedFamily, Proof]],
    kept: set[RankId],
    known: Mapping[tuple[int, int], Mapping[Extent, int]],
    *,
    has_checksums: bool,
) -> Iterator[FamilyCopy]:
    """What is left to copy, family by family, given what was read of the source already."""
    for family, proof in families:
        plans = tuple(rank for rank in family.ranks if rank.id not in kept)
        derivations = {} if kept or not has_checksums else family.derivations
        first = min(family.proven.folders.ranks.values())
        context = FinishContext(proof, family.sources, known.get(first.family, {}))
        yield FamilyCopy(plans, derivations, context, proof.depth is Depth.FULL, has_checksums)


def fingerprint_source(
    workers: Workers,
    survey: Survey,
    known: Mapping[RankId, Identity] | None = None,
    *,
    is_shared: bool = False,
) -> str:
    """The fingerprint of the whole source: all its folders are read, and are of one save.

    Args:
        workers: read the folders.
        survey: the source.
        known: what the folders that have been read are known by.
        is_shared: others read the rest, of which the directories of records are enough here.

    Raises:
        CheckpointError: a folder cannot be read, is of another save, or not what its name says.
    """
    found = dict(known or {})
    rest = [rank for rank in survey.ranks if rank not in found]
    told = None if is_shared else survey.told
    jobs = [RankJob(survey.path, rank, told) for rank in rest]
    found.update(zip(rest, workers.map(identify_rank, jobs), strict=True))
    savers = {rank: identity.saver for rank, identity in found.items()}
    check_savers(savers, survey.arguments.processes, survey.path)
    return fingerprint.of_checkpoint(found)
