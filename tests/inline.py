"""Runs without processes: tests of what is done need not wait for who does it."""

from __future__ import annotations

from pathlib import Path

from pp_to_vpp.megatron.forms import Ends, Even, HybridPattern, LayoutString, Listed
from pp_to_vpp.megatron.placement import Placement
from pp_to_vpp.options import Depth, Options
from pp_to_vpp.run import convert
from pp_to_vpp.run.listener import Listener
from pp_to_vpp.run.workers import Workers


class Inline(Workers):
    """One that deals work out as for more, and knows whether it was ended."""

    def __init__(self, count: int = 2) -> None:
        super().__init__(1)
        self.count = count
        self.killed = False

    def kill(self) -> None:
        super().kill()
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
    convert.convert(options, Listener())
