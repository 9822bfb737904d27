"""Whether the file system of the target can share blocks with the source, as XFS and Btrfs do."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..container.archive import MAX_DIVISOR
from ..errors import ConversionError
from ..source.files import open_source
from .folders import clear_leftovers
from .signs import SMALL, own_mark
from .target_folder import first_existing

_FICLONERANGE = 0x4020940D
"""linux/fs.h: _IOW(0x94, 13, struct file_clone_range)."""
_USUAL_BLOCK = 4096


def shared_block(source: Path, save_dir: Path) -> int:
    """Bytes of a block that files in ``save_dir`` can share with the file ``source``; 1 if they
    cannot. It is tried, with the first block and a file that is gone then.

    Raises:
        CopyError: the file system of the target fails.
    """
    place = first_existing(save_dir)
    try:
        block = os.statvfs(place).f_bsize
        if block > MAX_DIVISOR or block % 512:
            block = _USUAL_BLOCK
        with _tried(place) as ours, open_source(source) as theirs:
            fcntl.ioctl(ours, _FICLONERANGE, struct.pack("qQQQ", theirs.fileno(), 0, block, 0))
    except (OSError, ConversionError):
        return 1
    return block


@contextmanager
def _tried(place: Path) -> Iterator[BinaryIO]:
    """A file that never has a name, or, as NFS has no such files, one that loses it."""
    try:
        nameless = os.open(place, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        clear_leftovers(place, ())
        path = place / f"{SMALL}block.{own_mark()}"
        try:
            with path.open("wb") as file:
                yield file
        finally:
            path.unlink(missing_ok=True)
    else:
        with os.fdopen(nameless, "wb") as file:
            yield file
