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
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CopyError
from ..target.plan import RankPlan
from . import signs
from .signs import SHARING, SMALL, WRITING, Writer, own_mark


def copy_error(path: str | Path, what: str, error: OSError) -> CopyError:
    """A refusal by the operating system, as one line."""
    cure = "check the file system, then run again with --resume"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = "free some space, then run again with --resume"
    return CopyError.of(path, f"{what} ({error.strerror})", cure=cure)


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


def clear_leftovers(save_dir: Path, folders: Iterable[str]) -> list[Writer]:
    """Remove what interrupted runs left of these rank folders; who is writing the others.

    A folder is renamed before it is emptied: a run that is still alive can then no longer publish
    it, so removing it by mistake ends that run with an error and can do no other harm.

    Raises:
        CopyError: they cannot be removed.
    """
    wanted, others = set(folders), []
    try:
        for writer in _writers(save_dir):
            folder = folder_of(writer.path)
            if folder is not None and folder not in wanted:
                continue
            if not writer.is_dead:
                others += [writer] if folder is not None else []
            elif folder is None:
                writer.path.unlink(missing_ok=True)
            else:
                _remove(writer.path, save_dir / f"{WRITING}{folder}.{signs.DEAD}")
    except OSError as error:
        raise copy_error(save_dir, "leftovers of an earlier run cannot be removed", error) from None
    return others


def newest_sign(save_dir: Path) -> float:
    """Seconds since another run last gave a sign of life; endless if there is no other."""
    return min((w.silent for w in _writers(save_dir) if not w.is_dead), default=math.inf)


def is_at_work(save_dir: Path, share: object) -> bool:
    """Whether a process of a share shows that it lives."""
    name = f"{_shown(share)}."
    return any(not w.is_dead and w.path.name.startswith(name) for w in _writers(save_dir))


def _writers(save_dir: Path) -> list[Writer]:
    """Who has something unpublished in a target, this process's earlier attempts among them."""
    if not save_dir.is_dir():
        return []
    names = [n for n in sorted(os.listdir(save_dir)) if n.startswith((WRITING, SHARING, SMALL))]
    now = signs.server_time(save_dir) if names else 0.0
    return [signs.writer_of(save_dir / n, n[1:].partition(".")[2], now) for n in names]


def folder_of(path: Path) -> str | None:
    """The rank folder that a temporary one will be; None for other signs."""
    name = path.name
    return name.removeprefix(WRITING).partition(".")[0] if name.startswith(WRITING) else None


def _remove(path: Path, dead: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # removed by a run that does the same
        if path != dead:
            shutil.rmtree(dead, ignore_errors=True)
            path.rename(dead)
        shutil.rmtree(dead)


def create_folder(save_dir: Path, plan: RankPlan) -> TemporaryFolder:
    """Make the temporary folder of a rank, with its files as holes of their final size.

    Raises:
        CopyError: the target cannot be written.
    """
    name = plan.id.folder
    folder = TemporaryFolder(
        save_dir / f"{WRITING}{name}.{own_mark()}", save_dir / name, time.monotonic()
    )
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        folder.path.mkdir()
        for file in plan.files:
            with (folder.path / file.name).open("xb") as target:
                target.truncate(file.length)
    except OSError as error:
        raise copy_error(folder.path, "cannot be written", error) from None
    return folder


def remove_own(save_dir: Path) -> None:
    """Remove what this process has not published."""
    for path in signs.own_names(save_dir):
        if folder_of(path) is not None:
            shutil.rmtree(path, ignore_errors=True)


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
    try:
        sync_folder(folder.path)
        try:
            folder.path.rename(folder.target)
        except OSError:
            if not is_filled(folder.target):
                raise
            shutil.rmtree(folder.path, ignore_errors=True)
            return False
        sync_folder(folder.target.parent)
    except OSError as error:
        raise copy_error(folder.target, "cannot be given its name", error) from None
    return True


def is_filled(path: Path) -> bool:
    """Whether something is there that is more than an empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


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
    try:
        path.touch()
    except OSError as error:
        raise copy_error(save_dir, "cannot be written", error) from None
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
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            with contextlib.suppress(FileExistsError), path.open("x") as file:
                file.write(text)
                return True
            return False
    return True


@contextlib.contextmanager
def _written(path: Path, content: str | bytes) -> Iterator[Path]:
    """Content on disk under a private name beside ``path``, which is removed afterwards."""
    name = path.name.replace(".", "-")  # the mark comes after the first dot
    temporary = path.with_name(f"{SMALL}{name}.{own_mark()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        sync_folder(path.parent)
    except OSError as error:
        raise copy_error(path, "cannot be written", error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
