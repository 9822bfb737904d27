"""From fp32 main parameters to 16-bit weights: the one arithmetic fact that files can be held to.

Megatron copies each main parameter into its weight after a step, rounding to nearest even; some
writers cut it off at 16 bits. MindSpeed's --reuse-fp32-param rounds ties away from zero: it adds
32768 to the bits.

The precision-aware optimizer (0.11 and later) leaves less. Where Transformer Engine keeps nothing
but the lower 16 bits of a main parameter (``store_param_remainders``, 2.1 and later), the file has
those, as numbers, in its place (distrib_optimizer.py ``get_parameter_state_dp_zero``). Where it
keeps them in fp16, scaled, weights were rounded before that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

    _Bits = NDArray[np.uint32]

WAYS = ("rounded", "rounded half up", "cut off")
REMAINDERS = "remainders"
HALVES = "halves"
"""Two ways that explain any weight, hence for runs alone that may have gone them: with a remainder
in the place of a main parameter, for bf16 weights; with one that was kept in fp16."""
UNCOMPARED = (REMAINDERS, HALVES)
_EXPONENT, _QUIET = 0x7F800000, 0x7FFFFFFF


def _bfloat16_rounded(bits: _Bits) -> NDArray[np.uint16]:
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _bfloat16_half_up(bits: _Bits) -> NDArray[np.uint16]:
    return ((bits + 0x8000) >> 16).astype(np.uint16)


def _bfloat16_cut(bits: _Bits) -> NDArray[np.uint16]:
    return (bits >> 16).astype(np.uint16)


def _float16_rounded(bits: _Bits) -> NDArray[np.uint16]:
    with np.errstate(over="ignore", invalid="ignore"):
        return bits.view(np.float32).astype(np.float16).view(np.uint16)


_CONVERSIONS: dict[str, dict[str, Callable[[_Bits], NDArray[np.uint16]]]] = {
    "bfloat16": {
        "rounded": _bfloat16_rounded,
        "rounded half up": _bfloat16_half_up,
        "cut off": _bfloat16_cut,
    },
    "float16": {"rounded": _float16_rounded},
}


SIXTEEN_BIT = tuple(_CONVERSIONS)
"""Dtypes of weights that have an fp32 main parameter beside them."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """How weights follow from main parameters."""

    ways: frozenset[str]
    """The ways, of those asked about, that explain every element."""
    differing: tuple[int, ...]
    """Indices of the pairs that the likeliest way does not explain."""


def explain(
    dtype: str, weights: Sequence[bytes], mains: Sequence[bytes], ways: Collection[str] = WAYS
) -> Explanation:
    """Compare weights with the main parameters they come from.

    Args:
        dtype: of the weights; ``float32`` must be equal, unknown ones are not compared.
        weights: raw elements, little-endian, one entry per parameter.
        mains: the fp32 elements of the same parameters.
        ways: those that are possible still.
    """
    if dtype == "float32":
        differing = [i for i, (w, m) in enumerate(zip(weights, mains, strict=True)) if w != m]
        left = frozenset(ways) & {HALVES} if differing else frozenset(ways)
        return Explanation(left, () if left else tuple(differing))
    if dtype not in _CONVERSIONS:
        return Explanation(frozenset(ways), ())
    sizes = [len(weight) // 2 for weight in weights]
    found = np.frombuffer(b"".join(weights), dtype="<u2")
    bits = np.frombuffer(b"".join(mains), dtype="<u4")
    wrong = {
        way: _wrong(convert, bits, found)
        for way, convert in _CONVERSIONS[dtype].items()
        if way in ways
    }
    if REMAINDERS in ways and dtype == "bfloat16":
        wrong[REMAINDERS] = ~_are_remainders(bits)
    if HALVES in ways:
        wrong[HALVES] = np.zeros(bits.shape, dtype=np.bool_)
    right = frozenset(way for way, where in wrong.items() if not where.any())
    if right or not wrong:
        return Explanation(right, () if right else tuple(range(len(sizes))))
    likeliest = min(wrong.values(), key=lambda where: int(where.sum()))
    owners = np.repeat(np.arange(len(sizes)), sizes)
    return Explanation(right, tuple(np.unique(owners[likeliest]).tolist()))


def _wrong(
    convert: Callable[[_Bits], NDArray[np.uint16]], bits: _Bits, found: NDArray[np.uint16]
) -> NDArray[np.bool_]:
    """Where weights are others than a way makes of main parameters that are numbers."""
    where: NDArray[np.bool_] = convert(bits) != found
    return where & ~_is_nan(bits) if where.any() else where


def _are_remainders(bits: _Bits) -> NDArray[np.bool_]:
    """Which fp32 numbers are those of 16-bit integers."""
    with np.errstate(invalid="ignore"):
        numbers = bits.view(np.float32).astype(np.int16).astype(np.float32)
    are: NDArray[np.bool_] = numbers.view(np.uint32) == bits
    return are


def _is_nan(bits: _Bits) -> NDArray[np.bool_]:
    return (bits & _QUIET) > _EXPONENT
