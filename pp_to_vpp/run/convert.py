"""A whole run on one page: survey, plan, check, copy, verify, publish."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..container import crc32
from ..container.extents import Extent
from ..errors import (
    ANOTHER_COPY,
    CheckpointError,
    CopyError,
    UsageError,
    VerificationError,
    problem,
)
from ..megatron.pipeline import PipelineLayout
from ..megatron.ranks import RankId
from ..megatron.rules import Rules
from ..options import Depth, Options
from ..source.survey import Survey, take_survey
from ..target import request
from ..target.plan import RankPlan
from ..target.request import TargetSpec
from ..verify import compare
from ..verify.compare import Side, VerifyJob
from . import finishing, folders, plan_family
from .finishing import FinishContext, KeptJob, RankDone
from .plan_family import PlanJob, PlannedFamily
from .schedule import Copier, FamilyCopy
from .workers import Workers

log = logging.getLogger("pp_to_vpp")

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_([0-9]{7,})|(release)")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run before its first byte: what will be done."""

    survey: Survey
    save_dir: Path | None
    source: PipelineLayout
    target: TargetSpec
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
        arguments = self.survey.arguments
        flags = self.target.placement.launch_flags(arguments.num_layers, arguments.pp_size)
        if self.target.overlaps_param_gather_with_step:
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


@dataclass(frozen=True, slots=True)
class Verified:
    """An existing pair of folders that was verified."""

    source: str
    target: str
    layout: PipelineLayout
    """Of the target."""
    depth: Depth
    ranks: int
    length: int
    """Bytes of the target's tensors."""
    seconds: float


def convert(options: Options, listener: Listener) -> tuple[Prepared, Outcome | None]:
    """Convert a checkpoint; the plan and what was done (None after a dry run).

    Raises:
        ConversionError: whatever prevents it. Nothing that is not whole has been published.
    """
    began = time.monotonic()
    survey = take_survey(str(options.load_dir))
    pp_ranks = request.wanted_ranks(options, survey.arguments)
    target = request.target_spec(options, survey.arguments)
    compare.prepare(options.depth)
    with Workers(options.processes) as workers:
        families = list(
            workers.map(plan_family.plan_family, _plan_jobs(options, survey, pp_ranks, target))
        )
        plan_family.check_families(families, survey.path)
        prepared = _prepare(options, survey, families, target)
        listener.planned(prepared)
        if options.is_dry_run or options.save_dir is None:
            return prepared, None
        _check_target(workers, options.save_dir, prepared, families[0].rules)
        there = _existing(options, options.save_dir, prepared.ranks)
        missing = [plan for plan in prepared.ranks if plan.rank not in there]
        _check_space(options.save_dir, sum(plan.length for plan in missing))
        contexts = _contexts(options, survey, families, _digest(options, workers, survey))
        done = _keep(workers, options.save_dir, prepared.ranks, there, contexts)
        listener.started(sum(plan.length for plan in missing))
        copier = Copier(workers, options.save_dir, finishing.finish_rank, listener.advanced)
        for rank in copier.run(_copies(families, there, contexts)):
            log.info("%s: %d bytes written", rank.rank.folder, rank.length)
            done.append(rank)
        _check_target(workers, options.save_dir, prepared, families[0].rules)
    outcome = Outcome(
        ranks=tuple(sorted(done, key=lambda rank: rank.rank)),
        seconds=time.monotonic() - began,
        depth=options.depth,
        tracker=_write_tracker(options.save_dir, survey),
    )
    return prepared, outcome


def verify_existing(options: Options, listener: Listener) -> Verified:
    """Verify a target that is there, whoever wrote it, against its source.

    Raises:
        VerificationError: it does not hold what the source holds.
        CheckpointError: the source cannot be read, or is damaged itself.
    """
    began = time.monotonic()
    if options.save_dir is None or not options.save_dir.exists():
        raise UsageError.of(
            options.save_dir,
            "there is nothing to verify",
            cure="to convert, give --target-virtual-pipeline-model-parallel-size or "
            "--target-pipeline-model-parallel-layout",
        )
    source = take_survey(str(options.load_dir))
    request.wanted_ranks(options, source.arguments)
    target = _survey_target(options.save_dir, source)
    sides = {key: Side(source.path, source.family(key)) for key in source.families}
    compare.prepare(options.depth)
    with Workers(options.processes) as workers:
        sizes = [_size(options.save_dir / rank.folder) for rank in target.ranks]
        listener.started(sum(sizes))
        digests = _digest(options, workers, source)
        rules = dict(zip(sides, workers.map(compare.rules_of, sides.values()), strict=True))
        layout = compare.told_layout((target.path, target.ranks[0], next(iter(rules.values()))))
        jobs = [
            VerifyJob(
                source=sides[rank.family],
                rules=rules[rank.family],
                directory=target.path,
                rank=rank,
                layout=layout,
                digests=digests.get(rank.family, {}) if options.depth is Depth.FULL else None,
            )
            for rank in source.ranks
        ]
        length = 0
        for size, count in zip(sizes, workers.map(compare.verify_folder, jobs), strict=True):
            length += count
            listener.advanced(size)
    return Verified(
        source=source.path,
        target=target.path,
        layout=layout,
        depth=options.depth,
        ranks=len(target.ranks),
        length=length,
        seconds=time.monotonic() - began,
    )


def _size(folder: Path) -> int:
    """Bytes of the files of a rank folder."""
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def _survey_target(save_dir: Path, source: Survey) -> Survey:
    """The folders of an existing target.

    Raises:
        VerificationError: they are not those of the source.
    """
    try:
        target = take_survey(str(save_dir))
    except CheckpointError as error:
        raise VerificationError(*error.problems) from None
    if target.ranks != source.ranks:
        odd = min(set(target.ranks) ^ set(source.ranks))
        raise VerificationError.of(
            save_dir / odd.folder,
            "source and target do not have the same rank folders",
            cure="convert again",
        )
    return target


def _plan_jobs(
    options: Options, survey: Survey, pp_ranks: tuple[int, ...], target: TargetSpec
) -> Iterable[PlanJob]:
    for family in survey.families:
        ranks = survey.family(family)
        yield PlanJob(
            survey.path,
            survey.iteration,
            ranks,
            pp_ranks,
            target,
            needs_contents=not options.is_dry_run,
        )


def _prepare(
    options: Options, survey: Survey, families: Sequence[PlannedFamily], target: TargetSpec
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
    left = [name for family in families for name in family.left_behind]
    left += [name for name in survey.ignored if not name.startswith(".")]
    return Prepared(
        survey=survey,
        save_dir=options.save_dir,
        source=first.source,
        target=replace(target, layout=first.target),
        ranks=tuple(rank for family in families for rank in family.ranks),
        facts=tuple(facts),
        notes=(
            *request.notes(target, arguments),
            *(f"not copied, no part of a checkpoint: {name}" for name in left),
        ),
    )


def _existing(options: Options, save_dir: Path, plans: Sequence[RankPlan]) -> set[RankId]:
    """The rank folders of the target that are there, after clearing away what is half done.

    Raises:
        UsageError: there are some, and ``--resume`` was not given; or another run is writing now.
    """
    there = [plan.rank for plan in plans if _is_filled(save_dir / plan.rank.folder)]
    if there and not options.resume:
        raise UsageError.of(
            save_dir / there[0].folder,
            f"the target exists already ({len(there)} of {len(plans)} rank folders)",
            cure="use --resume to keep what an earlier run of this conversion finished, or "
            "remove it",
        )
    folders.clear_leftovers(save_dir, [plan.rank.folder for plan in plans])
    return set(there)


def _check_target(workers: Workers, save_dir: Path, prepared: Prepared, rules: Rules) -> None:
    """Hold the rank folders that other runs have written to the layout of this one.

    Raises:
        UsageError: they have another: together they would not be a checkpoint.
        VerificationError: one of them cannot be read.
    """
    own = {plan.rank for plan in prepared.ranks}
    others = [r for r in prepared.survey.ranks if r not in own and _is_filled(save_dir / r.folder)]
    jobs = [(str(save_dir), rank, rules) for rank in others]
    for rank, found in zip(others, workers.map(compare.told_layout, jobs), strict=True):
        if found != prepared.target.layout:
            raise UsageError.of(
                save_dir / rank.folder,
                "another conversion wrote this folder of the target",
                expected=prepared.target.layout,
                found=found,
                cure="give every run of one conversion the same options, or another "
                "--save-iteration-dir",
            )


def _is_filled(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _check_space(save_dir: Path, needed: int) -> None:
    """Refuse to start what cannot end.

    Raises:
        CopyError: the file system of the target has too little room.
    """
    place = save_dir.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CopyError.of(
            save_dir,
            "too little free space",
            expected=f"{needed} bytes",
            found=f"{free} bytes free",
            cure="free some, or choose another file system",
        )


def _contexts(
    options: Options,
    survey: Survey,
    families: Iterable[PlannedFamily],
    digests: Mapping[tuple[int, int], Mapping[str, bytes]],
) -> dict[tuple[int, int], FinishContext]:
    """What is needed to finish the ranks of each family."""
    contexts = {}
    for family in families:
        key = family.ranks[0].rank.family
        contexts[key] = FinishContext(
            side=Side(survey.path, survey.family(key)),
            rules=family.rules,
            layout=family.target,
            depth=options.depth,
            digests=digests.get(key, {}),
            sources=family.sources,
        )
    return contexts


def _keep(
    workers: Workers,
    save_dir: Path,
    plans: Sequence[RankPlan],
    there: set[RankId],
    contexts: Mapping[tuple[int, int], FinishContext],
) -> list[RankDone]:
    """Hold the folders that are there to what this conversion would write."""
    jobs = [
        KeptJob(save_dir, plan, contexts[plan.rank.family]) for plan in plans if plan.rank in there
    ]
    return list(workers.map(finishing.check_kept, jobs))


def _copies(
    families: Iterable[PlannedFamily],
    kept: set[RankId],
    contexts: Mapping[tuple[int, int], FinishContext],
) -> Iterable[FamilyCopy]:
    """What is left to copy, family by family."""
    for family in families:
        plans = tuple(rank for rank in family.ranks if rank.rank not in kept)
        wanted = [
            piece
            for rank in plans
            for file in rank.files
            for pieces in file.contents
            for piece in pieces
            if isinstance(piece, Extent)
        ]
        derivations = crc32.derivable(wanted, family.records)
        yield FamilyCopy(plans, derivations, contexts[family.ranks[0].rank.family])


def _digest(
    options: Options, workers: Workers, survey: Survey
) -> dict[tuple[int, int], dict[str, bytes]]:
    """For full verification: read the source once before copying, and hold it to its checksums.

    Raises:
        CheckpointError: records of the source are damaged.
    """
    if options.depth is not Depth.FULL:
        return {}
    found: dict[tuple[int, int], dict[str, bytes]] = {}
    damaged: list[str] = []
    jobs = [(survey.path, rank) for rank in survey.ranks]
    for (_, rank), digests in zip(jobs, workers.map(finishing.digest_rank, jobs), strict=True):
        found.setdefault(rank.family, {}).update(digests.by_label)
        damaged += (problem(path, text, cure=ANOTHER_COPY) for path, text in digests.damaged)
    if damaged:
        raise CheckpointError(*damaged)
    return found


def _write_tracker(save_dir: Path, survey: Survey) -> str:
    """Name the iteration in the tracker file once every rank folder is there."""
    missing = [rank for rank in survey.ranks if not (save_dir / rank.folder).is_dir()]
    match = _ITERATION.fullmatch(save_dir.resolve().name)
    path = save_dir.resolve().parent / TRACKER
    if missing:
        return f"not written: {len(missing)} rank folders are still to come ({missing[0].folder})"
    if match is None:
        return f"not written: {save_dir.name} is no iter_NNNNNNN folder, Megatron cannot name it"
    text = str(int(match[1])) if match[1] else "release"
    try:
        there = path.read_text() if path.exists() else None
    except (OSError, UnicodeDecodeError):
        there = "?"
    if there is not None and there.strip() != text:
        return f"left alone: {path} names {there.strip()[:40]}, Megatron loads that one"
    if there is None:
        folders.write_whole(path, text)
    return f"{path} names {text}"
