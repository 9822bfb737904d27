"""From fp32 main parameters to 16-bit weights: the one arithmetic fact that files can be held to.

Megatron copies each main parameter into its weight after a step, rounding to nearest even. With
stored remainders the weight may instead be the main parameter cut off at 16 bits
(``store_param_remainders``: optimizer/__init__.py from 0.11, distrib_optimizer.py from 0.13).
MindSpeed's --reuse-fp32-param rounds ties away from zero: it adds 32768 to the bits.
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
        return Explanation(frozenset(() if differing else ways), tuple(differing))
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


def _is_nan(bits: _Bits) -> NDArray[np.bool_]:
    return (bits & _QUIET) > _EXPONENT
