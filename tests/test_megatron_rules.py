"""Megatron-Core judges each rule by itself: its own code, asked about made-up models."""

from __future__ import annotations

import pytest

from .training.agreement import GROUP_RUNS, PROPERTIES, groups_agree
from .training.installed import NEEDS_MEGATRON
from .training.launch import Megatron
from .training.spec import Run

pytestmark = NEEDS_MEGATRON


@pytest.fixture(scope="module")
def version(server: Megatron) -> str:
    (found,) = server.run("version", Run(pp=1))
    return str(found)


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_rule_is_megatrons(name: str, server: Megatron, version: str) -> None:
    PROPERTIES[name][1](server, version)


@pytest.mark.parametrize("run", GROUP_RUNS.values(), ids=GROUP_RUNS)
def test_param_groups_are_megatrons(run: Run, server: Megatron, version: str) -> None:
    groups_agree(server, run, version)
