"""What was measured, in words: the machine, Markdown tables, and a plot as SVG."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .commands import COPY
from .measure import Measured

_GB, _MB = 1e9, 1e6
_COLORS = ("#1f77b4", "#17becf", "#7f7f7f", "#d62728")
_WIDTH, _HEIGHT, _LEFT, _TOP = 330, 220, 60, 40


@dataclass(frozen=True, slots=True)
class Series:
    """All runs of one column on one checkpoint."""

    column: str
    size: int
    """Bytes of the checkpoint."""
    runs: tuple[Measured, ...]
    """The i-th runs of all columns followed each other."""

    def median(self, value: Callable[[Measured], float]) -> float:
        """Median over the runs."""
        return statistics.median(map(value, self.runs))


def file_system(path: Path) -> str:
    """The type of the file system that holds a folder."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split()
        if len(mount) >= len(best) and path.resolve().is_relative_to(mount):
            best, kind = mount, found
    return kind


def free_memory() -> int:
    """Bytes that can be used without swapping."""
    match = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return int(match[1]) * 1024 if match else 0


def machine(where: Path) -> str:
    """The machine in words."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        f"{os.cpu_count()} cores ({model[1] if model else platform.machine()}), "
        f"{memory / 2**30:.0f} GiB of memory, {file_system(where)}, "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}; "
        f"load average {os.getloadavg()[0]:.1f} before the first run"
    )


def run_line(column: str, size: int, run: Measured) -> str:
    """One run, for the log."""
    return (
        f"{size / _GB:7.3f} GB  {column:<20} {run.seconds:8.2f} s  cpu {run.cpu_seconds:7.2f} s  "
        f"pss {run.peak_bytes / _MB:7.1f} MB  read {run.read_bytes / _GB:7.3f} GB  "
        f"written {run.written_bytes / _GB:7.3f} GB"
    )


def size_table(found: Sequence[Series]) -> str:
    """Medians for each size and column."""
    lines = [
        "| checkpoint | | time | against `cp -r` (least to most) | processor time "
        "| peak memory (PSS) | read | written |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    copies = {series.size: series for series in found if series.column == COPY}
    for series in found:
        ratio = "-"
        if series.size in copies:
            pairs = zip(series.runs, copies[series.size].runs, strict=True)
            ratios = [run.seconds / copy.seconds for run, copy in pairs]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        cells = (
            f"{series.size / _GB:.2f} GB",
            series.column,
            f"{series.median(lambda run: run.seconds):.2f} s",
            ratio,
            f"{series.median(lambda run: run.cpu_seconds):.2f} s",
            f"{series.median(lambda run: run.peak_bytes) / _MB:.0f} MB",
            f"{series.median(lambda run: run.read_bytes) / series.size:.3f} x",
            f"{series.median(lambda run: run.written_bytes) / series.size:.3f} x",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def small_table(title: str, found: Mapping[str, Sequence[Measured]]) -> str:
    """Medians of commands that write little or nothing."""
    lines = [f"| {title} | time | processor time | peak memory (PSS) | read |"]
    lines.append("|---|--:|--:|--:|--:|")
    for name, runs in found.items():
        series = Series(name, 0, tuple(runs))
        cells = (
            name,
            f"{series.median(lambda run: run.seconds):.2f} s",
            f"{series.median(lambda run: run.cpu_seconds):.2f} s",
            f"{series.median(lambda run: run.peak_bytes) / _MB:.0f} MB",
            f"{series.median(lambda run: run.read_bytes) / _MB:.1f} MB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Sequence[Series]) -> str:
    """Time and memory against size, as an SVG picture."""
    columns = list(dict.fromkeys(series.column for series in found))
    panels: dict[str, Callable[[Series], float]] = {
        "seconds": lambda series: series.median(lambda run: run.seconds),
        "peak memory, MB": lambda series: series.median(lambda run: run.peak_bytes) / _MB,
    }
    width, height = 2 * (_WIDTH + _LEFT) + 30, _HEIGHT + _TOP + 80
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, (title, value) in enumerate(panels.items()):
        left = _LEFT + index * (_WIDTH + _LEFT)
        curves = [[(s.size / _GB, value(s)) for s in found if s.column == c] for c in columns]
        parts += _panel(title, left, curves)
    for index, column in enumerate(columns):
        x, y = _LEFT + index * 190, _TOP + _HEIGHT + 60
        color = _COLORS[index % len(_COLORS)]
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="{x + 16}" y="{y}">{column}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(title: str, left: int, curves: list[list[tuple[float, float]]]) -> list[str]:
    """Axes from 0, labelled at the ends, and a line for each curve."""
    points = [point for curve in curves for point in curve]
    high_x, high_y = (1.05 * max(values) for values in zip(*points, strict=True))
    bottom = _TOP + _HEIGHT
    parts = [
        f'<path d="M{left} {_TOP} V{bottom} H{left + _WIDTH}" fill="none" stroke="black"/>',
        f'<text x="{left}" y="{_TOP - 12}">{title}</text>',
        f'<text x="{left + _WIDTH}" y="{bottom + 34}" text-anchor="end">checkpoint, GB</text>',
    ]
    for step in range(5):
        y = bottom - _HEIGHT * step / 4
        label = f"{high_y * step / 4:.3g}"
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{label}</text>')
    for x_value in sorted({x for x, _ in points}):
        x = left + _WIDTH * x_value / high_x
        parts.append(
            f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{x_value:.3g}</text>'
        )
    for color, curve in zip(_COLORS * len(curves), curves, strict=False):
        places = [
            (left + _WIDTH * x / high_x, bottom - _HEIGHT * y / high_y) for x, y in sorted(curve)
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
    return parts
