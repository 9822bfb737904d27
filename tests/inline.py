"""Runs without processes: tests of what is done need not wait for who does it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from pp_to_vpp.megatron.forms import Ends, Even, HybridPattern, LayoutString, Listed
from pp_to_vpp.megatron.placement import Placement
from pp_to_vpp.options import Depth, Options
from pp_to_vpp.run import convert
from pp_to_vpp.run.listener import Listener
from pp_to_vpp.run.workers import Workers


class Inline(Workers):
    """Does each task at once, in this process."""

    def __init__(self, count: int = 2, looked: Callable[[], None] = lambda: None) -> None:
        self.count = count
        self._looked = looked
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


def asking_for(source: Path, placement: Placement, *, overlaps: bool = False) -> Options:
    """Options that ask for a placement."""
    options = Options(source, target_vp_size=placement.vp_size, overlaps=overlaps)
    match placement.form:
        case LayoutString(text):
            options.target_vp_size, options.layout_string = None, text
        case Ends():
            options.first_split = placement.form.first_split
            options.last_split = placement.form.last_split
        case HybridPattern(text):
            options.target_vp_size, options.hybrid_pattern = None, text
        case Even() | Listed():
            pass
    return options


def run(source: Path, target: Path, wanted: Placement, depth: Depth = Depth.NONE) -> None:
    """Convert."""
    options = asking_for(source, wanted)
    options.save_dir, options.depth, options.processes = target, depth, 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "Workers", Inline)
        convert.convert(options, Listener())
