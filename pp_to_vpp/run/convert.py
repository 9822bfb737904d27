"""A whole run on one page: survey, plan, check, copy, verify, publish."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.family import TensorName
from ..errors import ANOTHER_COPY, CheckpointError, problem
from ..megatron.megatron import Megatron
from ..megatron.ranks import RankId
from ..options import Depth, Options
from ..source import fingerprint
from ..source.survey import Survey, take_survey
from ..target import request
from ..target.plan import RankPlan
from ..verify.compare import Proof, prepare
from ..verify.digests import digest_folder
from . import manifest, target_folder
from .finishing import FinishContext, KeptJob, RankDone, check_kept, finish_rank
from .plan_family import (
    PlanJob,
    PlannedFamily,
    RankJob,
    check_families,
    fingerprint_rank,
    plan_family,
)
from .schedule import Copier, FamilyCopy
from .workers import Workers

log = logging.getLogger("pp_to_vpp")


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

    @property
    def length(self) -> int:
        """Bytes of the target."""
        return sum(rank.length for rank in self.ranks)

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
    tracker: str
    """What became of the tracker file."""

    @property
    def written(self) -> int:
        """Bytes written by this run."""
        return sum(rank.length for rank in self.ranks if not rank.was_kept)


@dataclass(slots=True)
class Listener:
    """Who wants to hear of a run; the functions do nothing unless replaced."""

    planned: Callable[[Prepared], None] = field(default=lambda _: None)
    """The plan stands, and no byte has been written."""
    started: Callable[[int], None] = field(default=lambda _: None)
    """So many bytes will be written."""
    advanced: Callable[[int], None] = field(default=lambda _: None)
    """So many more are."""


def convert(options: Options, listener: Listener) -> tuple[Prepared, Outcome | None]:
    """Convert a checkpoint; the plan and what was done (None after a dry run).

    Raises:
        ConversionError: whatever prevents it. Nothing that is not whole has been published.
    """
    began = time.monotonic()
    survey = take_survey(str(options.load_dir), follow_links=options.follow_links)
    pp_ranks = request.wanted_ranks(options, survey.arguments)
    if options.save_dir is not None:
        target_folder.check_place(options.load_dir, options.save_dir)
    target = request.wanted_target(options, survey.arguments)
    prepare(options.depth)
    with Workers(options.processes) as workers:
        jobs = [
            PlanJob(survey.family(key), survey.told, pp_ranks, target, not options.is_dry_run)
            for key in survey.families
        ]
        families = list(workers.map(plan_family, jobs))
        check_families(families, survey.path)
        known = [family.fingerprints for family in families]
        source = fingerprint_source(workers, survey, dict(i for f in known for i in f.items()))
        prepared = _prepare(options, survey, families, source)
        listener.planned(prepared)
        if options.is_dry_run or options.save_dir is None:
            return prepared, None
        done = _write(workers, options, options.save_dir, prepared, families, listener)
    if target_folder.is_whole(options.save_dir, survey.ranks):
        manifest.finish(options.save_dir, prepared.manifest, options.depth)
    outcome = Outcome(
        ranks=tuple(sorted(done, key=lambda rank: rank.id)),
        seconds=time.monotonic() - began,
        depth=options.depth,
        tracker=target_folder.write_tracker(options.save_dir, survey.ranks),
    )
    return prepared, outcome


def _prepare(
    options: Options, survey: Survey, families: Sequence[PlannedFamily], known_by: str
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
    return Prepared(
        survey=survey,
        save_dir=options.save_dir,
        source=first.source,
        target=first.target,
        manifest=manifest.manifest_of(known_by, survey.iteration, first.target),
        ranks=tuple(rank for family in families for rank in family.ranks),
        facts=tuple(facts),
        notes=(
            *request.notes(first.source, first.target),
            *(f"{name} is unknown, alike in all files, and copied" for name in odd),
            *(f"not copied, no part of a checkpoint: {name}" for name in left),
        ),
    )


def _write(
    workers: Workers,
    options: Options,
    save_dir: Path,
    prepared: Prepared,
    families: Sequence[PlannedFamily],
    listener: Listener,
) -> list[RankDone]:
    """Keep what is there, copy what is missing."""

    def check_others() -> None:
        target_folder.check_others(
            workers,
            save_dir,
            prepared.survey.ranks,
            prepared.ranks,
            prepared.target.layout,
            prepared.source.rules,
        )

    manifest.check(save_dir, prepared.manifest)
    check_others()
    there = target_folder.existing(save_dir, prepared.ranks, resume=options.resume)
    missing = [plan for plan in prepared.ranks if plan.id not in there]
    target_folder.check_space(save_dir, sum(plan.length for plan in missing))
    digests = digest_source(workers, prepared.survey, options.depth)
    proofs = [
        Proof(
            family.folders,
            family.source.rules,
            family.frozen,
            family.target.layout,
            options.depth,
            digests.get(family.ranks[0].id.family, {}),
        )
        for family in families
    ]
    kept = [
        KeptJob(save_dir, plan, proof)
        for family, proof in zip(families, proofs, strict=True)
        for plan in family.ranks
        if plan.id in there
    ]
    done = list(workers.map(check_kept, kept))
    listener.started(sum(plan.length for plan in missing))
    copier = Copier(workers, save_dir, finish_rank, listener.advanced)
    is_first = manifest.claim(save_dir, prepared.manifest)
    try:
        for rank in copier.run(_copies(zip(families, proofs, strict=True), there)):
            log.info("%s: %d bytes written", rank.id.folder, rank.length)
            done.append(rank)
    except BaseException:
        if is_first:
            manifest.withdraw(save_dir)
        raise
    manifest.claim(save_dir, prepared.manifest)  # it is there still, and ours
    check_others()
    return done


def _copies(
    families: Iterable[tuple[PlannedFamily, Proof]], kept: set[RankId]
) -> Iterator[FamilyCopy]:
    """What is left to copy, family by family."""
    for family, proof in families:
        plans = tuple(rank for rank in family.ranks if rank.id not in kept)
        derivations = {} if kept else family.derivations
        yield FamilyCopy(plans, derivations, FinishContext(proof, family.sources))


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


def digest_source(
    workers: Workers, survey: Survey, depth: Depth
) -> Mapping[tuple[int, int], Mapping[TensorName, bytes]]:
    """For full verification: read the source once, and hold it to its checksums; the digests of
    each family.

    Raises:
        CheckpointError: records of the source are damaged.
    """
    if depth is not Depth.FULL:
        return {}
    found: dict[tuple[int, int], dict[TensorName, bytes]] = {}
    damaged: list[str] = []
    is_layer_wise = False
    jobs = [(survey.path, rank) for rank in survey.ranks]
    for (_, rank), digests in zip(jobs, workers.map(digest_folder, jobs), strict=True):
        found.setdefault(rank.family, {}).update(digests.by_name)
        is_layer_wise |= digests.is_layer_wise
        damaged += (problem(path, text, cure=ANOTHER_COPY) for path, text in digests.damaged)
    if damaged:
        raise CheckpointError(*damaged)
    if not is_layer_wise:
        return found
    # The states of dense parameters may lie in the folders of other expert ranks.
    together: dict[int, dict[TensorName, bytes]] = {}
    for (tp_rank, _), digests_of in found.items():
        together.setdefault(tp_rank, {}).update(digests_of)
    return {family: {**together[family[0]], **own} for family, own in found.items()}
