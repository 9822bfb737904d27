"""``python -m tests.sweep.run --count 100 --seed WORD``: a random sweep over Megatron's flags.

Draws pairs of training runs of the work trees that ``MEGATRON_TREES`` names, has each tree's own
``pretrain_gpt.py`` save them, converts each side into the other with ``--verify full``, compares
the result with what Megatron saved, and prints a table. The trees import six, regex, pydantic,
pyyaml, omegaconf and absl-py; Muon and SOAP are drawn where ``EMERGING_OPTIMIZERS`` names a folder
with releases of emerging-optimizers.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import pp_to_vpp

from ..training.launch import RankError, server
from .draw import Choices, Draw, draw
from .judge import Verdict, judge
from .trees import TREES, emerging_optimizers, trees

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..training.launch import Megatron


def sweep(
    count: int,
    seed: str,
    told: Callable[[int, str, Draw, Verdict], None],
    only: Iterable[int] | None = None,
    keep: Path | None = None,
) -> None:
    """Judge draws, those of one version after another, and tell of each.

    Args:
        count: how many draws there are.
        seed: any word; the same one draws the same pairs of the same trees.
        told: is called with a draw's number, version, the draw and what came of it.
        only: numbers of draws; the others are left out.
        keep: folder for the files of the pairs that are not equal.
    """
    torch.set_num_threads(1)
    known, chosen = trees(), random.Random(seed)
    versions = [chosen.choice(sorted(known)) for _ in range(count)]
    numbers = [n for n in range(count) if only is None or n in only]
    for version in sorted({versions[n] for n in numbers}):
        emerging = emerging_optimizers(known[version])
        path = {"PYTHONPATH": str(emerging)} if emerging else {}
        with server("tests.sweep.host", str(known[version]), **path) as host:
            try:
                (options,) = host.ask({"action": "options", "given": {}})
            except RankError as error:
                raise RuntimeError(f"{known[version]} does not start: {error}") from error
            for number in (n for n in numbers if versions[n] == version):
                choices = Choices(f"{seed}-{number}", options)
                drawn = draw(choices, has_emerging=emerging is not None)
                told(number, version, drawn, _verdict(host, drawn, keep and keep / str(number)))


def _verdict(host: Megatron, drawn: Draw, keep: Path | None) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="sweep_") as folder:
        verdict = judge(host, drawn, Path(folder))
        if keep is not None and verdict.refusal is None and not verdict.is_equal:
            shutil.copytree(folder, keep)
        return verdict


def row(number: int, version: str, drawn: Draw, verdict: Verdict) -> str:
    """A row of the table."""
    if verdict.refusal is not None:
        cells = [f"Megatron refuses: {verdict.refusal}", "", ""]
    else:
        cells = ["made", verdict.there, verdict.back]
    texts = [str(number), version, drawn.in_short(), *cells]
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


HEAD = """\
| draw | version | flags | Megatron | there | back |
|---|---|---|---|---|---|"""


def summary(verdicts: list[Verdict]) -> str:
    """What came of all draws, in a sentence."""
    made = [verdict for verdict in verdicts if verdict.refusal is None]
    kinds = Counter(
        said.partition(":")[0] for verdict in made for said in (verdict.there, verdict.back)
    )
    said = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    refused = len(verdicts) - len(made)
    return f"{len(made)} pairs, each both ways: {said}; Megatron itself refused {refused} draws."


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep.run", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="how many draws (100)")
    parser.add_argument("--seed", default="1", help="any word: it decides all draws (1)")
    parser.add_argument("--only", type=int, nargs="+", help="these numbers of them")
    parser.add_argument("--keep", type=Path, help="a folder for pairs that are not equal")
    given = parser.parse_args()
    if not trees():
        parser.error(f"{TREES} names no folder with work trees of Megatron-LM")
    print(f"pp_to_vpp {pp_to_vpp.__version__}, seed {given.seed}\n\n{HEAD}")  # noqa: T201
    verdicts = []

    def tell(number: int, version: str, drawn: Draw, verdict: Verdict) -> None:
        verdicts.append(verdict)
        print(row(number, version, drawn, verdict), flush=True)  # noqa: T201

    sweep(given.count, given.seed, tell, given.only, given.keep)
    print(f"\n{summary(verdicts)}")  # noqa: T201
    return int(any(verdict.is_wrong for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
