"""CRC-32 algebra against zlib."""

from __future__ import annotations

import itertools
import zlib

from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.container.crc32 import (
    Checksums,
    Ledger,
    concatenate,
    derivable,
    missing_part,
    of_zeros,
)
from pp_to_vpp.container.extents import Extent, Literal, Zeros

_data = st.binary(max_size=300)


@given(_data, _data)
def test_concatenation(first: bytes, second: bytes) -> None:
    whole = concatenate(zlib.crc32(first), zlib.crc32(second), len(second))
    assert whole == zlib.crc32(first + second)


@given(_data, _data, _data)
def test_a_part_follows_from_the_whole(before: bytes, part: bytes, after: bytes) -> None:
    found = missing_part(
        zlib.crc32(before + part + after),
        zlib.crc32(before),
        zlib.crc32(after),
        len(part),
        len(after),
    )
    assert found == zlib.crc32(part)


@given(st.integers(0, 10_000))
def test_zeros(length: int) -> None:
    assert of_zeros(length) == zlib.crc32(bytes(length))


def test_lengths_beyond_32_bits() -> None:
    """Squaring: 2^40 zeros are 2^20 times 2^20 zeros."""
    length, crc32 = 1 << 20, of_zeros(1 << 20)
    while length < 1 << 40:
        crc32 = concatenate(crc32, crc32, length)
        length *= 2
    assert crc32 == of_zeros(1 << 40)


@st.composite
def _cuts(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int]]]:
    """A record and disjoint ranges of it, in any order."""
    data = draw(st.binary(min_size=1, max_size=64)) * 4096
    points = sorted(draw(st.sets(st.integers(0, len(data)), min_size=2, max_size=10)))
    ranges = [(a, b - a) for a, b in itertools.pairwise(points)]
    kept = [r for r in ranges if draw(st.booleans())]
    return data, draw(st.permutations(kept))


@given(_cuts(), st.integers(0, 1000))
def test_derived_checksums_are_those_of_the_bytes(
    case: tuple[bytes, list[tuple[int, int]]], base: int
) -> None:
    data, ranges = case
    record = Extent("file", base, len(data))
    wanted = [Extent("file", base + start, length) for start, length in ranges]

    def crc32_of(extent: Extent) -> int:
        start = extent.offset - base
        return zlib.crc32(data[start : start + extent.length])

    derived = derivable(wanted, {"file": [(record, zlib.crc32(data))]})
    for extent, derivation in derived.items():
        assert extent == wanted[-1], "only what is copied last may wait for the rest"
        assert derivation.solve(crc32_of) == crc32_of(extent)
        known = {*wanted, *derivation.gaps}
        assert {*derivation.before, *derivation.after} == known - {extent}


@given(_cuts(), st.integers(1 << 11, 1 << 18), st.binary(max_size=9), st.integers(0, 999))
def test_a_ledger_knows_what_was_copied_and_derives_the_rest(
    case: tuple[bytes, list[tuple[int, int]]], segment_bytes: int, made: bytes, zeros: int
) -> None:
    data, ranges = case
    record = Extent("file", 0, len(data))
    wanted = [record.cut(start, length) for start, length in ranges]
    derived = derivable(wanted, {"file": [(record, zlib.crc32(data))]})
    ledger = Ledger(derived, segment_bytes)
    gaps = [gap for derivation in derived.values() for gap in derivation.gaps]
    for extent in (*wanted, *gaps):
        segments = list(extent.segments(segment_bytes))
        crc32s = (zlib.crc32(data[s.offset : s.offset + s.length]) for s in segments)
        ledger.enter(segments, (None if extent in derived else crc32 for crc32 in crc32s))
    ledger.enter([Zeros(zeros), Literal(made)], [None, None])
    content = b"".join(data[start : start + length] for start, length in ranges)
    assert ledger.of([Literal(made), *wanted, Zeros(zeros)]) == zlib.crc32(
        made + content + bytes(zeros)
    )
    for extent in wanted:
        assert ledger.of([extent]) == zlib.crc32(data[extent.offset :][: extent.length])


def test_a_wrong_checksum_of_a_source_stays_wrong() -> None:
    """It is not blessed by a ledger that derives from it."""
    data = bytes(range(256)) * 1024
    record = Extent("file", 0, len(data))
    derived = derivable([record], {"file": [(record, zlib.crc32(data) ^ 1)]})
    assert list(derived) == [record]
    assert Ledger(derived, 1 << 20).of([record]) == zlib.crc32(data) ^ 1


def test_a_range_is_derived_when_the_rest_is_known() -> None:
    record = Extent("f", 64, 1 << 20)
    parts = [record.cut(0, 1 << 19), record.cut(1 << 19, 1 << 19)]
    derived = derivable(parts, {"f": [(record, 123)]})
    assert list(derived) == [parts[1]]
    assert derived[parts[1]].gaps == ()


def test_whole_records_are_derived_however_often_they_are_copied() -> None:
    """As the states that a layer-wise optimizer's files hold twice; parts would have to wait."""
    record = Extent("f", 64, 1 << 20)
    derived = derivable([record, record], {"f": [(record, 123)]})
    assert list(derived) == [record]
    assert Ledger(derived, 1 << 16).of([record]) == 123
    parts = [record.cut(0, 1 << 19), record.cut(1 << 19, 1 << 19)]
    assert not derivable([parts[1], *parts], {"f": [(record, 123)]})


def test_nothing_is_derived_from_what_is_not_known() -> None:
    record = Extent("f", 64, 1 << 20)
    half = [record.cut(0, 1 << 19)]
    assert not derivable(half, {"f": [(record, 123)]}), "half of the record is not copied"
    assert not derivable([record], {"f": [(record, 0)]}), "no checksum was stored"
    assert not derivable([record], {}), "not a record"


@given(
    st.binary(min_size=1, max_size=60),
    st.lists(st.tuples(st.integers(0, 59), st.integers(0, 60)), max_size=6),
    st.tuples(st.integers(0, 59), st.integers(0, 60)),
)
def test_a_checksum_comes_from_what_was_read_and_the_rest_is_read(
    data: bytes, ranges: list[tuple[int, int]], wanted: tuple[int, int]
) -> None:
    """Whatever overlaps what."""

    def extent(start: int, length: int) -> Extent:
        start = min(start, len(data))
        return Extent("f", start, min(length, len(data) - start))

    def read(part: Extent) -> int:
        gaps.append(part)
        return zlib.crc32(data[part.offset : part.offset + part.length])

    gaps: list[Extent] = []
    extents = [extent(*given) for given in ranges]
    known = Checksums({e: read(e) for e in extents})
    gaps.clear()
    whole = extent(*wanted)
    assert known.of(whole, read) == zlib.crc32(data[whole.offset :][: whole.length])
    if whole not in extents:
        parts = [*known.inside(whole), *gaps]
        assert sum(part.length for part in parts) == whole.length, "nothing is read twice"
