"""What a run is asked to do, held against what the real checkpoints are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.errors import CheckpointError, LayoutError, UsageError
from pp_to_vpp.megatron.arguments import SavedArguments
from pp_to_vpp.megatron.forms import Ends, Even, HybridPattern, LayoutString
from pp_to_vpp.megatron.megatron import Megatron
from pp_to_vpp.megatron.placement import Placement
from pp_to_vpp.megatron.rules import candidates
from pp_to_vpp.options import Depth, Options
from pp_to_vpp.target import request
from pp_to_vpp.target.request import wanted_ranks, wanted_target

from ..compare import differences
from ..edit import copy_of, rewrite_all
from ..examples import examples
from ..families import OF_KINDS, SIDES, family, opposite, surveyed, target_of
from ..inline import asking_for, run
from ..pairs import DEEPSEEK, DENSE, FORK, HYBRID, HYBRID_MOE, TIED_MTP, names, pair
from ..strategies import targets

HERE = Path("/somewhere/iter_0000001")


def arguments_of(name: str, side: str = "source") -> SavedArguments:
    return surveyed(name, side).arguments


def source_of(arguments: SavedArguments) -> Megatron:
    """The run that saved these arguments, by the likeliest rules."""
    return Megatron(arguments, next(candidates(arguments.names)))


def target_for(options: Options, arguments: SavedArguments) -> Megatron:
    """The run that will load what is asked for."""
    return wanted_target(options, arguments).of(source_of(arguments))


def notes_for(options: Options, arguments: SavedArguments) -> list[str]:
    return request.notes(source_of(arguments), target_for(options, arguments))


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_asking_for_the_other_side_means_its_layout(name: str, side: str) -> None:
    """What Megatron placed is what is understood, both ways."""
    truth = target_of(name, opposite(side))
    placement = truth.arguments.placement
    overlaps = truth.arguments.overlaps_param_gather_with_step
    found = target_for(asking_for(HERE, placement, overlaps=overlaps), arguments_of(name, side))
    assert found.layout == truth.layout
    assert found.arguments.overlaps_param_gather_with_step == overlaps
    sizes = (truth.arguments.num_layers, truth.layout.pp_size)
    assert found.arguments.placement.arguments(*sizes) == placement.arguments(*sizes)


def test_mtp_layers_change_no_kind() -> None:
    """A layout with decoder layers beside them, and one without; pairs that Megatron 0.16.1 and its
    development branch saved so have other MTP layers."""
    beside, alone = (
        Options(HERE, layout_string=text) for text in ("Ettt|ttt|t|tmL", "Ettt|ttt|tt|mL")
    )
    own = arguments_of(DEEPSEEK)
    wanted_target(beside, own)
    wanted_target(alone, own)
    own = replace(own, last_kind_is_its_own=True)
    wanted_target(beside, own)
    with pytest.raises(LayoutError, match=r"expected some decoder layers .* found none"):
        wanted_target(alone, own)
    without = replace(own, placement=Placement(2, LayoutString("Ettt|ttt|tt|mL")))
    with pytest.raises(LayoutError, match=r"expected no decoder layers .* found some"):
        wanted_target(beside, without)
    wanted_target(Options(HERE, layout_string="Et|ttt|tttt|mL"), without)


def test_a_last_stage_alone_gets_a_first_one_where_numbers_would_be_wrong() -> None:
    """Compared with what Megatron 0.13.1 saved with both, given the last one alone."""
    own = replace(
        arguments_of(DENSE), num_layers=14, pp_size=4, placement=Placement(1, Ends(last=2))
    )
    wanted = Options(HERE, target_vp_size=2)
    assert wanted_target(wanted, own).placement.form == Ends(last=2)
    own = replace(own, misnumbers_kinds=True)
    assert wanted_target(wanted, own).placement.form == Ends(first=4, last=2)
    assert (
        target_for(wanted, own).layout
        == target_for(wanted, replace(own, misnumbers_kinds=False)).layout
    )
    between = replace(own, num_layers=6, pp_size=2)
    with pytest.raises(LayoutError, match=r"of several kinds .* ask for a layout string"):
        wanted_target(wanted, between)


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
def test_the_layout_that_is_there_is_refused(name: str, side: str) -> None:
    arguments = arguments_of(name, side)
    overlaps = arguments.overlaps_param_gather_with_step
    with pytest.raises(LayoutError, match="already has the layout"):
        wanted_target(asking_for(HERE, arguments.placement, overlaps=overlaps), arguments)


def test_the_same_layout_in_other_words_is_refused() -> None:
    arguments = arguments_of(DENSE)
    with pytest.raises(LayoutError, match=r"already has the layout.*virtual pipeline size 1"):
        wanted_target(Options(HERE, layout_string="Et*4|t*4L"), arguments)


@pytest.mark.parametrize("name", names())
@examples(20)
@given(data=st.data())
def test_any_layout_string_means_its_own_stages(name: str, data: st.DataObject) -> None:
    arguments = arguments_of(name)
    wanted = data.draw(targets(arguments))
    own = family(name, "source").megatron
    if own.relaunched(wanted, overlaps=False).layout == own.layout:
        return
    found = target_for(asking_for(HERE, wanted), arguments)
    if isinstance(wanted.form, LayoutString | HybridPattern):
        stages = wanted.form.text.partition("/")[0].split("|")
        is_layer = "t".__eq__ if isinstance(wanted.form, LayoutString) else bool
        assert [len(chunk.layers) for chunk in found.layout.chunks] == [
            sum(map(is_layer, stage)) for stage in stages
        ]
        assert found.layout.vp_size * arguments.pp_size == len(stages)
        assert found.arguments.placement == Placement(found.layout.vp_size, wanted.form)
    else:
        even = arguments.num_layers // (arguments.pp_size * wanted.vp_size)
        assert {len(chunk.layers) for chunk in found.layout.chunks} == {even}
    layers = [layer for chunk in found.layout.chunks for layer in chunk.layers]
    assert layers == list(range(arguments.num_layers))


def test_a_size_keeps_the_sources_other_words() -> None:
    """Accounting for the embedding, and uneven ends."""
    arguments = arguments_of(DENSE)
    own = Placement(1, Even(counts_embedding=True, counts_loss=True))
    accounted = replace(arguments, num_layers=6, placement=own)
    wanted = wanted_target(Options(HERE, target_vp_size=2), accounted)
    assert wanted.placement == replace(own, vp_size=2)
    ends = replace(arguments, pp_size=3, placement=Placement(1, Ends(2, 2)))
    found = target_for(Options(HERE, target_vp_size=2), ends)
    assert [len(chunk.layers) for chunk in found.layout.chunks] == [1, 2, 1, 1, 2, 1]


def test_words_of_the_source_that_no_longer_fit_are_dropped() -> None:
    layout = replace(arguments_of(DENSE), placement=Placement(1, LayoutString("Ett|t*6L")))
    options = Options(HERE, target_vp_size=2)
    assert wanted_target(options, layout).placement == Placement(2)
    assert any("'Ett|t*6L' is dropped" in note for note in notes_for(options, layout))
    fork = arguments_of(FORK, "truth")
    assert isinstance(fork.placement.form, Ends)
    assert fork.placement.form.first_split == (4, 4)
    back = wanted_target(Options(HERE, target_vp_size=1), fork).placement
    assert back == Placement(1, Ends(8, 7, None, None))


def test_equal_halves_are_even() -> None:
    """Megatron cannot number the layers of two ranks that are both given."""
    halves = replace(arguments_of(DENSE), placement=Placement(1, Ends(4, 4)))
    options = Options(HERE, target_vp_size=2)
    assert wanted_target(options, halves).placement == Placement(2)
    uneven = replace(halves, placement=Placement(1, Ends(2, 6)))
    found = wanted_target(options, uneven).placement
    assert found == Placement(2, Ends(2, 6))
    assert any("divides by zero" in note for note in notes_for(options, uneven))
    there = replace(uneven, placement=found)
    assert notes_for(Options(HERE, target_vp_size=1), there) == []


def test_a_last_stage_alone_is_counted_wrongly_by_some() -> None:
    alone = replace(arguments_of(DENSE), pp_size=3, placement=Placement(1, Ends(last=4)))
    options = Options(HERE, target_vp_size=2)
    found = target_for(options, alone)
    assert [len(chunk.layers) for chunk in found.layout.chunks] == [1, 1, 2, 1, 1, 2]
    (note,) = notes_for(options, alone)
    assert note.endswith("--decoder-first-pipeline-num-layers 2 too")
    both = replace(alone, placement=Placement(1, Ends(2, 4)))
    assert notes_for(options, both) == []


def test_splits_tell_the_layers_of_the_end_ranks() -> None:
    fork = arguments_of(FORK)
    options = Options(HERE, target_vp_size=2, first_split=(5, 4), last_split=(2, 4))
    found = target_for(options, fork)
    assert found.arguments.placement.form == Ends(9, 6, (5, 4), (2, 4))
    assert [len(chunk.layers) for chunk in found.layout.rank_chunks(0)] == [5, 4]
    assert [len(chunk.layers) for chunk in found.layout.rank_chunks(3)] == [2, 4]
    assert [len(chunk.layers) for chunk in found.layout.rank_chunks(1)] == [4, 4]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (Options(HERE, target_vp_size=3), "do not divide"),
        (Options(HERE, layout_string="Et*8L"), "1 stages do not make"),
        (Options(HERE, layout_string="Et|t|t*6L"), "3 stages do not make"),
        (Options(HERE, layout_string="Et|t*6L"), "expected 8 of t"),
        (
            Options(HERE, target_vp_size=1, layout_string="E|t|t|t*7L"),
            "disagrees with the layout string, expected 4 stages / 2 ranks = 2, found 1",
        ),
        (
            Options(HERE, layout_string="E|t*8L", overlaps=True),
            "with virtual pipeline stages only",
        ),
    ],
)  # fmt: skip
def test_impossible_targets_are_refused(options: Options, reason: str) -> None:
    with pytest.raises(LayoutError) as caught:
        wanted_target(options, arguments_of(DENSE))
    assert reason in str(caught.value)


def test_a_size_cuts_a_hybrids_layers_evenly() -> None:
    hybrid = arguments_of(HYBRID)
    wanted = wanted_target(Options(HERE, target_vp_size=2), hybrid).placement
    assert wanted == Placement(2, HybridPattern("M*|M-|M*|M-"))
    back = wanted_target(Options(HERE, target_vp_size=1), arguments_of(HYBRID, "truth")).placement
    assert back == Placement(1, HybridPattern("M*M-|M*M-"))


@pytest.mark.parametrize(
    ("name", "options", "kind", "reason"),
    [
        (HYBRID, {"target_vp_size": 3}, LayoutError, "8 layers do not divide into 2"),
        (HYBRID, {"hybrid_pattern": "M*|M-|M*|M"}, LayoutError, "its layers are not those of the"),
        (HYBRID, {"hybrid_pattern": "M*|M-|M-|M*"}, LayoutError, "the letters of 'M*M-M*M-'"),
        (HYBRID, {"hybrid_pattern": "M*|M-M*|M-"}, LayoutError, "3 stages do not make 1 virtual"),
        (HYBRID_MOE, {"hybrid_pattern": "M|*|ME|-/*E/*E"}, LayoutError, "its layers are not those"),
        (
            HYBRID,
            {"hybrid_pattern": "M*|M-|M*|M-", "target_vp_size": 4},
            LayoutError,
            "disagrees with the hybrid pattern, expected 4 stages / 2 ranks = 2, found 4",
        ),
        (HYBRID, {"layout_string": "Et*4|t*4L"}, UsageError, "do not place the layers of a hybrid"),
        (
            HYBRID,
            {"target_vp_size": 2, "first_split": (2, 2), "last_split": (3, 1)},
            UsageError,
            "do not place the layers of a hybrid",
        ),
        (DENSE, {"hybrid_pattern": "M*|M-|M*|M-"}, UsageError, "is that of no hybrid model"),
    ],
)
def test_what_hybrids_and_others_cannot_be_asked_for(
    name: str, options: dict[str, Any], kind: type[Exception], reason: str
) -> None:
    with pytest.raises(kind) as caught:
        wanted_target(Options(HERE, **options), arguments_of(name))
    assert reason in str(caught.value)


def test_all_ranks_are_wanted_unless_told_otherwise() -> None:
    arguments = replace(arguments_of(DENSE), pp_size=4)
    assert wanted_ranks(Options(HERE), arguments) == (0, 1, 2, 3)
    assert wanted_ranks(Options(HERE, pp_ranks=(3, 1, 3)), arguments) == (1, 3)
    sizes = Options(HERE, pp_size=4, tp_size=1, ep_size=1)
    assert wanted_ranks(sizes, arguments) == (0, 1, 2, 3)


def test_everything_that_disagrees_is_told_at_once() -> None:
    options = Options(HERE, pp_size=8, tp_size=3, ep_size=2, pp_ranks=(0, 2, -1))
    with pytest.raises(UsageError) as caught:
        wanted_ranks(options, arguments_of(DENSE))
    assert len(caught.value.problems) == 5
    text = str(caught.value)
    for part in ("--pipeline-model", "--expert-model", "--tensor-model", "rank 2", "rank -1"):
        assert part in text


@pytest.mark.parametrize("name", [name for name in names() if "hybrid" not in name])
def test_notes_tell_what_the_version_cannot(name: str) -> None:
    """Layout strings came with 0.13; splits are the fork's own."""
    arguments = arguments_of(name)
    stages = ["E", *[""] * (arguments.pp_size - 2)]
    mtp = "m" * (arguments.mtp_num_layers or 0)
    layout = "|".join([*stages, "t" * arguments.num_layers + mtp + "L"])
    notes = notes_for(Options(HERE, layout_string=layout), arguments)
    is_old = name.endswith(("v012", "fork"))
    assert [note for note in notes if "0.13 or later" in note] == notes[: int(is_old)]
    found = request.notes(source_of(arguments), target_of(FORK, "truth"))
    assert any("Microsoft's fork" in note for note in found) == ("fork" not in name)


def test_mtp_layers_may_share_the_embedding_of_the_first_stage() -> None:
    """They have no copy there; with virtual stages Megatron hangs."""
    own = arguments_of(DEEPSEEK)
    (note,) = notes_for(Options(HERE, layout_string="E" + "t" * 8 + "m|L"), own)
    assert "the MTP layers' copy of the word embedding, which is equal" in note
    with pytest.raises(LayoutError, match="MTP layers on the first pipeline rank"):
        wanted_target(Options(HERE, layout_string="Ett|tt|ttttm|L"), own)


def test_a_wrong_first_guess_of_rules_refuses_nothing(tmp_path: Path) -> None:
    """The layout is judged by the rules that the files prove: here MTP layers apart from the loss,
    of a commit that does not know the argument by which such versions are known."""
    case = pair(TIED_MTP)
    source = copy_of(case.truth, tmp_path)
    rewrite_all(source, lambda root: root["args"].state.__delitem__("mtp_standalone"))
    wanted = family(TIED_MTP, "source").megatron.arguments.placement
    made, expected = tmp_path / "made" / "iter_0000002", tmp_path / "expected" / "iter_0000002"
    run(source, made, wanted, Depth.FULL)
    run(case.truth, expected, wanted)
    assert differences(made, expected, source) == []


def test_a_target_is_judged_by_the_rules_of_its_source() -> None:
    saved = family(TIED_MTP, "source").megatron
    apart = Options(HERE, layout_string="E|t|t||m|L")
    target = wanted_target(apart, saved.arguments)
    assert target.of(saved).layout.vp_size == 2
    without = replace(saved, rules=replace(saved.rules, mtp_may_stand_alone=False))
    with pytest.raises(LayoutError, match="MTP layers in another stage"):
        target.of(without)


def test_a_source_that_no_rules_place_is_refused_at_once() -> None:
    arguments = replace(arguments_of(DENSE), placement=Placement(7))
    with pytest.raises(CheckpointError, match="tell no possible placement"):
        wanted_target(Options(HERE, target_vp_size=2), arguments)
