"""Where reports, pictures and logs go: beside a checkpoint, never into one, and never over what is
no plain file.

``-`` is standard output.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from .errors import refusals

STANDARD_OUTPUT = Path("-")


def why_unwritable(path: Path, checkpoints: Iterable[Path]) -> str | None:
    """Why a report or log cannot go there: found out before hours of copying.

    Makes the folder that the file will be in.

    Args:
        path: as given.
        checkpoints: folders of source and target as they were given, and their iteration folders,
            which hold nothing but a checkpoint.
    """
    if path == STANDARD_OUTPUT:
        return None
    place = Path(os.path.realpath(path))
    try:
        given = map(Path, map(os.path.realpath, checkpoints))
        inside = [f for f in given if place.is_relative_to(f) or _is_linked_from(f, place)]
        # So does what lies in the iteration folder of another one, or in a rank folder of that.
        inside += [f for f in place.parents[:2] if next(f.glob("mp_rank_[0-9]*"), None) is not None]
        if inside:
            return f"it lies in the checkpoint {inside[0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            return "it is a folder"
        if _is_special(path):
            return None if os.access(path, os.W_OK) or not path.exists() else "it is not writable"
    except OSError as error:
        return error.strerror
    return None if os.access(path.parent, os.W_OK) else "its folder is not writable"


def _is_linked_from(folder: Path, path: Path) -> bool:
    """Whether a file is one of a checkpoint by another name."""
    for file in folder.glob("*/*"):
        with contextlib.suppress(OSError):
            if path.samefile(file):
                return True
    return False


def _is_special(path: Path) -> bool:
    """Whether a name is that of a link, a device, a pipe: to be written through, not replaced."""
    try:
        return path == STANDARD_OUTPUT or not stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def open_output(path: Path, *, append: bool) -> TextIO:
    """Open what is there, or a new file, for writing; a pipe that nobody reads is no wait.

    Raises:
        CopyError: it cannot be opened.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    with refusals(path, "cannot be written"):
        if path == STANDARD_OUTPUT:
            descriptor = os.dup(1)
        else:
            descriptor = os.open(path, flags | (os.O_APPEND if append else os.O_TRUNC), 0o666)
            os.set_blocking(descriptor, True)
    return os.fdopen(
        descriptor, "a" if append else "w", encoding="utf-8", errors="backslashreplace"
    )


def write_output(path: Path, content: str | bytes) -> None:
    """Write a report or a picture: a plain file as a whole or not at all, anything else through.

    Raises:
        CopyError: it cannot be written.
    """
    from .run.folders import write_whole  # --help must not wait for numpy

    if not _is_special(path):
        write_whole(path, content)
        return
    with refusals(path, "cannot be written"), open_output(path, append=False) as file:
        file.buffer.write(content.encode() if isinstance(content, str) else content)
