"""Blocks shared with the source: on a file system that can, and as if on one that can."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.serialization import config

from pp_to_vpp.run import convert
from pp_to_vpp.run.cloning import shared_block

from ..compare import differences, load
from ..edit import copy_of, flip_byte
from ..pairs import DENSE, LAYER_WISE, MOE, PLAIN, SOAP, pair
from ..runs import Program
from .test_signs import mark

_BLOCK = 4096


@dataclass(frozen=True)
class Call:
    """Of copy_file_range."""

    size: int
    source: int
    target: int


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """A file system that shares blocks: the calls of copy_file_range, which copies."""
    real, found = os.copy_file_range, list[Call]()

    def record(source: int, target: int, size: int, theirs: int, ours: int) -> int:
        found.append(Call(size, theirs, ours))
        return real(source, target, size, theirs, ours)

    monkeypatch.setattr(convert, "shared_block", lambda *_: _BLOCK)
    monkeypatch.setattr(os, "copy_file_range", record)
    return found


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("checksums", ["crc32", "none"])
@pytest.mark.parametrize("name", [DENSE, MOE, PLAIN, SOAP, LAYER_WISE])
def test_files_placed_for_sharing_hold_the_same(
    name: str, checksums: str, program: Program, tmp_path: Path
) -> None:
    case = pair(name)
    target = tmp_path / "iter_0000001"
    options = ("--checksums", checksums, "--verify", "full")
    run = program.convert(case.source, target, case.options, *options)
    assert run.status == 0, run.errors
    assert "bytes are shared with the source" in run.output
    assert ("records without checksums" in run.output) == (checksums == "none")
    assert differences(target, case.truth, case.source) == []
    again = program.convert(case.source, target, case.options, *options, "--resume")
    assert again.status == 0, again.errors
    assert "kept" in again.output


def test_whole_blocks_stand_alike_in_theirs(
    calls: list[Call], program: Program, tmp_path: Path
) -> None:
    """What is shared is cut at borders of blocks; with checksums of their own, nothing else is
    copied by the kernel."""
    case = pair(DENSE)
    run = program.convert(case.source, tmp_path / "a", case.options, "--verify", "full")
    assert run.status == 0, run.errors
    assert calls
    for call in calls:
        assert (call.source % _BLOCK, call.target % _BLOCK, call.size % _BLOCK) == (0, 0, 0)


@pytest.mark.usefixtures("calls")
def test_torch_and_unzip_read_what_is_placed_for_sharing(program: Program, tmp_path: Path) -> None:
    case = pair(MOE)
    target = tmp_path / "iter_0000001"
    assert program.convert(case.source, target, case.options).status == 0
    for path in sorted(target.glob("*/*.pt")):
        if shutil.which("unzip"):
            subprocess.run(["unzip", "-tq", path], check=True, stdout=subprocess.DEVNULL)
    path = target / "mp_rank_00_001_000" / "distrib_optim.pt"
    whole = load(path)
    for computes in (False, True):
        config.load.calculate_storage_offsets = computes
        try:
            mapped = torch.load(path, weights_only=False, mmap=True)
        finally:
            config.load.calculate_storage_offsets = False
        for entry, other in zip(whole, mapped, strict=True):
            ((_, ours),) = entry[0].items()
            ((_, theirs),) = other[0].items()
            assert all(torch.equal(ours[key], theirs[key]) for key in ("param", "exp_avg"))


def test_a_conversion_goes_on_as_it_began_on_another_file_system(
    program: Program, tmp_path: Path
) -> None:
    """And what came out of it converts back to the bytes it came from."""
    case = pair(DENSE)
    placed, plain = tmp_path / "placed", tmp_path / "plain"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "shared_block", lambda *_: _BLOCK)
        assert program.convert(case.source, placed, case.options).status == 0
    whole = {path: path.read_bytes() for path in placed.glob("*/*")}
    shutil.rmtree(placed / "mp_rank_00_001")
    assert program.convert(case.source, placed, case.options, "--resume").status == 0
    assert {path: path.read_bytes() for path in placed.glob("*/*")} == whole
    assert program.convert(case.source, plain, case.options).status == 0
    back = []
    for folder in (placed, plain):
        target = tmp_path / f"back-{folder.name}"
        given = ["--target-virtual-pipeline-model-parallel-size", "1"]
        assert program.convert(folder, target, given).status == 0
        back.append({path.relative_to(target): path.read_bytes() for path in target.glob("*/*")})
    assert back[0] == back[1]


def test_no_block_is_shared_where_none_can_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    assert shared_block(tmp_path / "a", tmp_path / "missing" / "deep") == 1
    assert shared_block(tmp_path / "not there", tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture(params=["xfs", "btrfs"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system that shares blocks, where mounting is allowed."""
    kind: str = request.param
    image, place = tmp_path / "image", tmp_path / "mounted"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(320 << 20)
    make = shutil.which(f"mkfs.{kind}", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    if make is None or os.getuid() != 0:
        pytest.skip(f"no mkfs.{kind}, or not root")
    subprocess.run([make, "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, place], check=False).returncode:
        pytest.skip("mounting is not allowed")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("checksums", ["crc32", "none"])
def test_shared_blocks_are_the_targets_own(checksums: str, mounted: Path, program: Program) -> None:
    """A source that changes after it was cloned leaves the target as it was."""
    case = pair(DENSE)
    source, target = copy_of(case.source, mounted), mounted / "target" / "iter_0000001"
    assert shared_block(next(source.glob("*/*.pt")), target) == _BLOCK
    run = program.convert(source, target, case.options, "--checksums", checksums)
    assert run.status == 0, run.errors
    assert "bytes are shared with the source" in run.output
    for path in source.glob("*/*.pt"):
        for offset in range(0, path.stat().st_size, 5000):
            flip_byte(path, offset)
    assert differences(target, case.truth, case.source) == []


def test_the_trial_needs_no_file_without_a_name(
    mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS has none. What an interrupted trial left is removed by the next one."""
    real = os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    (mounted / "a").write_bytes(bytes(2 * _BLOCK))
    (mounted / f".small-block.{mark('4194305', '77')}").touch()
    assert shared_block(mounted / "a", mounted / "deep" / "down") == _BLOCK
    assert [path.name for path in mounted.iterdir()] == ["a"]


def test_a_target_larger_than_the_free_space_is_written(mounted: Path, program: Program) -> None:
    case = pair(DENSE)
    source, target = copy_of(case.source, mounted), mounted / "target" / "iter_0000001"
    size = sum(path.stat().st_size for path in source.glob("*/*.pt"))
    with (mounted / "full").open("wb") as file, contextlib.suppress(OSError):  # it is full
        for start in itertools.count(0, 1 << 20):
            if shutil.disk_usage(mounted).free < size:
                break
            os.posix_fallocate(file.fileno(), start, 1 << 20)
    run = program.convert(source, target, case.options, "--checksums", "none")
    assert run.status == 0, run.errors
    assert differences(target, case.truth, case.source) == []
