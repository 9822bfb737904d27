#!/usr/bin/env python3
"""Draw what logs record: losses of training, time and memory of a benchmark.

Each picture is an SVG file beside its log, made from the numbers in the log and from nothing else.
Needs matplotlib: pip install '.[plots]'.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOGS = Path(__file__).resolve().parent.parent / "logs"
_COLORS = ("#0072b2", "#56b4e9", "#8c8c8c", "#d55e00")
"""Told apart by the colour-blind too (Okabe and Ito), and in print."""
_STYLE = {
    "svg.hashsalt": "pp_to_vpp",  # the same numbers give the same file
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1,
    "lines.markersize": 3,
}
_FIRST_CELL, _CELL = 9, 17
"""Widths of the columns in a log of losses."""
_MODEL = re.compile(r"tests.training.resume (\w+)")
_BENCHMARK_ROW = re.compile(r"\| ([\d.]+) GB \| ([^|]+) \| ([\d.]+) s \|.*?\| (\d+) MB \|")
_MEASURES = ("cp -r", "diff -rq")
_RATIO_ROW = re.compile(r"GB \| ([^|]+) \| [\d.]+ s \| ([\d.]+) \(([\d.]+) to ([\d.]+)\)")


def read_losses(log: str) -> dict[str, dict[int, float]]:
    """The losses of each run by iteration; equal ones are equal. The uninterrupted run is first."""
    lines = iter(log.splitlines())
    head = next(line for line in lines if line.startswith("iteration"))
    starts = range(_FIRST_CELL, len(head), _CELL)
    runs: dict[str, dict[int, float]] = {
        head[start : start + _CELL].strip(): {} for start in starts
    }
    for line in lines:
        if not line.strip():
            break
        for start, losses in zip(starts, runs.values(), strict=True):
            cell = line[start : start + _CELL].strip()
            if cell:
                losses[int(line[:_FIRST_CELL])] = float(cell)
    return runs


def draw_losses(log: str, figure: Figure) -> None:
    """The losses of all runs, and below how far each is from the uninterrupted one."""
    (name, whole), *others = read_losses(log).items()
    losses, away = figure.subplots(2, sharex=True, height_ratios=(5, 4))
    losses.plot(whole.keys(), whole.values(), color="#c8c8c8", linewidth=4, label=name)
    colors = (_COLORS[0], "#009e73", _COLORS[3], "#e69f00")
    apart: list[float] = []
    for (title, run), color, marker in zip(others, colors, "os^D", strict=True):
        is_equal = all(loss == whole[iteration] for iteration, loss in run.items())
        style = {"color": color, "marker": marker, "zorder": 4 if is_equal else 3}
        losses.plot(run.keys(), run.values(), label=title, **style)
        differences = [abs(loss - whole[iteration]) for iteration, loss in run.items()]
        away.plot(run.keys(), differences, clip_on=False, **style)
        apart += filter(None, differences)
    for title, run in others[:2]:
        for panel in (losses, away):
            panel.axvline(min(run) - 0.5, color="#8c8c8c", linestyle=":")
        where = {"xycoords": losses.get_xaxis_transform(), "textcoords": "offset points"}
        losses.annotate(f"converted {title}", (min(run) - 0.5, 1), (0, 6), **where)
    losses.set_title(f"model: {_MODEL.findall(log)[0]}")
    losses.set_ylabel("loss")
    losses.legend(loc="lower left")
    least, most = math.floor(math.log10(min(apart))), math.ceil(math.log10(max(apart)))
    decades = [10.0**power for power in range(least, most + 1)]
    away.set_yscale("symlog", linthresh=decades[0])
    away.set_yticks([0, *decades], ["0, bit for bit", *(f"{decade:g}" for decade in decades)])
    away.set_ylim(-decades[0] / 3, decades[-1])
    away.axhline(0, color="#444444")
    away.minorticks_off()
    away.set_title("distance from the uninterrupted run, logarithmic")
    away.set_ylabel("difference of losses")
    away.set_xlabel("iteration")
    away.set_xlim(0.5, max(whole) + 0.5)


def draw_benchmark(log: str, figure: Figure) -> None:
    """Time and memory against the size of the checkpoint."""
    columns: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for size, column, seconds, memory in _BENCHMARK_ROW.findall(log):
        columns[column].append((float(size), float(seconds), float(memory)))
    panels: tuple[Axes, Axes] = figure.subplots(1, 2)
    for (column, rows), color in zip(columns.items(), _COLORS, strict=False):
        sizes, *values = zip(*rows, strict=True)
        for panel, value in zip(panels, values, strict=True):
            panel.plot(sizes, value, color=color, marker="o", label=column)
    for panel, title in zip(panels, ("time, s", "peak memory (PSS), MB, logarithmic"), strict=True):
        panel.set_title(title)
        panel.set_xlabel("checkpoint, GB")
        panel.set_xlim(left=0)
    panels[0].set_ylim(bottom=0)
    panels[1].set_yscale("log")  # from 1 MB to gigabytes
    panels[1].yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_places(log: str, figure: Figure) -> None:
    """Times of conversions and of verification on each file system, in parts of ``cp`` and
    ``diff``, with their scatter."""
    panels: tuple[Axes, Axes] = figure.subplots(1, 2, sharey=True)
    for panel, title in zip(panels, ("time / cp -r", "time / diff -rq"), strict=True):
        panel.set_title(title)
        panel.axvline(1, color="#8c8c8c")
    names: list[str] = []
    _, *places = log.split("### ")
    for place in places:
        names.append(place.partition("\n")[0])
        for panel, table in zip(panels, _tables(place), strict=True):
            rows = [row for row in _RATIO_ROW.findall(table) if row[0] not in _MEASURES]
            height = 0.8 / len(rows)
            for i, ((column, *values), color) in enumerate(zip(rows, _COLORS, strict=False)):
                middle, least, most = map(float, values)
                where = len(names) - 1 + (i - (len(rows) - 1) / 2) * height
                scatter = [[middle - least], [most - middle]]
                style = {"height": height * 0.9, "color": color, "label": column.strip()}
                panel.barh(where, middle, xerr=scatter, ecolor="#444444", **style)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True))
        panel.legend(found.values(), found.keys(), loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _tables(place: str) -> list[str]:
    """Those of conversion and of verification."""
    return [part for part in place.split("\n\n") if part.startswith("| checkpoint")][:2]


def main() -> None:
    """Draw each log."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "logs",
        nargs="*",
        type=Path,
        default=[
            *sorted(_LOGS.glob("train_*.log")),
            _LOGS / "benchmark_memory.md",
            _LOGS / "benchmark_disk.md",
            _LOGS / "benchmark_file_systems.md",
        ],
        metavar="LOG",
        help="a log of losses (.log) or the tables of a benchmark (.md) [default: those in logs/]",
    )
    logs: list[Path] = parser.parse_args().logs

    import matplotlib as mpl  # --help does without
    from matplotlib.figure import Figure

    for path in logs:
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(7.2, 4.2), layout="constrained")
            log = path.read_text()
            draw = draw_losses
            if path.suffix == ".md":
                draw = draw_places if log.count("### ") > 1 else draw_benchmark
            draw(log, figure)
            picture = path.with_suffix(".svg")
            figure.savefig(picture, metadata={"Date": None})
        print(picture)


if __name__ == "__main__":
    main()
