"""Our rounding is torch's, on every bit pattern that matters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.megatron import rounding


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


_bits = st.lists(
    st.integers(0, 2**32 - 1)
    | st.sampled_from([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x3F808000, 0x477FF000]),
    min_size=1,
    max_size=50,
)


@given(_bits, st.sampled_from(["bfloat16", "float16", "float32"]))
def test_rounding_is_torchs(bits: list[int], dtype: str) -> None:
    main = torch.tensor(bits, dtype=torch.int64).to(torch.uint32).view(torch.float32)
    weight = main.to(getattr(torch, dtype))
    found = rounding.explain(dtype, [raw(weight)], [raw(main)])
    assert "rounded" in found.ways
    assert found.differing == ()


def test_the_ways_to_16_bits_are_told_apart() -> None:
    bits = torch.tensor([0x3F80FFFF, 0x3F800001, 0x3F808000], dtype=torch.int32)
    main = bits.view(torch.float32)
    half_up = ((bits + 0x8000) >> 16).to(torch.int16)
    assert rounding.explain("bfloat16", [raw(half_up)], [raw(main)]).ways == {"rounded half up"}
    cut = main.view(torch.int16)[1::2].contiguous()
    assert rounding.explain("bfloat16", [raw(cut)], [raw(main)]).ways == {"cut off"}
    rounded = main.to(torch.bfloat16)
    assert rounding.explain("bfloat16", [raw(rounded)], [raw(main)]).ways == {"rounded"}


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1), st.integers(0, 2**16 - 1))
def test_remainders_explain_any_weight_of_a_run_that_may_keep_them(
    numbers: list[int], weight: int
) -> None:
    mains = raw(torch.tensor(numbers, dtype=torch.int16).to(torch.float32))
    weights = weight.to_bytes(2, "little") * len(numbers)
    ways = (*rounding.WAYS, rounding.REMAINDERS)
    assert rounding.REMAINDERS in rounding.explain("bfloat16", [weights], [mains], ways).ways
    assert rounding.REMAINDERS not in rounding.explain("float16", [weights], [mains], ways).ways
    assert rounding.REMAINDERS not in rounding.explain("bfloat16", [weights], [mains]).ways


@given(_bits)
def test_remainders_are_16_bit_integers(bits: list[int]) -> None:
    main = torch.tensor(bits, dtype=torch.int64).to(torch.uint32).view(torch.float32)
    is_one = all(
        float(x).is_integer() and -(2**15) <= x < 2**15 and not (x == 0 and x.signbit())
        for x in main
        if x.isfinite()
    ) and bool(main.isfinite().all())
    found = rounding.explain("bfloat16", [bytes(2 * len(bits))], [raw(main)], [rounding.REMAINDERS])
    assert (rounding.REMAINDERS in found.ways) == is_one


def test_main_parameters_kept_in_fp16_are_not_compared() -> None:
    weight, main = torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 1.01)
    ways = (*rounding.WAYS, rounding.HALVES)
    assert rounding.explain("bfloat16", [raw(weight)], [raw(main)]).ways == set()
    assert rounding.explain("bfloat16", [raw(weight)], [raw(main)], ways).ways == {rounding.HALVES}
    found = rounding.explain("float32", [raw(torch.ones(3))], [raw(main)], ways)
    assert found.ways == {rounding.HALVES}
    assert found.differing == ()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_one_wrong_element_is_found_and_attributed(dtype: str) -> None:
    mains = [torch.randn(100), torch.randn(7), torch.randn(1)]
    weights = [main.to(getattr(torch, dtype), copy=True) for main in mains]
    weights[1][3] *= 1.5
    found = rounding.explain(dtype, [raw(w) for w in weights], [raw(m) for m in mains])
    assert found.ways == frozenset()
    assert found.differing == (1,)


def test_unknown_dtypes_are_not_compared() -> None:
    assert rounding.explain("int8", [b"a"], [b"bcde"]).ways == set(rounding.WAYS)
