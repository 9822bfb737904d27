"""The iteration folder of the target: what is there, whether there is room, and its tracker."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import (
    CheckpointError,
    ConversionError,
    CopyError,
    UsageError,
    refusals,
    refused,
    show,
)
from ..megatron.megatron import Megatron
from ..megatron.ranks import TRACKER, RankId, is_rank_folder
from ..source.files import names_in
from ..source.foreign import DISTRIBUTED
from ..target.plan import RankPlan
from ..verification.compare import told_run
from . import folders
from .folders import exists, is_filled, is_folder
from .listener import Listener
from .share import TOGETHER, launched
from .signs import SILENT_SECONDS, Writer
from .workers import Workers

_ITERATION = re.compile(r"iter_([0-9]{7}|[1-9][0-9]{7,})|(release)")
_LOOK_SECONDS = 2.0
"""How often what other runs do is looked at: each look is a listing of the target."""
_SAY_SECONDS = 60.0
_PATIENCE_SECONDS = 15 * 60.0
"""A process that shares the work and has begun touches the target far more often; one that has not
begins by planning, which takes minutes for the largest checkpoints."""


def check_place(load_dir: Path, save_dir: Path) -> None:
    """The target can be where it is asked for, and Megatron could find it there.

    Raises:
        UsageError: it lies in the source, which is never written, or has a name like that of an
            iteration which no iteration has.
        CopyError: nothing can be written there.
    """
    name = Path(os.path.abspath(save_dir)).name
    if name.startswith("iter_") and _ITERATION.fullmatch(name) is None:
        number = name.removeprefix("iter_")
        is_number = re.fullmatch("[0-9]{1,18}", number) is not None
        raise UsageError.of(
            save_dir,
            "Megatron looks for no such folder",
            expected=f"iter_{int(number):07d}" if is_number else "iter_ and seven digits",
            found=name,
            cure="name the target as Megatron names iterations",
        )
    sign = DISTRIBUTED.sign_in(save_dir)
    if sign is not None:
        raise UsageError.of(
            save_dir,
            f"{DISTRIBUTED.what} lies there, and Megatron would load that one",
            found=sign,
            cure="choose another folder",
        )
    place = first_existing(save_dir)
    if not is_folder(place) or not os.access(place, os.W_OK | os.X_OK):
        raise CopyError.of(
            place,
            "the target cannot be written",
            found="no folder" if not is_folder(place) else "no permission to write",
            cure="choose another --save-iteration-dir",
        )
    sources = set()
    with contextlib.suppress(CheckpointError):  # whoever surveys the source tells what is wrong
        sources.add(_identity(load_dir, CheckpointError))
        ranks = (name for name in names_in(load_dir) if name.startswith("mp_rank_"))
        sources |= {_identity(load_dir / name, CheckpointError) for name in ranks}
    if (sources - {None}) & {_identity(path, CopyError) for path in (place, *place.parents)}:
        raise UsageError.of(
            "--save-iteration-dir",
            "it lies in the source, which is never written",
            cure="choose another folder",
        )


def _identity(path: Path, kind: type[ConversionError]) -> tuple[int, int] | None:
    """What a folder is, by whatever name; None where there is none."""
    with refusals(path, "cannot be looked at", kind), contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def notes(save_dir: Path | None, iteration: int | None) -> list[str]:
    """What the user should know about where the target will be.

    Args:
        save_dir: the target; None if none is named.
        iteration: that of training which the source tells.
    """
    name = "" if save_dir is None else Path(os.path.abspath(save_dir)).name
    match, found = _ITERATION.fullmatch(name), list[str]()
    if iteration is not None and match is not None and match[1] and int(match[1]) != iteration:
        found.append(f"the target is called {name}, and the checkpoint is of iteration {iteration}")
    if save_dir is not None and _free_space(save_dir) is None:
        found.append("the target's file system does not tell how much room it has")
    return found


def check_others(
    workers: Workers,
    save_dir: Path,
    ranks: Iterable[RankId],
    own: Iterable[RankPlan],
    target: Megatron,
) -> None:
    """Hold the rank folders that other runs have written to the layout of this one.

    Args:
        workers: read the folders.
        save_dir: the target.
        ranks: all that the target will have.
        own: those that this run writes.
        target: the run that will load it.

    Raises:
        UsageError: they have another: together they would not be a checkpoint.
        VerificationError: one of them cannot be read.
    """
    known = {rank.folder for rank in ranks}
    for name in sorted(os.listdir(save_dir)) if save_dir.is_dir() else ():
        if is_rank_folder(name) and name not in known and is_filled(save_dir / name):
            raise UsageError.of(
                save_dir / name,
                "the target will have no such rank folder, and Megatron might read it",
                expected=f"none but {min(known)} to {max(known)}",
                cure="remove it, or choose another --save-iteration-dir",
            )
    mine = {plan.id for plan in own}
    others = [r for r in ranks if r not in mine and is_filled(save_dir / r.folder)]
    jobs = [(str(save_dir), rank, target.rules) for rank in others]
    for rank, found in zip(others, workers.map(told_run, jobs), strict=True):
        if not found.is_laid_out_like(target):
            raise UsageError.of(
                save_dir / rank.folder,
                "another conversion wrote this folder of the target",
                expected=target,
                found=found,
                cure="give every run of one conversion the same options, or another "
                "--save-iteration-dir",
            )


def filled(save_dir: Path, plans: Sequence[RankPlan], *, resume: bool) -> set[RankId]:
    """The rank folders that are there.

    Raises:
        UsageError: there are some, and ``--resume`` was not given.
    """
    there = [plan.id for plan in plans if is_filled(save_dir / plan.id.folder)]
    if there and not resume:
        raise UsageError.of(
            save_dir / there[0].folder,
            f"the target exists already ({len(there)} of {len(plans)} rank folders)",
            cure="use --resume to keep what an earlier run of this conversion finished, or "
            f"remove it{f'; {TOGETHER}' if launched() else ''}",
        )
    return set(there)


class _Wait:
    """A wait for other runs, of which the listener hears once a minute."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._said = -math.inf

    def a_while(self, text: str) -> None:
        """Sleep until it is worth a look; say what for."""
        if time.monotonic() - self._said >= _SAY_SECONDS:
            self._said = time.monotonic()
            self._listener.waits(text)
        self._listener.looked()
        time.sleep(_LOOK_SECONDS)


def existing(
    save_dir: Path, plans: Sequence[RankPlan], listener: Listener, *, resume: bool
) -> set[RankId]:
    """The rank folders that are there, after clearing away what is half done. Where another run is
    at it, wait until it ends or is dead.

    Args:
        save_dir: the target.
        plans: of the rank folders that are wanted.
        listener: hears what is waited for.
        resume: whether to wait.

    Raises:
        UsageError: there are some, or another run is writing now, and ``--resume`` was not given.
        CopyError: what is left cannot be removed.
    """
    filled(save_dir, plans, resume=resume)  # nothing is touched where this refuses
    wait = _Wait(listener)
    while writers := folders.clear_leftovers(save_dir, [plan.id.folder for plan in plans]):
        if not resume:
            raise UsageError.of(
                save_dir,
                f"another run is writing rank folders of this target now ({writers[0]})",
                cure=f"wait for it, or end it; --resume waits, and {TOGETHER}",
            )
        wait.a_while("; ".join(map(_waits_for, writers[:4])))
    return filled(save_dir, plans, resume=resume)


def _waits_for(writer: Writer) -> str:
    folder = folders.folder_of(writer.path)
    until = "until it ends"
    if not writer.is_seen:
        then = time.localtime(time.time() + SILENT_SECONDS - writer.silent)
        until = f"it is taken over after {time.strftime('%H:%M:%S', then)} unless it gives one"
    return f"{folder}: another run is writing it ({writer}), {until}"


class Others:
    """The rank folders that other processes of the same conversion write."""

    def __init__(
        self,
        save_dir: Path,
        awaited: Mapping[RankId, int],
        listener: Listener,
        check: Callable[[], None],
    ) -> None:
        """See what others do.

        Args:
            save_dir: the target.
            awaited: their rank folders, with bytes.
            listener: hears what they do.
            check: called at each look while they are waited for; raises if one has failed.
        """
        self._save_dir = save_dir
        self._check = check
        self._listener = listener
        self._left = dict(awaited)
        self._looked = time.monotonic()
        self._seen = self._looked
        """When a folder was last found to be new."""

    def look(self) -> None:
        """Tell the listener what they have published since, unless that was just done."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        for rank in [r for r in self._left if is_folder(self._save_dir / r.folder)]:
            self._listener.advanced(self._left.pop(rank))
            self._listener.finished(rank.folder)
            self._seen = self._looked

    def wait(self) -> None:
        """Wait until all are there.

        Raises:
            ConversionError: one of them has failed, or nobody has given a sign of life for a
                quarter of an hour.
        """
        self._seen, wait = time.monotonic(), _Wait(self._listener)
        self._looked = -math.inf
        self.look()
        while self._left:
            self._check()
            silent = min(time.monotonic() - self._seen, folders.newest_sign(self._save_dir))
            missing = f"{len(self._left)} rank folders of other processes are still to come"
            if silent > _PATIENCE_SECONDS:
                raise CopyError.of(
                    self._save_dir,
                    f"{missing} ({min(self._left).folder}), and no process has given a sign of "
                    f"life for {_PATIENCE_SECONDS / 60:.0f} minutes",
                    cure="see what the other processes say, then run again with --resume",
                )
            wait.a_while(f"{missing}; last sign of life {silent:.0f} s ago")
            self.look()


def check_space(save_dir: Path, plans: Iterable[RankPlan]) -> None:
    """Refuse to start what cannot end; blocks that are shared with the source need no room.

    Raises:
        CopyError: the file system of the target has too little room.
    """
    needed = sum(plan.length - plan.shared for plan in plans)
    free = _free_space(save_dir)
    if free is not None and free < needed:
        raise CopyError.of(
            save_dir,
            "too little free space",
            expected=f"{needed} bytes",
            found=f"{free} bytes free",
            cure="free some, or choose another file system",
        )


def _free_space(save_dir: Path) -> int | None:
    """Bytes; None if the file system does not tell, as some in user space.

    Raises:
        CopyError: it fails.
    """
    place = first_existing(save_dir)
    try:
        found = os.statvfs(place)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ESTALE):
            raise refused(place, "its free space cannot be read", error, CopyError) from None
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def first_existing(path: Path) -> Path:
    """A folder, or the one above it that will hold it."""
    place = path.resolve()
    while not exists(place):
        place = place.parent
    return place


def is_whole(save_dir: Path, ranks: Iterable[RankId]) -> bool:
    """Whether every rank folder is there."""
    return all(is_folder(save_dir / rank.folder) for rank in ranks)


def write_tracker(save_dir: Path, ranks: Sequence[RankId]) -> str:
    """Name the iteration in the tracker file once every rank folder is there; what became of it."""
    missing = [rank for rank in ranks if not is_folder(save_dir / rank.folder)]
    named = Path(os.path.abspath(save_dir))  # as --load will name it, whatever it links to
    match = _ITERATION.fullmatch(named.name)
    path = named.parent / TRACKER
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
        if re.fullmatch(r"[0-9]+|release", there.strip()) is None:
            return f"left alone: {path} holds {show(there)}, which Megatron cannot read: correct it"
        return f"left alone: {path} names {there.strip()[:40]}, Megatron loads that one"
    if there is None:
        folders.write_whole(path, text)
    return f"{path} names {text}"
