"""The iteration of a checkpoint: named by its folder, or by the tracker file in the root."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError
from ..megatron.ranks import TRACKER


def tracked(root: Path) -> str | None:
    """The name of the iteration folder that a checkpoint's tracker file names; None if there is no
    tracker, or nothing that Megatron could read (training/checkpointing.py, read_metadata)."""
    try:
        told = (root / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if re.fullmatch("[0-9]{1,18}", told):
        return f"iter_{int(told):07d}"
    return told if told == "release" else None


def source_dir(path: Path) -> Path:
    """The iteration folder that a path is, or that the tracker in it names.

    Raises:
        CheckpointError: that folder is not there.
    """
    name = tracked(path)
    if name is None or is_iteration(path):
        return path
    if not (path / name).exists():
        raise CheckpointError.of(
            path / TRACKER,
            "it names an iteration that is not there",
            expected=f"folder {name}",
            found=", ".join(sorted(each.name for each in path.glob("iter_*") if each.is_dir())[-5:])
            or "none",
            cure="give the iteration folder itself",
        )
    return path / name


def is_iteration(path: Path) -> bool:
    """Whether a folder is named as an iteration, or holds rank folders."""
    is_named = path.name == "release" or path.name.startswith("iter_")
    return is_named or next(path.glob("mp_rank_*"), None) is not None
