"""A run as a whole: where its layers are, and which other runs save the same files."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pp_to_vpp.errors import LayoutError
from pp_to_vpp.megatron.forms import Ends, LayoutString
from pp_to_vpp.megatron.megatron import Megatron
from pp_to_vpp.megatron.naming import Section
from pp_to_vpp.megatron.placement import Placement

from ..examples import examples
from ..families import SIDES, families, family
from ..pairs import DENSE, OVERLAP, TIED_MTP
from ..strategies import placements


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_layers_are_where_the_arguments_place_them(name: str, side: str) -> None:
    for of in families(name, side):
        arguments = of.megatron.arguments
        assert of.megatron.layout == arguments.placement.place(
            arguments.num_layers,
            arguments.pp_size,
            mtp_num_layers=arguments.mtp_num_layers,
            mtp_may_stand_alone=of.megatron.rules.mtp_may_stand_alone,
            noop_layers=arguments.noop_layers,
        )
        assert of.megatron.is_laid_out_like(of.megatron)


@given(placements())
def test_a_relaunch_changes_its_placement_alone(case: tuple[int, int, Placement]) -> None:
    num_layers, pp_size, placement = case
    saved = family(DENSE, "source").megatron
    sizes = replace(saved.arguments, num_layers=num_layers, pp_size=pp_size)
    for overlaps in (False, True):
        found = Megatron(sizes, saved.rules).relaunched(placement, overlaps=overlaps)
        assert found.layout == placement.place(num_layers, pp_size)
        assert found.rules == saved.rules
        assert found.arguments == replace(
            sizes, placement=placement, overlaps_param_gather_with_step=overlaps
        )


def test_an_impossible_placement_is_told_when_the_layers_are_asked_for() -> None:
    relaunched = family(DENSE, "source").megatron.relaunched(Placement(7), overlaps=False)
    with pytest.raises(LayoutError, match="do not divide"):
        _ = relaunched.layout


def test_runs_are_alike_by_their_layers_however_they_are_told() -> None:
    saved = family(DENSE, "source").megatron
    half = saved.arguments.num_layers // 2
    assert saved.layout.vp_size == 1
    for form in (Ends(first=half), LayoutString(f"Et*{half}|t*{half}L")):
        again = saved.relaunched(Placement(1, form), overlaps=False)
        assert again.is_laid_out_like(saved)
        assert saved.is_laid_out_like(again)
    for other in (Placement(2), Placement(1, Ends(first=half - 1))):
        moved = saved.relaunched(other, overlaps=False)
        assert not moved.is_laid_out_like(saved)
        assert not saved.is_laid_out_like(moved)


def test_runs_are_alike_by_their_optimizers() -> None:
    """Overlapping splits one off."""
    saved = family(OVERLAP, "truth").megatron
    placement, overlaps = (
        saved.arguments.placement,
        saved.arguments.overlaps_param_gather_with_step,
    )
    assert overlaps
    assert saved.relaunched(placement, overlaps=True).is_laid_out_like(saved)
    assert not saved.relaunched(placement, overlaps=False).is_laid_out_like(saved)


@given(placements())
def test_sources_are_the_ranks_that_hold_what_is_needed(case: tuple[int, int, Placement]) -> None:
    num_layers, pp_size, placement = case
    assume(num_layers % pp_size == 0)
    saved = family(DENSE, "source").megatron
    sizes = replace(saved.arguments, num_layers=num_layers, pp_size=pp_size)
    source = Megatron(replace(sizes, placement=placement), saved.rules)
    target = Megatron(replace(sizes, placement=Placement()), saved.rules)
    for p in range(pp_size):
        needed = {layer for chunk in target.layout.rank_chunks(p) for layer in chunk.layers}
        holders = {c.pp_rank for c in source.layout.chunks if needed & set(c.layers)}
        last = source.layout.chunks[-1].pp_rank
        ends = {0} if p == 0 else {last} if p == pp_size - 1 else set()
        assert set(source.sources_of(target, p)) == (holders | ends or {0})


_LAYOUTS = {
    "Et|t|mL": ({Section.MTP_EMBEDDING}, {Section.MTP_EMBEDDING}),
    "Et|tm|L": ({Section.MTP_EMBEDDING}, {Section.MTP_EMBEDDING, Section.HEAD}),
    "Ettm||L": (set(), {Section.HEAD}),
}


@pytest.mark.parametrize("text", _LAYOUTS)
def test_copies_of_the_embedding_follow_from_the_layout(text: str) -> None:
    """Where MTP layers or embedding are beside it, the output layer's own weight is none."""
    saved = family(TIED_MTP, "source").megatron
    for ties, wanted in zip((False, True), _LAYOUTS[text], strict=True):
        arguments = replace(saved.arguments, ties_embeddings=ties)
        run = replace(saved, arguments=arguments)
        found = run.relaunched(Placement(1, LayoutString(text)), overlaps=False)
        assert found.embedding_copies == wanted


def test_a_copy_that_is_to_be_made_needs_the_embedding() -> None:
    source, target = (family(TIED_MTP, side).megatron for side in ("source", "truth"))
    assert source.sources_of(target, 2) == (0, 1, 2)
    assert target.sources_of(source, 2) == (1, 2)


SIZES = st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 3, 4])).filter(
    lambda size: size[0] > 1 or size[1] == 1
)


@examples(200)
@given(SIZES, SIZES, st.integers(1, 3), st.booleans(), st.booleans())
def test_ranks_of_any_number_are_made_of_those_that_hold_their_layers(
    own: tuple[int, int], wanted: tuple[int, int], times: int, ties: bool, grows: bool
) -> None:
    """And the first and last have the ends; a tied output layer comes and goes with one rank."""
    saved = family(DENSE, "source").megatron
    layers = math.lcm(own[0] * own[1], wanted[0] * wanted[1]) * times
    arguments = replace(
        saved.arguments,
        num_layers=layers,
        pp_size=own[0],
        placement=Placement(own[1]),
        ties_embeddings=ties,
    )
    source = Megatron(arguments, saved.rules)
    dp_size = arguments.dp_size + grows
    target = source.relaunched(
        Placement(wanted[1]), overlaps=False, pp_size=wanted[0], dp_size=dp_size
    )
    before, after = (
        [layer // (layers // (pp * vp)) % pp for layer in range(layers)] for pp, vp in (own, wanted)
    )
    for pp_rank in range(wanted[0]):
        needed = {before[layer] for layer in range(layers) if after[layer] == pp_rank}
        needed |= {0} if pp_rank == 0 else set()
        needed |= {own[0] - 1} if pp_rank == wanted[0] - 1 else set()
        assert set(source.sources_of(target, pp_rank)) == needed
        counterpart = pp_rank if pp_rank < own[0] else min(needed)
        assert source.counterpart(target, pp_rank) == counterpart
    was, will_be = (ties and pp > 1 for pp, _ in (own, wanted))
    assert bool(source.made_for(target)) == (will_be and not was)
    assert bool(source.dropped_for(target)) == (was and not will_be)
    is_like = own == wanted and not grows
    assert target.is_laid_out_like(source) == is_like
