"""The picture of what moves: every layer is there once, and says where it comes from."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp import picture
from pp_to_vpp.errors import UsageError
from pp_to_vpp.megatron.forms import Ends, LayoutString, Order
from pp_to_vpp.megatron.layout import PipelineLayout
from pp_to_vpp.megatron.placement import Placement

from .examples import examples


def even(layers: int, pp_size: int, vp_size: int = 1) -> PipelineLayout:
    """An even layout."""
    return Placement(vp_size).place(layers, pp_size)


def test_what_moves_at_a_glance() -> None:
    assert picture.moves(even(8, 2), even(8, 2, 2)) == (
        "     source         target\n"
        "     vp0            vp0    vp1\n"
        "pp0  E 0-3     pp0  E 0-1  4-5<1\n"
        "pp1  4-7 L     pp1  2-3<0  6-7 L\n"
        "4 layers stay on their rank, 4 travel; <1 says that it comes from pp1"
    )


def test_sixteen_by_four_fits_a_terminal() -> None:
    for target in (even(64, 16, 4), even(128, 16, 4)):
        text = picture.moves(even(len(target.chunks) * len(target.chunks[0].layers), 16), target)
        assert "<" in text
        assert max(map(len, text.splitlines())) <= 80


def test_what_is_too_wide_has_stars_then_stands_below() -> None:
    source, target = even(32, 4), even(32, 4, 4)
    wide = picture.moves(source, target, 80)
    width = max(map(len, wide.splitlines()[:-1]))
    narrow = picture.moves(source, target, width - 1)
    assert "<" in wide
    assert "*" in narrow
    assert "<" not in narrow
    assert narrow.splitlines()[0].split() == ["source", "target"]
    below = picture.moves(source, target, 20).splitlines()
    assert below[0] == "source"
    assert below[6] == "target"


def test_colour_changes_nothing_but_colour() -> None:
    source, target = even(8, 2), even(8, 2, 2)
    coloured = picture.moves(source, target, coloured=True)
    assert "\x1b[36m4-5<1\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == picture.moves(source, target)


def test_where_nothing_moves_nothing_is_explained() -> None:
    text = picture.moves(even(4, 2), even(4, 2))
    assert text.splitlines()[-1] == "4 layers stay on their rank, 0 travel"


def test_layers_without_parameters_stand_in_parentheses() -> None:
    layout = Placement(1).place(8, 2, noop_layers=[2, 3, 7])
    rows = picture.grid(layout, layout)
    cells = [" ".join(part.text for part in cell) for row in rows for cell in row]
    assert cells == ["E 0-1 (2-3)", "4-6 (7) L"]


def test_multi_token_prediction_has_its_mark() -> None:
    source = Placement(1).place(4, 2, mtp_num_layers=1)
    target = Placement(2, LayoutString("Et|tt|t|mL")).place(4, 2, mtp_num_layers=1)
    assert "M L" in picture.moves(source, target).splitlines()[3]


def _layouts(layers: int, pp_size: int) -> st.SearchStrategy[PipelineLayout]:
    divisors = [v for v in range(1, 9) if layers % (pp_size * v) == 0]
    placements = [Placement(v, order=order) for v in divisors for order in Order if v <= 2]
    placements += [Placement(v) for v in divisors]
    if layers > pp_size:
        placements.append(Placement(1, Ends(first=layers - (pp_size - 1))))
    return st.sampled_from(placements).map(lambda placement: placement.place(layers, pp_size))


@examples(100)
@given(data=st.data(), pp_size=st.integers(2, 5), times=st.integers(1, 8))
def test_every_layer_is_there_with_its_origin(
    data: st.DataObject, pp_size: int, times: int
) -> None:
    layers = pp_size * times
    source, target = (data.draw(_layouts(layers, pp_size)) for _ in range(2))
    home = {layer: c.pp_rank for c in source.chunks for layer in c.layers}
    found: dict[int, int] = {}
    for pp_rank, row in enumerate(picture.grid(target, source)):
        for part in itertools.chain.from_iterable(row):
            assert part.moves == (part.origin != pp_rank)
            numbers = [int(number) for number in re.findall(r"\d+", part.text)]
            if numbers:
                assert part.size == numbers[-1] - numbers[0] + 1
                found |= dict.fromkeys(range(numbers[0], numbers[-1] + 1), part.origin)
    assert found == home
    stay, leave = picture.travelling(source, target)
    away = sum(home[layer] != c.pp_rank for c in target.chunks for layer in c.layers)
    assert (stay, leave) == (layers - away, away)
    assert ("<" in picture.moves(source, target, 10_000)) == bool(leave)


@pytest.mark.parametrize("name", ["moves.svg", "moves.png", "moves.pdf"])
def test_it_is_drawn(name: str) -> None:
    pytest.importorskip("matplotlib")
    path = Path(name)
    picture.check_drawing(path)
    drawn = picture.drawn(even(48, 12), even(48, 12, 4), path)
    begins = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[path.suffix]
    assert drawn.startswith(begins)
    if path.suffix == ".svg":
        assert all(f"<!-- {text} -->".encode() in drawn for text in ("pp11", "vp3", "44-47", "47"))
        assert drawn == picture.drawn(even(48, 12), even(48, 12, 4), path)
    assert picture.drawn(even(8, 2), None, path).startswith(begins)


def test_other_formats_are_refused() -> None:
    with pytest.raises(UsageError, match=r"ends with .svg, .png, .pdf, found moves.gif"):
        picture.check_drawing(Path("moves.gif"))
