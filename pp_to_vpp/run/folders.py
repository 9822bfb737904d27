"""Rank folders and small files that appear only when they are whole.

A rank folder is written under a temporary name and renamed at the end. The name carries the mark
of the run that writes it (see ``signs``): what an interrupted one left can be told from what lives.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CopyError, refusals
from ..source.files import names_in
from ..target.plan import RankPlan
from . import signs
from .signs import SHARING, SMALL, WRITING, Writer, own_mark


@dataclass(frozen=True, slots=True)
class TemporaryFolder:
    """A rank folder that is being written."""

    path: Path
    target: Path
    """Its name when it is whole."""
    began: float
    """When it was made, by the monotonic clock."""

    def file(self, name: str) -> str:
        """Path of one of its files."""
        return str(self.path / name)

    def remove(self) -> None:
        """It will not be whole; or it has its name, and then nothing is removed."""
        shutil.rmtree(self.path, ignore_errors=True)


def clear_leftovers(save_dir: Path, folders: Iterable[str]) -> list[Writer]:
    """Remove what interrupted runs left of these rank folders; who is writing the others.

    A folder is renamed before it is emptied: a run that is still alive can then no longer publish
    it, so removing it by mistake ends that run with an error and can do no other harm. What cannot
    be removed then, such as files that a process of another host has open on NFS, may stay.

    Raises:
        CopyError: a folder cannot be renamed.
    """
    wanted, others = set(folders), []
    for writer in _writers(save_dir):
        folder = folder_of(writer.path)
        if folder is not None and folder not in wanted:
            continue
        if not writer.is_dead:
            others += [writer] if folder is not None else []
        elif folder is None:
            with contextlib.suppress(OSError):
                writer.path.unlink()
        else:
            _remove(writer.path)
    return others


def left_behind(save_dir: Path) -> tuple[Path, ...]:
    """What dead runs, or this one, left in a target and could not be removed yet."""
    return tuple(writer.path for writer in _writers(save_dir) if writer.is_dead)


def newest_sign(save_dir: Path) -> float:
    """Seconds since another run last gave a sign of life; endless if there is no other."""
    return min((w.silent for w in _writers(save_dir) if not w.is_dead), default=math.inf)


def is_at_work(save_dir: Path, share: object) -> bool:
    """Whether a process of a share shows that it lives."""
    name = f"{_shown(share)}."
    return any(not w.is_dead and w.path.name.startswith(name) for w in _writers(save_dir))


def _writers(save_dir: Path) -> list[Writer]:
    """Who has something unpublished in a target, this process's earlier attempts among them."""
    if not is_folder(save_dir):
        return []
    names = [n for n in names_in(save_dir, CopyError) if n.startswith((WRITING, SHARING, SMALL))]
    now = signs.server_time(save_dir) if names else 0.0
    return [signs.writer_of(save_dir / n, n[1:].partition(".")[2], now) for n in names]


def folder_of(path: Path) -> str | None:
    """The rank folder that a temporary one will be; None for other signs."""
    name = path.name
    return name.removeprefix(WRITING).partition(".")[0] if name.startswith(WRITING) else None


def _remove(path: Path) -> None:
    """Each leftover gets a name of its own: one that cannot be removed is in nobody's way."""
    dead = path
    if path.suffix != f".{signs.DEAD}":
        dead = path.with_name(f"{path.name}.{signs.DEAD}")
        with (
            refusals(path, "leftovers of an earlier run cannot be removed"),
            contextlib.suppress(FileNotFoundError),  # removed by a run that does the same
        ):
            path.rename(dead)
    shutil.rmtree(dead, ignore_errors=True)


def create_folder(save_dir: Path, plan: RankPlan) -> TemporaryFolder:
    """Make the temporary folder of a rank, with its files as holes of their final size.

    Raises:
        CopyError: the target cannot be written.
    """
    name = plan.id.folder
    folder = TemporaryFolder(
        save_dir / f"{WRITING}{name}.{own_mark()}", save_dir / name, time.monotonic()
    )
    with refusals(folder.path, "cannot be written"):
        save_dir.mkdir(parents=True, exist_ok=True)
        folder.path.mkdir()
        try:
            for file in plan.files:
                with (folder.path / file.name).open("xb") as target:
                    target.truncate(file.length)
        except BaseException:
            folder.remove()
            raise
    return folder


def sync_folder(path: Path) -> None:
    """Bring a folder's entries to disk; network file systems that cannot are forgiven."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def publish(folder: TemporaryFolder) -> bool:
    """Give a whole folder its name; False if another run has published one meanwhile, and this one
    is gone.

    Raises:
        CopyError: the file system refuses.
    """
    with refusals(folder.target, "cannot be given its name"):
        sync_folder(folder.path)
        try:
            folder.path.rename(folder.target)
        except OSError:
            if not is_filled(folder.target):
                raise
            folder.remove()
            return False
        sync_folder(folder.target.parent)
    return True


def _mode(path: Path) -> int:
    """What is at a path, as ``stat`` tells; 0 for nothing."""
    with refusals(path, "cannot be looked at"):
        try:
            return path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0


def exists(path: Path) -> bool:
    """Whether something is there.

    Raises:
        CopyError: the file system does not tell.
    """
    return _mode(path) != 0


def is_folder(path: Path) -> bool:
    """Whether a folder is there.

    Raises:
        CopyError: the file system does not tell.
    """
    return stat.S_ISDIR(_mode(path))


def is_filled(path: Path) -> bool:
    """Whether something is there that is more than an empty folder.

    Raises:
        CopyError: the file system does not tell.
    """
    return exists(path) and (not is_folder(path) or bool(names_in(path, CopyError)))


def _shown(share: object) -> str:
    return f"{SHARING}{share}".replace("/", "-of-")


@contextlib.contextmanager
def shown_at_work(save_dir: Path, share: object | None) -> Iterator[None]:
    """Let the processes that share the work, if any, see that this one has begun, and lives.

    Raises:
        CopyError: the target cannot be written.
    """
    if share is None:
        yield
        return
    path = save_dir / f"{_shown(share)}.{own_mark()}"
    with refusals(save_dir, "cannot be written"):
        path.touch()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file so that it is there as a whole or not at all.

    Raises:
        CopyError: writing failed.
    """
    with _written(path, content) as temporary:
        temporary.replace(path)


def write_first(path: Path, text: str) -> bool:
    """Like ``write_whole``, unless the file is there already; whether it was written. Of several
    runs that try at once, on whichever hosts, one succeeds.

    Raises:
        CopyError: writing failed.
    """
    with _written(path, text) as temporary:
        try:
            os.link(temporary, path)  # exclusive on network file systems too
        except FileExistsError:
            return False
        except OSError:  # file systems without links say so in many ways
            return _write_new(path, text)
    return True


def _write_new(path: Path, text: str) -> bool:
    """Write a file that is not there; whether it was not."""
    try:
        file = path.open("x")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(text)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


@contextlib.contextmanager
def _written(path: Path, content: str | bytes) -> Iterator[Path]:
    """Content on disk under a private name beside ``path``, which is removed afterwards."""
    name = path.name.replace(".", "-")  # the mark comes after the first dot
    temporary = path.with_name(f"{SMALL}{name}.{own_mark()}")
    with refusals(path, "cannot be written"):
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
