"""What a source is known by, wherever it lies: its records' names, sizes and checksums.

Neither paths nor times count: each node may read a copy of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from ..checkpoint.family import RankFiles
from ..checkpoint.one_save import saver
from ..megatron.ranks import RankId
from .files import RangeReader, other_files


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
    found = hashlib.sha256()
    with RangeReader() as reader:
        for file in files.all:
            name = file.path.rpartition("/")[2]
            for record in file.records.values():
                line = f"{name} {record.name} {record.length} {record.crc32}\n"
                found.update(line.encode("utf-8", "surrogatepass"))
                if not record.has_checksum:
                    found.update(reader.ends(record.extent(file.path)))
        for name, extent in other_files(directory, files.id)[0]:
            found.update(f"{name} {extent.length}\n".encode())
            found.update(reader.ends(extent))
    return Identity(found.hexdigest(), saver(files))


def of_checkpoint(ranks: Mapping[RankId, Identity]) -> str:
    """The fingerprint of all rank folders, from those of each."""
    found = hashlib.sha256()
    for rank, identity in sorted(ranks.items()):
        found.update(f"{rank.folder} {identity.fingerprint}\n".encode())
    return found.hexdigest()
