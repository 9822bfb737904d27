"""Rank folders: coordinates and names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.megatron.ranks import RankId, is_rank_folder

NUMBERS = st.integers(0, 10**6)


@given(NUMBERS, st.none() | NUMBERS, st.none() | NUMBERS)
def test_folder_names_parse_back(tp_rank: int, pp_rank: int | None, ep_rank: int | None) -> None:
    rank = RankId(tp_rank, pp_rank, ep_rank)
    sizes = [1 if number is None else number + 2 for number in (pp_rank, ep_rank)]
    assert is_rank_folder(rank.folder)
    assert RankId.parse(rank.folder, *sizes) == rank


@pytest.mark.parametrize(
    ("folder", "sizes", "rank"),
    [
        ("mp_rank_00", (1, 1), RankId(0, None, None)),
        ("mp_rank_00_003", (4, 1), RankId(0, 3, None)),
        ("mp_rank_00_003", (1, 4), RankId(0, None, 3)),
        ("mp_rank_07_015_063", (16, 64), RankId(7, 15, 63)),
        ("mp_rank_100_1000_1000", (1001, 1001), RankId(100, 1000, 1000)),
        ("mp_rank_00", (2, 1), None),
        ("mp_rank_00_003", (1, 1), None),
        ("mp_rank_00_003", (4, 4), None),
        ("mp_rank_00_003_000", (4, 1), None),
        ("mp_rank_000_003", (4, 1), None),
        ("mp_rank_00_0003", (4, 1), None),
    ],
)
def test_sizes_tell_what_the_numbers_mean(
    folder: str, sizes: tuple[int, int], rank: RankId | None
) -> None:
    assert is_rank_folder(folder)
    assert RankId.parse(folder, *sizes) == rank


@pytest.mark.parametrize(
    "folder",
    [
        "mp_rank_00_03", "mp_rank_00_003_001_002", "mp_rank_0_003", "mp_rank_00_٠٠٣", "mp_rank_",
        "mp_rank_00_", "xmp_rank_00_003", "mp_rank_00_003\n", "mp_rank_00_-03",
    ],
)  # fmt: skip
def test_only_megatrons_names_are_rank_folders(folder: str) -> None:
    assert not is_rank_folder(folder)
    assert RankId.parse(folder, 4, 1) is None


def test_a_rank_has_the_same_place_in_other_runs() -> None:
    rank = RankId(1, 3, 2)
    assert rank.at(0, 2) == RankId(1, 0, 2)
    assert rank.at(0, 1).folder == "mp_rank_01_002"
    assert rank.at(0, 1).at(3, 4) == rank
    assert rank.at(0, 1).family == rank.family


def test_ranks_stand_by_their_coordinates() -> None:
    found = sorted([RankId(0, 1, None), RankId(0, None, None), RankId(0, 0, 3), RankId(0, 0, 0)])
    assert [rank.folder[8:] for rank in found] == ["00", "00_000_000", "00_000_003", "00_001"]
