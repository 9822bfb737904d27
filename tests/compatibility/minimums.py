"""Converts the pairs in ``tests/data`` with the oldest and the newest Python and packages.

    python -m tests.compatibility.minimums [--pairs moe-pp2ep2-v016 ...]

Prints a Markdown table. The oldest are those that pyproject.toml promises. Each has a virtual
environment of its own; its conversions must be Megatron's files, with the bytes of this Python's.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..compare import differences
from ..pairs import MOE, Pair, names, pair
from ..runs import ROOT
from . import old_torch

_CACHE = ROOT / "build" / "minimums"
PROMISES = dict(
    re.findall(
        r'(python|numpy|torch|tqdm)(?: = ")?>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()
    )
)
"""The oldest version of each that pyproject.toml allows."""
_WINDOW = struct.pack("4H", 24, 80, 0, 0)
"""Lines and columns."""
_VERSIONS = """\
import importlib.metadata, platform, sys
print(platform.python_version(), *map(importlib.metadata.version, sys.argv[1:]))
"""


@dataclass(frozen=True)
class Environment:
    """A Python with the packages of the program."""

    python: str
    numpy: str
    tqdm: str
    torch: str | None
    """Only full verification imports it."""

    @property
    def depth(self) -> str:
        """What ``--verify`` is given."""
        return "structure" if self.torch is None else "full"

    @property
    def folder(self) -> str:
        """Its name in the cache."""
        return "-".join(filter(None, [self.python, self.numpy, self.tqdm, self.torch]))


_OLDEST = (PROMISES["python"], f"numpy=={PROMISES['numpy']}", f"tqdm=={PROMISES['tqdm']}")
ENVIRONMENTS = (
    Environment(*_OLDEST, torch=None),
    Environment(*_OLDEST, torch=PROMISES["torch"]),
    Environment("3.13", "numpy", "tqdm", torch=None),
)


@dataclass(frozen=True)
class Program:
    """The program, run by a Python."""

    python: str | Path
    variables: dict[str, str]

    def convert(self, case: Pair, target: Path, depth: str) -> None:
        """Convert a pair's source as at a terminal, with the progress bar.

        Raises:
            RuntimeError: it failed, or showed no bar.
        """
        command = [
            self.python, "-m", "pp_to_vpp", "--load-iteration-dir", case.source,
            "--save-iteration-dir", target, *case.options, "--verify", depth,
            "--num-max-processing-processes", "1",
        ]  # fmt: skip
        reader, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, _WINDOW)
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **self.variables}
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=terminal, env=variables, cwd="/"
        )
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # how Linux tells that nobody has the terminal any more
            while piece := os.read(reader, 4096):
                shown += piece
        os.close(reader)
        if process.wait() or b"B/s" not in shown:
            raise RuntimeError(shown.decode(errors="replace"))

    def be_host(self, case: Pair, folder: Path) -> None:
        """Convert in a program with threads and processes of its own, which no warning reaches.

        Raises:
            RuntimeError: it failed, or printed something.
        """
        command = [self.python, "-W", "error::DeprecationWarning", "-m", "tests.guest"]
        done = subprocess.run(
            [*command, case.source, folder], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), **self.variables}, timeout=120,
        )  # fmt: skip
        if done.stdout != "done\n" or done.stderr:
            raise RuntimeError(done.stdout + done.stderr)


def made(environment: Environment, cache: Path) -> Program | None:
    """The program in its virtual environment, made unless it is there; None without that Python.

    Raises:
        subprocess.CalledProcessError: a package does not install.
    """
    folder = cache / environment.folder
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        base = interpreter(environment.python)
        if base is None:
            return None
        subprocess.run([base, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, environment.numpy, environment.tqdm], check=True)
        if environment.torch is not None:
            old_torch.install(python, environment.torch)
        (folder / "complete").touch()
    return Program(python, {} if environment.torch is None else old_torch.environment(python))


def interpreter(version: str) -> str | Path | None:
    """A Python of this version: on the path, or one of pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates: list[str | Path] = [
        f"python{version}",
        *root.glob(f"versions/{version}.*/bin/python"),
    ]
    for found in candidates:
        with suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([found, "-c", "pass"], stderr=subprocess.DEVNULL, check=True)
            return found
    return None


def _digest(iteration: Path) -> str:
    """Of all files, and their names."""
    digest = hashlib.sha256()
    for path in sorted(iteration.glob("*/*")):
        digest.update(f"{path.relative_to(iteration)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def problem(program: Program, case: Pair, depth: str) -> str | None:
    """What is wrong with the conversion of a pair."""
    with tempfile.TemporaryDirectory(prefix="minimums_") as folder:
        theirs, ours = (Path(folder, side, case.truth.name) for side in ("theirs", "ours"))
        try:
            program.convert(case, theirs, depth)
            if case.name == MOE:
                program.be_host(case, Path(folder, "host"))
        except RuntimeError as error:
            return " / ".join(str(error).split("\n")[-4:]).replace("|", "\\|")
        Program(sys.executable, {}).convert(case, ours, "none")
        found = differences(theirs, case.truth, case.source)
        if not found and _digest(theirs) != _digest(ours):
            found = ["not the bytes of this Python"]
        return found[0] if found else None


def row(environment: Environment, pairs: list[str], cache: Path) -> tuple[bool, list[str]]:
    """Whether nothing is wrong, and the cells of the table."""
    try:
        program = made(environment, cache)
    except (subprocess.CalledProcessError, OSError) as error:
        return False, [environment.python, "", "", "", "", f"does not install: {error}"]
    if program is None:
        return True, [environment.python, "", "", "", "", "no such Python here"]
    packages = ["numpy", "tqdm", *(["torch"] if environment.torch else [])]
    command = [program.python, "-c", _VERSIONS, *packages]
    versions = subprocess.check_output(command, text=True).split()
    outcomes = [(name, problem(program, pair(name), environment.depth)) for name in pairs]
    wrong = [f"{name}: {outcome}" for name, outcome in outcomes if outcome is not None]
    text = f"WRONG: {len(wrong)}, {wrong[0]}" if wrong else f"EQUAL: {len(pairs)} conversions"
    return not wrong, [*versions, *([] if environment.torch else [""]), environment.depth, text]


def main() -> int:
    """Judge and print; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility.minimums")
    parser.add_argument("--pairs", nargs="+", default=names(), choices=names(), metavar="PAIR")
    parser.add_argument("--cache", type=Path, default=_CACHE, help="where environments are made")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.system()}, {platform.machine()}"
    print(f"Printed by `python -m tests.compatibility.minimums` ({machine}).\n")  # noqa: T201
    judged = f"against Megatron's files and the bytes of Python {platform.python_version()}"
    print(f"| Python | numpy | tqdm | torch | `--verify` | {judged} |")  # noqa: T201
    print("|---|---|---|---|---|---|")  # noqa: T201
    is_right = True
    for environment in ENVIRONMENTS:
        is_fine, cells = row(environment, given.pairs, given.cache)
        print(f"| {' | '.join(cells)} |", flush=True)  # noqa: T201
        is_right &= is_fine
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
