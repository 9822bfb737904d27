"""Workers that are no processes: tests of what is done need not wait for who does it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pp_to_vpp.run.workers import Workers


class Inline(Workers):
    """Does each task at once, in this process."""

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.killed = False
        self._dead_thread = None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.killed = self.killed or kind is not None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """The result, or the error, is there at once."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def kill(self) -> None:
        """Nobody is there to be ended."""
        self.killed = True
