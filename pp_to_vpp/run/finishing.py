"""What workers do with a rank folder whose bytes are there: complete, verify, publish, or keep."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..container import archive
from ..container.archive import ArchiveError
from ..container.extents import Literal
from ..errors import AT_REST, CopyError, UsageError
from ..megatron.pipeline import PipelineLayout
from ..megatron.ranks import RankId
from ..megatron.rules import Rules
from ..options import Depth
from ..source import files
from ..source.files import SourceFile
from ..target.plan import FilePlan, RankPlan
from ..verify import compare, digests
from ..verify.compare import Side, VerifyJob
from ..verify.digests import Digests
from . import copying, folders
from .folders import TemporaryFolder


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

    side: Side
    """The source."""
    rules: Rules
    layout: PipelineLayout
    """Of the target."""
    depth: Depth
    digests: Mapping[str, bytes]
    """Of everything in the source family, for full verification."""
    sources: tuple[SourceFile, ...]


def finish_rank(
    context: FinishContext,
    plan: RankPlan,
    folder: TemporaryFolder,
    crc32s: tuple[tuple[int, ...], ...],
) -> RankDone:
    """Complete, verify and publish a rank folder whose records have been copied.

    Raises:
        CopyError: writing failed, or the source changed meanwhile.
        VerificationError: the folder does not hold what it must.
    """
    files = []
    for file, records in zip(plan.files, crc32s, strict=True):
        crc32 = copying.complete_file(folder.file(file.name), file, records)
        files.append(WrittenFile(file.name, file.length, crc32))
    _check_unchanged(context.sources, plan.source_paths())
    _verify(context, folder.path.parent, plan.rank, folder.path.name)
    folders.publish(folder)
    return RankDone(plan.rank, tuple(files), time.monotonic() - folder.began)


def _check_unchanged(sources: Iterable[SourceFile], paths: Sequence[str]) -> None:
    """What was planned must be what was copied.

    Raises:
        CopyError: a source file has changed since it was planned.
    """
    before = {source.path: source for source in sources}
    for now in files.source_files(paths):
        if now != before[now.path]:
            raise CopyError.of(
                now.path,
                "the source changed during the run",
                expected=f"{before[now.path].length} bytes, unchanged since the run began",
                found=f"{now.length} bytes",
                cure=AT_REST,
            )


def _verify(context: FinishContext, save_dir: Path, rank: RankId, folder: str | None) -> None:
    """Verify a rank folder, under its temporary name if it has one."""
    if context.depth is Depth.NONE:
        return
    job = VerifyJob(
        source=context.side,
        rules=context.rules,
        directory=str(save_dir),
        rank=rank,
        folder=folder,
        layout=context.layout,
        digests=context.digests if context.depth is Depth.FULL else None,
    )
    compare.verify_folder(job)


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
    began = time.monotonic()
    folder = job.save_dir / job.plan.rank.folder
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    differing = "its files" if names != sorted(file.name for file in job.plan.files) else ""
    for file in job.plan.files if not differing else ():
        if not _is_as_planned(folder / file.name, file):
            differing = file.name
    if differing:
        raise UsageError.of(
            folder,
            f"it is not what this conversion writes ({differing})",
            cure="remove the folder, then run again with --resume",
        )
    _verify(job.context, job.save_dir, job.plan.rank, None)
    files = tuple(WrittenFile(file.name, file.length, None) for file in job.plan.files)
    return RankDone(job.plan.rank, files, time.monotonic() - began, was_kept=True)


def _is_as_planned(path: Path, plan: FilePlan) -> bool:
    """Whether a file has the planned size, records, and bytes of the program's own making."""
    with files.open_source(path) as file:
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


def digest_rank(job: tuple[str, RankId]) -> Digests:
    """Read a rank folder in full (see ``verifier.digest_rank``)."""
    return digests.digest_rank(files.read_rank(*job))
