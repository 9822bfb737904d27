"""CRC-32 algebra: the checksum of a whole from those of its parts, and of a part from the rest.

A CRC-32 is a remainder of polynomials over GF(2): appending n bytes multiplies it by x^(8n). Bits
are reflected as in zlib: the most significant bit of an int is the coefficient of x^0.
"""

from __future__ import annotations

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_ORDER = (1 << 32) - 1
"""x^_ORDER = 1: the CRC-32 polynomial is primitive."""


def _multiply(a: int, b: int) -> int:
    """a * b modulo the CRC-32 polynomial."""
    product = 0
    bit = _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


def _squares() -> tuple[int, ...]:
    """x^(2^i) for i = 0..31."""
    powers = [_ONE >> 1]
    for _ in range(31):
        powers.append(_multiply(powers[-1], powers[-1]))
    return tuple(powers)


_SQUARES = _squares()


def _power_of_x(exponent: int) -> int:
    """x^exponent; negative exponents divide."""
    exponent %= _ORDER
    power = _ONE
    for square in _SQUARES:
        if exponent & 1:
            power = _multiply(square, power)
        exponent >>= 1
    return power


def concatenate(first: int, second: int, second_length: int) -> int:
    """CRC-32 of A + B from those of A and B and the length of B in bytes."""
    return _multiply(_power_of_x(8 * second_length), first) ^ second


def of_zeros(length: int) -> int:
    """CRC-32 of ``length`` zero bytes."""
    return _multiply(_power_of_x(8 * length), _ORDER) ^ _ORDER


def missing_part(whole: int, before: int, after: int, length: int, after_length: int) -> int:
    """CRC-32 of B from those of A + B + C, A and C; ``length`` is that of B, in bytes."""
    shifted = whole ^ after ^ _multiply(_power_of_x(8 * (length + after_length)), before)
    return _multiply(_power_of_x(-8 * after_length), shifted)
