"""The processes that share a conversion: one that fails tells the others, which would else wait.

Not every launcher ends the others (MPICH's does so only after a signal). So a process that fails
leaves a mark in the target, with its lines, which it removes when it begins anew.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from ..errors import ConversionError, CopyError
from . import folders, signs, target_folder
from .share import Share

_FAILED = ".failed-"
_MAX_BYTES = 1 << 16
_SKEW_SECONDS = 3.0
"""Processes of one launch begin at most so far apart."""


class Siblings:
    """Those of this process; a context manager that tells them of its failure."""

    def __init__(
        self, load_dir: Path, save_dir: Path, share: Share | None, *, is_launched: bool
    ) -> None:
        """Begin.

        Args:
            load_dir: the source.
            save_dir: the target.
            share: of this process.
            is_launched: a launcher starts all processes at once, and all again if one fails.
        """
        self._load_dir, self._save_dir, self._share = load_dir, save_dir, share
        self._began = time.monotonic()
        self._skew = _SKEW_SECONDS if is_launched else 0.0
        self._is_awaited = True
        """Others wait for this process, and none has failed before."""

    def __enter__(self) -> Siblings:
        """Remove the mark of an earlier run of this share."""
        if self._share is not None:
            _remove([self._mark(self._share)])
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._share is None or not self._is_awaited or not isinstance(error, Exception):
            return
        path, status = self._mark(self._share), ConversionError.exit_status
        problems: Sequence[str] = [f"{type(error).__name__}: {error}"]
        if isinstance(error, ConversionError):
            status, problems = error.exit_status, error.problems
        with contextlib.suppress(OSError, ConversionError):  # where nobody can write, nobody waits
            target_folder.check_place(self._load_dir, self._save_dir)
            self._save_dir.mkdir(parents=True, exist_ok=True)
            path.touch()  # the file system may be full
            folders.write_whole(path, json.dumps({"status": status, "problems": problems[:8]}))

    def _mark(self, share: Share) -> Path:
        return self._save_dir / f"{_FAILED}{share.index}-of-{share.count}"

    def has_done_its_part(self) -> None:
        """From now on this process waits, and nobody for it: its failure is its own."""
        self._is_awaited = False

    def check(self) -> None:
        """End with what another process ended with.

        Raises:
            ConversionError: one has failed; of its kind, with its lines.
        """
        if self._share is None:
            return
        for path in sorted(self._save_dir.glob(f"{_FAILED}*-of-{self._share.count}")):
            index = path.name.removeprefix(_FAILED).partition("-")[0]
            failed = f"{index}/{self._share.count}"
            if path == self._mark(self._share) or not self._is_of_this_launch(path):
                continue
            if not folders.is_at_work(self._save_dir, failed):
                self._is_awaited = False
                raise _error_in(path, failed)

    def _is_of_this_launch(self, path: Path) -> bool:
        """Whether a mark was left since this process began; or, by one that a launcher started
        with it, just before, and whoever left it has had the time to begin anew."""
        elapsed = time.monotonic() - self._began
        try:
            age = signs.server_time(self._save_dir) - path.stat().st_mtime
        except OSError:
            return False
        return age < elapsed + (self._skew if elapsed > 2 * self._skew else 0)

    def forget(self) -> None:
        """Remove all marks: the conversion is done."""
        _remove(self._save_dir.glob(f"{_FAILED}*"))


def _remove(paths: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):
        for path in paths:
            path.unlink(missing_ok=True)


def _error_in(path: Path, failed: str) -> ConversionError:
    kind: type[ConversionError]
    try:
        told = json.loads(path.read_bytes()[:_MAX_BYTES])
        kinds = {kind.exit_status: kind for kind in ConversionError.__subclasses__()}
        kind = kinds.get(told["status"], ConversionError)
        lines = list(map(str, told["problems"]))
    except (OSError, ValueError, KeyError, TypeError):
        kind, lines = CopyError, ["see what it printed"]
    return kind(*(f"share {failed} failed: {line}" for line in lines))
