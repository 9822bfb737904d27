"""Every call of the system may fail: which one, how, where and when is drawn."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..pairs import DENSE, pair
from ..runs import command, environment

FAULTS = int(os.environ.get("PP_TO_VPP_FAULTS", "5"))
SEED = os.environ.get("PP_TO_VPP_SEED", "one")

_MOVING = ("read", "pread", "preadv", "pwrite", "copy_file_range")
"""Those that may also move less than they are asked to."""
_OF_THE_TARGET = (
    "write", "pwrite", "copy_file_range", "fsync", "close", "rename", "link", "mkdir", "unlink",
    "rmdir", "ftruncate", "statvfs", "utime",
)  # fmt: skip
_OF_BOTH = ("read", "pread", "preadv", "open", "opendir", "stat", "lstat")
_ERRORS = (
    errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM,
    errno.EMFILE, errno.EINVAL, errno.EPERM, errno.EINTR, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV,
)  # fmt: skip
_SECONDS = 60


@dataclass(frozen=True)
class Fault:
    """What fails."""

    call: str
    number: int
    """Of the call, from 1."""
    error: int
    """0: half of the bytes are moved."""
    is_lasting: bool
    """Later calls fail, too."""
    is_in_child: bool
    """Only in workers."""
    is_in_source: bool
    option: tuple[str, ...]

    @classmethod
    def drawn(cls, draw: random.Random) -> Fault:
        """Any of them."""
        call = draw.choice(_OF_THE_TARGET + _OF_BOTH)
        is_short = call in _MOVING and draw.random() < 0.25
        error = 0 if is_short else draw.choice(_ERRORS)
        return cls(
            call,
            draw.choice((1, 1, 2, 3, 5, 8)),
            error,
            is_short or (error != errno.EINTR and draw.random() < 0.3),
            draw.random() < 0.4,
            call in _OF_BOTH and draw.random() < 0.5,
            draw.choice(((), ("--checksums", "none"), ("--verify", "full"))),
        )

    def variable(self, path: Path) -> str:
        """As the stand-in reads it."""
        numbers = (self.number, self.error, int(self.is_lasting), int(self.is_in_child))
        return f"{self.call} {' '.join(map(str, numbers))} {path}"


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that lets calls fail."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("fault") / "fault.so"
    source = Path(__file__).with_name("fault.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def contents(folder: Path, pattern: str = "*/*") -> dict[str, bytes]:
    """The bytes of the files in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob(pattern)}


def converted(
    source: Path, target: Path, *more: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A conversion in processes of its own, with two workers."""
    both = ("--load-iteration-dir", source, "--save-iteration-dir", target)
    vpp = ("--target-virtual-pipeline-model-parallel-size", "2")
    asked = command(*both, *vpp, "--num-max-processing-processes", "2", *more)
    environ = {**environment(), **variables}
    return subprocess.run(
        asked, capture_output=True, text=True, env=environ, timeout=_SECONDS, check=False
    )


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], dict[str, bytes]]:
    """What comes out where nothing fails, by options."""
    found: dict[tuple[str, ...], dict[str, bytes]] = {}
    for option in ((), ("--checksums", "none")):
        target = tmp_path_factory.mktemp("wanted") / "iter_0000001"
        assert converted(pair(DENSE).source, target, *option).returncode == 0
        found[option] = contents(target, "mp_rank*/*")
    return {**found, ("--verify", "full"): found[()]}


@pytest.mark.parametrize("number", range(FAULTS))
def test_a_call_that_fails_is_told_and_done_again(
    number: int, stand_in: Path, wanted: dict[tuple[str, ...], dict[str, bytes]], tmp_path: Path
) -> None:
    """In a minute, in one to three lines; and another run goes on from there."""
    fault = Fault.drawn(random.Random(f"{SEED} {number}"))
    source = pair(DENSE).source.resolve()
    before, good = contents(source), wanted[fault.option]
    target = tmp_path / "t" / "iter_0000001"
    target.parent.mkdir()
    variable = fault.variable(source if fault.is_in_source else target.parent)
    run = converted(source, target, *fault.option, LD_PRELOAD=str(stand_in), FAULT=variable)
    what = f"{fault}: {run.returncode}, {run.stderr}"
    assert run.returncode in (0, 4, 5, 6), what
    assert "Traceback" not in run.stderr, what
    lines = [line for line in run.stderr.splitlines() if "pp_to_vpp: error: " in line]
    assert bool(run.returncode) <= len(lines) <= 3, what
    assert run.returncode == 0 or fault.error, f"good data are refused: {what}"
    assert contents(source) == before, what
    for name, data in contents(target, "mp_rank*/*").items():
        assert data == good[name], what
    if run.returncode:
        again = converted(source, target, *fault.option, "--resume")
        assert again.returncode == 0, f"{what}; with --resume: {again.stderr}"
    assert contents(target, "mp_rank*/*") == good, what
    assert [path.name for path in target.iterdir() if path.name.startswith(".")] == [], what
