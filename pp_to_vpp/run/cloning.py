"""Whether the file system of the target can share blocks with the source, as XFS and Btrfs do."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from ..container.archive import MAX_DIVISOR
from ..errors import CheckpointError
from ..source.files import open_source
from .target_folder import first_existing

_FICLONERANGE = 0x4020940D
"""linux/fs.h: _IOW(0x94, 13, struct file_clone_range)."""
_USUAL_BLOCK = 4096


def shared_block(source: Path, save_dir: Path) -> int:
    """Bytes of a block that files in ``save_dir`` can share with the file ``source``; 1 if they
    cannot. It is tried, with the first block and a file that never has a name.
    """
    place = first_existing(save_dir)
    try:
        block = os.statvfs(place).f_bsize
        if block > MAX_DIVISOR or block % 512:
            block = _USUAL_BLOCK
        nameless = os.open(place, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC)
        with os.fdopen(nameless, "wb") as ours, open_source(source) as theirs:
            fcntl.ioctl(ours, _FICLONERANGE, struct.pack("qQQQ", theirs.fileno(), 0, block, 0))
    except (OSError, CheckpointError):
        return 1
    return block
