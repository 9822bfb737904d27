"""Whether the file system of the target can share blocks with the source, as XFS and Btrfs do."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from ..container.archive import MAX_DIVISOR
from .target_folder import first_existing

_FICLONERANGE = 0x4020940D
"""linux/fs.h: _IOW(0x94, 13, struct file_clone_range)."""
_USUAL_BLOCK = 4096


def shared_block(source: Path, save_dir: Path) -> int:
    """Bytes of a block that a file in ``save_dir`` can share with the file ``source``, 1 if it
    cannot. Tried with the first block and a file that never has a name.
    """
    try:
        place = first_existing(save_dir)
        block = os.statvfs(place).f_bsize
        if block > MAX_DIVISOR or block % 512:
            block = _USUAL_BLOCK
        ours = os.open(place, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC)
        try:
            theirs = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.ioctl(ours, _FICLONERANGE, struct.pack("qQQQ", theirs, 0, block, 0))
            finally:
                os.close(theirs)
        finally:
            os.close(ours)
    except OSError:
        return 1
    return block
