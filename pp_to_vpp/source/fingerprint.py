"""What a source is known by, wherever it lies: its records' names, sizes and checksums.

Neither paths nor times count: each node may read a copy of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..checkpoint.family import RankFiles
from ..checkpoint.one_save import saver
from ..container.archive import Record
from ..megatron.ranks import RankId
from .files import RangeReader, list_records, other_files, rank_files


class Identity(NamedTuple):
    """What a rank folder is known by."""

    fingerprint: str
    """In hexadecimal."""
    saver: int | None
    """The process that saved it, if it tells."""


def of_rank(files: RankFiles, directory: str) -> Identity:
    """What one rank folder is known by.

    Records without a checksum, and files that are copied as they are, are sampled at both ends.

    Raises:
        CheckpointError: a file cannot be read.
    """
    records = {file.path: list(file.records.values()) for file in files.all}
    return Identity(_of_records(records, directory, files.id), saver(files))


def of_folder(directory: str, rank: RankId) -> Identity:
    """``of_rank`` of a folder whose files are not decoded: nobody learns who saved it.

    Raises:
        CheckpointError: a file is missing, or cannot be read.
    """
    records = {str(path): list_records(path) for path in rank_files(directory, rank)}
    return Identity(_of_records(records, directory, rank), None)


def _of_records(records: Mapping[str, Iterable[Record]], directory: str, rank: RankId) -> str:
    found = hashlib.sha256()
    with RangeReader() as reader:
        for path, listed in records.items():
            name = path.rpartition("/")[2]
            for record in listed:
                line = f"{name} {record.name} {record.length} {record.crc32}\n"
                found.update(line.encode("utf-8", "surrogatepass"))
                if not record.has_checksum:
                    found.update(reader.ends(record.extent(path)))
        for name, extent in other_files(directory, rank)[0]:
            found.update(f"{name} {extent.length}\n".encode())
            found.update(reader.ends(extent))
    return found.hexdigest()


def of_checkpoint(ranks: Mapping[RankId, Identity]) -> str:
    """The fingerprint of all rank folders, from those of each."""
    found = hashlib.sha256()
    for rank, identity in sorted(ranks.items()):
        found.update(f"{rank.folder} {identity.fingerprint}\n".encode())
    return found.hexdigest()
