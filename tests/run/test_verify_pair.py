"""Verification of a target that is there: what is held to what (see ``verify`` for the rest)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pp_to_vpp.errors import CheckpointError, UsageError, VerificationError
from pp_to_vpp.options import Depth, Options
from pp_to_vpp.run import workers as processes
from pp_to_vpp.run.listener import Listener
from pp_to_vpp.run.verify_pair import Verified, verify_existing
from pp_to_vpp.verification import torch_loading

from ..edit import copy_of
from ..families import family
from ..pairs import BERT, DENSE, MOE, pair
from ..runs import Program


def verified(source: Path, target: Path | None, *, depth: Depth = Depth.STRUCTURE) -> Verified:
    """Verify in this process; what is heard of it must add up."""
    heard: list[list[int]] = []

    def advanced(count: int) -> None:
        heard[-1].append(count)

    listener = Listener(began=lambda _, total: heard.append([total]), advanced=advanced)
    found = verify_existing(Options(source, target, depth=depth, processes=1), listener)
    assert all(total == sum(parts) for total, *parts in heard)
    assert heard[0][0] == found.ranks
    assert heard[-1][0] >= found.length
    return found


@pytest.mark.parametrize("depth", [Depth.STRUCTURE, Depth.FULL])
@pytest.mark.parametrize("name", [DENSE, MOE])
def test_a_real_pair_is_told(name: str, depth: Depth, program: Program, tmp_path: Path) -> None:
    """With its layout, the number of its folders and the bytes of their records."""
    case, target = pair(name), tmp_path / "iter_0000001"
    assert program.convert(case.source, target, case.options).status == 0
    found = verified(case.source, target, depth=depth)
    ranks = [*target.glob("mp_rank_*")]
    total = sum(path.stat().st_size for path in target.glob("*/*"))
    assert (found.source, found.target) == (str(case.source), str(target))
    assert found.layout == family(name, "truth").layout
    assert (found.depth, found.ranks) == (depth, len(ranks))
    assert total * 0.5 < found.length < total
    assert found.seconds > 0


@pytest.mark.parametrize("workers", [1, 2])
def test_torch_opens_the_files_beside_the_comparison(
    workers: int, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it finds is told; that it is missing, too, as before a conversion."""
    monkeypatch.setattr(processes, "_has_one_thread", lambda: True)  # forked ones are patched, too
    case, target = pair(MOE), tmp_path / "iter_0000001"
    assert program.convert(case.source, target, case.options).status == 0
    both = ("--load-iteration-dir", case.source, "--save-iteration-dir", target, "--verify", "full")
    assert program(*both, workers=workers).status == 0
    monkeypatch.setattr(
        torch_loading, "differences", lambda file, _: [f"odd {Path(file.path).name}"]
    )
    run = program(*both, workers=workers)
    program.refuses(6, run, "mp_rank_00_001_001/distrib_optim.pt: odd distrib_optim.pt; do not tr")

    def missing() -> None:
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(torch_loading, "load_torch", missing)
    run = program(*both, workers=workers)
    program.refuses(2, run, "which cannot be imported (No module named 'torch')")


def test_forgetting_the_target_layout_is_told(program: Program, tmp_path: Path) -> None:
    case = pair(DENSE)
    run = program("--load-iteration-dir", case.source, "--save-iteration-dir", tmp_path / "new")
    program.refuses(2, run, "there is nothing to verify", "to convert, give --target-virtual")


def test_folders_of_two_conversions_are_told(program: Program, tmp_path: Path) -> None:
    """Written apart and put together: layers would be in no folder, others in two."""
    source = pair(MOE).source
    target, other = tmp_path / "t" / source.name, tmp_path / "o" / source.name
    size, ranks = "--target-virtual-pipeline-model-parallel-size", "--pipeline-ranks-to-process"
    assert program.convert(source, target, [size, "2"], ranks, "0").status == 0
    assert program.convert(source, other, [size, "4"], ranks, "1").status == 0
    for folder in other.glob("mp_rank_*"):
        folder.rename(target / folder.name)
    for depth in ("structure", "full"):
        run = program(
            "--load-iteration-dir", source, "--save-iteration-dir", target, "--verify", depth
        )
        program.refuses(6, run, "mp_rank_00_001_000/model_optim_rng.pt: its arguments tell another")
    assert not (target.parent / "latest_checkpointed_iteration.txt").exists()


def test_the_source_is_not_its_own_target() -> None:
    source = pair(DENSE).source
    with pytest.raises(UsageError, match="it lies in the source"):
        verified(source, source)


def test_sizes_are_held_to_the_source(tmp_path: Path) -> None:
    options = Options(pair(DENSE).source, copy_of(pair(DENSE).truth, tmp_path), tp_size=3)
    with pytest.raises(UsageError, match="--tensor-model-parallel-size: disagrees"):
        verify_existing(options, Listener())


@pytest.mark.parametrize(
    ("source", "target", "folder"),
    [(DENSE, BERT, "mp_rank_01_000"), (MOE, DENSE, "mp_rank_00_000")],
)
def test_other_rank_folders_are_another_checkpoint(source: str, target: str, folder: str) -> None:
    """The first that only one of the two has is named."""
    reason = f"{folder}: source and target do not have the same rank folders"
    with pytest.raises(VerificationError, match=reason):
        verified(pair(source).source, pair(target).truth)


def test_it_is_the_target_that_cannot_be_read_or_the_source(tmp_path: Path) -> None:
    """Their exit statuses differ."""
    target = copy_of(pair(DENSE).truth, tmp_path / "t")
    shutil.rmtree(target / "mp_rank_00_001")
    with pytest.raises(VerificationError, match="rank 1 is missing"):
        verified(pair(DENSE).source, target)
    source = copy_of(pair(DENSE).source, tmp_path / "s")
    shutil.rmtree(source / "mp_rank_00_001")
    with pytest.raises(CheckpointError, match="rank 1 is missing"):
        verified(source, pair(DENSE).truth)
