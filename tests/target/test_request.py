"""What a run is asked to do, held against what the real checkpoints are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.errors import LayoutError, UsageError
from pp_to_vpp.megatron.arguments import SavedArguments
from pp_to_vpp.megatron.pipeline import Placement
from pp_to_vpp.options import Depth, Options
from pp_to_vpp.target import request
from pp_to_vpp.target.request import target_spec, wanted_ranks

from ..examples import examples
from ..families import SIDES, family, opposite, placed, surveyed, target_of
from ..pairs import names
from ..strategies import targets

HERE = Path("/somewhere/iter_0000001")
DENSE = "dense-pp2-v016"


def arguments_of(name: str, side: str = "source") -> SavedArguments:
    return surveyed(name, side).arguments


def asking_for(placement: Placement, *, overlaps: bool = False) -> Options:
    """Options that ask for a placement."""
    return Options(
        HERE,
        target_vp_size=None if placement.layout is not None else placement.vp_size,
        first_split=placement.first_split,
        last_split=placement.last_split,
        target_layout=placement.layout,
        overlaps_param_gather_with_step=overlaps,
    )


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_asking_for_the_other_side_means_its_layout(name: str, side: str) -> None:
    """What Megatron placed is what is understood, both ways."""
    truth = target_of(name, opposite(side))
    wanted = asking_for(truth.placement, overlaps=truth.overlaps_param_gather_with_step)
    found = target_spec(wanted, arguments_of(name, side))
    assert found.layout == truth.layout
    assert found.overlaps_param_gather_with_step == truth.overlaps_param_gather_with_step
    assert found.placement.arguments(
        arguments_of(name).num_layers, truth.layout.pp_size
    ) == truth.placement.arguments(arguments_of(name).num_layers, truth.layout.pp_size)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_the_layout_that_is_there_is_refused(name: str, side: str) -> None:
    arguments = arguments_of(name, side)
    overlaps = arguments.overlaps_param_gather_with_step
    with pytest.raises(LayoutError, match="already has the layout"):
        target_spec(asking_for(arguments.placement, overlaps=overlaps), arguments)


def test_the_same_layout_in_other_words_is_refused() -> None:
    arguments = arguments_of(DENSE)
    with pytest.raises(LayoutError, match=r"already has the layout.*virtual pipeline size 1"):
        target_spec(Options(HERE, target_layout="Et*4|t*4L"), arguments)


@pytest.mark.parametrize("name", names())
@examples(20)
@given(data=st.data())
def test_any_layout_string_means_its_own_stages(name: str, data: st.DataObject) -> None:
    arguments = arguments_of(name)
    wanted = data.draw(targets(arguments))
    if placed(family(name, "source"), wanted) == family(name, "source").layout:
        return
    found = target_spec(asking_for(wanted), arguments)
    if wanted.layout is not None:
        stages = wanted.layout.split("|")
        assert [len(chunk.layers) for chunk in found.layout.chunks] == [
            stage.count("t") for stage in stages
        ]
        assert found.layout.vp_size * arguments.pp_size == len(stages)
        assert found.placement == Placement(found.layout.vp_size, layout=wanted.layout)
    else:
        even = arguments.num_layers // (arguments.pp_size * wanted.vp_size)
        assert {len(chunk.layers) for chunk in found.layout.chunks} == {even}
    layers = [layer for chunk in found.layout.chunks for layer in chunk.layers]
    assert layers == list(range(arguments.num_layers))


def test_a_size_keeps_the_sources_other_words() -> None:
    """Accounting for the embedding, and uneven ends."""
    arguments = arguments_of(DENSE)
    own = Placement(account_for_embedding=True, account_for_loss=True)
    accounted = replace(arguments, num_layers=6, placement=own)
    assert target_spec(Options(HERE, target_vp_size=2), accounted).placement == replace(
        own, vp_size=2
    )
    ends = replace(arguments, pp_size=3, placement=Placement(first_layers=2, last_layers=2))
    found = target_spec(Options(HERE, target_vp_size=2), ends)
    assert [len(chunk.layers) for chunk in found.layout.chunks] == [1, 2, 1, 1, 2, 1]


def test_words_of_the_source_that_no_longer_fit_are_dropped() -> None:
    layout = replace(arguments_of(DENSE), placement=Placement(1, layout="Ett|t*6L"))
    found = target_spec(Options(HERE, target_vp_size=2), layout)
    assert found.placement == Placement(2)
    assert any("'Ett|t*6L' is dropped" in note for note in request.notes(found, layout))
    fork = arguments_of("uneven-31layers-pp4-fork", "truth")
    assert fork.placement.first_split == (4, 4)
    back = target_spec(Options(HERE, target_vp_size=1), fork).placement
    assert (back.first_split, back.last_split) == (None, None)
    assert (back.first_layers, back.last_layers) == (8, 7)


def test_equal_halves_are_even() -> None:
    """Megatron cannot number the layers of two ranks that are both given."""
    halves = replace(arguments_of(DENSE), placement=Placement(first_layers=4, last_layers=4))
    assert target_spec(Options(HERE, target_vp_size=2), halves).placement == Placement(2)
    uneven = replace(halves, placement=Placement(first_layers=2, last_layers=6))
    found = target_spec(Options(HERE, target_vp_size=2), uneven)
    assert found.placement == Placement(2, first_layers=2, last_layers=6)
    assert any("divides by zero" in note for note in request.notes(found, uneven))
    plain = target_spec(Options(HERE, target_vp_size=1), replace(uneven, placement=found.placement))
    assert request.notes(plain, uneven) == []


def test_a_last_stage_alone_is_counted_wrongly_by_some() -> None:
    alone = replace(arguments_of(DENSE), pp_size=3, placement=Placement(last_layers=4))
    found = target_spec(Options(HERE, target_vp_size=2), alone)
    assert [len(chunk.layers) for chunk in found.layout.chunks] == [1, 1, 2, 1, 1, 2]
    (note,) = request.notes(found, alone)
    assert note.endswith("--decoder-first-pipeline-num-layers 2 too")
    both = replace(alone, placement=Placement(first_layers=2, last_layers=4))
    assert request.notes(target_spec(Options(HERE, target_vp_size=2), both), both) == []


def test_splits_tell_the_layers_of_the_end_ranks() -> None:
    fork = arguments_of("uneven-31layers-pp4-fork")
    options = Options(HERE, target_vp_size=2, first_split=(5, 4), last_split=(2, 4))
    found = target_spec(options, fork)
    assert (found.placement.first_layers, found.placement.last_layers) == (9, 6)
    assert [len(chunk.layers) for chunk in found.layout.rank_chunks(0)] == [5, 4]
    assert [len(chunk.layers) for chunk in found.layout.rank_chunks(3)] == [2, 4]
    assert [len(chunk.layers) for chunk in found.layout.rank_chunks(1)] == [4, 4]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (Options(HERE, target_vp_size=3), "do not divide"),
        (Options(HERE, target_layout="Et*8L"), "1 stages do not make"),
        (Options(HERE, target_layout="Et|t|t*6L"), "3 stages do not make"),
        (Options(HERE, target_layout="Et|t*6L"), "expected 8 of t"),
        (
            Options(HERE, target_vp_size=1, target_layout="E|t|t|t*7L"),
            "disagrees with the layout string, expected 4 stages / 2 ranks = 2, found 1",
        ),
        (
            Options(
                HERE, target_layout="E|t*8L", overlaps_param_gather_with_step=True
            ),
            "with virtual pipeline stages only",
        ),
    ],
)  # fmt: skip
def test_impossible_targets_are_refused(options: Options, reason: str) -> None:
    with pytest.raises(LayoutError) as caught:
        target_spec(options, arguments_of(DENSE))
    assert reason in str(caught.value)


def test_all_ranks_are_wanted_unless_told_otherwise() -> None:
    arguments = replace(arguments_of(DENSE), pp_size=4)
    assert wanted_ranks(Options(HERE), arguments) == (0, 1, 2, 3)
    assert wanted_ranks(Options(HERE, pp_ranks=(3, 1, 3)), arguments) == (1, 3)
    sizes = Options(HERE, pp_size=4, tp_size=1, ep_size=1)
    assert wanted_ranks(sizes, arguments) == (0, 1, 2, 3)


def test_everything_that_disagrees_is_told_at_once() -> None:
    options = Options(
        HERE, save_dir=HERE / "x", pp_size=8, tp_size=3, ep_size=2, pp_ranks=(0, 2, -1)
    )
    with pytest.raises(UsageError) as caught:
        wanted_ranks(options, arguments_of(DENSE))
    assert len(caught.value.problems) == 6
    text = str(caught.value)
    for part in ("--pipeline-model", "--expert-model", "--tensor-model", "rank 2", "rank -1"):
        assert part in text
    assert "--save-iteration-dir: it lies in the source" in text


@pytest.mark.parametrize(
    ("target", "is_inside"),
    [
        ("source", True),
        ("source/deep/down", True),
        ("link", True),
        ("other/../source/x", True),
        ("source-2", False),
        ("other", False),
        (".", False),
    ],
)
def test_the_source_is_never_the_target(target: str, is_inside: bool, tmp_path: Path) -> None:
    """By whatever name it is called."""
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(source)
    options = Options(source, save_dir=tmp_path / target)
    if is_inside:
        with pytest.raises(UsageError, match="lies in the source"):
            wanted_ranks(options, arguments_of(DENSE))
    else:
        assert wanted_ranks(options, arguments_of(DENSE)) == (0, 1)


@pytest.mark.parametrize("name", names())
def test_notes_tell_what_the_version_cannot(name: str) -> None:
    """Layout strings came with 0.13; splits are the fork's own."""
    arguments = arguments_of(name)
    stages = ["E", *[""] * (arguments.pp_size - 2)]
    mtp = "m" * arguments.mtp_num_layers
    layout = "|".join([*stages, "t" * arguments.num_layers + mtp + "L"])
    notes = request.notes(target_spec(Options(HERE, target_layout=layout), arguments), arguments)
    is_old = name.endswith(("v012", "fork"))
    assert [note for note in notes if "0.13 or later" in note] == notes[: int(is_old)]
    split = target_of("uneven-31layers-pp4-fork", "truth")
    found = request.notes(split, arguments)
    assert any("Microsoft's fork" in note for note in found) == ("fork" not in name)


def test_without_a_target_a_pair_is_verified() -> None:
    assert Options(HERE).verifies_only
    assert not Options(HERE, target_vp_size=1).verifies_only
    assert not Options(HERE, target_layout="E|L").verifies_only
    assert Options(HERE).depth is Depth.STRUCTURE
