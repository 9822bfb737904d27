"""Rank folders and byte ranges."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.container.extents import Extent, Literal, Piece, Zeros, cut_pieces, join_pieces
from pp_to_vpp.megatron.ranks import RankId

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


@given(_pieces, st.data())
def test_cutting_pieces_is_cutting_their_bytes(pieces: list[Piece], data: st.DataObject) -> None:
    whole = content(tuple(pieces))
    start = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - start))
    assert content(cut_pieces(tuple(pieces), start, length)) == whole[start : start + length]


@given(_pieces)
def test_joining_pieces_keeps_their_bytes_and_joins_neighbours(pieces: list[Piece]) -> None:
    joined = join_pieces(pieces)
    assert content(joined) == content(tuple(pieces))
    for left, right in itertools.pairwise(joined):
        if isinstance(left, Extent) and isinstance(right, Extent):
            assert left.path != right.path or left.offset + left.length != right.offset
        assert not (isinstance(left, Zeros) and isinstance(right, Zeros))


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.none() | st.integers(0, 10**6))
def test_folder_names_parse_back(tp_rank: int, pp_rank: int, ep_rank: int | None) -> None:
    rank = RankId(tp_rank, pp_rank, ep_rank)
    assert RankId.parse(rank.folder) == rank


@pytest.mark.parametrize(
    ("folder", "rank"),
    [
        ("mp_rank_00_003", RankId(0, 3, None)),
        ("mp_rank_07_015_063", RankId(7, 15, 63)),
        ("mp_rank_100_1000_1000", RankId(100, 1000, 1000)),
        ("mp_rank_00", None),
        ("mp_rank_00_03", None),
        ("mp_rank_00_003_001_002", None),
        ("mp_rank_0_003", None),
        ("mp_rank_00_٠٠٣", None),
        ("xmp_rank_00_003", None),
    ],
)
def test_only_megatrons_names_are_rank_folders(folder: str, rank: RankId | None) -> None:
    assert RankId.parse(folder) == rank
