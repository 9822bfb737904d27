"""Verification of a target that is there, whoever wrote it, against its source."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from ..container.extents import Extent
from ..errors import CheckpointError, CopyError, UsageError, VerificationError
from ..megatron.layout import PipelineLayout
from ..megatron.megatron import Megatron
from ..megatron.ranks import RankId
from ..options import MANIFEST, Depth, Options
from ..source import fingerprint
from ..source.files import sizes_in
from ..source.proven import FamilyJob, check_families, prove
from ..source.survey import Survey, take_survey
from ..target import request
from ..verification.compare import Proof, VerifyJob, open_folders, prepare, told_run, verify_folder
from ..verification.in_full import check_source
from . import manifest
from .folders import exists
from .listener import Listener, Phase, read_families
from .share import deal, number_of_workers, wanted_share
from .target_folder import check_place
from .workers import Workers


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
    source_layout: PipelineLayout

    @property
    def layouts(self) -> tuple[PipelineLayout, PipelineLayout]:
        """Of source and target."""
        return self.source_layout, self.layout


def verify_existing(options: Options, listener: Listener) -> Verified:
    """Hold each rank folder of the target to the source, and all of them to one layout.

    Raises:
        VerificationError: it does not hold what the source holds.
        CheckpointError: the source cannot be read, or is damaged itself.
    """
    began = time.monotonic()
    share = wanted_share(options)
    if options.save_dir is None or not exists(options.save_dir):
        raise UsageError.of(
            options.save_dir,
            "there is nothing to verify",
            cure="to convert, give --target-virtual-pipeline-model-parallel-size or "
            "--target-pipeline-model-parallel-layout",
        )
    source = take_survey(str(options.load_dir), follow_links=options.follow_links)
    check_place(options.load_dir, options.save_dir)
    target = _survey_target(options.save_dir, source)
    sized = replace(options, target_pp_size=target.arguments.pp_size)
    request.wanted_ranks(sized, source.arguments)
    prepare(Depth.STRUCTURE)  # torch starts in a worker, beside those that compare
    with Workers(number_of_workers(options), listener.looked) as workers:
        places = {rank: options.save_dir / rank.folder for rank in target.ranks}
        sizes = {rank: sum(sizes_in(place, CopyError)) for rank, place in places.items()}
        own = target.ranks if share is None else deal(sizes, share.count).hands[share.index]
        folders = {key: source.family(key) for key in source.families}
        jobs = [FamilyJob(each, source.told) for each in folders.values()]
        families = read_families(workers, prove, jobs, listener)
        check_families(families, source.path)
        known = {rank: of for each in families for rank, of in each.identities.items()}
        known_by = fingerprint.of_checkpoint(known)
        run = families[0].source
        told = told_run((target.path, target.ranks[0], run.rules))
        _check_manifest(options.save_dir, known_by, source.iteration, (run, told), options)
        bare = options.no_save_optim
        proofs = {
            key: Proof.of(each, told, options.depth, no_save_optim=bare)
            for key, each in zip(folders, families, strict=True)
        }
        listener.began(Phase.VERIFY, sum(sizes[rank] for rank in own))
        is_full = options.depth is Depth.FULL
        verified = _verify(workers, target.path, sorted(own), proofs, is_full=is_full)
        length = 0
        for rank, count in verified:
            length += count
            listener.advanced(sizes[rank])
            listener.finished(rank.folder)
    return Verified(
        source=source.path,
        target=target.path,
        layout=told.layout,
        depth=options.depth,
        ranks=len(own),
        length=length,
        seconds=time.monotonic() - began,
        source_layout=run.layout,
    )


def _verify(
    workers: Workers,
    directory: str,
    ranks: Sequence[RankId],
    proofs: Mapping[tuple[int, int], Proof],
    *,
    is_full: bool,
) -> Iterator[tuple[RankId, int]]:
    """Hold the rank folders of a target to their sources, family by family, and what was read of a
    family's source to its checksums; the bytes of each folder's records.

    Raises:
        CheckpointError: the source is damaged. That is told before what it made of the target.
        VerificationError: a folder does not hold what it must.
    """
    opened = workers.submit(open_folders, directory, ranks) if is_full else None
    by_family = sorted(ranks, key=lambda rank: (rank.family, rank))
    jobs = [VerifyJob(proofs[rank.family], directory, rank, is_opened=False) for rank in by_family]
    verdicts = zip(by_family, workers.map(verify_folder, jobs), strict=True)
    checks: list[Future[None]] = []
    problems: list[str] = []
    for family, own in itertools.groupby(verdicts, key=lambda verdict: verdict[0].family):
        found: dict[Extent, int] = {}
        for rank, verdict in own:
            yield rank, verdict.length
            found |= verdict.source
            problems += verdict.problems
            if opened is not None and opened.done():
                workers.result_of(opened)  # at once, if there is no torch
        checks.append(workers.submit(check_source, proofs[family].source_job(found)))
        if problems:
            break
        for check in (check for check in checks if check.done()):
            workers.result_of(check)
    for check in checks:
        workers.result_of(check)
    if opened is not None and not problems:
        problems = workers.result_of(opened)
    if problems:
        raise VerificationError(*problems)


def _survey_target(save_dir: Path, source: Survey) -> Survey:
    """The folders of an existing target.

    Raises:
        VerificationError: they are not those of the source.
    """
    try:
        target = take_survey(str(save_dir))
    except CheckpointError as error:
        raise VerificationError(*error.problems) from None
    expected = source.ranks_of(target.arguments.pp_size)
    if target.ranks != expected:
        odd = min(set(target.ranks) ^ set(expected))
        raise VerificationError.of(
            save_dir / odd.folder,
            "source and target do not have the same rank folders",
            cure="convert again",
        )
    return target


def _check_manifest(
    save_dir: Path,
    known_by: str,
    iteration: int | None,
    runs: tuple[Megatron, Megatron],
    options: Options,
) -> None:
    """Where the target tells which conversion made it, it must be one of this source.

    Raises:
        VerificationError: it was made of another source, or for another layout.
    """
    found = manifest.read_manifest(save_dir)
    if found is None:
        return
    source, target = (found.get(side) or {} for side in ("source", "target"))
    sizes = manifest.sizes_told(*runs)
    problems = manifest.differences(
        {
            **{name: target.get(name) for name in manifest.SIZES},
            "fingerprint": source.get("fingerprint"),
            "iteration": source.get("iteration"),
            "layout": target.get("layout"),
            "no_save_optim": target.get("no_save_optim", False),
        },
        {
            **sizes,
            "fingerprint": known_by,
            "iteration": iteration,
            "layout": str(runs[1].layout),
            "no_save_optim": options.no_save_optim,
        },
        save_dir / MANIFEST,
    )
    if problems:
        raise VerificationError(*problems)
