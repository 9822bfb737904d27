"""The iteration folder of the target: what is there, whether there is room, and its tracker."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import CopyError, UsageError
from ..megatron.pipeline import PipelineLayout
from ..megatron.ranks import RankId
from ..megatron.rules import Rules
from ..target.plan import RankPlan
from ..verify.compare import told_layout
from . import folders
from .workers import Workers

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron finds the optimizer file through it, even with --ckpt-step (FORMAT 1.2)."""
_ITERATION = re.compile(r"iter_([0-9]{7,})|(release)")


def check_place(load_dir: Path, save_dir: Path) -> None:
    """The source is never written.

    Raises:
        UsageError: the target lies in it.
    """
    target = save_dir.resolve()
    sources = {path.resolve() for path in (load_dir, *load_dir.glob("mp_rank_*"))}
    if sources & {target, *target.parents}:
        raise UsageError.of(
            "--save-iteration-dir",
            "it lies in the source, which is never written",
            cure="choose another folder",
        )


def check_others(
    workers: Workers,
    save_dir: Path,
    ranks: Iterable[RankId],
    own: Iterable[RankPlan],
    layout: PipelineLayout,
    rules: Rules,
) -> None:
    """Hold the rank folders that other runs have written to the layout of this one.

    Args:
        workers: read the folders.
        save_dir: the target.
        ranks: all that the target will have.
        own: those that this run writes.
        layout: of the target.
        rules: of the version that wrote the source.

    Raises:
        UsageError: they have another: together they would not be a checkpoint.
        VerificationError: one of them cannot be read.
    """
    mine = {plan.id for plan in own}
    others = [r for r in ranks if r not in mine and is_filled(save_dir / r.folder)]
    jobs = [(str(save_dir), rank, rules) for rank in others]
    for rank, found in zip(others, workers.map(told_layout, jobs), strict=True):
        if found != layout:
            raise UsageError.of(
                save_dir / rank.folder,
                "another conversion wrote this folder of the target",
                expected=layout,
                found=found,
                cure="give every run of one conversion the same options, or another "
                "--save-iteration-dir",
            )


def existing(save_dir: Path, plans: Sequence[RankPlan], *, resume: bool) -> set[RankId]:
    """The rank folders that are there, after clearing away what is half done.

    Raises:
        UsageError: there are some, and ``--resume`` was not given; or another run is writing now.
    """
    there = [plan.id for plan in plans if is_filled(save_dir / plan.id.folder)]
    if there and not resume:
        raise UsageError.of(
            save_dir / there[0].folder,
            f"the target exists already ({len(there)} of {len(plans)} rank folders)",
            cure="use --resume to keep what an earlier run of this conversion finished, or "
            "remove it",
        )
    folders.clear_leftovers(save_dir, [plan.id.folder for plan in plans])
    return set(there)


def is_filled(path: Path) -> bool:
    """Whether something is there that is more than an empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def check_space(save_dir: Path, needed: int) -> None:
    """Refuse to start what cannot end.

    Raises:
        CopyError: the file system of the target has too little room.
    """
    place = save_dir.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CopyError.of(
            save_dir,
            "too little free space",
            expected=f"{needed} bytes",
            found=f"{free} bytes free",
            cure="free some, or choose another file system",
        )


def is_whole(save_dir: Path, ranks: Iterable[RankId]) -> bool:
    """Whether every rank folder is there."""
    return all((save_dir / rank.folder).is_dir() for rank in ranks)


def write_tracker(save_dir: Path, ranks: Sequence[RankId]) -> str:
    """Name the iteration in the tracker file once every rank folder is there; what became of it."""
    missing = [rank for rank in ranks if not (save_dir / rank.folder).is_dir()]
    match = _ITERATION.fullmatch(save_dir.resolve().name)
    path = save_dir.resolve().parent / TRACKER
    if missing:
        return f"not written: {len(missing)} rank folders are still to come ({missing[0].folder})"
    if match is None:
        return f"not written: {save_dir.name} is no iter_NNNNNNN folder, Megatron cannot name it"
    text = str(int(match[1])) if match[1] else "release"
    try:
        there = path.read_text() if path.exists() else None
    except (OSError, UnicodeDecodeError):
        there = "?"
    if there is not None and there.strip() != text:
        return f"left alone: {path} names {there.strip()[:40]}, Megatron loads that one"
    if there is None:
        folders.write_whole(path, text)
    return f"{path} names {text}"
