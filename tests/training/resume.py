"""Training on from a converted checkpoint, beside a run that was never interrupted.

    python -m tests.training.resume dense logs/train_dense.log --steps 10

Exit status 0 if every loss after a conversion has the bits of the uninterrupted run's, 1 if not, 77
if the model needs what is not installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .agreement import release
from .command import command, convert
from .launch import megatron
from .spec import Model, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .launch import Megatron

LEFT_OUT = 77
"""The exit status for what cannot be done here, as Automake has it."""
STEPS = 3
"""Between two conversions, at least: the first step after loading shows no optimizer error."""
_DENSE = Run(Model(hidden=40, ffn=88), dp=2)
_MOE = Run(Model("moe", tied=False), ep=2, dp=2)
_V2 = Run(Model("deepseek", tied=False, leading_dense=2, expert_bias=False), ep=2, dp=2)
_V3 = Run(Model("deepseek", tied=False, mtp_layers=1), ep=2, dp=2)
_UNEVEN = Run(Model(layers=9), dp=2, layout="Etttt|tttttL")
_MUON = replace(_DENSE, optimizer="muon")
_LAYER_WISE = replace(_MOE, optimizer="dist_muon")
_HYBRID = Run(Model("hybrid", tied=False), ep=2, dp=2, pattern="M*M-|ME*E")
_ONE = Run(Model(hidden=40, ffn=88, tied=False), pp=1)
_TIED = Run(Model(hidden=40, ffn=88))
RUNS = {
    "dense": (_DENSE, replace(_DENSE, vpp=2)),
    "moe": (_MOE, replace(_MOE, vpp=2)),
    "deepseek_v2": (_V2, replace(_V2, vpp=2)),
    "deepseek_v3": (_V3, replace(_V3, vpp=2)),
    "uneven": (_UNEVEN, replace(_UNEVEN, vpp=2, layout="Ettt|tt|t|tttL")),
    "one_stage": (_ONE, replace(_ONE, pp=2, vpp=2)),
    "twice_the_stages": (_TIED, replace(_TIED, pp=4)),
    "half_the_stages": (replace(_TIED, pp=4), replace(_TIED, vpp=2)),
    "muon": (_MUON, replace(_MUON, vpp=2)),
    "dist_muon": (_LAYER_WISE, replace(_LAYER_WISE, vpp=2)),
    "hybrid": (_HYBRID, replace(_HYBRID, vpp=2, pattern="M*|M-M|E|*E")),
}
"""Models and optimizers, under PP and under VPP, or on another number of pipeline ranks."""
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
    """As ``virtual`` and on, with the first moments of one rank in reverse order."""
    without: Losses
    """As ``virtual`` and on, with ``--no-load-optim``."""
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
        for losses in (self.control, self.without):
            if all(loss == self.plain[i] for i, loss in losses.items()):
                yield "the losses do not depend on the optimizer state"


def lacking(run: Run, version: str) -> str | None:
    """What a run needs that this environment has not.

    Args:
        run: what is to be trained.
        version: of the Megatron-Core that is installed.
    """
    if run.pattern is not None and release(version) < (0, 18):
        return "Megatron-Core 0.18 or later"
    if "muon" in run.optimizer:
        try:
            found = release(importlib.metadata.version("emerging-optimizers"))
        except importlib.metadata.PackageNotFoundError:
            return "emerging-optimizers"
        if release(version) < (0, 17) and found > (0, 1):
            return "Megatron-Core 0.17 or later, or emerging-optimizers 0.1"
    return None


def experiment(
    server: Megatron, run: Run, target: Run, folder: Path, steps: int = STEPS
) -> Experiment:
    """Train under PP; convert to VPP and train on; convert back and train on."""
    roots = {name: str(folder / name) for name in ("plain", "virtual", "back", "control")}

    def train(run: Run, **options: Any) -> Losses:
        ranks = server.run("train", run, save_every=steps, **options)
        return {int(iteration): loss for rank in ranks for iteration, loss in rank.items()}

    plain = train(run, steps=3 * steps, save=roots["plain"])
    converted = convert(folder / "plain" / f"iter_{steps:07d}", folder / "virtual", target)
    shutil.copytree(converted.parent, roots["control"])
    without = train(target, steps=2 * steps, load=roots["virtual"], load_optimizer=False)
    virtual = train(target, steps=steps, load=roots["virtual"], save=roots["virtual"])
    convert(folder / "virtual" / f"iter_{2 * steps:07d}", folder / "back", run)
    back = train(run, steps=steps, load=roots["back"])
    ranks = sorted((folder / "control" / converted.name).iterdir())
    server.run("reverse_moments", Run(pp=1), folder=str(ranks[0]))
    control = train(target, steps=2 * steps, load=roots["control"])
    return Experiment(plain, virtual, back, control, without, steps)


def _report(
    name: str, run: Run, target: Run, result: Experiment, version: str, files: list[Path]
) -> Iterator[str]:
    """The lines of the log; the version is Megatron-Core's, the files are of one checkpoint."""
    first, second = result.steps, 2 * result.steps
    yield f"$ python -m tests.training.resume {name} logs/train_{name}.log --steps {first}"
    packages = ["torch", "numpy"] + ["emerging-optimizers"] * ("muon" in run.optimizer)
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    python = f"Python {platform.python_version()}, {platform.machine()}, gloo"
    yield f"{python}, megatron-core {version}, {', '.join(versions)}"
    deepseek = ["leading_dense", "expert_bias"] * (run.model.kind == "deepseek")
    yield f"model: {_told(run.model, 'kind', 'layers', 'hidden', 'ffn', 'tied', *deepseek)}"
    for title, each in (("source", run), ("target", target)):
        yield f"{title}: {_told(each, 'pp', 'vpp', 'dp', 'optimizer')}"
    sizes = [file.stat().st_size for file in files]
    yield f"a checkpoint: {len(files)} files, {sum(sizes):,} bytes"
    yield "bf16 with fp32 main parameters, Megatron's own schedules, --clip-grad 0"
    yield ""
    columns = {
        "uninterrupted": (f"{3 * first} iterations of the source's layout", result.plain),
        "to VPP": (f"in the target's layout, from iteration {first} converted", result.virtual),
        "back to PP": (f"from iteration {second} of that, converted back", result.back),
        "moments spoilt": (
            'the control: as "to VPP", with the moments of one rank reversed', result.control,
        ),
        "--no-load-optim": (
            'as "to VPP", without the optimizer and its schedule: what losing it costs',
            result.without,
        ),
    }  # fmt: skip
    for title, (meaning, _) in columns.items():
        yield f"{title:15}  {meaning}"
    for source, root, saved, wanted in (
        ("plain", "virtual", first, target), ("virtual", "back", second, run)
    ):  # fmt: skip
        folder = f"iter_{saved:07d}"
        words = command(Path(source, folder), Path(root, folder), wanted)
        yield f"$ python {shlex.join(words)}"
    yield ""
    yield "losses, in nine digits, which tell any two fp32 numbers apart"
    yield "iteration" + "".join(f"  {title:>15}" for title in columns)
    runs = [losses for _, losses in columns.values()]
    for iteration in result.plain:
        cells = [_cell(losses.get(iteration)) for losses in runs]
        yield (f"{iteration:9}" + "".join(f"  {cell:>15}" for cell in cells)).rstrip()
    yield ""
    largest = [
        f"{title} {_largest(result.plain, losses):.4g}" for title, (_, losses) in columns.items()
    ]
    yield f"largest difference: {', '.join(largest[1:])}"
    problems = list(result.problems())
    yield from problems
    yield (
        "DIFFERENT"
        if problems
        else "EQUAL: every loss after a conversion has the bits of the uninterrupted run's"
    )


def _told(what: Model | Run, *always: str) -> str:
    """The fields that are not as usual, and those that are always told."""
    values = [(field.name, getattr(what, field.name), field.default) for field in fields(what)]
    told = [
        f"{name} {value}"
        for name, value, usual in values
        if name in always or (name != "model" and value != usual)
    ]
    return ", ".join(told)


def _largest(plain: Losses, losses: Losses) -> float:
    """How far losses are from those of the same iterations at most."""
    pairs = [(float.fromhex(plain[i]), float.fromhex(loss)) for i, loss in losses.items()]
    return max(abs(one - other) for one, other in pairs)


def _cell(loss: str | None) -> str:
    return "" if loss is None else f"{float.fromhex(loss):#.9g}"


def main() -> int:
    """Run one experiment and write its log; 1 if the losses differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.training.resume", description=__doc__)
    parser.add_argument("model", choices=RUNS)
    parser.add_argument("log", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="between two conversions")
    given = parser.parse_args()
    run, target = RUNS[given.model]
    with megatron() as server, tempfile.TemporaryDirectory(prefix="resume_") as folder:
        (version,) = server.run("version", Run(pp=1))
        lacks = lacking(run, version)
        if lacks is not None:
            line = f"{given.model} is left out: it needs {lacks}, which is not installed"
            print(line, file=sys.stderr)  # noqa: T201 - a command
            return LEFT_OUT
        result = experiment(server, run, target, Path(folder), given.steps)
        files = list(Path(folder, "plain", f"iter_{given.steps:07d}").rglob("*.pt"))
        lines = list(_report(given.model, run, target, result, version, files))
    given.log.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))  # noqa: T201 - a command
    return 1 if list(result.problems()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
