"""The arithmetic of ``rounding``, in bulk: the one module that needs numpy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .rounding import HALVES, REMAINDERS

_Bits = NDArray[np.uint32]
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


def wrong_elements(
    dtype: str, weights: bytes, mains: bytes, ways: Collection[str]
) -> Mapping[str, NDArray[np.bool_]]:
    """Which 16-bit weights do not follow from their main parameters, for each way.

    Args:
        dtype: of the weights, one of ``SIXTEEN_BIT``.
        weights: raw elements, little-endian.
        mains: the fp32 elements of the same parameters.
        ways: those that are possible.
    """
    found = np.frombuffer(weights, dtype="<u2")
    bits = np.frombuffer(mains, dtype="<u4")
    wrong = {
        way: _wrong(convert, bits, found)
        for way, convert in _CONVERSIONS[dtype].items()
        if way in ways
    }
    if REMAINDERS in ways and dtype == "bfloat16":
        wrong[REMAINDERS] = ~_are_remainders(bits)
    if HALVES in ways:
        wrong[HALVES] = np.zeros(bits.shape, dtype=np.bool_)
    return wrong


def owners_of(elements: NDArray[np.bool_], sizes: Sequence[int]) -> tuple[int, ...]:
    """The parameters that some elements belong to, given how many elements each one has."""
    owners = np.repeat(np.arange(len(sizes)), sizes)
    return tuple(np.unique(owners[elements]).tolist())


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
