"""Source files: which rank folders there are, what their files decode to, samples of their bytes.

Files are opened for reading only, and must be regular files inside the checkpoint.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from . import archive, rounding, torch_file
from .archive import ArchiveError, Record
from .arguments import SavedArguments, read_arguments
from .errors import (
    ANOTHER_COPY,
    COPY_MISSING,
    FROM_MEGATRON,
    NOT_CONVERTED,
    NOTHING_TO_CONVERT,
    ONE_SAVE,
    PUT_FILE_THERE,
    CheckpointError,
    problem,
)
from .inventory import Family, RankFiles, Sample, read_family, samples
from .pickling import as_mapping
from .torch_file import FileFormatError, TorchFile
from .types import MODEL_FILE, OPTIMIZER_FILE, Extent, Piece, RankId

_RANK_LIKE = re.compile(r"mp_rank_[0-9]+(_[0-9]+)*")
_KEPT_AS_THEY_ARE = re.compile(r"train_dataloader_dprank[0-9]+\.pt")
_REFUSED_FILES = re.compile(r"layer_wise_optimizer_.*\.pt|optim\.pt|model_rng\.pt")
_SAMPLED = 16
"""Elements compared at each end of a parameter."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when it was planned: a later change must not go unnoticed."""

    path: str
    length: int
    modified: int
    """mtime in nanoseconds."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The folders of an iteration."""

    path: str
    ranks: tuple[RankId, ...]
    arguments: SavedArguments
    """Of the first rank."""
    iteration: int | None
    """As the first rank file tells."""
    ignored: tuple[str, ...]
    """Entries beside the rank folders that are no part of the checkpoint."""

    @property
    def families(self) -> tuple[tuple[int, int], ...]:
        """Each (tp_rank, ep_rank)."""
        return tuple(sorted({rank.family for rank in self.ranks}))

    def family(self, family: tuple[int, int]) -> dict[int, RankId]:
        """The ranks of one family by pipeline rank."""
        return {rank.pp_rank: rank for rank in self.ranks if rank.family == family}


def survey(iteration_dir: str) -> Survey:
    """List an iteration folder and read the files of its first rank.

    Raises:
        CheckpointError: not a Megatron checkpoint of --ckpt-format torch, or ranks are missing.
    """
    path = Path(iteration_dir)
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError.of(
            path, f"cannot be listed ({error.strerror})", cure="check --load-iteration-dir"
        ) from None
    ranks = {rank: name for name in names if (rank := RankId.parse(name)) is not None}
    odd = [name for name in names if _RANK_LIKE.fullmatch(name) and RankId.parse(name) is None]
    if not ranks:
        raise CheckpointError(_why_no_ranks(path, names, odd))
    first = min(ranks)
    files = read_rank(str(path), first)
    arguments = read_arguments(as_mapping(files.model.root) or {}, files.model.path)
    _check_sizes(path, sorted(ranks), arguments)
    ignored = tuple(name for name in names if RankId.parse(name) is None)
    return Survey(str(path), tuple(sorted(ranks)), arguments, files.iteration, ignored)


def _why_no_ranks(path: Path, names: Collection[str], odd: list[str]) -> str:
    """What the folder is instead of what was expected."""
    expected = "folders named mp_rank_TT_PPP or mp_rank_TT_PPP_EEE"
    if any(name in names for name in ("metadata.json", "common.pt", ".metadata")):
        what = "this is a distributed checkpoint (torch_dist or fsdp_dtensor)"
        cure = "Megatron reshards those by itself when it loads them: no conversion is needed"
    elif odd:
        what = f"its rank folders ({odd[0]}) name no pipeline rank: it was saved with PP 1"
        cure = NOTHING_TO_CONVERT
    elif any(name.startswith(("iter_", "release")) for name in names):
        what = "this is the checkpoint's root"
        cure = "give one of its iteration folders, such as iter_0001000"
    else:
        what = "it holds no rank folders"
        cure = FROM_MEGATRON
    return problem(
        path, what, expected=expected, found=", ".join(list(names)[:5]) or "nothing", cure=cure
    )


def _check_sizes(path: Path, ranks: list[RankId], arguments: SavedArguments) -> None:
    """The folders must be those of the sizes in the arguments."""
    problems = []
    if arguments.pp_size < 2:
        problems.append(
            problem(
                path, "it was saved with pipeline_model_parallel_size 1", cure=NOTHING_TO_CONVERT
            )
        )
    if any((rank.ep_rank is None) != (arguments.ep_size == 1) for rank in ranks):
        problems.append(
            problem(
                path,
                "its folder names do not fit expert_model_parallel_size",
                expected=f"{'two' if arguments.ep_size == 1 else 'three'} numbers in each name",
                found=ranks[0].folder,
                cure=ONE_SAVE,
            )
        )
    problems = problems or _odd_sizes(path, ranks, arguments)
    problems = problems or list(itertools.islice(_missing(path, ranks, arguments), 8))
    if problems:
        raise CheckpointError(*problems)


def _odd_sizes(path: Path, ranks: list[RankId], arguments: SavedArguments) -> list[str]:
    """Sizes that are not those of the folders; they may be absurd."""
    sizes = (
        ("tensor", arguments.tp_size, {rank.tp_rank for rank in ranks}),
        ("expert", arguments.ep_size, {rank.ep_rank or 0 for rank in ranks}),
        ("pipeline", arguments.pp_size, {rank.pp_rank for rank in ranks}),
    )
    problems = []
    for kind, size, numbers in sizes:
        missing = next(number for number in itertools.count() if number not in numbers)
        if missing != size or len(numbers) != size:
            is_missing = f", rank {missing} is missing" if missing < size else ""
            problems.append(
                problem(
                    path,
                    f"its folders do not fit {kind}_model_parallel_size",
                    expected=f"ranks 0 to {size - 1}",
                    found=f"{len(numbers)} of them{is_missing}",
                    cure=COPY_MISSING,
                )
            )
    return problems


def _missing(path: Path, ranks: list[RankId], arguments: SavedArguments) -> Iterator[str]:
    """Folders of the sizes that are there in part."""
    found = set(ranks)
    families = {rank.family for rank in ranks}
    wanted = set(families)
    if arguments.etp_size == arguments.tp_size:
        wanted |= set(itertools.product(range(arguments.tp_size), range(arguments.ep_size)))
    for tp_rank, ep_rank in sorted(wanted):
        folders = [
            RankId(tp_rank, pp_rank, ep_rank if arguments.ep_size > 1 else None)
            for pp_rank in range(arguments.pp_size)
        ]
        if (tp_rank, ep_rank) not in families:
            yield problem(
                path / folders[0].folder,
                "this rank folder and its siblings are missing",
                cure=COPY_MISSING,
            )
            continue
        for rank in folders:
            if rank not in found:
                yield problem(
                    path / rank.folder,
                    "this rank folder is missing",
                    expected=f"{arguments.pp_size} pipeline ranks of each family",
                    cure=COPY_MISSING,
                )


@contextmanager
def open_source(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file of the checkpoint for reading.

    Raises:
        CheckpointError: it is missing, unreadable, no regular file, or outside its checkpoint.
    """
    try:
        root = os.path.realpath(path.parent.parent)
        if not os.path.realpath(path).startswith(root + os.sep):
            raise CheckpointError.of(
                path, "it is a link out of the checkpoint", cure=PUT_FILE_THERE
            )
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError.of(path, "it is no regular file", cure=PUT_FILE_THERE)
            yield file
    except OSError as error:
        raise CheckpointError.of(
            path, f"cannot be read ({error.strerror})", cure="check the file and its mode"
        ) from None


def read_torch_file(path: Path) -> TorchFile:
    """Decode one ``.pt`` file; its tensors stay on disk.

    Raises:
        CheckpointError: unreadable, or not written by torch.save.
    """
    with open_source(path) as file:

        def read(record: Record) -> bytes:
            return os.pread(file.fileno(), record.length, record.offset)

        try:
            stem, records = archive.read_records(file)
            return torch_file.decode(str(path), stem, records, read)
        except (ArchiveError, FileFormatError) as error:
            raise CheckpointError.of(
                path,
                str(error),
                expected="a file that torch.save wrote for Megatron-LM",
                cure=ANOTHER_COPY,
            ) from None
        except MemoryError:
            raise CheckpointError.of(
                path, "its description does not fit into memory", cure=ANOTHER_COPY
            ) from None


def read_rank(iteration_dir: str, rank: RankId, folder: str | None = None) -> RankFiles:
    """Decode the files of one rank folder (``folder`` where it has a temporary name).

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path = Path(iteration_dir) / (folder or rank.folder)
    has_optimizer = (path / OPTIMIZER_FILE).exists()
    return RankFiles(
        rank,
        read_torch_file(path / MODEL_FILE),
        read_torch_file(path / OPTIMIZER_FILE) if has_optimizer else None,
    )


@functools.lru_cache(maxsize=16)
def read_source_rank(iteration_dir: str, rank: RankId) -> RankFiles:
    """``read_rank``, decoding a folder that does not change once for several steps of a worker."""
    return read_rank(iteration_dir, rank)


def other_files(
    iteration_dir: str, rank: RankId, folder: str | None = None
) -> tuple[list[tuple[str, Extent]], list[str]]:
    """Files of a rank folder that are copied as they are, and names that are left behind.

    ``folder`` is its name while it is a temporary one.

    Raises:
        CheckpointError: a file of an optimizer or format that cannot be converted.
    """
    path = Path(iteration_dir) / (folder or rank.folder)
    kept: list[tuple[str, Extent]] = []
    left: list[str] = []
    for name in sorted(os.listdir(path)):
        if name in (MODEL_FILE, OPTIMIZER_FILE):
            continue
        if _REFUSED_FILES.fullmatch(name):
            raise CheckpointError.of(
                path / name,
                "a file of an optimizer or of an old format that is kept per rank",
                cure=NOT_CONVERTED,
            )
        if _KEPT_AS_THEY_ARE.fullmatch(name):
            with open_source(path / name) as file:
                length = os.fstat(file.fileno()).st_size
            kept.append((name, Extent(str(path / name), 0, length)))
        else:
            left.append(f"{rank.folder}/{name}")
    return kept, left


def source_files(paths: Iterable[str]) -> tuple[SourceFile, ...]:
    """Size and modification time of files."""
    found = []
    for path in paths:
        with open_source(Path(path)) as file:
            status = os.fstat(file.fileno())
            found.append(SourceFile(path, status.st_size, status.st_mtime_ns))
    return tuple(found)


def proven_family(files: Mapping[int, RankFiles]) -> tuple[Family, str]:
    """The inventory of a family under the first rules that its bytes agree with, and how the
    16-bit weights come from their main parameters: "rounded", "cut off", or "" if there are none.

    Raises:
        CheckpointError: no rules explain structure and samples.
    """
    worst: list[Sample] = []
    for family in read_family(files):
        way, differing = check_samples(samples(family))
        if way is not None:
            return family, way
        worst = worst or differing
    raise CheckpointError.of(
        worst[0].main_path,
        f"{len(worst)} weights are not their main parameters rounded, {worst[0].name} first",
        expected="16-bit weights that follow from the fp32 main parameters",
        cure=ONE_SAVE,
    )


def check_samples(wanted: Iterable[Sample]) -> tuple[str | None, list[Sample]]:
    """Compare the first and last elements of weights with those of their main parameters.

    Returns:
        "rounded" or "cut off" if one way of getting from fp32 to 16 bits explains every sample,
        "" if there were none; None if neither does, with the samples that differ.
    """
    by_dtype: dict[str, list[Sample]] = {}
    for sample in wanted:
        by_dtype.setdefault(sample.dtype, []).append(sample)
    ways: set[str] = set(rounding.WAYS)
    differing: list[Sample] = []
    with SampleReader() as reader:
        for dtype, found in by_dtype.items():
            explained = rounding.explain(
                dtype,
                [reader.ends(sample.weight, rounding.item_bytes(dtype)) for sample in found],
                [reader.ends(sample.main, rounding.item_bytes("float32")) for sample in found],
            )
            ways &= explained.ways
            differing += [found[index] for index in explained.differing]
    if not by_dtype:
        return "", []
    best = next((way for way in rounding.WAYS if way in ways), None)
    return best, differing or [sample for found in by_dtype.values() for sample in found]


class SampleReader:
    """Reads small ranges; each file is opened once."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Bytes of a file.

        Raises:
            CheckpointError: the file ends before.
        """
        if path not in self._descriptors:
            with open_source(Path(path)) as file:
                self._descriptors[path] = os.dup(file.fileno())
        try:
            data = os.pread(self._descriptors[path], length, offset)
        except OSError as error:
            raise CheckpointError.of(
                path, f"cannot be read ({error.strerror})", cure="check the file system"
            ) from None
        if len(data) != length:
            raise CheckpointError.of(path, "it is cut off", cure=ANOTHER_COPY)
        return data

    def ends(self, pieces: tuple[Piece, ...], item_bytes: int) -> bytes:
        """The first and last elements of a tensor's bytes."""
        extent = pieces[0]
        if len(pieces) != 1 or not isinstance(extent, Extent):
            raise TypeError("a source tensor is one extent")
        window = _SAMPLED * item_bytes
        if extent.length <= 2 * window:
            return self.read(extent.path, extent.offset, extent.length)
        head = self.read(extent.path, extent.offset, window)
        return head + self.read(extent.path, extent.offset + extent.length - window, window)
