"""The commands that are measured, and those that make what they work on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from . import measure
from .measure import Measured

_SCRIPTS = Path(__file__).resolve().parent.parent
_ITERATION = "iter_0000010"
_V3_TARGET_LAYOUT = "Et*3|(tt|)*29m|L"
_VP_SIZE = "2"
_SYNCED = 'target=$1; shift; "$@" && find "$target" -type f -exec sync {} +'
"""Shell: run a command, then bring what it wrote to disk, as the converter does by itself."""
_BLOCK = 1 << 20
_REST_SECONDS = 0.2
_UNCOMPILED = "PYTHONDONTWRITEBYTECODE"
"""Where it is set, each start compiles every module of a checkout: 0.1 s."""
COPY = "cp -r"
"""Which here never shares blocks."""
NO_CHECKSUMS = "--checksums none"
IN_FULL = "--verify full"
DIFF = "diff -rq"
NAIVE = "torch.load/save"


def converter(workers: int) -> str:
    """Name of the column of the converter, to which options may be added."""
    return f"pp_to_vpp, {workers} worker{'s' if workers > 1 else ''}"


def _environment() -> dict[str, str]:
    """In which the project itself can be imported, compiled as it is where it was installed."""
    paths = [str(_SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
    inherited = {name: value for name, value in os.environ.items() if name != _UNCOMPILED}
    return {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def make(wanted: str, root: Path, optimizer: str) -> None:
    """Make a checkpoint of so many bytes, or the simulated DeepSeek-V3, in a new folder."""
    command = [sys.executable, "-m", "benchmarking.checkpoint", wanted, str(root), optimizer]
    subprocess.run(command, check=True, cwd=_SCRIPTS, start_new_session=True, env=_environment())


def size_of(root: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def _run_converter(*arguments: str) -> Measured:
    return measure.run([sys.executable, "-m", "pp_to_vpp", *arguments], _environment())


def show_help() -> Measured:
    """The least that the program can do."""
    return _run_converter("--help")


def dry_run(root: Path, workers: int) -> Measured:
    """Plan without writing."""
    source = str(root / _ITERATION)
    return _run_converter(
        "--load-iteration-dir", source, "--target-virtual-pipeline-model-parallel-size", _VP_SIZE,
        "--num-max-processing-processes", str(workers), "--dry-run",
    )  # fmt: skip


def dry_run_v3(root: Path, workers: int, ranks: Iterable[int]) -> Measured:
    """Plan the simulated DeepSeek-V3: all of it, or some target pipeline ranks."""
    chosen = [str(rank) for rank in ranks]
    return _run_converter(
        "--load-iteration-dir", str(root / _ITERATION),
        "--target-pipeline-model-parallel-layout", _V3_TARGET_LAYOUT,
        "--num-max-processing-processes", str(workers), "--dry-run",
        *(["--pipeline-ranks-to-process", *chosen] if chosen else []),
    )  # fmt: skip


def _on(root: Path, target: Path, workers: int) -> list[str]:
    """The options that name both folders."""
    return [
        "--load-iteration-dir", str(root / _ITERATION),
        "--save-iteration-dir", str(target / _ITERATION),
        "--num-max-processing-processes", str(workers),
    ]  # fmt: skip


def convert(root: Path, target: Path, workers: int, *options: str) -> Measured:
    """Convert a checkpoint with default verification."""
    layout = ("--target-virtual-pipeline-model-parallel-size", _VP_SIZE)
    return _run_converter(*_on(root, target, workers), *layout, *options)


def verify(root: Path, target: Path, workers: int, depth: str) -> Measured:
    """Verify a checkpoint that was converted before."""
    return _run_converter(*_on(root, target, workers), "--verify", depth)


def compare(root: Path, copy_of: Path) -> Measured:
    """Compare a checkpoint with a copy of it."""
    return measure.run(["diff", "-rq", str(root / _ITERATION), str(copy_of / _ITERATION)])


def copy(root: Path, target: Path) -> Measured:
    """Copy the iteration folder as it is."""
    target.mkdir()
    return _synced(
        target, "cp", "-r", "--reflink=never", str(root / _ITERATION), str(target / _ITERATION)
    )


def convert_naively(root: Path, target: Path) -> Measured:
    """Convert with torch alone."""
    script = str(_SCRIPTS / "naive_convert.py")
    places = str(root / _ITERATION), str(target / _ITERATION)
    return _synced(target, sys.executable, script, *places, "--vp-size", _VP_SIZE)


def _synced(target: Path, *command: str) -> Measured:
    return measure.run(["sh", "-c", _SYNCED, "sh", str(target), *command])


def check_naive(root: Path, scratch: Path) -> None:
    """Both converters must write the same tensors.

    Raises:
        subprocess.CalledProcessError: they do not, as printed.
    """
    ours, naive = scratch / "ours", scratch / "naive"
    convert(root, ours, 1)
    convert_naively(root, naive)
    script = str(_SCRIPTS / "naive_convert.py")
    places = str(naive / _ITERATION), str(ours / _ITERATION)
    subprocess.run([sys.executable, script, *places, "--compare"], check=True)
    shutil.rmtree(ours)
    shutil.rmtree(naive)


def run_column(column: str, root: Path, target: Path) -> Measured:
    """One run of a column; what it wrote is removed again."""
    before = _used(target.parent)
    try:
        run = _run(column, root, target)
        new = _used(target.parent) - before
        shared = max(0, run.written_bytes - new)  # the kernel counts it as read and as written
        return replace(run, new_bytes=new, read_bytes=run.read_bytes - shared)
    finally:
        shutil.rmtree(target, ignore_errors=True)
        if target.parent.exists():
            _used(target.parent)


def _run(column: str, root: Path, target: Path) -> Measured:
    if column == COPY:
        return copy(root, target)
    if column == NAIVE:
        return convert_naively(root, target)
    _, words, *options = column.split(", ")
    return convert(root, target, int(words.split()[0]), *" ".join(options).split())


def _used(place: Path) -> int:
    """Bytes of a file system that are in use, when it has come to rest."""
    found = -1
    while True:
        subprocess.run(["sync", "-f", str(place)], check=True)
        status = os.statvfs(place)
        last, found = found, (status.f_blocks - status.f_bfree) * status.f_frsize
        if found == last:
            return found
        time.sleep(_REST_SECONDS)


@contextmanager
def mounted(kind: str, scratch: Path, size: int) -> Iterator[Path | None]:
    """A new file system of a kind in a file of so many bytes; None where that is not possible."""
    image, place = scratch / f"{kind}.image", scratch / kind
    with image.open("wb") as file:
        file.truncate(size)
    place.mkdir()
    commands = ([f"mkfs.{kind}", "-q", str(image)], ["mount", "-o", "loop", str(image), str(place)])
    try:
        for command in commands:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no {kind}: {error}", flush=True)
        yield None
    else:
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        image.unlink()
        place.rmdir()


def touch_memory(scratch: Path, size: int) -> None:
    """Fill so many bytes of memory and free them again.

    A virtual machine gets its memory from the host when it first uses it: otherwise whoever runs
    first would pay for that.
    """
    path = scratch / "touched"
    block = bytes(_BLOCK)
    with path.open("wb", buffering=0) as file:
        for _ in range(size // _BLOCK + 1):
            file.write(block)
    path.unlink()


def forget(root: Path) -> None:
    """Drop the pages of a folder's files from the page cache."""
    for path in root.rglob("*.pt"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
