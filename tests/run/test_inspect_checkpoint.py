"""A checkpoint described: every layout that is offered converts, with the flags that were told."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pp_to_vpp.megatron.forms import Ends
from pp_to_vpp.megatron.megatron import Megatron
from pp_to_vpp.megatron.placement import LAYOUT_SIGN, Placement
from pp_to_vpp.megatron.rules import candidates
from pp_to_vpp.options import MANIFEST, Options
from pp_to_vpp.run import inspect_checkpoint
from pp_to_vpp.run.inspect_checkpoint import Inspection, inspect
from pp_to_vpp.run.listener import Listener

from ..edit import copy_of, rewrite_all
from ..families import iteration, surveyed
from ..pairs import DENSE, EMPTY, FORK, HYBRID, HYBRID_MOE, LAYER_WISE, LAYOUT, MOE, NOOP, ODD, pair
from ..runs import Program

UNLIKE = "of which it is a copy"
"""The older pairs have other values in the copies of the embedding than in itself."""


def inspected(path: Path) -> Inspection:
    """A checkpoint, by two workers."""
    return inspect(Options(path, processes=2), Listener())


@pytest.mark.parametrize("side", ["source", "truth"])
@pytest.mark.parametrize("name", [ODD, MOE, EMPTY, HYBRID_MOE, LAYER_WISE, NOOP, FORK])
def test_a_checkpoint_is_described(name: str, side: str) -> None:
    path, version = iteration(name, side), pair(name).megatron
    found = inspected(path)
    assert found.iteration == 1
    assert [note for note in found.notes if UNLIKE not in note] == []
    assert found.folders == len(list(path.glob("mp_rank_*")))
    assert found.length == sum(file.stat().st_size for file in path.glob("*/*"))
    since = found.written_by.partition("Megatron-Core ")[2].partition(" or later")[0]
    if version[0].isdigit() and since:
        saved = tuple(map(int, version.split(".")[:2]))
        assert tuple(map(int, since.split("."))) <= saved, found.written_by
    assert "and its files agree" in found.written_by


@pytest.mark.parametrize("name", [DENSE, HYBRID, FORK, LAYOUT])
def test_every_choice_converts(name: str, program: Program, tmp_path: Path) -> None:
    found = inspected(pair(name).source)
    assert found.choices
    for number, choice in enumerate(found.choices):
        run = program(
            "--load-iteration-dir", pair(name).source, "--save-iteration-dir",
            tmp_path / str(number), *shlex.split(choice.options), "--dry-run",
        )  # fmt: skip
        assert run.status == 0, run
        assert f"launch Megatron with: {choice.launch_flags}\n" in run.output


def test_sizes_that_divide_are_offered() -> None:
    """Half as many ranks are not: they would drop a copy of the embedding that is unlike it."""
    for path, stages in ((pair(DENSE).source, "24"), (pair(DENSE).truth, "14")):
        choices = [choice.options for choice in inspected(path).choices]
        assert choices == [
            "--target-pipeline-model-parallel-size 4",
            *(f"--target-virtual-pipeline-model-parallel-size {size}" for size in stages),
        ]


def test_the_fork_is_offered_its_splits() -> None:
    choice = inspected(pair(FORK).source).choices[-1]
    assert "--target-first-virtual-pipeline-num-layers-split 4 4" in choice.options
    assert "--decoder-last-pipeline-num-layers-split 4 3" in choice.launch_flags


@pytest.mark.parametrize("knows", [True, False])
def test_where_nothing_divides_a_layout_string_is_offered(knows: bool) -> None:
    """If the version could launch it."""
    found = surveyed(DENSE, "source")
    names = found.arguments.names if knows else found.arguments.names - {LAYOUT_SIGN}
    arguments = replace(
        found.arguments, num_layers=7, placement=Placement(1, Ends(first=4)), names=names
    )
    source = Megatron(arguments, next(candidates(arguments.names)))
    choices = list(
        inspect_checkpoint._choices(
            Options(Path(found.path)), replace(found, arguments=arguments), source
        )
    )
    texts = [choice.options for choice in choices]
    assert texts == (["--target-pipeline-model-parallel-layout 'Et|(tt|)*2ttL'"] if knows else [])


def test_oddities_are_told(tmp_path: Path) -> None:
    source = copy_of(pair(MOE).source, tmp_path)
    (source / "mp_rank_00_000_000" / "notes.txt").touch()
    (source / "more").mkdir()
    assert sorted(inspected(source).notes) == [
        "not copied, no part of a checkpoint: more",
        "not copied, no part of a checkpoint: mp_rank_00_000_000/notes.txt",
    ]


def test_the_note_of_a_conversion_is_no_oddity(program: Program, tmp_path: Path) -> None:
    target = tmp_path / "iter_0000001"
    run = program(
        "--load-iteration-dir", pair(DENSE).source, "--save-iteration-dir", target,
        "--target-virtual-pipeline-model-parallel-size", "2",
    )  # fmt: skip
    assert run.status == 0, run
    assert (target / MANIFEST).exists()
    assert [note for note in inspected(target).notes if UNLIKE not in note] == []


def test_rules_that_only_the_files_prove_are_told(tmp_path: Path) -> None:
    """The sign of a change is not there, the change is."""
    source = copy_of(pair(ODD).source, tmp_path)

    def without_sign(root: Any) -> None:
        del root["args"].state["deterministic_mode"]

    rewrite_all(source, without_sign)
    assert "its files prove otherwise: aligns_parameters" in inspected(source).written_by
