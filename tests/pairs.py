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

# The pairs that tests ask for by name.
DENSE = "dense-pp2-v016"
MOE = "moe-pp2ep2-v016"
DEEPSEEK = "deepseek-mtp-pp2ep2-v016"
BUCKETS = "dense-pp2-buckets-odd-dp2-v016"
ODD = "dense-pp2-odd-dp3-v012"
HALF = "dense-pp2-fp16-v016"
LAYOUT = "dense-pp2-layout-v016"
REMAINDERS = "dense-pp2-remainders-v016"
HALVED_MAINS = "dense-pp2-fp16mains-v016"
PLAIN = "dense-pp2-nodistopt-v016"
WEIGHTS = "dense-pp2-nosaveoptim-v016"
OVERLAP = "dense-pp2-opgos-v016"
OVERLAP_EMPTY = "dense-pp2-opgos-emptyfirst-v014"
OVERLAP_EMPTY_MOE = "moe-pp2ep2-opgos-emptyfirst-v016"
SGD = "dense-pp2-sgd-v016"
LION = "moe-pp2ep2-lion-v019"
MUON = "muon-dense-pp2-v016"
SOAP = "soap-dense-pp2-v019"
FROZEN = "frozen-experts-moe-pp2ep2-v019"
LONE = "frozen-lone-dense-pp2-v016"
FRONT = "frozen-front-dense-pp2-odd-v016"
FROZEN_MOST = "frozen-most-moe-pp2ep2-v012"
FROZEN_PLAIN = "frozen-norms-dense-nodistopt-v016"
MUP = "mup-nodistopt-dense-pp2-dev"
OWN_RATES = "ownlr-nodistopt-dense-pp2-v012"
LAYER_WISE = "distmuon-moe-pp2ep2-v019"
LAYER_WISE_ODD = "distmuon-dense-pp2dp3-odd-v016"
FROZEN_LAYER_WISE = "frozen-distmuon-moe-pp2ep2dp4-v016"
EXPERTS_FIRST = "frozen-front-distmuon-moe-pp2ep2-v019"
FROZEN_DECOUPLED = "frozen-norms-decoupled-dense-pp3-v014"
LAYER_WISE_WIDE = "soap-layerwise-moe-pp2ep2dp4-v019"
EMPTY_OLD = "dense-pp3-empty-v013"
EMPTY = "dense-pp3-empty-v015"
ETP = "moe-pp2tp2etp1-v019"
HYBRID = "hybrid-emptyseg-pp2-v018"
HYBRID_MOE = "hybrid-emptylast-mtp-pp2ep2-v019"
NOOP = "noop-dense-emptychunk-pp2-v012"
FORK = "uneven-31layers-pp4-fork"
INSTANCES = "instances3-dp3-dense-pp2-v018"
BARE = "declr-middle-rank-dense-pp3-main-202512"
BERT = "bert-tied-pp2tp2-v016"
TIED_MTP = "mtp-tied-own-stage-nodistopt-dense-pp3-v019"

ONE_WAY = (TIED_MTP,)
"""Those of which the way back has values that nobody can know; ``test_copies`` asks for them."""

EACH_KIND = (
    MOE, DEEPSEEK, BUCKETS, PLAIN, LAYER_WISE_WIDE, FROZEN, FROZEN_DECOUPLED, OVERLAP_EMPTY,
    HYBRID_MOE, FORK,
)  # fmt: skip
"""One pair of each kind of optimizer, model and placement."""
UNCOMPARED = {REMAINDERS: "remainders", HALVED_MAINS: "halves"}
"""Those whose weights cannot be compared with what is left of their main parameters, which is that
in place of "rounded"."""


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
def scratch() -> Path:
    """A folder for what is made once in a test run; it is removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="pp_to_vpp_pairs_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def names() -> list[str]:
    """All pairs that convert both ways."""
    found = (path.name.removesuffix(".tar.xz") for path in DATA.glob("*.tar.xz"))
    return sorted(name for name in found if name not in ONE_WAY)


@functools.cache
def pair(name: str) -> Pair:
    """Unpack a pair, once per test run. Nobody may write into it."""
    return unpacked(DATA / f"{name}.tar.xz")[0]


def unpacked(path: Path) -> tuple[Pair, dict[str, str]]:
    """A pair, and all that is told of it."""
    name = path.name.removesuffix(".tar.xz")
    folder = scratch() / name
    if not folder.exists():
        with tarfile.open(path) as archive:
            # The argument `filter` is unknown to Debian 12's Python, 3.11.2; the attribute is not.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(scratch())
    case = json.loads((folder / "case.json").read_text())
    (source,) = (folder / "source").glob("iter_*")
    (truth,) = (folder / "truth").glob("iter_*")
    return Pair(name, source, truth, tuple(shlex.split(case["convert"])), case["megatron"]), case


def rank_files(name: str) -> list[Path]:
    """Every file of a pair, of the source and of the truth."""
    found = pair(name)
    return sorted(found.source.glob("*/*.pt")) + sorted(found.truth.glob("*/*.pt"))
