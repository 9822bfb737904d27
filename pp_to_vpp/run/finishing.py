"""What workers do with a rank folder whose bytes are there: complete, verify, publish, or keep."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..container import archive
from ..container.extents import Extent, Literal
from ..errors import AT_REST, CopyError, FormatError, UsageError
from ..megatron.ranks import RankId
from ..options import Depth
from ..source.files import SourceFile, check_links, names_in, open_source, source_files
from ..target.plan import FilePlan, RankPlan
from ..verification.compare import Proof, VerifyJob, verify_folder
from ..verification.in_full import check_source
from . import copying, folders
from .folders import TemporaryFolder


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file of the target."""

    name: str
    length: int
    crc32: int | None
    """Of the whole file; None for files kept from an earlier run, and without checksums."""


@dataclass(frozen=True, slots=True)
class RankDone:
    """A rank folder of the target that is there, and verified as asked."""

    id: RankId
    files: tuple[WrittenFile, ...]
    seconds: float
    """From its first byte to its name, beside other folders; or what checking a kept one took."""
    was_kept: bool = False
    """An earlier run wrote it."""

    @property
    def length(self) -> int:
        """Bytes of its files."""
        return sum(file.length for file in self.files)


@dataclass(frozen=True, slots=True)
class FinishContext:
    """What is needed to finish the ranks of one family."""

    proof: Proof
    sources: tuple[SourceFile, ...]
    """The files of the source as they were planned."""
    known: Mapping[Extent, int] = field(default_factory=dict)
    """CRC-32 of what was read of the source to verify the folders that are kept."""


def check_copied(context: FinishContext, found: Mapping[Extent, int]) -> None:
    """Hold the source of a family to its checksums, given those of what copying has read.

    Raises:
        CheckpointError: records of the source are damaged.
    """
    check_source(context.proof.source_job({**context.known, **found}))


def finish_rank(
    context: FinishContext,
    plan: RankPlan,
    folder: TemporaryFolder,
    crc32s: tuple[tuple[int, ...], ...] | None,
    known: Mapping[Extent, int] | None = None,
) -> RankDone:
    """Complete, verify and publish a rank folder whose records have been copied.

    Args:
        context: of its family.
        plan: of the folder.
        folder: with its bytes.
        crc32s: of each record of each file; None for records without.
        known: those of the ranges of the source, for full verification.

    Raises:
        CopyError: writing failed, or the source changed meanwhile.
        VerificationError: the folder does not hold what it must.
    """
    files = []
    none = tuple(None for _ in plan.files)
    for file, records in zip(plan.files, crc32s or none, strict=True):
        crc32 = copying.complete_file(folder.file(file.name), file, records)
        files.append(WrittenFile(file.name, file.length, crc32))
    _check_unchanged(context.sources, plan.source_paths())
    job = VerifyJob(context.proof, str(folder.path.parent), plan.id, folder.path.name, known)
    _verify(job)
    if not folders.publish(folder):
        return check_kept(KeptJob(folder.path.parent, plan, context.proof))[0]
    return RankDone(plan.id, tuple(files), time.monotonic() - folder.began)


def _check_unchanged(sources: Iterable[SourceFile], paths: Sequence[str]) -> None:
    """What was planned must be what was copied.

    Raises:
        CopyError: a source file has changed since it was planned.
    """
    before = {source.path: source for source in sources}
    for now in source_files(paths):
        if now != before[now.path]:
            raise CopyError.of(
                now.path,
                "the source changed during the run",
                expected=f"{before[now.path].length} bytes, unchanged since the run began",
                found=f"{now.length} bytes",
                cure=AT_REST,
            )


def _verify(job: VerifyJob) -> Mapping[Extent, int]:
    """Verify a rank folder; the CRC-32 of what was read of the source for it."""
    if job.proof.depth is Depth.NONE:
        return {}
    verdict = verify_folder(job)
    verdict.check()
    return verdict.source


@dataclass(frozen=True, slots=True)
class KeptJob:
    """A rank folder that is there before the run."""

    save_dir: Path
    plan: RankPlan
    proof: Proof


def check_kept(job: KeptJob) -> tuple[RankDone, Mapping[Extent, int]]:
    """Hold a folder to the plan that would write it; and the CRC-32 of what was read of the source
    for that.

    Raises:
        UsageError: another conversion wrote it, or it is damaged.
        CheckpointError: it lies elsewhere.
    """
    began = time.monotonic()
    folder = job.save_dir / job.plan.id.folder
    names = names_in(folder, CopyError) if folders.is_folder(folder) else []
    differing = "its files" if names != sorted(file.name for file in job.plan.files) else ""
    if not differing:
        check_links([folder])
    for file in job.plan.files if not differing else ():
        if not _is_as_planned(folder / file.name, file):
            differing = file.name
    if differing:
        raise UsageError.of(
            folder,
            f"it is not what this conversion writes ({differing})",
            cure="remove the folder, then run again with --resume",
        )
    found = _verify(VerifyJob(job.proof, str(job.save_dir), job.plan.id))
    files = tuple(WrittenFile(file.name, file.length, None) for file in job.plan.files)
    return RankDone(job.plan.id, files, time.monotonic() - began, was_kept=True), found


def _is_as_planned(path: Path, plan: FilePlan) -> bool:
    """Whether a file has the planned size, records, and bytes of the program's own making."""
    with open_source(path) as file:
        if os.fstat(file.fileno()).st_size != plan.length:
            return False
        if plan.archive is None:
            return True
        try:
            stem, records = archive.read_records(file)
        except FormatError:
            return False
        placed = [(f"{stem}/{r.name}", r.offset, r.length) for r in records.values()]
        if placed != [(r.name, r.offset, r.length) for r in plan.archive.records]:
            return False
        for offset, pieces in plan.places():
            position = offset
            for piece in pieces:
                own = isinstance(piece, Literal) and piece.data
                if own and archive.read_at(file, position, len(own)) != own:
                    return False
                position += piece.length
    return True
