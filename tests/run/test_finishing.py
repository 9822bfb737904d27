"""Rank folders whose bytes are there: completed, verified, published, or kept from before."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pp_to_vpp.errors import CheckpointError, CopyError, UsageError, VerificationError
from pp_to_vpp.options import Depth
from pp_to_vpp.run.finishing import (
    FinishContext,
    KeptJob,
    RankDone,
    check_copied,
    check_kept,
    finish_rank,
)
from pp_to_vpp.run.folders import TemporaryFolder
from pp_to_vpp.run.plan_family import PlanJob, plan_family
from pp_to_vpp.run.schedule import Copier, FamilyCopy
from pp_to_vpp.source.survey import take_survey
from pp_to_vpp.target.plan import RankPlan
from pp_to_vpp.verification.compare import Proof

from ..compare import differences
from ..edit import copy_of, flip_byte
from ..families import OF_KINDS, iteration, opposite, surveyed, target_of
from ..inline import Inline
from ..pairs import DENSE, pair
from .test_copying import Crcs, Known
from .test_plan_family import target_like


@dataclass
class Copied:
    """A rank folder before it is finished."""

    context: FinishContext
    plan: RankPlan
    folder: TemporaryFolder
    crc32s: Crcs
    known: Known

    def finish(self) -> RankDone:
        return finish_rank(self.context, self.plan, self.folder, self.crc32s, self.known)

    def kept(self) -> RankDone:
        """Hold the published folder to the plan."""
        return check_kept(KeptJob(self.folder.target.parent, self.plan, self.context.proof))[0]


def copied(
    source: Path, name: str, save_dir: Path, side: str = "source", depth: Depth = Depth.STRUCTURE
) -> list[Copied]:
    """Copy all rank folders of the family (0, 0) under their temporary names."""
    survey = take_survey(str(source))
    folders = survey.family((0, 0))
    target = target_like(target_of(name, opposite(side)))
    is_full = depth is Depth.FULL
    job = PlanJob(
        folders,
        survey.told,
        tuple(folders.ranks),
        target,
        needs_contents=True,
        is_verified_in_full=is_full,
    )
    planned = plan_family(job)
    proof = Proof.of(planned.proven, planned.target, depth, no_save_optim=False)
    context = FinishContext(proof, planned.sources)
    family = FamilyCopy(planned.ranks, planned.derivations, context, is_full)

    def take(
        given: Any, plan: RankPlan, folder: TemporaryFolder, crc32s: Crcs, known: Known
    ) -> Copied:
        return Copied(given, plan, folder, crc32s, known)

    return list(Copier(Inline(), save_dir, take, lambda _: None).run([family]))


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
def test_finished_folders_are_whole_and_have_their_name(
    name: str, side: str, tmp_path: Path
) -> None:
    source, target = iteration(name, side), tmp_path / "iter_0000001"
    ranks = copied(source, name, target, side)
    assert all(path.name.startswith(".writing-") for path in target.iterdir())
    for rank in ranks:
        done = rank.finish()
        assert not rank.folder.path.exists()
        assert (done.id, done.was_kept) == (rank.plan.id, False)
        for file in done.files:
            data = (target / done.id.folder / file.name).read_bytes()
            assert (file.length, file.crc32) == (len(data), zlib.crc32(data))
        assert done.length == rank.plan.length
        assert done.seconds > 0
        kept = rank.kept()
        assert kept.was_kept
        assert [(f.name, f.length, f.crc32) for f in kept.files] == [
            (f.name, f.length, None) for f in done.files
        ]
    truth = iteration(name, opposite(side))
    if side == "source" and len(surveyed(name, side).families) == 1:
        assert differences(target, truth, source) == []


@pytest.mark.parametrize("change", ["bytes", "time", "length"])
def test_a_source_that_changed_is_not_published(change: str, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    ranks = copied(source, DENSE, tmp_path / "out")
    path = source / "mp_rank_00_001" / "distrib_optim.pt"
    if change == "bytes":
        flip_byte(path, path.stat().st_size // 2)
    elif change == "time":
        os.utime(path, ns=(1, 1))
    else:
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CopyError, match=r"mp_rank_00_001/distrib_optim.pt: the source changed"):
        ranks[0].finish()
    assert not ranks[0].folder.target.exists()


@pytest.mark.parametrize("depth", [Depth.NONE, Depth.STRUCTURE])
def test_what_fails_verification_is_not_published(depth: Depth, tmp_path: Path) -> None:
    """Unless none is asked for."""
    (rank, _) = copied(pair(DENSE).source, DENSE, tmp_path / "out", depth=depth)
    layout = rank.plan.files[0].archive
    assert layout is not None
    record = next(r for r in layout.records if r.name.endswith("/data/0"))
    flip_byte(Path(rank.folder.file("model_optim_rng.pt")), record.offset)
    if depth is Depth.NONE:
        rank.finish()
    else:
        with pytest.raises(VerificationError):
            rank.finish()
    assert rank.folder.target.exists() == (depth is Depth.NONE)


def swap_files(folder: Path) -> None:
    one, other = folder / "model_optim_rng.pt", folder / "distrib_optim.pt"
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def flip_in_pickle(folder: Path) -> None:
    path = folder / "model_optim_rng.pt"
    flip_byte(path, path.read_bytes().index(b"iteration"))


def flip_in_directory(folder: Path) -> None:
    path = folder / "model_optim_rng.pt"
    flip_byte(path, path.read_bytes().rindex(b"version"))


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file too many": (lambda folder: (folder / "extra").touch(), "its files"),
    "a file too few": (lambda folder: (folder / "distrib_optim.pt").unlink(), "its files"),
    "cut off": (
        lambda folder: os.truncate(folder / "distrib_optim.pt", 5000), "distrib_optim.pt",
    ),
    "no archive": (
        lambda f: (f / "distrib_optim.pt").write_bytes(
            bytes((f / "distrib_optim.pt").stat().st_size)
        ),
        "distrib_optim.pt",
    ),
    "another pickle": (flip_in_pickle, "model_optim_rng.pt"),
    "another record": (flip_in_directory, "model_optim_rng.pt"),
    "swapped": (swap_files, "distrib_optim.pt"),
    "no folder": (shutil.rmtree, "its files"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("depth", [Depth.NONE, Depth.STRUCTURE])
def test_folders_of_another_conversion_are_not_kept(
    harm: str, depth: Depth, tmp_path: Path
) -> None:
    """Told before anything is verified, and whatever depth is asked for."""
    (rank, _) = copied(pair(DENSE).source, DENSE, tmp_path / "out", depth=depth)
    rank.finish()
    change, where = HARM[harm]
    change(rank.folder.target)
    with pytest.raises(UsageError) as caught:
        rank.kept()
    assert f"mp_rank_00_000: it is not what this conversion writes ({where})" in str(caught.value)


def test_kept_folders_are_verified(tmp_path: Path) -> None:
    """A changed weight is no matter of structure: only the samples tell."""
    (rank, _) = copied(pair(DENSE).source, DENSE, tmp_path / "out")
    rank.finish()
    layout = rank.plan.files[0].archive
    assert layout is not None
    record = next(r for r in layout.records if r.name.endswith("/data/0"))
    flip_byte(rank.folder.target / "model_optim_rng.pt", record.offset)
    with pytest.raises(VerificationError):
        rank.kept()
    rank.context = replace(rank.context, proof=replace(rank.context.proof, depth=Depth.NONE))
    assert rank.kept().was_kept


def test_full_verification_sees_what_no_sample_does(tmp_path: Path) -> None:
    """A byte in the middle of the largest moment, by the checksums of what copying has read."""
    (rank, other) = copied(pair(DENSE).source, DENSE, tmp_path / "out", depth=Depth.FULL)
    assert rank.known is not None
    check_copied(rank.context, {**rank.known, **(other.known or {})})
    other.finish()
    layout = rank.plan.files[1].archive
    assert layout is not None
    record = max(layout.records, key=lambda r: r.length)
    flip_byte(Path(rank.folder.file("distrib_optim.pt")), record.offset + 4 * (record.length // 9))
    with pytest.raises(VerificationError):
        rank.finish()


def test_what_copying_has_read_is_held_to_the_records_of_the_source(tmp_path: Path) -> None:
    (rank, other) = copied(pair(DENSE).source, DENSE, tmp_path / "out", depth=Depth.FULL)
    known = {**(rank.known or {}), **(other.known or {})}
    extent = max(known, key=lambda extent: extent.length)
    with pytest.raises(CheckpointError, match=r"record 'data/\d' is damaged"):
        check_copied(rank.context, {**known, extent: known[extent] ^ 1})
