"""Layer placement: layers dealt out like cards, and what layout strings say.

Megatron's own placement judges in tests/test_megatron_rules.py.
"""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pp_to_vpp.errors import LayoutError
from pp_to_vpp.megatron.forms import Ends, Even, HybridPattern, LayoutString, Listed, Order
from pp_to_vpp.megatron.layout import PipelineLayout
from pp_to_vpp.megatron.naming import Section
from pp_to_vpp.megatron.placement import Placement

from ..strategies import hybrid_patterns, layout_strings, placements

_APART = (
    "layer placement: MTP layers in another stage ({}) than the loss ({}), where Megatron before "
    "0.16 does not put them"
)


def dealt(num_layers: int, pp_size: int, placement: Placement) -> list[list[int]]:
    """The layers of each chunk, in order of execution: dealt out one after the other.

    Without given ends all chunks get as many cards, and embedding and loss may be cards too. With
    ends each stage has its number, and its chunks have equal parts of it or those of its split.
    """
    vp_size, form = placement.vp_size, placement.form
    given = form if isinstance(form, Ends) else Ends()
    sizes = {0: given.first, pp_size - 1: given.last}
    ends = {p: size for p, size in sizes.items() if size is not None}
    counted = form if isinstance(form, Even) else Even()
    cards = ["E"] * counted.counts_embedding + list(map(str, range(num_layers)))
    cards += ["L"] * counted.counts_loss
    middle = len(cards) - sum(ends.values())
    hands = {p: [size // vp_size] * vp_size for p, size in ends.items()}
    for p in set(range(pp_size)) - set(ends):
        hands[p] = [middle // (pp_size - len(ends)) // vp_size] * vp_size
    for p, split in ((0, given.first_split), (pp_size - 1, given.last_split)):
        hands[p] = hands[p] if split is None else list(split)
    deck = iter(cards)
    found = [
        list(itertools.islice(deck, hands[p][v])) for v in range(vp_size) for p in range(pp_size)
    ]
    assert not list(deck)
    return [[int(card) for card in hand if card not in ("E", "L")] for hand in found]


@given(placements())
def test_layers_are_dealt_out_in_order_of_execution(case: tuple[int, int, Placement]) -> None:
    num_layers, pp_size, placement = case
    assume(not isinstance(placement.form, LayoutString))
    layout = placement.place(num_layers, pp_size)
    assert [list(chunk.layers) for chunk in layout.chunks] == dealt(num_layers, pp_size, placement)


@given(placements(), st.integers(0, 2))
def test_every_layer_and_section_has_one_place(case: tuple[int, int, Placement], mtp: int) -> None:
    num_layers, pp_size, placement = case
    assume(not isinstance(placement.form, LayoutString) or mtp == 0)
    layout = placement.place(num_layers, pp_size, mtp_num_layers=mtp)
    assert [layer for chunk in layout.chunks for layer in chunk.layers] == list(range(num_layers))
    assert (layout.pp_size, layout.vp_size) == (pp_size, placement.vp_size)
    for index, chunk in enumerate(layout.chunks):
        assert (chunk.vp_stage, chunk.pp_rank) == divmod(index, pp_size)
        assert chunk is layout.rank_chunks(chunk.pp_rank)[chunk.vp_stage]
        assert list(chunk.sections) == sorted(chunk.sections)
    held = [section for chunk in layout.chunks for section in chunk.sections]
    expected = [Section.EMBEDDING, Section.FINAL_NORM, Section.HEAD]
    expected += [Section.MTP_EMBEDDING, Section.MTP] if mtp else []
    assert sorted(held) == sorted(expected)
    assert layout.chunks[0].sections[0] is Section.EMBEDDING
    assert layout.chunks[-1].sections[-1] is Section.HEAD


@given(placements(), st.data())
def test_layers_without_parameters_count_like_others(
    case: tuple[int, int, Placement], data: st.DataObject
) -> None:
    num_layers, pp_size, placement = case
    noop = data.draw(st.sets(st.integers(0, num_layers)))
    if num_layers in noop:
        with pytest.raises(LayoutError, match=f"names layer {num_layers} of {num_layers}"):
            placement.place(num_layers, pp_size, noop_layers=noop)
        return
    found = placement.place(num_layers, pp_size, noop_layers=noop)
    others = placement.place(num_layers, pp_size)
    assert [chunk.layers for chunk in found.chunks] == [chunk.layers for chunk in others.chunks]
    assert [set(chunk.layers) & noop for chunk in found.chunks] == [
        chunk.noop_layers for chunk in found.chunks
    ]


def layers_of(layout: PipelineLayout) -> list[list[list[int]]]:
    """Layers of each rank and virtual stage."""
    return [[list(chunk.layers) for chunk in layout.rank_chunks(p)] for p in range(layout.pp_size)]


@given(st.integers(2, 6), st.integers(1, 3))
def test_a_v_goes_there_and_back(pp_size: int, count: int) -> None:
    """Layers of the ranks in turn, then of the ranks in reverse; the ends are both on rank 0."""
    num_layers = 2 * pp_size * count
    layout = Placement(2, order=Order.V_SHAPED).place(num_layers, pp_size)
    there_and_back = [*range(pp_size), *reversed(range(pp_size))]
    assert [chunk.pp_rank for chunk in layout.chunks] == there_and_back
    assert [chunk.vp_stage for chunk in layout.chunks] == [0] * pp_size + [1] * pp_size
    for p in range(pp_size):
        first, second = layout.rank_chunks(p)
        assert first.layers.start == p * count
        assert second.layers.start == num_layers - (p + 1) * count
    first, second = layout.rank_chunks(0)
    assert (first.sections, second.sections) == (
        (Section.EMBEDDING,),
        (Section.FINAL_NORM, Section.HEAD),
    )


def test_the_ends_of_a_v_are_its_first_and_last_chunk() -> None:
    assert layers_of(Placement(2, Ends(first=1, last=3), Order.V_SHAPED).place(8, 2)) == [
        [[0], [5, 6, 7]],
        [[1, 2], [3, 4]],
    ]


def test_lists_are_rank_by_rank_or_along_the_v() -> None:
    form = Listed((1, 2, 3, 4), "decoder_pipeline_manual_split_list")
    assert layers_of(Placement(2, form).place(10, 2)) == [[[0], [4, 5]], [[1, 2, 3], [6, 7, 8, 9]]]
    assert layers_of(Placement(2, form, Order.V_SHAPED).place(10, 2)) == [
        [[0], [6, 7, 8, 9]],
        [[1, 2], [3, 4, 5]],
    ]


def test_interleaving() -> None:
    assert layers_of(Placement(2).place(8, 2)) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_thirty_one_layers_on_four_stages() -> None:
    """The Microsoft fork's mode."""
    placement = Placement(2, Ends(8, 7, first_split=(4, 4), last_split=(4, 3)))
    assert layers_of(placement.place(31, 4)) == [
        [[0, 1, 2, 3], [16, 17, 18, 19]],
        [[4, 5, 6, 7], [20, 21, 22, 23]],
        [[8, 9, 10, 11], [24, 25, 26, 27]],
        [[12, 13, 14, 15], [28, 29, 30]],
    ]


def test_the_fork_gives_the_remainder_to_the_first_chunks() -> None:
    assert Ends(5, 3).with_splits(2) == Ends(5, 3, first_split=(3, 2), last_split=(2, 1))
    assert Ends(first=4).with_splits(2) == Ends(first=4)
    assert Ends(first=5, first_split=(2, 3)).with_splits(2).first_split == (2, 3)


def test_zero_layer_chunks_are_allowed() -> None:
    layout = Placement(2, Even(counts_embedding=True, counts_loss=True)).place(2, 2)
    assert layers_of(layout) == [[[], [1]], [[0], []]]


def test_the_final_norm_follows_the_layers_with_mtp() -> None:
    """From 0.16: to the chunk of the last decoder layer, where the last has none (FORMAT 9.18)."""
    text = "Ett|tt|tt|t|m|L"
    layout = Placement(2, LayoutString(text)).place(
        7, 3, mtp_num_layers=1, mtp_may_stand_alone=True
    )
    assert layout.rank_chunks(0)[1].sections == (Section.FINAL_NORM,)
    assert layout.rank_chunks(1)[1].sections == (Section.MTP_EMBEDDING, Section.MTP)
    assert layout.rank_chunks(2)[1].sections == (Section.HEAD,)
    with pytest.raises(LayoutError, match=re.escape(_APART.format(4, 5))):
        Placement(2, LayoutString(text)).place(7, 3, mtp_num_layers=1)
    before = Placement(2, LayoutString("Ett|tt|tt|t||mL")).place(7, 3, mtp_num_layers=1)
    assert Section.FINAL_NORM in before.rank_chunks(2)[1].sections


@pytest.mark.parametrize(("mtp", "holder"), [(None, (1, 1)), (0, (0, 1))])
def test_the_final_norm_stays_last_without_a_number_of_mtp_layers(
    mtp: int | None, holder: tuple[int, int]
) -> None:
    """``--mtp-num-layers 0`` is a number: Megatron asks whether it is None."""
    placement = Placement(2, LayoutString("Ett|tt|tt|L"))
    layout = placement.place(6, 2, mtp_num_layers=mtp, mtp_may_stand_alone=True)
    holders = [chunk for chunk in layout.chunks if Section.FINAL_NORM in chunk.sections]
    assert [(chunk.pp_rank, chunk.vp_stage) for chunk in holders] == [holder]
    assert all(Section.MTP not in chunk.sections for chunk in layout.chunks)
    before = placement.place(6, 2, mtp_num_layers=mtp)
    assert Section.FINAL_NORM in before.rank_chunks(1)[1].sections


@given(st.integers(0, 20), st.integers(2, 6), st.integers(0, 2), st.data())
def test_layout_strings_place_what_they_say(
    num_layers: int, pp_size: int, mtp: int, data: st.DataObject
) -> None:
    text = data.draw(layout_strings(num_layers, pp_size * 2, mtp))
    layout = Placement(2, LayoutString(text)).place(num_layers, pp_size, mtp_num_layers=mtp)
    assert [len(chunk.layers) for chunk in layout.chunks] == [s.count("t") for s in text.split("|")]


@given(st.text("M*-EG+?", min_size=1, max_size=12), st.integers(2, 5), st.integers(0, 2), st.data())
def test_hybrid_patterns_place_what_they_say(
    letters: str, pp_size: int, mtp: int, data: st.DataObject
) -> None:
    """Letters dealt out stage by stage, whatever they are; norm, MTP and head in the last one."""
    vp_size = data.draw(st.integers(1, 3))
    own = HybridPattern("/".join((letters, *["*E"] * mtp)))
    form = data.draw(hybrid_patterns(own, pp_size * vp_size))
    layout = Placement(vp_size, form).place(
        len(letters), pp_size, mtp_num_layers=mtp, mtp_may_stand_alone=data.draw(st.booleans())
    )
    deck = list(enumerate(letters))
    for index, stage in enumerate(form.text.split("/")[0].split("|")):
        chunk = layout.chunks[index]
        hand, deck = deck[: len(stage)], deck[len(stage) :]
        assert list(zip(chunk.layers, chunk.letters or "", strict=True)) == hand
        assert (chunk.vp_stage, chunk.pp_rank) == divmod(index, pp_size)
    ends = {Section.FINAL_NORM, Section.HEAD, *([Section.MTP_EMBEDDING, Section.MTP] * bool(mtp))}
    assert set(layout.chunks[-1].sections) == ends
    assert form.kinds == own.kinds


def test_a_hybrid_pattern_without_stages_is_for_plain_ones() -> None:
    even = Placement(1, HybridPattern("M*M-M*"))
    assert [chunk.letters for chunk in even.place(6, 2).chunks] == ["M*M", "-M*"]
    ends = Placement(1, HybridPattern("M*M-M*/", Ends(first=1)))
    assert [chunk.letters for chunk in ends.place(6, 2).chunks] == ["M", "*M-M*"]
    assert ends.arguments(6, 2)["decoder_first_pipeline_num_layers"] == 1


@pytest.mark.parametrize(
    ("placement", "num_layers", "pp_size", "reason"),
    [
        (Placement(3), 8, 2, "do not divide"),
        (Placement(2, Even(counts_embedding=True)), 8, 2, "embedding and loss included"),
        (Placement(2, Ends(first=3)), 7, 2, r"its 3 layers \(all: 3 4\) do not divide into 2"),
        (Placement(2, Ends(5, 4)), 8, 2, "must divide evenly"),
        (Placement(1, Ends(2, 2)), 9, 4, "must divide evenly"),
        (Placement(2, Ends(4, 4, (3, 2), (2, 2))), 8, 2, "add up to 4"),
        (Placement(2, LayoutString("Et|tL")), 2, 2, "2 stages do not make"),
        (Placement(1, LayoutString("Et|tL")), 3, 2, "expected 3 of t"),
        (Placement(1, LayoutString("Et|EtL")), 2, 2, "expected 1 of E"),
        (Placement(1, LayoutString("tE|tL")), 2, 2, "first element must be E"),
        (Placement(1, LayoutString("Et|tmL")), 2, 2, "expected 0 of m"),
    ],
)  # fmt: skip
def test_impossible_placements_are_refused(
    placement: Placement, num_layers: int, pp_size: int, reason: str
) -> None:
    with pytest.raises(LayoutError, match=reason):
        placement.place(num_layers, pp_size)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Et|m|t|tL", "after an MTP layer"),
        ("Etm|t|t|L", "after an MTP layer|last virtual stage"),
        ("Ett|tm|mt|L", "more than one stage|after"),
        ("Ett|t|m|mL", "more than one stage"),
        ("Ett|tm||L", "last one"),
    ],
)
def test_misplaced_mtp_layers_are_refused(text: str, reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        Placement(2, LayoutString(text)).place(3, 2, mtp_num_layers=text.count("m"))


def test_mtp_layers_may_stand_on_the_first_stage() -> None:
    """Without virtual stages Megatron 0.16 builds that and saves it: no copy of the embedding."""
    placement = Placement(1, LayoutString("Ettttm|L"))
    layout = placement.place(4, 2, mtp_num_layers=1, mtp_may_stand_alone=True)
    assert layout.rank_chunks(0)[0].sections == (Section.EMBEDDING, Section.FINAL_NORM, Section.MTP)
    assert layout.rank_chunks(1)[0].sections == (Section.HEAD,)
    with pytest.raises(LayoutError, match=re.escape(_APART.format(0, 1))):
        placement.place(4, 2, mtp_num_layers=1)
    virtual = Placement(2, LayoutString("Ettttm|||L"))
    with pytest.raises(LayoutError, match="only in the last one"):
        virtual.place(4, 2, mtp_num_layers=1, mtp_may_stand_alone=True)


@pytest.mark.parametrize(
    ("placement", "num_layers", "flags"),
    [
        (Placement(1), 8, ""),
        (Placement(2), 8, "--num-layers-per-virtual-pipeline-stage 2"),
        (
            Placement(2, Ends(2, 2)), 4,
            "--num-virtual-stages-per-pipeline-rank 2 --decoder-first-pipeline-num-layers 2 "
            "--decoder-last-pipeline-num-layers 2",
        ),
        (
            Placement(2, LayoutString("Et|t|t|tL")), 4,
            "--pipeline-model-parallel-layout 'Et|t|t|tL'",
        ),
        (
            Placement(2, Even(counts_embedding=True)), 7,
            "--num-layers-per-virtual-pipeline-stage 2 --account-for-embedding-in-pipeline-split",
        ),
        (
            Placement(2, Ends(8, 7, first_split=(4, 4), last_split=(4, 3))), 15,
            "--num-virtual-stages-per-pipeline-rank 2 --decoder-first-pipeline-num-layers 8 "
            "--decoder-last-pipeline-num-layers 7 --decoder-first-pipeline-num-layers-split 4 4 "
            "--decoder-last-pipeline-num-layers-split 4 3",
        ),
    ],
)  # fmt: skip
def test_launch_flags(placement: Placement, num_layers: int, flags: str) -> None:
    assert placement.launch_flags(num_layers, 2) == flags
