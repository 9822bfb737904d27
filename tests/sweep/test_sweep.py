"""Real Megatron-LM work trees judge random combinations of flags (``tests.sweep.run``)."""

from __future__ import annotations

import os

import pytest

from .draw import Choices, Draw, draw
from .judge import Verdict, last_line
from .run import row, summary, sweep
from .trees import TREES, trees

COUNT = int(os.environ.get("PP_TO_VPP_DRAWS", "4"))
SEED = os.environ.get("PP_TO_VPP_SEED", "1")
_OPTIONS = {
    "--optimizer": ["adam", "sgd", "muon"],
    "--position-embedding-type": ["rope", "none"],
    "--mtp-num-layers": [],
    "--pipeline-model-parallel-layout": [],
    "--num-virtual-stages-per-pipeline-rank": [],
    "--multi-latent-attention": [],
}


@pytest.mark.skipif(not trees(), reason=f"{TREES} names no folder with trees of Megatron-LM")
@pytest.mark.timeout(300 * COUNT + 300)
def test_nothing_is_written_that_megatron_would_not_have_saved() -> None:
    told: list[tuple[str, Verdict]] = []

    def tell(number: int, version: str, drawn: Draw, verdict: Verdict) -> None:
        told.append((row(number, version, drawn, verdict), verdict))

    sweep(COUNT, SEED, tell)
    assert len(told) == COUNT
    assert [line for line, verdict in told if verdict.is_wrong] == []


def _drawn(number: int) -> Draw:
    return draw(Choices(f"seed-{number}", _OPTIONS), has_emerging=number % 2 == 0)


def test_a_seed_decides_a_draw() -> None:
    assert [_drawn(number) for number in range(9)] == [_drawn(number) for number in range(9)]
    assert len({_drawn(number) for number in range(9)}) == 9


@pytest.mark.parametrize("number", range(40))
def test_layouts_have_all_layers_and_whole_rounds_of_stages(number: int) -> None:
    drawn = _drawn(number)
    common = dict(zip(drawn.flags, drawn.flags[1:], strict=False))
    assert drawn.world_size <= 8
    assert drawn.sides[0] != drawn.sides[1]
    for side in drawn.sides:
        if "--pipeline-model-parallel-layout" in side.flags:
            text = side.flags[1]
            assert len(text.split("|")) % int(common["--pipeline-model-parallel-size"]) == 0
            assert text.count("t") == int(common["--num-layers"])
            assert text.count("m") == int(common.get("--mtp-num-layers", 0))


def test_what_a_version_does_not_know_is_not_drawn() -> None:
    flags = {flag for number in range(40) for flag in _drawn(number).flags}
    assert "--mtp-num-layers" in flags
    assert "--moe-layer-freq" not in flags
    assert "soap" not in flags


def test_the_table_tells_what_was_wrong() -> None:
    right, wrong = Verdict(there="equal", back="equal"), Verdict(there="equal", back="WRONG: a|b")
    refused = Verdict(refusal=last_line("Traceback\nValueError: no\n"))
    assert row(3, "0.16.1", _drawn(3), wrong).endswith(r"| made | equal | WRONG: a\|b |")
    assert "Megatron refuses: ValueError: no" in row(4, "0.16.1", _drawn(4), refused)
    assert summary([right, wrong, refused]) == (
        "2 pairs, each both ways: 1 WRONG, 3 equal; Megatron itself refused 1 draws."
    )
    assert [verdict.is_wrong for verdict in (right, wrong, refused)] == [False, True, False]
