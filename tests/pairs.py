"""The checkpoints in ``tests/data``: pairs (source, truth) that real Megatron-LM versions saved.

Each archive holds one logical state saved twice by ``pretrain_gpt.py``: under the source layout and
under the target layout, with values that depend only on global names. So converting ``source`` must
give ``truth``.
"""

from __future__ import annotations

import atexit
import functools
import json
import shlex
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Pair:
    """One unpacked pair."""

    name: str
    source: Path
    """Iteration folder to be converted."""
    truth: Path
    """Iteration folder that Megatron saved with the target's flags."""
    options: tuple[str, ...]
    """Command-line options that ask for the target."""
    megatron: str
    """Version that saved it."""


@functools.cache
def _root() -> Path:
    path = Path(tempfile.mkdtemp(prefix="pp_to_vpp_pairs_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def names() -> list[str]:
    """All pairs."""
    return sorted(path.name.removesuffix(".tar.xz") for path in DATA.glob("*.tar.xz"))


@functools.cache
def pair(name: str) -> Pair:
    """Unpack a pair, once per test run. Nobody may write into it."""
    folder = _root() / name
    if not folder.exists():
        with tarfile.open(DATA / f"{name}.tar.xz") as archive:
            archive.extractall(_root(), filter="data")
    case = json.loads((folder / "case.json").read_text())
    (source,) = (folder / "source").glob("iter_*")
    (truth,) = (folder / "truth").glob("iter_*")
    return Pair(name, source, truth, tuple(shlex.split(case["convert"])), case["megatron"])


def rank_files() -> list[Path]:
    """Every file of every pair."""
    found: list[Path] = []
    for name in names():
        found += sorted(pair(name).source.glob("*/*.pt")) + sorted(pair(name).truth.glob("*/*.pt"))
    return found
