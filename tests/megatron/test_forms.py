"""What layout strings and hybrid patterns say, and what is advised where layers do not divide."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.errors import LayoutError
from pp_to_vpp.megatron.forms import (
    Ends,
    HybridPattern,
    LayoutString,
    Order,
    Shape,
    even_layout_string,
    parse_layout,
)
from pp_to_vpp.megatron.placement import Placement


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("Et|tL", ["Et", "tL"]),
        ("Et*4|t*3L", ["Etttt", "tttL"]),
        ("E,t*3,|(tt|)*2,m|L", ["Ettt", "tt", "tt", "m", "L"]),
        ("Ettt|t|t|t|t|t||L", ["Ettt", "t", "t", "t", "t", "t", "", "L"]),
        ("E(t|)*3L", ["Et", "t", "t", "L"]),
        ("E(tt)*2|L", ["Etttt", "L"]),
    ],
)
def test_layout_strings(text: str, stages: list[str]) -> None:
    assert list(parse_layout(text)) == stages


@pytest.mark.parametrize(
    ("text", "vp_size", "reason"),
    [
        ("M*M-M*", 2, "1 stages do not make 2 virtual stages on 2 pipeline ranks; give 4"),
        ("M*|M-|M*", 1, "3 stages do not make 1 virtual stages"),
        ("M*|M-M", 1, "5 layers where args.num_layers tells 6"),
        ("M*M|-M*/*", 1, "1 MTP layers where args.mtp_num_layers tells 0"),
    ],
)
def test_hybrid_patterns_that_megatron_could_not_build(
    text: str, vp_size: int, reason: str
) -> None:
    with pytest.raises(LayoutError, match=re.escape(reason)):
        Placement(vp_size, HybridPattern(text)).place(6, 2)


@pytest.mark.parametrize("vp_size", [1, 2, 3])
def test_a_hybrid_pattern_is_cut_evenly(vp_size: int) -> None:
    whole = HybridPattern("M|*M-M*M*ME--/*E/*E")
    found = whole.divided(2, vp_size)
    assert {len(stage) for stage in found.stages} == {12 // (2 * vp_size)}
    assert len(found.stages) == 2 * vp_size
    assert found.kinds == whole.kinds == "M*M-M*M*ME--/*E/*E"
    with pytest.raises(LayoutError, match=r"12 layers do not divide into 2 .* x 5 .*layer-pattern"):
        whole.divided(2, 5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Et|tx", "letter 'x'"),
        ("Et| tL", "letter ' '"),
        ("E(t", r"groups are written \(...\)\*n"),
        ("E((t|)*2)*3tt|L", "do not nest"),
        ("E" + "t*99999999", "absurdly long"),
        ("E((t)*9999)*9999|L", "absurdly long|groups"),
    ],
)
def test_bad_strings_are_refused_at_once(text: str, reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        parse_layout(text)


def test_sizes_that_divide_are_told() -> None:
    with pytest.raises(LayoutError, match=r"choose another VPP size \(2 or 4\), or give a layout"):
        Placement(3).place(8, 2)
    with pytest.raises(LayoutError, match=r"divides them: give \S+-layout 'Et\|tt\|t\|tL'"):
        Placement(2).place(5, 2)
    with pytest.raises(
        LayoutError, match=r"\(all: 4 6 6 4\) do not .* VPP size \(2\), or give --t"
    ):
        Placement(3, Ends(first=4, last=4)).place(20, 4)
    with pytest.raises(LayoutError, match=r"\(all: 3 5 5 3\) do not divide .* stages; give --targ"):
        Placement(2, Ends(first=3, last=3)).place(16, 4)
    with pytest.raises(LayoutError, match=r"VPP size \(2 or 4\), or give --target-hybrid"):
        HybridPattern("M*M*M*M*").divided(2, 3)
    with pytest.raises(LayoutError, match=r"no VPP size divides them: give \S+-layout$"):
        Placement(4).place(5, 2)


@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 70), st.integers(0, 2))
def test_the_layout_string_that_is_offered_works(
    pp_size: int, vp_size: int, num_layers: int, mtp_num_layers: int
) -> None:
    """It places all layers, as evenly as can be, the ends not more than the others."""
    shape = Shape(num_layers, pp_size, vp_size, mtp_num_layers, Order.INTERLEAVED)
    text = even_layout_string(shape)
    if text is None:
        assert num_layers < shape.chunks
        return
    counts = LayoutString(text).cut(shape).counts
    assert sum(counts) == num_layers
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts) or num_layers % shape.chunks == shape.chunks - 1
