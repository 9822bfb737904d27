"""The package: built as wheel and source archive, it holds what the program needs, and starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from pp_to_vpp import __version__

from .runs import ROOT

_FILES = {
    "pp_to_vpp/" + path.relative_to(ROOT / "pp_to_vpp").as_posix()
    for path in (ROOT / "pp_to_vpp").rglob("*")
    if path.is_file() and path.suffix != ".pyc"
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both archives, made by the project's own build backend."""
    folder = tmp_path_factory.mktemp("dist")
    script = f"from flit_core import buildapi as b; b.build_wheel({str(folder)!r}); "
    script += f"b.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    return folder


def test_both_hold_every_file(built: Path) -> None:
    assert {"pp_to_vpp/py.typed", "pp_to_vpp/report.schema.json"} <= _FILES
    with zipfile.ZipFile(built / f"pp_to_vpp-{__version__}-py3-none-any.whl") as wheel:
        assert set(wheel.namelist()) >= _FILES
    with tarfile.open(built / f"pp_to_vpp-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= _FILES | {"LICENSE", "README.md", "pyproject.toml"}


def test_the_wheel_starts_where_nothing_else_is(built: Path, tmp_path: Path) -> None:
    """Unpacked beside the standard library alone: as pip does it, without its network."""
    with zipfile.ZipFile(built / f"pp_to_vpp-{__version__}-py3-none-any.whl") as wheel:
        wheel.extractall(tmp_path)
        metadata = wheel.read(f"pp_to_vpp-{__version__}.dist-info/METADATA").decode()
        entries = wheel.read(f"pp_to_vpp-{__version__}.dist-info/entry_points.txt").decode()
    assert "pp-to-vpp=pp_to_vpp.__main__:main" in entries
    assert "Classifier: Typing :: Typed" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: BSD-3-Clause" in metadata
    done = subprocess.run(
        [sys.executable, "-S", "-m", "pp_to_vpp", "--version"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"pp_to_vpp {__version__}\n"), done.stderr
