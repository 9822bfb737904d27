"""Fixtures for all tests."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from .examples import FACTOR
from .runs import Program
from .training.judge import Judge
from .training.launch import Megatron, megatron

settings.register_profile(
    "default",
    max_examples=100 * FACTOR,
    derandomize=FACTOR == 1,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("default")


@pytest.fixture
def read_pickle() -> Callable[[Path], bytes]:
    """The ``data.pkl`` of a file, by the standard library's reader."""

    def read(path: Path) -> bytes:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return archive.read(name)

    return read


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    """The command line."""
    return Program(capsys)


@pytest.fixture(scope="session")
def server() -> Iterator[Megatron]:
    """The installed Megatron-Core, imported once."""
    with megatron() as found:
        yield found


@pytest.fixture(scope="session")
def judge(server: Megatron, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """With what Megatron saved so far."""
    return Judge(server, tmp_path_factory.mktemp("saved"))
