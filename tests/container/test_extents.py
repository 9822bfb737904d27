"""Byte ranges and other pieces of files."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.container.extents import Extent, Literal, Piece, Zeros, cut_pieces, join_pieces

_SOURCE = bytes(range(256)) * 4


def content(pieces: tuple[Piece, ...]) -> bytes:
    """The bytes that pieces stand for, when every path is ``_SOURCE``."""
    found = b""
    for piece in pieces:
        match piece:
            case Extent(_, offset, length):
                found += _SOURCE[offset : offset + length]
            case Zeros(length):
                found += bytes(length)
            case Literal(data):
                found += data
    return found


_pieces = st.lists(
    st.one_of(
        st.builds(Extent, st.sampled_from("ab"), st.integers(0, 400), st.integers(0, 40)),
        st.builds(Zeros, st.integers(0, 20)),
        st.builds(Literal, st.binary(max_size=10)),
    ),
    max_size=6,
)


_extents = st.builds(Extent, st.just("a"), st.integers(0, 400), st.integers(0, 400))


@given(_extents, st.data())
def test_cutting_an_extent_is_cutting_its_bytes(extent: Extent, data: st.DataObject) -> None:
    whole = content((extent,))
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - start))
    assert content((extent.cut(start, length),)) == whole[start : start + length]


@given(_extents, st.integers(1, 500))
def test_segments_are_the_bytes_in_equal_parts(extent: Extent, length: int) -> None:
    segments = tuple(extent.segments(length))
    assert content(segments) == content((extent,))
    assert join_pieces(list(segments)) == ((extent,) if extent.length else ())
    assert all(segment.length == length for segment in segments[:-1])
    assert all(0 < segment.length <= length for segment in segments)


@given(_pieces)
def test_joining_pieces_keeps_their_bytes_and_joins_neighbours(pieces: list[Piece]) -> None:
    joined = join_pieces(pieces)
    assert content(joined) == content(tuple(pieces))
    for left, right in itertools.pairwise(joined):
        if isinstance(left, Extent) and isinstance(right, Extent):
            assert left.path != right.path or left.offset + left.length != right.offset
        assert not (isinstance(left, Zeros) and isinstance(right, Zeros))


@given(_pieces, st.dictionaries(st.sampled_from("ab"), st.sets(st.integers(0, 440))))
def test_cutting_pieces_keeps_their_bytes_and_no_piece_across_a_border(
    pieces: list[Piece], borders: dict[str, set[int]]
) -> None:
    joined = join_pieces(pieces)
    cut = cut_pieces(joined, {path: sorted(own) for path, own in borders.items()})
    assert content(cut) == content(joined)
    assert join_pieces(list(cut)) == joined
    for piece in cut:
        if isinstance(piece, Extent):
            inner = range(piece.offset + 1, piece.offset + piece.length)
            assert not borders.get(piece.path, set()).intersection(inner)


@given(_extents, st.integers(0, 400), st.integers(1, 64))
def test_the_blocks_of_an_extent_are_those_that_stand_alike(
    extent: Extent, offset: int, block: int
) -> None:
    """Every block of both files that the extent fills, and no more."""
    shared = extent.blocks(offset, block)
    inside = range(extent.offset, extent.offset + extent.length + 1)
    starts = [
        start
        for start in range(0, 1000, block)
        if start in inside and start + block in inside
        if (start - extent.offset + offset) % block == 0 and block > 1
    ]
    assert shared.length == len(starts) * block
    if starts:
        assert shared.offset == starts[0]
