"""The pairs in ``tests/data/sizes``: one state saved with other numbers of pipeline or
data-parallel ranks.

Dropping a copy of the word embedding needs copies that are equal: here they are, as training keeps
them.
"""

from __future__ import annotations

import functools
import shlex
from dataclasses import dataclass
from pathlib import Path

from pp_to_vpp import cli
from pp_to_vpp.options import Options
from pp_to_vpp.run import convert
from pp_to_vpp.run.listener import Listener
from pp_to_vpp.run.ready import ready

from .pairs import DATA, unpacked

FOLDER = DATA / "sizes"
PIPED = "tied-odd-pp4-pp2v2-v016"
TIED_ONE = "tied-odd-dp2-pp1-dp1-pp2-v016"
MTP_ONE = "deepseek-mtp-ep2-pp2-pp1-v016"
LAYER_WISE_SIZES = "distmuon-moe-ep2-pp2dp2-pp1dp4-v019"
HYBRID_ONE = "hybrid-moe-mtp-ep2-pp2-pp1-v019"
UNEVEN = "uneven-pp4-pp2-v016"

NAMES = sorted(path.name.removesuffix(".tar.xz") for path in FOLDER.glob("*.tar.xz"))
WAYS = [(name, side) for name in NAMES for side in ("source", "truth")]


@dataclass(frozen=True)
class Way:
    """A conversion of one side of a pair to the other."""

    source: Path
    truth: Path
    options: tuple[str, ...]


@functools.cache
def way(name: str, side: str = "source") -> Way:
    """From one side of a pair to the other. Nobody may write into it."""
    pair, case = unpacked(FOLDER / f"{name}.tar.xz")
    if side == "source":
        return Way(pair.source, pair.truth, pair.options)
    return Way(pair.truth, pair.source, tuple(shlex.split(case["back"])))


def options(source: Path, target: Path | None, *asked: str) -> Options:
    """Those of a command line, without processes."""
    folders = ["--load-iteration-dir", str(source), "--num-max-processing-processes", "1"]
    folders += [] if target is None else ["--save-iteration-dir", str(target)]
    return ready(cli.parser().parse_args([*folders, *asked], Options(Path())))


def run(source: Path, target: Path, *asked: str) -> None:
    """Convert."""
    convert.convert(options(source, target, *asked), Listener())
