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

from collections.abc import Collection, Sequence
from dataclasses import dataclass

WAYS = ("rounded", "rounded half up", "cut off")
REMAINDERS = "remainders"
HALVES = "halves"
"""Two ways that explain any weight, hence for runs alone that may have gone them: with a remainder
in the place of a main parameter, for bf16 weights; with one that was kept in fp16."""
UNCOMPARED = (REMAINDERS, HALVES)

SIXTEEN_BIT = ("bfloat16", "float16")
"""Dtypes of weights that have an fp32 main parameter beside them."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """How weights follow from main parameters."""

    ways: frozenset[str]
    """The ways, of those asked about, that explain every element."""
    differing: tuple[int, ...]
    """Indices of the pairs that the likeliest way does not explain."""


def load() -> None:
    """Import numpy. Do it before processes are forked, and they share it."""
    from . import rounding_bits  # noqa: F401


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
    if dtype not in SIXTEEN_BIT:
        return Explanation(frozenset(ways), ())
    from .rounding_bits import owners_of, wrong_elements  # numpy starts slowly

    sizes = [len(weight) // 2 for weight in weights]
    wrong = wrong_elements(dtype, b"".join(weights), b"".join(mains), ways)
    right = frozenset(way for way, where in wrong.items() if not where.any())
    if right or not wrong:
        return Explanation(right, () if right else tuple(range(len(sizes))))
    likeliest = min(wrong.values(), key=lambda where: int(where.sum()))
    return Explanation(right, owners_of(likeliest, sizes))
