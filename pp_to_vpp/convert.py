"""A whole run: survey, plan, check, copy, verify, publish."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import archive, checksum, executor, planning, reader, verifier
from .archive import ArchiveError
from .errors import CheckpointError, CopyError, LayoutError, UsageError, VerificationError, problem
from .executor import Copier, FamilyCopy, TemporaryFolder, Workers
from .layout import PipelineLayout, Placement, parse_layout
from .plan import FilePlan, RankPlan, TargetSpec
from .planning import PlanJob, PlannedFamily
from .rules import candidates
from .types import Extent, Literal, RankId
from .verifier import Depth, Digests, Side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from .arguments import SavedArguments
    from .reader import SourceFile, Survey

log = logging.getLogger("pp_to_vpp")

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_([0-9]{7,})|(release)")


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked to do (the command line, typed)."""

    load_dir: Path
    save_dir: Path | None = None
    pp_size: int | None = None
    ep_size: int | None = None
    tp_size: int | None = None
    target_vp_size: int | None = None
    first_split: tuple[int, ...] | None = None
    last_split: tuple[int, ...] | None = None
    target_layout: str | None = None
    overlaps_param_gather_with_step: bool = False
    processes: int = 8
    pp_ranks: tuple[int, ...] | None = None
    is_dry_run: bool = False
    depth: Depth = Depth.STRUCTURE
    resume: bool = False

    @property
    def verifies_only(self) -> bool:
        """No target layout is asked for: the target is there and is to be verified."""
        return self.target_vp_size is None and self.target_layout is None


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file of the target."""

    name: str
    length: int
    crc32: int | None
    """Of the whole file; None for files kept from an earlier run."""


@dataclass(frozen=True, slots=True)
class RankDone:
    """A rank folder of the target that is there, and verified as asked."""

    rank: RankId
    files: tuple[WrittenFile, ...]
    was_kept: bool = False
    """An earlier run wrote it."""

    @property
    def length(self) -> int:
        """Bytes of its files."""
        return sum(file.length for file in self.files)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run before its first byte: what will be done."""

    survey: Survey
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


def convert(options: Options, listener: Listener) -> tuple[Prepared, Outcome | None]:
    """Convert a checkpoint; the plan and what was done (None after a dry run).

    Raises:
        ConversionError: whatever prevents it. Nothing that is not whole has been published.
    """
    began = time.monotonic()
    survey = reader.survey(str(options.load_dir))
    pp_ranks = _check_options(options, survey.arguments)
    target = _target(options, survey.arguments)
    with Workers(options.processes) as workers:
        jobs = [
            PlanJob(survey.path, survey.family(family), pp_ranks, target, not options.is_dry_run)
            for family in survey.families
        ]
        families = list(workers.map(planning.plan_family, jobs))
        planning.check_families(families, survey.path)
        prepared = _prepare(survey, families, target)
        listener.planned(prepared)
        if options.is_dry_run or options.save_dir is None:
            return prepared, None
        there = _existing(options, options.save_dir, prepared.ranks)
        _check_space(
            options.save_dir, sum(rank.length for rank in prepared.ranks if rank.rank not in there)
        )
        digests = _digest_sources(options, workers, survey)
        contexts = {
            family.ranks[0].rank.family: _context(options, survey, family, digests)
            for family in families
        }
        jobs_kept = [
            KeptJob(options.save_dir, rank, contexts[rank.rank.family])
            for rank in prepared.ranks
            if rank.rank in there
        ]
        done = list(workers.map(check_kept, jobs_kept))
        listener.started(prepared.length - sum(rank.length for rank in done))
        copier = Copier(workers, options.save_dir, _finish_rank, listener.advanced)
        for rank in copier.run(_copies(families, there, contexts)):
            log.info("%s: %d bytes written", rank.rank.folder, rank.length)
            done.append(rank)
    tracker = _write_tracker(options.save_dir, survey)
    outcome = Outcome(
        ranks=tuple(sorted(done, key=lambda rank: rank.rank)),
        seconds=time.monotonic() - began,
        depth=options.depth,
        tracker=tracker,
    )
    return prepared, outcome


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


def verify_existing(options: Options, listener: Listener) -> Verified:
    """Verify a target that is there, whoever wrote it, against its source.

    Raises:
        VerificationError: it does not hold what the source holds.
        CheckpointError: the source cannot be read, or is damaged itself.
    """
    began = time.monotonic()
    if options.save_dir is None:
        raise UsageError("--save-iteration-dir: nothing to verify; name the target")
    source = reader.survey(str(options.load_dir))
    _check_options(options, source.arguments)
    try:
        target = reader.survey(str(options.save_dir))
    except CheckpointError as error:
        raise VerificationError(*error.problems) from None
    if target.ranks != source.ranks:
        odd = min(set(target.ranks) ^ set(source.ranks))
        raise VerificationError(
            problem(
                options.save_dir / odd.folder,
                "source and target do not have the same rank folders",
                cure="convert again",
            )
        )
    with Workers(options.processes) as workers:
        listener.started(len(source.ranks))
        digests = _digest_sources(options, workers, source)
        jobs = [
            VerifyJob(
                Side(source.path, source.family(rank.family)),
                target.path,
                rank,
                digests.get(rank.family, {}) if options.depth is Depth.FULL else None,
            )
            for rank in source.ranks
        ]
        length = 0
        for count in workers.map(verify_folder, jobs):
            length += count
            listener.advanced(1)
    arguments = target.arguments
    layout = arguments.placement.place(
        arguments.num_layers, arguments.pp_size, mtp_num_layers=arguments.mtp_num_layers
    )
    seconds = time.monotonic() - began
    return Verified(
        source.path, target.path, layout, options.depth, len(target.ranks), length, seconds
    )


@dataclass(frozen=True, slots=True)
class VerifyJob:
    """A rank folder to be verified."""

    source: Side
    directory: str
    rank: RankId
    digests: Mapping[str, bytes] | None


def verify_folder(job: VerifyJob) -> int:
    """Verify one rank folder of an existing target; the bytes of its records.

    Raises:
        VerificationError: it differs from its source, or is damaged.
    """
    try:
        files = reader.read_rank(job.directory, job.rank)
        verifier.verify_rank(job.source, files, None, job.digests)
        if job.digests is not None:
            damaged = verifier.digest_rank(files).damaged
            if damaged:
                raise VerificationError(*damaged)
    except CheckpointError as error:
        raise VerificationError(*error.problems) from None
    found = [file for file in (files.model, files.optimizer) if file is not None]
    return sum(record.length for file in found for record in file.records.values())


# --- what is asked for ---------------------------------------------------------------------------


def _check_options(options: Options, arguments: SavedArguments) -> tuple[int, ...]:
    """The target pipeline ranks to be written.

    Raises:
        UsageError: options disagree with the checkpoint, or with each other.
    """
    problems = [
        problem(
            f"--{name}-model-parallel-size",
            "disagrees with the checkpoint",
            expected=found,
            found=given,
            cure="leave it out, or check that this is the right checkpoint",
        )
        for name, given, found in (
            ("pipeline", options.pp_size, arguments.pp_size),
            ("expert", options.ep_size, arguments.ep_size),
            ("tensor", options.tp_size, arguments.tp_size),
        )
        if given is not None and given != found
    ]
    pp_ranks = options.pp_ranks or tuple(range(arguments.pp_size))
    problems += [
        problem(
            "--pipeline-ranks-to-process",
            f"there is no pipeline rank {pp_rank}",
            expected=f"0 to {arguments.pp_size - 1}",
            cure="name target pipeline ranks",
        )
        for pp_rank in pp_ranks
        if not 0 <= pp_rank < arguments.pp_size
    ]
    if options.save_dir is not None:
        source, target = options.load_dir.resolve(), options.save_dir.resolve()
        if target == source or source in target.parents:
            problems.append(
                problem(
                    "--save-iteration-dir",
                    "it lies in the source, which is never written",
                    cure="choose another folder",
                )
            )
    if problems:
        raise UsageError(*problems)
    return tuple(sorted(set(pp_ranks)))


def _target(options: Options, arguments: SavedArguments) -> TargetSpec:
    """Placement and layout of the target.

    Raises:
        LayoutError: it is impossible, or the source has it already.
    """
    placement = _placement(options, arguments)
    rules = next(candidates(arguments.names))

    def place(wanted: Placement) -> PipelineLayout:
        return wanted.place(
            arguments.num_layers,
            arguments.pp_size,
            mtp_num_layers=arguments.mtp_num_layers,
            final_norm_follows_layers=rules.final_norm_follows_layers,
        )

    layout = place(placement)
    if layout == place(arguments.placement):
        raise LayoutError(
            problem(
                options.load_dir,
                "the source already has the layout that is asked for",
                found=f"virtual pipeline size {layout.vp_size} with the same layers per chunk",
                cure="there is nothing to convert; ask for another layout",
            )
        )
    overlaps = options.overlaps_param_gather_with_step
    if overlaps and layout.vp_size == 1:
        raise LayoutError(
            problem(
                "--target-overlap-param-gather-with-optimizer-step",
                "Megatron allows it with virtual pipeline stages only",
                cure="leave it out",
            )
        )
    return TargetSpec(placement, layout, overlaps)


def _placement(options: Options, arguments: SavedArguments) -> Placement:
    """The target's placement: the source's own words, with those of the options."""
    given = options.target_vp_size
    if options.target_layout is not None:
        stages = len(parse_layout(options.target_layout))
        vp_size = max(1, stages // arguments.pp_size)
        if given is not None and given != vp_size:
            raise LayoutError(
                problem(
                    "--target-virtual-pipeline-model-parallel-size",
                    "disagrees with the layout string",
                    expected=f"{stages} stages / {arguments.pp_size} ranks = {vp_size}",
                    found=given,
                    cure="leave it out, or correct the string",
                )
            )
        return Placement(vp_size=vp_size, layout=options.target_layout)
    vp_size = given or 1
    if options.first_split is not None and options.last_split is not None:
        return Placement(
            vp_size=vp_size,
            first_layers=sum(options.first_split),
            last_layers=sum(options.last_split),
            first_split=options.first_split,
            last_split=options.last_split,
        )
    own = replace(arguments.placement, vp_size=vp_size, first_split=None, last_split=None)
    return replace(own, layout=None)


def _prepare(survey: Survey, families: Sequence[PlannedFamily], target: TargetSpec) -> Prepared:
    first = families[0]
    arguments = survey.arguments
    facts = [
        f"{first.kind.value}",
        f"TP {arguments.tp_size}, PP {arguments.pp_size}, EP {arguments.ep_size}, "
        f"DP {arguments.dp_size}, {arguments.num_layers} layers"
        + (f", {arguments.mtp_num_layers} MTP layers" if arguments.mtp_num_layers else ""),
    ]
    if first.rounding:
        facts.append(f"16-bit weights are their main parameters {first.rounding}")
    notes = []
    known = arguments.names
    placement = target.placement
    if placement.layout is not None and "pipeline_model_parallel_layout" not in known:
        notes.append("layout strings need Megatron 0.13 or later to launch; this one is older")
    if placement.first_split is not None and "decoder_first_pipeline_num_layers_split" not in known:
        notes.append("the layer splits need Microsoft's fork of Megatron-LM to launch")
    if arguments.placement.layout is not None and placement.layout is None:
        notes.append(
            f"the source's layout string {arguments.placement.layout!r} is dropped: the target's "
            "layers are placed evenly"
        )
    left = [name for family in families for name in family.left_behind]
    ignored = [name for name in survey.ignored if not name.startswith(".")]
    notes += [f"not copied, no part of a checkpoint: {name}" for name in (*ignored, *left)]
    return Prepared(
        survey=survey,
        source=first.source,
        target=replace(target, layout=first.target),
        ranks=tuple(rank for family in families for rank in family.ranks),
        facts=tuple(facts),
        notes=tuple(notes),
    )


# --- what is there already -----------------------------------------------------------------------


def _existing(options: Options, save_dir: Path, plans: Sequence[RankPlan]) -> set[RankId]:
    """The rank folders of the target that are there, after clearing away what is half done.

    Raises:
        UsageError: there are some, and ``--resume`` was not given; or another run is writing now.
    """
    there = [plan.rank for plan in plans if _is_filled(save_dir / plan.rank.folder)]
    if there and not options.resume:
        raise UsageError(
            problem(
                save_dir / there[0].folder,
                f"the target exists already ({len(there)} of {len(plans)} rank folders)",
                cure="use --resume to keep what an earlier run of this conversion finished, or "
                "remove it",
            )
        )
    executor.clear_leftovers(save_dir, [plan.rank.folder for plan in plans])
    return set(there)


def _is_filled(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


@dataclass(frozen=True, slots=True)
class KeptJob:
    """A rank folder that is there before the run."""

    save_dir: Path
    plan: RankPlan
    context: FinishContext


def check_kept(job: KeptJob) -> RankDone:
    """Hold a folder to the plan that would write it.

    Raises:
        UsageError: another conversion wrote it, or it is damaged.
    """
    folder = job.save_dir / job.plan.rank.folder
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    differing = "its files" if names != sorted(file.name for file in job.plan.files) else ""
    for file in job.plan.files if not differing else ():
        if not _is_as_planned(folder / file.name, file):
            differing = file.name
    if differing:
        raise UsageError(
            problem(
                folder,
                f"it is not what this conversion writes ({differing})",
                cure="remove the folder, then run again with --resume",
            )
        )
    _verify(job.context, job.save_dir, job.plan.rank, None)
    files = (WrittenFile(file.name, file.length, None) for file in job.plan.files)
    return RankDone(job.plan.rank, tuple(files), was_kept=True)


def _is_as_planned(path: Path, plan: FilePlan) -> bool:
    """Whether a file has the planned size, records, and bytes of the program's own making."""
    with reader.open_source(path) as file:
        if os.fstat(file.fileno()).st_size != plan.length:
            return False
        if plan.layout is None:
            return True
        try:
            stem, records = archive.read_records(file)
        except ArchiveError:
            return False
        placed = [(f"{stem}/{r.name}", r.offset, r.length) for r in records.values()]
        if placed != [(r.name, r.offset, r.length) for r in plan.layout.records]:
            return False
        for offset, pieces in plan.places():
            position = offset
            for piece in pieces:
                own = isinstance(piece, Literal) and piece.data
                if own and os.pread(file.fileno(), len(own), position) != own:
                    return False
                position += piece.length
    return True


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
        raise CopyError(
            problem(
                save_dir,
                "too little free space",
                expected=f"{needed} bytes",
                found=f"{free} bytes free",
                cure="free some, or choose another file system",
            )
        )


# --- copying and publishing ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FinishContext:
    """What a worker needs to finish the ranks of one family."""

    side: Side
    """The source."""
    layout: PipelineLayout
    """Of the target."""
    depth: Depth
    digests: Mapping[str, bytes]
    """Of everything in the source family, for full verification."""
    sources: tuple[SourceFile, ...]


def _context(
    options: Options,
    survey: Survey,
    family: PlannedFamily,
    digests: Mapping[tuple[int, int], Mapping[str, bytes]],
) -> FinishContext:
    key = family.ranks[0].rank.family
    side = Side(survey.path, survey.family(key))
    return FinishContext(side, family.target, options.depth, digests.get(key, {}), family.sources)


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
        derivations = checksum.derivable(wanted, family.records)
        yield FamilyCopy(plans, derivations, contexts[family.ranks[0].rank.family])


def _finish_rank(
    context: FinishContext,
    plan: RankPlan,
    folder: TemporaryFolder,
    crc32s: tuple[tuple[int, ...], ...],
) -> RankDone:
    """Complete, verify and publish a rank folder whose records have been copied."""
    files = []
    for file, records in zip(plan.files, crc32s, strict=True):
        crc32 = executor.complete_file(folder.file(file.name), file, records)
        files.append(WrittenFile(file.name, file.length, crc32))
    _check_unchanged(context.sources, plan.source_paths())
    _verify(context, folder.path.parent, plan.rank, folder.path.name)
    executor.publish(folder)
    return RankDone(plan.rank, tuple(files))


def _check_unchanged(sources: Iterable[SourceFile], paths: Sequence[str]) -> None:
    """What was planned must be what was copied.

    Raises:
        CopyError: a source file has changed since it was planned.
    """
    before = {source.path: source for source in sources}
    for now in reader.source_files(paths):
        if now != before[now.path]:
            raise CopyError(
                problem(
                    now.path,
                    "the source changed during the run",
                    expected=f"{before[now.path].length} bytes, unchanged since the run began",
                    found=f"{now.length} bytes",
                    cure="run again when nothing writes to it",
                )
            )


def _verify(context: FinishContext, save_dir: Path, rank: RankId, folder: str | None) -> None:
    """Verify a rank folder, under its temporary name if it has one."""
    if context.depth is Depth.NONE:
        return
    try:
        files = reader.read_rank(str(save_dir), rank, folder)
    except CheckpointError as error:
        raise VerificationError(*error.problems) from None
    digests = context.digests if context.depth is Depth.FULL else None
    verifier.verify_rank(context.side, files, context.layout, digests)


def _digest_sources(
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
    for (_, rank), digests in zip(jobs, workers.map(_digest_rank, jobs), strict=True):
        found.setdefault(rank.family, {}).update(digests.by_label)
        damaged += digests.damaged
    if damaged:
        raise CheckpointError(*damaged)
    return found


def _digest_rank(job: tuple[str, RankId]) -> Digests:
    return verifier.digest_rank(reader.read_rank(*job))


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
        executor.write_whole(path, text)
    return f"{path} names {text}"
