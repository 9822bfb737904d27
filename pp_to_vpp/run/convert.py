"""A whole run on one page: survey, plan, check, copy, verify, publish."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..container.extents import Extent
from ..megatron.megatron import Megatron
from ..megatron.ranks import MODEL_FILE, RankId
from ..options import CRC32, Depth, Options
from ..source import fingerprint
from ..source.survey import Survey, take_survey
from ..target import request
from ..target.plan import RankPlan
from ..verify.compare import Proof, prepare
from . import folders, manifest, signs, target_folder
from .cloning import shared_block
from .finishing import FinishContext, KeptJob, RankDone, check_copied, check_kept, finish_rank
from .listener import Listener, Phase
from .plan_family import (
    PlanJob,
    PlannedFamily,
    RankJob,
    check_families,
    fingerprint_rank,
    plan_family,
)
from .schedule import Copier, FamilyCopy
from .share import Share, deal, number_of_workers, wanted_share
from .workers import Workers

log = logging.getLogger("pp_to_vpp")


@dataclass(frozen=True, slots=True)
class Part:
    """What one of several processes does."""

    share: Share
    ranks: frozenset[RankId]
    """The rank folders that it writes."""
    length: int
    """Their bytes."""
    largest_over_mean: float
    """Of the bytes of all processes: 1 if they share evenly."""

    def __str__(self) -> str:
        return str(self.share)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run before its first byte: what will be done."""

    survey: Survey
    save_dir: Path | None
    source: Megatron
    """The run that saved the source."""
    target: Megatron
    """The run that will load the target."""
    manifest: Mapping[str, Any]
    """What this conversion is known by."""
    ranks: tuple[RankPlan, ...]
    """What the target will hold; after a dry run, without contents."""
    facts: tuple[str, ...]
    """What the source was found to be."""
    notes: tuple[str, ...]
    """What the user should know."""
    part: Part | None = None
    """What this process does, if several share the work."""

    @property
    def length(self) -> int:
        """Bytes of the target."""
        return sum(rank.length for rank in self.ranks)

    @property
    def own(self) -> tuple[RankPlan, ...]:
        """What this process writes."""
        part = self.part
        return tuple(rank for rank in self.ranks if part is None or rank.id in part.ranks)

    @property
    def awaited(self) -> tuple[RankPlan, ...]:
        """What others write and this process waits for."""
        part = self.part
        if part is None or not self.writes_tracker:
            return ()
        return tuple(rank for rank in self.ranks if rank.id not in part.ranks)

    @property
    def writes_tracker(self) -> bool:
        """Whether this process waits for the others, and ends the conversion."""
        return self.part is None or self.part.share.index == 0

    @property
    def launch_flags(self) -> str:
        """Megatron's flags to train from the target."""
        arguments = self.target.arguments
        flags = arguments.placement.launch_flags(arguments.num_layers, arguments.pp_size)
        if arguments.overlaps_param_gather_with_step:
            flags += " --overlap-param-gather-with-optimizer-step"
        return flags or "(none: plain pipeline parallelism)"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has done."""

    ranks: tuple[RankDone, ...]
    seconds: float
    depth: Depth
    checksums: str
    """Of the records written."""
    tracker: str
    """What became of the tracker file."""

    @property
    def written(self) -> int:
        """Bytes written by this run."""
        return sum(rank.length for rank in self.ranks if not rank.was_kept)


def convert(options: Options, listener: Listener) -> tuple[Prepared, Outcome | None]:
    """Convert a checkpoint; the plan and what was done (None after a dry run).

    Raises:
        ConversionError: whatever prevents it. Nothing that is not whole has been published.
    """
    began = time.monotonic()
    share = wanted_share(options.share, shares_by_hand=options.pp_ranks is not None)
    survey = take_survey(str(options.load_dir), follow_links=options.follow_links)
    pp_ranks = request.wanted_ranks(options, survey.arguments)
    if options.save_dir is not None:
        target_folder.check_place(options.load_dir, options.save_dir)
    target = request.wanted_target(options, survey.arguments)
    prepare(options.depth)
    block = _block(options.save_dir, survey)
    with Workers(number_of_workers(options.processes), listener.looked) as workers:
        needs_contents = not options.is_dry_run and share is None
        jobs = [
            PlanJob(
                survey.family(key),
                survey.told,
                pp_ranks,
                target,
                needs_contents,
                block,
                options.depth is Depth.FULL,
            )
            for key in survey.families
        ]
        families = _plan(workers, jobs, listener)
        check_families(families, survey.path)
        known_by = manifest.manifest_of(
            _fingerprint(workers, survey, families),
            survey.iteration,
            families[0].target,
            block,
            options.checksums,
        )
        prepared = _prepare(options, survey, families, known_by)
        if share is not None:
            prepared = replace(prepared, part=_part_of(share, prepared.ranks))
        listener.planned(prepared)
        run = _Run(workers, options, prepared, listener)
        if options.is_dry_run or options.save_dir is None:
            if options.save_dir is not None:
                run.check_target(options.save_dir)
            return prepared, None
        if prepared.part is not None:
            own = prepared.part.ranks
            jobs = [job.narrowed_to(own) for job in jobs if job.ranks & own]
            families = _plan(workers, jobs, listener)
        done = run.write(options.save_dir, families)
    if target_folder.is_whole(options.save_dir, survey.ranks):
        manifest.finish(options.save_dir, prepared.manifest, options.depth)
    outcome = Outcome(
        ranks=tuple(sorted(done, key=lambda rank: rank.id)),
        seconds=time.monotonic() - began,
        depth=options.depth,
        checksums=options.checksums,
        tracker=target_folder.write_tracker(options.save_dir, survey.ranks)
        if prepared.writes_tracker
        else "left to the first process",
    )
    return prepared, outcome


def _plan(workers: Workers, jobs: Sequence[PlanJob], listener: Listener) -> list[PlannedFamily]:
    """The plans of families."""
    listener.began(Phase.PLAN, sum(len(job.folders.ranks) for job in jobs))
    families = []
    for family in workers.map(plan_family, jobs):
        families.append(family)
        listener.advanced(len(family.folders.ranks))
        log.debug("%s and its family: planned", family.ranks[0].id.folder)
    return families


def _fingerprint(workers: Workers, survey: Survey, families: Sequence[PlannedFamily]) -> str:
    known = {rank: text for family in families for rank, text in family.fingerprints.items()}
    return fingerprint_source(workers, survey, known)


def _part_of(share: Share, ranks: Sequence[RankPlan]) -> Part:
    dealt = deal({rank.id: rank.length for rank in ranks}, share.count)
    own = dealt.hands[share.index]
    return Part(share, own, dealt.lengths[share.index], dealt.largest_over_mean)


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


def _prepare(
    options: Options, survey: Survey, families: Sequence[PlannedFamily], known_by: Mapping[str, Any]
) -> Prepared:
    first = families[0]
    arguments = survey.arguments
    sizes = (
        f"TP {arguments.tp_size}, PP {arguments.pp_size}, EP {arguments.ep_size}, "
        f"DP {arguments.dp_size}, {arguments.num_layers} layers"
    )
    if arguments.mtp_num_layers:
        sizes += f", {arguments.mtp_num_layers} MTP layers"
    facts = [first.kind.value, sizes]
    if first.rounding:
        facts.append(f"16-bit weights are their main parameters {first.rounding}")
    if arguments.clips_qk:
        facts.append("but for those that --qk-clip scales, which cannot be compared")
    odd = [name for name in survey.told if name.startswith("entry ")]
    left = [name for family in families for name in family.left_behind]
    left += [name for name in survey.ignored if not name.startswith(".")]
    ranks = tuple(rank for family in families for rank in family.ranks)
    shared = sum(rank.shared for rank in ranks)
    return Prepared(
        survey=survey,
        save_dir=options.save_dir,
        source=first.source,
        target=first.target,
        manifest=known_by,
        ranks=ranks,
        facts=tuple(facts),
        notes=(
            *request.notes(first.source, first.target),
            *target_folder.notes(options.save_dir, survey.iteration),
            *(f"{name} is unknown, alike in all files, and copied" for name in odd),
            *([f"{shared} bytes are shared with the source, and need no room"] if shared else []),
            *(f"not copied, no part of a checkpoint: {name}" for name in left),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A run whose plan stands, at its target."""

    workers: Workers
    options: Options
    prepared: Prepared
    listener: Listener

    def check_target(self, save_dir: Path) -> set[RankId]:
        """Hold what is there to this conversion, and the room to what is missing; the own rank
        folders that are there. A dry run only looks.

        Raises:
            UsageError: another conversion has the target, or it exists.
            CopyError: there is too little room.
        """
        resume = self.options.resume
        manifest.check(save_dir, self.prepared.manifest)
        self._check_others(save_dir)
        own = self.prepared.own
        if self.options.is_dry_run:
            there = target_folder.filled(save_dir, own, resume=resume)
        else:
            there = target_folder.existing(save_dir, own, self.listener, resume=resume)
        target_folder.check_space(save_dir, [plan for plan in own if plan.id not in there])
        return there

    def _check_others(self, save_dir: Path) -> None:
        prepared = self.prepared
        target_folder.check_others(
            self.workers,
            save_dir,
            prepared.survey.ranks,
            prepared.own,
            prepared.target.layout,
            prepared.source.rules,
        )

    def write(self, save_dir: Path, families: Sequence[PlannedFamily]) -> list[RankDone]:
        """Keep what is there, copy what is missing.

        Args:
            save_dir: the target.
            families: with the contents of the own rank folders.
        """
        there = self.check_target(save_dir)
        is_first = manifest.claim(save_dir, self.prepared.manifest)
        try:
            with signs.Heartbeat(save_dir), folders.shown_at_work(save_dir, self.prepared.part):
                done = self._copy(save_dir, families, there)
        except BaseException:
            if is_first:
                manifest.withdraw(save_dir)
            raise
        manifest.claim(save_dir, self.prepared.manifest)  # it is there still, and ours
        if self.prepared.writes_tracker:  # of processes that share, who waited for all reads all
            self._check_others(save_dir)
        return done

    def _copy(
        self, save_dir: Path, families: Sequence[PlannedFamily], there: set[RankId]
    ) -> list[RankDone]:
        depth, listener = self.options.depth, self.listener
        proofs = [
            Proof(family.folders, family.source.rules, family.frozen, family.target.layout, depth)
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
        others = target_folder.Others(save_dir, self.prepared.awaited, listener)
        missing = sum(plan.length for plan in self.prepared.own if plan.id not in there)
        read_back = missing if depth is Depth.FULL else 0
        awaited = sum(plan.length for plan in self.prepared.awaited)
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
        context = FinishContext(proof, family.sources, known.get(family.ranks[0].id.family, {}))
        yield FamilyCopy(plans, derivations, context, proof.depth is Depth.FULL, has_checksums)


def fingerprint_source(
    workers: Workers, survey: Survey, known: Mapping[RankId, str] | None = None
) -> str:
    """The fingerprint of the whole source: all its folders are read, and are of one save.

    Args:
        workers: read the folders.
        survey: the source.
        known: fingerprints of folders that have been read.

    Raises:
        CheckpointError: a folder cannot be read, or is of another save.
    """
    found = dict(known or {})
    rest = [rank for rank in survey.ranks if rank not in found]
    jobs = [RankJob(survey.path, rank, survey.told) for rank in rest]
    found.update(zip(rest, workers.map(fingerprint_rank, jobs), strict=True))
    return fingerprint.of_checkpoint(found)
