"""What a run is doing, for somebody who watches: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm

    from .run.listener import Listener, Phase

log = logging.getLogger("pp_to_vpp")

_FIRST_SECONDS, _LINE_SECONDS = 5.0, 60.0
"""When nobody watches a terminal: how long a phase is silent at first, and between lines."""


def is_watched() -> bool:
    """Whether standard error is a terminal; it is None where a caller has closed it."""
    return bool(sys.stderr and sys.stderr.isatty())


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class Progress:
    """Shows a run phase by phase; a context manager that leaves no bar behind."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._bar: tqdm[NoReturn] | None = None
        self._phase: Phase | None = None
        self._total = self._done = self._folders = 0
        self._began = self._next_line = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def listen(self, listener: Listener) -> Listener:
        """Be told what the listener is told."""
        listener.began, listener.advanced = self.begin, self.advance
        listener.finished, listener.waits, listener.looked = self.finish, self.wait, self.look
        return listener

    def begin(self, phase: Phase, total: int) -> None:
        """A phase begins."""
        self.close()
        self._phase, self._total, self._done, self._folders = phase, total, 0, 0
        self._began = time.monotonic()
        self._next_line = self._began + _FIRST_SECONDS
        if is_watched() and not self._is_quiet:
            self._bar = _new_bar(phase, total)

    def advance(self, count: int) -> None:
        """So much more of it is done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        self.look()

    def finish(self, _folder: str) -> None:
        """A rank folder is done."""
        self._folders += 1
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._folders} folders done")

    def wait(self, text: str) -> None:
        """The run waits for another one."""
        log.info("waiting: %s", text)
        if is_watched() and not self._is_quiet:
            if self._bar is not None:
                self._bar.clear()
            print(f"waiting: {text}", file=sys.stderr)

    def look(self) -> None:
        """Show that time goes by."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.refresh()
        elif self._phase is not None and now >= self._next_line:
            self._next_line = now + _LINE_SECONDS
            log.info("%s", self._line(self._phase, now - self._began))

    def _line(self, phase: Phase, seconds: float) -> str:
        """Phase, folders, how much, rate and time left."""
        in_words = size if phase.unit == "B" else "{:.0f}".format
        text = f"{phase.word}: {in_words(self._done)} of {in_words(self._total)}"
        text += f" {phase.unit}" if phase.unit != "B" else f", {self._folders} folders done"
        if 0 < self._done < self._total:
            left = seconds * (self._total - self._done) / self._done
            text += f", {in_words(self._done / seconds)}/s, {left:.0f} s left"
        return text

    def close(self) -> None:
        """The phase is over."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._phase = None


def _new_bar(phase: Phase, total: int) -> tqdm[NoReturn] | None:
    """A bar for a phase; None where tqdm is not installed."""
    try:
        from tqdm import tqdm  # nobody else must wait for it
    except ImportError:
        return None
    tqdm.monitor_interval = 0  # no thread: workers are forked
    unit = phase.unit if phase.unit == "B" else f" {phase.unit}"
    return tqdm(total=total, desc=phase.word, unit=unit, unit_scale=phase.unit == "B", leave=False)
