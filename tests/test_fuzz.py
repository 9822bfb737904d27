"""A sample of the fuzzing: mutated real files never crash the program (see ``tests/fuzz``)."""

from __future__ import annotations

from pathlib import Path

from .fuzz import run

_INPUTS = 80
_SEED = 5


def test_mutated_files_are_refused_or_converted(tmp_path: Path) -> None:
    result = run.fuzz(_SEED, tmp_path / "failures", inputs=_INPUTS)
    assert result.tried == _INPUTS
    assert not result.failures
    assert {"status 0", "status 4"} <= set(result.outcomes)


def test_inputs_are_a_function_of_their_seed() -> None:
    made = [run.make_input(_SEED, index) for index in range(5)]
    assert made == [run.make_input(_SEED, index) for index in range(5)]
    assert made != [run.make_input(_SEED + 1, index) for index in range(5)]
