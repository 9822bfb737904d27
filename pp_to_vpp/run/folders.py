"""Rank folders and small files that appear only when they are whole.

A rank folder is written under a temporary name and renamed at the end. The name tells which process
of which host writes it, so that what an interrupted run left can be told from what is alive.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CopyError, UsageError
from ..target.plan import RankPlan

_FRESH_SECONDS = 15 * 60
"""A temporary folder of another host that changed within this time is taken to be alive."""
_PREFIX = ".writing-"


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


def _own_mark() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{_start_time(os.getpid())}"


def _start_time(pid: int) -> str:
    """When a process began, in the kernel's ticks: tells it from a later one with its number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"


def clear_leftovers(save_dir: Path, folders: Iterable[str]) -> None:
    """Remove what interrupted runs left of these rank folders.

    A folder is renamed before it is emptied: a run that is still alive can then no longer publish
    it, so removing it by mistake ends that run with an error and can do no other harm.

    Raises:
        UsageError: another run is writing one of them now.
        CopyError: they cannot be removed.
    """
    if not save_dir.is_dir():
        return
    wanted = set(folders)
    try:
        names = [name for name in os.listdir(save_dir) if name.startswith(_PREFIX)]
        for name in names:
            folder, _, mark = name.removeprefix(_PREFIX).partition(".")
            if folder not in wanted:
                continue
            if mark != "dead" and _is_alive(save_dir / name, mark):
                raise UsageError.of(
                    save_dir / name,
                    "another run is writing this rank folder now",
                    cure="wait for it, or end it; give each run other --pipeline-ranks-to-process",
                )
            dead = save_dir / f"{_PREFIX}{folder}.dead"
            with contextlib.suppress(FileNotFoundError):  # removed by a run that does the same
                if name != dead.name:
                    shutil.rmtree(dead, ignore_errors=True)
                    (save_dir / name).rename(dead)
                shutil.rmtree(dead)
    except OSError as error:
        raise copy_error(save_dir, "leftovers of an earlier run cannot be removed", error) from None


def _is_alive(path: Path, mark: str) -> bool:
    """Whether the run that writes a temporary folder still exists."""
    host, pid, start = ["", "", *mark.rsplit("-", 2)][-3:]
    if host == socket.gethostname():
        return pid.isdigit() and _start_time(int(pid)) == start and int(pid) != os.getpid()
    try:
        newest = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
    except OSError:
        return False
    return time.time() - newest < _FRESH_SECONDS


def create_folder(save_dir: Path, plan: RankPlan) -> TemporaryFolder:
    """Make the temporary folder of a rank, with its files as holes of their final size.

    Raises:
        CopyError: the target cannot be written.
    """
    name = plan.id.folder
    folder = TemporaryFolder(
        save_dir / f"{_PREFIX}{name}.{_own_mark()}", save_dir / name, time.monotonic()
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
    for path in save_dir.glob(f"{_PREFIX}*.{glob.escape(_own_mark())}"):
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


def publish(folder: TemporaryFolder) -> None:
    """Give a whole folder its name.

    Raises:
        CopyError: the name is taken, or the file system refuses.
    """
    try:
        sync_folder(folder.path)
        folder.path.rename(folder.target)
        sync_folder(folder.target.parent)
    except OSError as error:
        raise copy_error(folder.target, "cannot be given its name", error) from None


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there as a whole or not at all.

    Raises:
        CopyError: writing failed.
    """
    with _written(path, text) as temporary:
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
def _written(path: Path, text: str) -> Iterator[Path]:
    """A text on disk under a private name beside ``path``, which is removed afterwards."""
    temporary = path.with_name(f".{path.name}.{_own_mark()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        sync_folder(path.parent)
    except OSError as error:
        raise copy_error(path, "cannot be written", error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
