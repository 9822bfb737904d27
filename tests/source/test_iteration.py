"""Roots of checkpoints: the tracker names their iteration."""

from __future__ import annotations

from pathlib import Path

import pytest

from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.ranks import TRACKER
from pp_to_vpp.source.iteration import is_iteration, source_dir, tracked


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("7", "iter_0000007"), ("12345678\n", "iter_12345678"), ("release", "release"),
        ("", None), ("-1", None), ("seven", None), ("1" * 30, None), ("٣", None),
    ],
)  # fmt: skip
def test_a_tracker_names_a_folder(text: str, name: str | None, tmp_path: Path) -> None:
    assert tracked(tmp_path) is None
    (tmp_path / TRACKER).write_text(text)
    assert tracked(tmp_path) == name


def test_a_tracker_may_be_unreadable(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_bytes(b"\xff\xfe")
    assert tracked(tmp_path) is None
    (tmp_path / TRACKER).unlink()
    (tmp_path / TRACKER).mkdir()
    assert tracked(tmp_path) is None


def test_a_root_is_taken_for_its_iteration(tmp_path: Path) -> None:
    assert source_dir(tmp_path) == tmp_path
    (tmp_path / TRACKER).write_text("3")
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000009_0_local.pt").touch()
    with pytest.raises(
        CheckpointError, match=r"not there, expected folder iter_0000003, found iter_0000002; "
    ):
        source_dir(tmp_path)
    (tmp_path / "iter_0000003").mkdir()
    assert source_dir(tmp_path) == tmp_path / "iter_0000003"


def test_a_folder_with_ranks_is_no_root_whatever_lies_in_it(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("3")
    (tmp_path / "mp_rank_00_000").mkdir()
    assert is_iteration(tmp_path)
    assert source_dir(tmp_path) == tmp_path
    assert is_iteration(tmp_path / "iter_0000009")
    assert is_iteration(tmp_path / "release")
    assert not is_iteration(tmp_path / "other")
