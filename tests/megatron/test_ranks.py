"""Rank folders: coordinates and names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.megatron.ranks import RankId


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
