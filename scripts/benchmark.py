#!/usr/bin/env python3
"""Measure the converter against `cp -r`, and against an obvious converter that uses torch.

Checkpoints of the sizes asked for are made in Megatron's structure (PP 4, EP 2, hundreds of
experts' tensors). The columns are run in turn, several times; each run is set against the `cp -r`
beside it. Prints a Markdown table of the medians, and writes it to --output; scripts/plot.py draws
it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from benchmarking import commands, report
from benchmarking.measure import Measured, RunFailedError
from benchmarking.report import Series

_UNITS = {"MB": 10**6, "GB": 10**9}
_COLUMNS = ("workers", "none", "full", "one", "cp", "naive", "verify")
_CACHES = ("cold", "warm")
_FILE_SYSTEMS = ("xfs", "btrfs")
_ROOM = 3.2
"""Of a mounted file system, for each byte of the checkpoint."""
_OPTIMIZERS = ("distributed", "layer-wise")
_TINY = 10**7
_V3_RANK = 5
_NAIVE_MEMORY = 0.75
"""Bytes that the naive converter holds at most, for each byte of the checkpoint."""
_METHOD = """\
Time includes start-up and bringing the files to disk. Memory is the sum of the proportional set
sizes of all processes, sampled 5 times a second. Bytes are those that all processes moved by read,
write and copy_file_range, as the kernel counts them, in parts of the checkpoint's size; those
written that made the file system no fuller were shared, and read by nobody: they count as written
alone. New blocks are those by which the file system became fuller.
`cp -r` is run with --reflink=never. Verification is of a finished pair, `diff -rq` of a copy."""


class _Arguments(argparse.Namespace):
    """The arguments, typed."""

    size: list[int] | None
    runs: int
    workers: int
    where: Path
    columns: list[str]
    cache: list[str]
    mount: list[str]
    simulate_deepseek_v3: bool
    optimizer: str
    output: Path
    keep: bool


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+)\s*(MB|GB)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no size such as 6GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--size",
        type=_size,
        action="append",
        metavar="SIZE",
        help="size of a checkpoint, such as 6GB or 500MB; repeat it for more [default: 1GB]",
    )
    add(
        "--runs",
        type=int,
        default=5,
        metavar="N",
        help="measured runs of each column [default: %(default)s]",
    )
    add(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="workers of the converter's first column [default: %(default)s]",
    )
    add(
        "--where",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="folder to work in, on disk or in memory; needs twice the size [default: %(default)s]",
    )
    add(
        "--columns",
        nargs="+",
        choices=_COLUMNS,
        default=list(_COLUMNS),
        help="what to run: the converter with several workers; the same with --checksums none, and "
        "with --verify full; with one worker; cp -r; the naive torch converter; verification of "
        "what was converted, against diff -rq [default: all]",
    )
    add(
        "--cache",
        nargs="+",
        choices=_CACHES,
        default=["cold"],
        help="on disk, whether the source is dropped from the page cache before each run, or both "
        "[default: cold]",
    )
    add(
        "--mount",
        nargs="+",
        choices=_FILE_SYSTEMS,
        default=[],
        help="measure also on new file systems that share blocks, in files of --where (needs root, "
        "and mkfs)",
    )
    add(
        "--simulate-deepseek-v3",
        action="store_true",
        help="only plan (--dry-run) a DeepSeek-V3 of sparse files: PP 16, EP 64, 1,024 folders of "
        "12 TB in all; needs 200 MB",
    )
    add(
        "--optimizer",
        choices=_OPTIMIZERS,
        default=_OPTIMIZERS[0],
        help="of the checkpoint: the distributed Adam, or a layer-wise Muon, for which there is no "
        "naive converter [default: %(default)s]",
    )
    add(
        "--output",
        type=Path,
        default=Path("benchmark.md"),
        metavar="FILE",
        help="where the tables are written [default: %(default)s]",
    )
    add("--keep", action="store_true", help="leave the made checkpoints there")  # fmt: skip
    return parser


def main() -> int:
    """Run what is asked for; the exit status."""
    given = _parser().parse_args(namespace=_Arguments())
    signal.signal(signal.SIGTERM, _interrupt)
    head = f"Measured on {report.machine(given.where)}."
    try:
        with _scratch(given.where, keep=given.keep) as scratch:
            if given.simulate_deepseek_v3:
                text = _simulate(given, scratch)
            else:
                text = f"{_measure(given, scratch)}\n\n{_METHOD}"
    except RunFailedError as error:
        print(f"benchmark: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    given.output.write_text(f"{head}\n\n{text}\n")
    print(f"\n{head}\n\n{text}")
    return 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _scratch(where: Path, *, keep: bool) -> Iterator[Path]:
    """A folder that is gone afterwards, whatever happens."""
    path = Path(tempfile.mkdtemp(prefix="pp_to_vpp-benchmark-", dir=where))
    try:
        yield path
    finally:
        if keep:
            print(f"kept: {path}")
        else:
            shutil.rmtree(path)


def _measure(given: _Arguments, scratch: Path) -> str:
    """Start-up, then every size on every file system; the tables."""
    small = _measure_start(given, scratch)
    sizes = sorted(given.size or [10**9])
    parts = [_measure_place(given, scratch, sizes)]
    for kind in given.mount:
        with commands.mounted(kind, scratch, int(max(sizes) * _ROOM)) as place:
            if place is not None:
                parts.append(_measure_place(given, place, sizes))
    return "\n\n".join((*parts, report.small_table("start-up", small)))


def _measure_place(given: _Arguments, place: Path, sizes: list[int]) -> str:
    """Every size on one file system, with each state of the cache; the tables."""
    kind = report.file_system(place)
    parts = []
    for cache in ("warm",) if kind == "tmpfs" else given.cache:
        found: list[Series] = []
        proofs: list[Series] = []
        for size in sizes:
            columns, verified = _measure_size(given, place, size, is_cold=cache == "cold")
            found += columns
            proofs += verified
        parts += [f"### {kind}" + ("" if kind == "tmpfs" else f", {cache} cache")]
        parts += [report.size_table(found)] if found else []
        parts += [report.size_table(proofs, commands.DIFF)] if proofs else []
    return "\n\n".join(parts)


def _measure_start(given: _Arguments, scratch: Path) -> dict[str, list[Measured]]:
    """What the converter takes when there is next to nothing to do."""
    root, target = scratch / "tiny", scratch / "target"
    commands.make(str(_TINY), root, given.optimizer)
    if "naive" in given.columns and given.optimizer == _OPTIMIZERS[0]:
        commands.check_naive(root, scratch)
    size = commands.size_of(root) / 1e6
    jobs: dict[str, Callable[[], Measured]] = {
        "--help": commands.show_help,
        f"--dry-run of {size:.0f} MB": lambda: commands.dry_run(root, given.workers),
        f"conversion of {size:.0f} MB": lambda: commands.run_column(
            commands.converter(given.workers), root, target
        ),
    }
    return _repeat(jobs, given.runs)


def _repeat(jobs: dict[str, Callable[[], Measured]], runs: int) -> dict[str, list[Measured]]:
    """Run each job once to warm up, then all in turn."""
    for job in jobs.values():
        job()
    found: dict[str, list[Measured]] = {name: [] for name in jobs}
    for _ in range(runs):
        for name, job in jobs.items():
            found[name].append(job())
            print(f"{name:<24} {found[name][-1].seconds:7.2f} s", flush=True)
    return found


def _measure_size(
    given: _Arguments, scratch: Path, wanted: int, *, is_cold: bool
) -> tuple[list[Series], list[Series]]:
    """All columns on one checkpoint, and its verification."""
    root, target = scratch / f"source-{wanted}", scratch / "target"
    if not root.exists():
        commands.make(str(wanted), root, given.optimizer)
    size = commands.size_of(root)
    columns = _columns(given, size)

    def prepare(*folders: Path) -> None:
        if report.file_system(scratch) == "tmpfs":
            commands.touch_memory(scratch, size)
        for folder in folders if is_cold else ():
            commands.forget(folder)

    jobs: dict[str, Callable[[], Measured]] = {
        column: lambda column=column: commands.run_column(column, root, target)  # type: ignore[misc]
        for column in columns
    }
    found = _in_turn(jobs, given.runs, size, lambda: prepare(root))
    proofs: list[Series] = []
    if "verify" in given.columns:
        copy_of, workers = scratch / "copy", given.workers
        commands.convert(root, target, workers)
        commands.copy(root, copy_of)
        depths = {f"--verify {depth}": depth for depth in ("structure", "full")}
        jobs = {
            name: lambda depth=depth: commands.verify(root, target, workers, depth)  # type: ignore[misc]
            for name, depth in depths.items()
        }
        jobs[commands.DIFF] = lambda: commands.compare(root, copy_of)
        proofs = _in_turn(jobs, given.runs, size, lambda: prepare(root, target, copy_of))
        shutil.rmtree(target)
        shutil.rmtree(copy_of)
    if not given.keep:
        shutil.rmtree(root)
    return found, proofs


def _in_turn(
    jobs: dict[str, Callable[[], Measured]], runs: int, size: int, prepare: Callable[[], None]
) -> list[Series]:
    """Run the first job once to warm up, then all in turn."""
    for job in list(jobs.values())[:1]:
        job()
    found: dict[str, list[Measured]] = {name: [] for name in jobs}
    for _ in range(runs):
        for name, job in jobs.items():
            prepare()
            found[name].append(job())
            print(report.run_line(name, size, found[name][-1]), flush=True)
    return [Series(name, size, tuple(of)) for name, of in found.items()]


def _columns(given: _Arguments, size: int) -> list[str]:
    """Names of the columns that can be run."""
    names = {
        "workers": commands.converter(given.workers),
        "none": f"{commands.converter(given.workers)}, {commands.NO_CHECKSUMS}",
        "full": f"{commands.converter(given.workers)}, {commands.IN_FULL}",
        "one": commands.converter(1),
        "cp": commands.COPY,
        "naive": commands.NAIVE,
    }
    chosen = [name for column, name in names.items() if column in given.columns]
    if given.optimizer != _OPTIMIZERS[0]:
        chosen = [column for column in chosen if column != commands.NAIVE]
    if commands.NAIVE in chosen and report.free_memory() < size * _NAIVE_MEMORY:
        print(f"no {commands.NAIVE} of {size / 1e9:.1f} GB: too little free memory", flush=True)
        chosen.remove(commands.NAIVE)
    return list(dict.fromkeys(chosen))


def _simulate(given: _Arguments, scratch: Path) -> str:
    """Plan a DeepSeek-V3; the table."""
    root = scratch / "deepseek-v3"
    print("making 1,024 rank folders", flush=True)
    commands.make("deepseek-v3", root, given.optimizer)
    workers = given.workers
    jobs: dict[str, Callable[[], Measured]] = {
        f"all 16 pipeline ranks, {workers} workers": lambda: commands.dry_run_v3(root, workers, []),
        "one pipeline rank": lambda: commands.dry_run_v3(root, workers, [_V3_RANK]),
    }
    size = commands.size_of(root) / 1e12
    title = f"`--dry-run` of a DeepSeek-V3, 1,024 folders, {size:.1f} TB"
    return report.small_table(title, _repeat(jobs, given.runs))


if __name__ == "__main__":
    sys.exit(main())
