"""ARCHITECTURE.md tells the truth: its examples run, and its rooms are those of the package."""

from __future__ import annotations

import doctest
import re
import shutil
from pathlib import Path

import pytest

from .pairs import MOE, pair
from .runs import ROOT

_PAGE = ROOT / "ARCHITECTURE.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(pair(MOE).source.parent, tmp_path / "ckpt")
    monkeypatch.chdir(tmp_path)
    found = doctest.testfile(str(_PAGE), module_relative=False)
    assert found.attempted > 10
    assert found.failed == 0


def test_every_room_has_a_line() -> None:
    (table,) = re.findall(r"^## The rooms\n(.*?)^## ", _PAGE.read_text(), re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([a-z_]+)/?`", "".join(re.findall(r"^\| (`[^|]+) \|", table, re.M))))
    package = ROOT / "pp_to_vpp"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert named == rooms | {path.stem for path in package.glob("[a-z]*.py")}
