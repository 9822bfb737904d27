"""What was measured, in words: the machine, and Markdown tables."""

from __future__ import annotations

import importlib.util
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
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, "
        f"CRC-32 by {'ISA-L' if importlib.util.find_spec('isal') else 'zlib'}; "
        f"load average {os.getloadavg()[0]:.1f} before the first run"
    )


def run_line(column: str, size: int, run: Measured) -> str:
    """One run, for the log."""
    return (
        f"{size / _GB:7.3f} GB  {column:<20} {run.seconds:8.2f} s  cpu {run.cpu_seconds:7.2f} s  "
        f"pss {run.peak_bytes / _MB:7.1f} MB  read {run.read_bytes / _GB:7.3f} GB  "
        f"written {run.written_bytes / _GB:7.3f} GB"
    )


def size_table(found: Sequence[Series], against: str = COPY) -> str:
    """Medians for each size and column; the times set against those of one column."""
    lines = [
        f"| checkpoint | | time | against `{against}` (least to most) | processor time "
        "| peak memory (PSS) | read | written | new blocks |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    copies = {series.size: series for series in found if series.column == against}
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
            f"{series.median(lambda run: run.new_bytes) / series.size:.3f} x",
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
