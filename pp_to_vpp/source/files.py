"""Source files, opened for reading only: what they decode to, samples of their bytes."""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from ..checkpoint.family import RankFiles
from ..checkpoint.layer_wise_states import LayerWiseFiles, without_experts
from ..container import archive, torch_file
from ..container.archive import Record
from ..container.crc32 import of_bytes
from ..container.extents import Extent
from ..container.torch_file import TorchFile
from ..errors import (
    ANOTHER_COPY,
    NOT_CONVERTED,
    PUT_FILE_THERE,
    CheckpointError,
    ConversionError,
    located,
    problem,
    refusals,
)
from ..megatron.processes import Processes
from ..megatron.ranks import MODEL_FILE, OPTIMIZER_FILE, RankId, dp_rank_of, is_rank_file

_KEPT_AS_THEY_ARE = re.compile(r"train_dataloader_dprank[0-9]+\.pt")
_REFUSED_FILES = re.compile(r"optim\.pt|model_rng\.pt")
_OF_DLROVER = re.compile(r"rank_[0-9]+")
_MAY_HOLD_STATE = re.compile(
    r"(?!\._).*\.(pt|pth|bin|ckpt|npy|npz|pkl|safetensors|distcp|ema)$|rank_[0-9]+$", re.DOTALL
)
"""``.ema`` is a moving average of MindSpeed-MM; ``._NAME`` is what macOS knows about a file, and
Megatron opens no such name."""
_SAMPLED = 16
"""Elements compared at each end of a parameter."""
_READ_BYTES = 4 << 20
"""Divides into whole elements of any size."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when it was planned: a later change must not go unnoticed."""

    path: str
    length: int
    modified: int
    """mtime in nanoseconds."""


@contextmanager
def open_source(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file of the checkpoint for reading; whether it may be a link out of it is the
    business of ``check_links``.

    Raises:
        CheckpointError: it is missing, unreadable, or no regular file.
    """
    with refusals(path, "cannot be read", CheckpointError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError.of(path, "it is no regular file", cure=PUT_FILE_THERE)
            yield file


def names_in(folder: Path, kind: type[ConversionError] = CheckpointError) -> list[str]:
    """The names in a folder, in order.

    Raises:
        ConversionError: of that kind; it cannot be listed.
    """
    with refusals(folder, "cannot be listed", kind):
        return sorted(os.listdir(folder))


def sizes_in(folder: Path, kind: type[ConversionError] = CheckpointError) -> list[int]:
    """Bytes of each file in a folder.

    Raises:
        ConversionError: of that kind; they cannot be looked at.
    """
    with refusals(folder, "cannot be read", kind), os.scandir(folder) as entries:
        return [entry.stat().st_size for entry in entries]


def check_links(folders: Iterable[Path]) -> None:
    """Refuse rank folders whose files lie outside their checkpoint.

    Raises:
        CheckpointError: a file with state, or its folder, is a link out of the iteration folder.
    """
    problems = [
        problem(
            path,
            "it is a link out of the checkpoint",
            cure=f"{PUT_FILE_THERE}; of a source, --follow-links allows it",
        )
        for folder in folders
        for path in _links_out(folder)
    ]
    if problems:
        raise CheckpointError(*problems[:8])


def _links_out(folder: Path) -> Iterator[Path]:
    root = Path(os.path.realpath(folder.parent))
    if not Path(os.path.realpath(folder)).is_relative_to(root):
        yield folder
        return
    with refusals(folder, "cannot be read", CheckpointError), os.scandir(folder) as entries:
        links = sorted(entry.name for entry in entries if entry.is_symlink())
    for path in (folder / name for name in links if _MAY_HOLD_STATE.match(name)):
        if not Path(os.path.realpath(path)).is_relative_to(root):
            yield path


def read_torch_file(path: Path) -> TorchFile:
    """Decode one ``.pt`` file; its tensors stay on disk.

    Raises:
        CheckpointError: unreadable, or not written by torch.save.
    """
    with open_source(path) as file:

        def read(record: Record) -> bytes:
            return archive.read_at(file, record.offset, record.length)

        try:
            with located(path, expected="a file that torch.save wrote for Megatron-LM"):
                stem, records = archive.read_records(file)
                return torch_file.decode(str(path), stem, records, read)
        except MemoryError:
            raise CheckpointError.of(
                path, "its description does not fit into memory", cure=ANOTHER_COPY
            ) from None


def read_directory(path: Path) -> list[Record]:
    """The records of a ``.pt`` file, by its directory alone.

    Raises:
        CheckpointError: unreadable, or not written by torch.save.
    """
    with open_source(path) as file, located(path, cure=ANOTHER_COPY):
        return list(archive.read_records(file)[1].values())


def list_records(path: Path) -> list[Record]:
    """The records of a ``.pt`` file; their offsets are right only if one has no checksum.

    Raises:
        CheckpointError: unreadable, or not written by torch.save.
    """
    with open_source(path) as file, located(path, cure=ANOTHER_COPY):
        found = archive.read_listed(file)
        if all(record.has_checksum for record in found):
            return found
        return list(archive.read_records(file)[1].values())


def rank_files(iteration_dir: str, rank: RankId) -> list[Path]:
    """The files of a rank folder in the order of ``RankFiles.all``."""
    path = Path(iteration_dir) / rank.folder
    names = sorted(os.listdir(path))
    optimizer = [OPTIMIZER_FILE] if OPTIMIZER_FILE in names else []
    layer_wise = [name for name in names if dp_rank_of(name) is not None]
    return [path / name for name in (MODEL_FILE, *optimizer, *layer_wise)]


def read_rank(iteration_dir: str, rank: RankId, folder: str | None = None) -> RankFiles:
    """Decode the files of one rank folder (``folder`` where it has a temporary name).

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path = Path(iteration_dir) / (folder or rank.folder)
    names = names_in(path)
    return RankFiles(
        rank,
        read_torch_file(path / MODEL_FILE),
        read_torch_file(path / OPTIMIZER_FILE) if OPTIMIZER_FILE in names else None,
        LayerWiseFiles(_read_layer_wise(path, names)),
    )


def _read_layer_wise(folder: Path, names: Iterable[str]) -> dict[int, TorchFile]:
    """The files of a layer-wise optimizer in a rank folder, by data-parallel rank."""
    found = ((dp_rank_of(name), folder / name) for name in names)
    return {dp_rank: read_torch_file(path) for dp_rank, path in found if dp_rank is not None}


@functools.lru_cache(maxsize=16)
def read_source_rank(iteration_dir: str, rank: RankId) -> RankFiles:
    """``read_rank``, decoding a folder that does not change once for several steps of a worker."""
    return read_rank(iteration_dir, rank)


@functools.lru_cache(maxsize=2048)
def _read_optimizer_file(iteration_dir: str, folder: str) -> TorchFile | None:
    """A folder's ``distrib_optim.pt``, if there is one, decoded once for all families that share
    the state of dense parameters in it.

    The folder itself may be missing: with an expert tensor size of its own, not every tensor rank
    has a process of the first expert rank (FORMAT 1.3).
    """
    path = Path(iteration_dir) / folder
    with refusals(path, "cannot be listed", CheckpointError), suppress(FileNotFoundError):
        if OPTIMIZER_FILE in os.listdir(path):
            return read_torch_file(path / OPTIMIZER_FILE)
    return None


@functools.lru_cache(maxsize=2048)
def _read_dense_states(iteration_dir: str, folder: str) -> Mapping[int, TorchFile]:
    """The states of dense parameters in the layer-wise files of a folder, decoded once for all
    families that share them."""
    path = Path(iteration_dir) / folder
    files = _read_layer_wise(path, names_in(path))
    return {dp_rank: without_experts(file) for dp_rank, file in files.items()}


def forget() -> None:
    """Decode every folder anew: another run may find others at the same paths."""
    for remembered in (read_source_rank, _read_optimizer_file, _read_dense_states):
        remembered.cache_clear()


@dataclass(frozen=True, slots=True)
class FamilyFolders:
    """Where the ranks of one (tp, ep) lie."""

    directory: str
    """The iteration folder."""
    ranks: Mapping[int, RankId]
    """By pipeline rank."""
    processes: Processes
    """Of the run that saved them."""

    def read(self, pp_ranks: Iterable[int]) -> dict[int, RankFiles]:
        """Decode the files of some ranks; of a layer-wise optimizer, those in the folders of all
        expert ranks.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        return {p: self._read_rank(self.ranks[p]) for p in sorted(pp_ranks)}

    def at(self, pp_rank: int, pp_size: int) -> RankId:
        """The same family's rank in a run of so many pipeline ranks."""
        return next(iter(self.ranks.values())).at(pp_rank, pp_size)

    def others(self, pp_rank: int) -> list[tuple[str, Extent]]:
        """The files that a rank of this number gets as they are, in whatever run.

        Raises:
            CheckpointError: see ``other_files``.
        """
        return other_files(self.directory, self.ranks[pp_rank])[0] if pp_rank in self.ranks else []

    def _read_rank(self, rank: RankId) -> RankFiles:
        files = read_source_rank(self.directory, rank)
        ep_size = self.processes.ep_size
        if ep_size == 1:
            return files
        if not files.layer_wise:
            return with_dense_states(files, self.directory)
        others: dict[int, TorchFile] = {}
        for ep_rank in (number for number in range(ep_size) if number != rank.ep_rank):
            others |= _read_dense_states(self.directory, replace(rank, ep_rank=ep_rank).folder)
        return replace(files, layer_wise=LayerWiseFiles(files.layer_wise.own, others))


def with_dense_states(files: RankFiles, iteration_dir: str) -> RankFiles:
    """The files of a rank folder with the optimizer file of the first expert rank, which has the
    state of the dense parameters for all (FORMAT 1.3).

    Raises:
        CheckpointError: that is damaged.
    """
    if not files.id.ep_rank:
        return files
    first = replace(files.id, ep_rank=0)
    return replace(files, dense=_read_optimizer_file(iteration_dir, first.folder))


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
    for name in names_in(path):
        if is_rank_file(name):
            continue
        if _REFUSED_FILES.fullmatch(name):
            raise CheckpointError.of(
                path / name, "a file of Megatron's old format", cure=NOT_CONVERTED
            )
        if _MAY_HOLD_STATE.match(name) and not _KEPT_AS_THEY_ARE.fullmatch(name):
            what = "a folder of DLRover, which keeps optimizer states by data-parallel rank"
            if _OF_DLROVER.fullmatch(name) is None:
                what = "an unknown file in a rank folder"
            raise CheckpointError.of(
                path / name,
                f"{what}: it could hold state that moves with layers",
                cure="ask for support of it, or convert a copy without it if the relaunch can do "
                "without",
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


class RangeReader:
    """Reads ranges; each file is opened once."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def read(self, extent: Extent) -> bytes:
        """Bytes of a file.

        Raises:
            CheckpointError: the file ends before.
        """
        path = extent.path
        if path not in self._files:
            self._files[path] = self._open.enter_context(open_source(Path(path)))
        with refusals(path, "cannot be read", CheckpointError):
            data = archive.read_at(self._files[path], extent.offset, extent.length)
        if len(data) != extent.length:
            raise CheckpointError.of(path, "it is cut off", cure=ANOTHER_COPY)
        return data

    def ends(self, extent: Extent, item_bytes: int = 1) -> bytes:
        """The first and last elements of a tensor's bytes."""
        window = _SAMPLED * item_bytes
        if extent.length <= 2 * window:
            return self.read(extent)
        last = extent.cut(extent.length - window, window)
        return self.read(extent.cut(0, window)) + self.read(last)

    def chunks(self, extent: Extent) -> Iterator[bytes]:
        """The bytes of an extent, some megabytes at a time."""
        return map(self.read, extent.segments(_READ_BYTES))

    def crc32(self, extent: Extent) -> int:
        """The checksum of a range."""
        found = 0
        for data in self.chunks(extent):
            found = of_bytes(data, found)
        return found
