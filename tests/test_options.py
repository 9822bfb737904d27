"""Options: which task they mean, and which contradict each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pp_to_vpp.errors import UsageError
from pp_to_vpp.options import Depth, Options, Task

HERE, THERE = Path("here"), Path("there")


def test_what_is_given_tells_the_task() -> None:
    assert Options(HERE).task is Task.INSPECT
    assert Options(HERE, THERE).task is Task.VERIFY
    for wanted in (
        Options(HERE, THERE, target_vp_size=1),
        Options(HERE, THERE, layout_string="E|L"),
        Options(HERE, THERE, hybrid_pattern="M|M"),
    ):
        assert wanted.task is Task.CONVERT
        assert replace(wanted, is_dry_run=True).task is Task.PLAN
    assert Options(HERE).depth is Depth.STRUCTURE


@pytest.mark.parametrize(
    "fields",
    [
        {"first_split": (1, 1)}, {"last_split": (1, 1)}, {"overlaps": True},
        {"no_save_optim": True}, {"pp_ranks": (0,)}, {"share": "0/2"}, {"is_dry_run": True},
        {"depth": Depth.FULL}, {"depth": Depth.NONE}, {"checksums": "none"}, {"resume": True},
    ],
)  # fmt: skip
def test_a_description_takes_nothing_that_a_target_has(fields: dict[str, Any]) -> None:
    Options(HERE).check()
    Options(HERE, pp_size=2, processes=3, is_quiet=True, follow_links=True).check()
    with pytest.raises(UsageError, match="give --target-virtual-pipeline-model-parallel-size"):
        Options(HERE, **fields).check()


@pytest.mark.parametrize("fields", [{"is_dry_run": True}, {"resume": True}, {"depth": Depth.NONE}])
def test_a_verification_verifies(fields: dict[str, Any]) -> None:
    Options(HERE, THERE, no_save_optim=True, depth=Depth.FULL).check()
    with pytest.raises(UsageError, match="give --target-virtual-pipeline-model-parallel-size"):
        Options(HERE, THERE, **fields).check()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target_vp_size": 0}, "virtual pipeline model parallel size: 0 is not a positive number"),
        ({"target_vp_size": True}, "True is not a positive number"),
        ({"target_vp_size": 2, "processes": -1}, "number of processes: -1 is not a positive"),
        ({"target_vp_size": 2, "pp_ranks": ()}, "none is named"),
        ({"target_vp_size": 2, "checksums": "md5"}, "'md5' is neither 'crc32' nor 'none'"),
        ({"target_vp_size": 2, "first_split": (1, 1)}, "or none"),
        ({"target_vp_size": 2, "first_split": (1,), "last_split": (1, 1)}, "one number for each"),
        ({"target_vp_size": 1, "first_split": (0,), "last_split": (1,)}, "positive numbers"),
        ({"layout_string": "E|L", "first_split": (1,), "last_split": (1,)}, "not both"),
    ],
)
def test_contradictions_and_impossible_values(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Options(HERE, THERE, **fields).check()
