"""Options as they were meant: checked, with iterations in the place of roots."""

from __future__ import annotations

from pathlib import Path

import pytest

from pp_to_vpp.errors import UsageError
from pp_to_vpp.megatron.ranks import TRACKER
from pp_to_vpp.options import Options
from pp_to_vpp.run.ready import ready


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkpoint with one iteration."""
    (tmp_path / "ckpt" / "iter_0000005").mkdir(parents=True)
    (tmp_path / "ckpt" / TRACKER).write_text("5")
    return tmp_path / "ckpt"


def made(load_dir: Path, save_dir: Path, vp_size: int | None = 2) -> Path | None:
    """Where the target will be."""
    return ready(Options(load_dir, save_dir, target_vp_size=vp_size)).save_dir


def test_a_root_means_its_iteration(root: Path) -> None:
    assert ready(Options(root)).load_dir == root / "iter_0000005"
    assert ready(Options(root / "iter_0000005")).load_dir == root / "iter_0000005"


def test_a_new_target_is_a_root_if_the_source_was_given_so(root: Path) -> None:
    new = root.parent / "new"
    assert made(root, new) == new / "iter_0000005"
    assert made(root, new / "iter_0000009") == new / "iter_0000009"
    assert made(root / "iter_0000005", new) == new
    assert made(root, new, None) == new / "iter_0000005"


def test_the_root_of_a_target_has_the_iteration_of_the_source(root: Path) -> None:
    """But for verification, where it has its own."""
    target = root.parent / "target"
    target.mkdir()
    (target / TRACKER).write_text("4")
    for source in (root, root / "iter_0000005"):
        assert made(source, target) == target / "iter_0000005"
        assert made(source, target, None) == target / "iter_0000004"


def test_options_are_checked(root: Path) -> None:
    with pytest.raises(UsageError, match="--save-iteration-dir is required"):
        ready(Options(root, target_vp_size=2))
