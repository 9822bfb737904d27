"""Training on from a converted checkpoint, beside a run that was never interrupted.

python -m tests.training.resume dense logs/train_dense.log
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shlex
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import command, convert
from .launch import megatron
from .spec import Model, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .launch import Megatron

STEPS = 3
"""Between two conversions, at least: the first step after loading shows no optimizer error."""
RUNS = {
    "dense": Run(Model(hidden=40, ffn=88), dp=2),
    "moe": Run(Model("moe", tied=False), ep=2, dp=2),
}
Losses = dict[int, str]
"""Exact, by iteration."""


@dataclass(frozen=True)
class Experiment:
    """One model, trained in several ways."""

    plain: Losses
    """Plain PP, never interrupted."""
    virtual: Losses
    """Resumed under VPP, from the checkpoint of ``plain`` converted."""
    back: Losses
    """Resumed under PP, from the checkpoint of ``virtual`` converted back."""
    control: Losses
    """As ``virtual``, with Adam's first moments of one chunk in reverse order."""
    steps: int
    """Between two conversions."""

    def problems(self) -> Iterator[str]:
        """Whatever is not as it must be."""
        if (
            set(self.plain) != set(range(1, 3 * self.steps + 1))
            or len(set(self.plain.values())) < 8
        ):
            yield "the uninterrupted run did not train"
        for name, losses, first in (
            ("VPP", self.virtual, self.steps + 1),
            ("PP after VPP", self.back, 2 * self.steps + 1),
        ):
            if losses != {i: self.plain[i] for i in range(first, first + self.steps)}:
                yield f"{name} is not bit for bit what the uninterrupted run is"
        if self.control == self.virtual:
            yield "the losses do not depend on the optimizer state"


def experiment(server: Megatron, run: Run, folder: Path, steps: int = STEPS) -> Experiment:
    """Train under PP; convert to VPP and train on; convert back and train on."""
    target = replace(run, vpp=2)
    roots = {name: str(folder / name) for name in ("plain", "virtual", "back", "control")}

    def train(run: Run, **options: Any) -> Losses:
        ranks = server.run("train", run, save_every=steps, **options)
        return {int(iteration): loss for rank in ranks for iteration, loss in rank.items()}

    plain = train(run, steps=3 * steps, save=roots["plain"])
    converted = convert(folder / "plain" / f"iter_{steps:07d}", folder / "virtual", target)
    shutil.copytree(converted.parent, roots["control"])
    virtual = train(target, steps=steps, load=roots["virtual"], save=roots["virtual"])
    convert(folder / "virtual" / f"iter_{2 * steps:07d}", folder / "back", run)
    back = train(run, steps=steps, load=roots["back"])
    ranks = sorted((folder / "control" / converted.name).iterdir())
    server.run("damage", Run(pp=1), folder=str(ranks[0]), kind="order of moments")
    control = train(target, steps=steps, load=roots["control"])
    return Experiment(plain, virtual, back, control, steps)


def _report(name: str, run: Run, result: Experiment) -> Iterator[str]:
    """The lines of the log."""
    target = replace(run, vpp=2)
    yield f"{name}: {run}"
    packages = ("megatron-core", "torch", "numpy")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    yield f"Python {platform.python_version()}, {', '.join(versions)}, gloo, {platform.machine()}"
    yield "Megatron's pipeline schedules, --clip-grad 0, Adam with fp32 main parameters, bf16"
    for source, root, saved, wanted in (
        ("plain", "virtual", result.steps, target),
        ("virtual", "back", 2 * result.steps, run),
    ):
        folder = f"iter_{saved:07d}"
        words = command(Path(source, folder), Path(root, folder), wanted)
        yield f"$ python {shlex.join(words)}"
    yield ""
    columns = {
        "PP, never interrupted": result.plain,
        f"VPP 2, resumed from {result.steps}": result.virtual,
        f"PP again, resumed from {2 * result.steps}": result.back,
        "control: VPP, moments spoilt": result.control,
    }
    yield "iteration" + "".join(f"  {title:>29}" for title in columns)
    for iteration in result.plain:
        cells = [_cell(losses.get(iteration)) for losses in columns.values()]
        yield f"{iteration:9}" + "".join(f"  {cell:>29}" for cell in cells)
    yield ""
    problems = list(result.problems())
    yield from problems
    yield (
        "DIFFERENT"
        if problems
        else ("EQUAL: every loss after a conversion has the bits of the uninterrupted run's")
    )


def _cell(loss: str | None) -> str:
    return "" if loss is None else f"{float.fromhex(loss):.6f} {loss}"


def main() -> int:
    """Run one experiment and write its log; 1 if the losses differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.training.resume", description=__doc__)
    parser.add_argument("model", choices=RUNS)
    parser.add_argument("log", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="between two conversions")
    given = parser.parse_args()
    run = RUNS[given.model]
    with megatron() as server, tempfile.TemporaryDirectory(prefix="resume_") as folder:
        result = experiment(server, run, Path(folder), given.steps)
    lines = list(_report(given.model, run, result))
    given.log.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))  # noqa: T201 - a command
    return 1 if list(result.problems()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
