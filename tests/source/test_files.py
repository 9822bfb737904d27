"""Source files: opened for reading only, decoded, and read in ranges."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.checkpoint.family import RankFiles
from pp_to_vpp.container.extents import Extent
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.ranks import MODEL_FILE, RankId
from pp_to_vpp.source.files import (
    RangeReader,
    check_links,
    open_source,
    other_files,
    read_rank,
    read_torch_file,
    source_files,
)

from ..compare import load
from ..edit import copy_of
from ..families import OF_KINDS, SIDES, families, family, iteration, surveyed
from ..pairs import DENSE, PLAIN, pair


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_weights_are_those_that_torch_finds(name: str, side: str) -> None:
    """Shape, dtype and bytes of every tensor of every chunk."""
    for of in families(name, side):
        for rank in of.ranks.values():
            truth = load(Path(rank.files.model.path))
            data = Path(rank.files.model.path).read_bytes()
            keys = [key for key in truth if key.startswith("model")]
            for key, content in zip(keys, rank.contents, strict=True):
                assert len(truth[key]) == len(content.items)
                for item, value in zip(content.items, truth[key].values(), strict=True):
                    check_tensor(item.tensor, value, data)


def check_tensor(found: Any, truth: Any, data: bytes) -> None:
    if not isinstance(truth, torch.Tensor):
        assert found is None
        return
    assert found.shape == tuple(truth.shape)
    assert f"torch.{found.dtype}" == str(truth.dtype)
    extent = found.extent
    ours = data[extent.offset : extent.offset + extent.length]
    assert ours == bytes(truth.contiguous().flatten().view(torch.uint8).tolist())


def test_temporary_folders_are_read_under_their_name(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    (source / "mp_rank_00_001").rename(source / ".writing")
    rank = RankId(0, 1, None)
    found = read_rank(str(source), rank, ".writing")
    assert isinstance(found, RankFiles)
    assert found.id == rank
    assert found.optimizer is not None
    assert found.all == (found.model, found.optimizer)
    assert found.model.path == str(source / ".writing" / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        read_rank(str(source), rank)


def test_a_rank_may_have_no_optimizer_file() -> None:
    found = surveyed(PLAIN, "source")
    files = read_rank(found.path, found.ranks[0])
    assert files.optimizer is None
    assert files.all == (files.model,)


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
def test_families_read_the_ranks_asked_for(name: str, side: str) -> None:
    """Each once, however often: what a worker needs for several steps stays decoded."""
    found = surveyed(name, side)
    for key in found.families:
        folders = found.family(key)
        everything = folders.read(folders.ranks)
        assert list(everything) == sorted(folders.ranks)
        for pp_rank, files in everything.items():
            assert files.id == folders.ranks[pp_rank]
            assert files.model.path == str(iteration(name, side) / files.id.folder / MODEL_FILE)
        first, last = min(folders.ranks), max(folders.ranks)
        some = folders.read([last, first])
        assert list(some) == [first, last]
        assert some[first].model is everything[first].model
        assert folders.read([]) == {}


def test_data_loaders_are_kept_and_others_left(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    rank, folder = RankId(0, 1, None), source / "mp_rank_00_001"
    assert other_files(str(source), rank) == ([], [])
    for name in ("train_dataloader_dprank000.pt", "train_dataloader_dprank001.pt", "b", "a.txt"):
        (folder / name).write_bytes(name.encode())
    kept, left = other_files(str(source), rank)
    path = str(folder / "train_dataloader_dprank000.pt")
    assert kept[0] == ("train_dataloader_dprank000.pt", Extent(path, 0, 29))
    assert [name for name, _ in kept] == [f"train_dataloader_dprank00{i}.pt" for i in (0, 1)]
    assert left == ["mp_rank_00_001/a.txt", "mp_rank_00_001/b"]


def test_what_copy_tools_leave_is_left_behind(tmp_path: Path) -> None:
    """Megatron opens none of these names."""
    names = ["._distrib_optim.pt", "._model_optim_rng.pt", ".DS_Store", ".fuse_hidden0001",
             ".model_optim_rng.pt.aB3dE9", ".nfs0000001", "Thumbs.db", "distrib_optim.pt.tmp",
             "model_optim_rng.pt~"]  # fmt: skip
    source = copy_of(pair(DENSE).source, tmp_path)
    for name in names:
        (source / "mp_rank_00_001" / name).write_bytes(b"x")
    kept, left = other_files(str(source), RankId(0, 1, None))
    assert kept == []
    assert left == [f"mp_rank_00_001/{name}" for name in sorted(names)]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("rank_00001", "a folder of DLRover, which keeps optimizer states by data-parallel rank"),
        ("other.pt", "an unknown file in a rank folder"),
        ("odd\nname.pt", "an unknown file in a rank folder"),
    ],
)
def test_files_that_may_hold_state_are_refused(name: str, what: str, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    (source / "mp_rank_00_001" / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{what}: it could hold state"):
        other_files(str(source), RankId(0, 1, None))


@pytest.mark.parametrize("name", ["optim.pt", "model_rng.pt"])
def test_files_of_old_formats_are_refused(name: str, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    (source / "mp_rank_00_001" / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name}: a file of Megatron's old format"):
        other_files(str(source), RankId(0, 1, None))


def test_source_files_tell_when_they_change(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    path.parent.mkdir()
    path.write_bytes(b"12345")
    os.utime(path, ns=(1, 1_000_000_007))
    (before,) = source_files([str(path)])
    assert (before.path, before.length, before.modified) == (str(path), 5, 1_000_000_007)
    os.utime(path, ns=(1, 1_000_000_008))
    assert source_files([str(path)]) != (before,)


def test_what_is_opened_is_for_reading_only(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    path.parent.mkdir()
    path.write_bytes(b"12345")
    with open_source(path) as file, pytest.raises(OSError, match="Bad file descriptor"):
        os.write(file.fileno(), b"x")
    with pytest.raises(CheckpointError, match="Is a directory"), open_source(path.parent):
        pass


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "LFS pointer .*git lfs pull",
        ),
        (b"/annex/objects/SHA256E-s1--0\n", "it is a git-annex pointer .*git annex get"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "it is a page of HTML or XML"),
        (
            b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
            "HTML or XML, .*read it",
        ),
        (b'{"error": "not found"}', "it is JSON, as a server sends it"),
        (b"\x1f\x8b\x08" + bytes(60), "it is compressed as a whole"),
        (b"Entry not found, or you may not see it", "it is plain text, no archive"),
        (bytes(300), "no end record of a zip archive"),
    ],
)
def test_what_is_there_in_place_of_a_file_is_named(data: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=line):
        read_torch_file(path)


def test_links_out_of_the_checkpoint_are_told_from_others(tmp_path: Path) -> None:
    """By where they lead to at last; of files that may hold state, and of rank folders."""
    for folder in ("iter/a", "iter/b", "outside", "iter2"):
        (tmp_path / folder).mkdir(parents=True)
    for path in ("iter/a/file.pt", "outside/file.pt", "iter2/file.pt"):
        (tmp_path / path).write_text(path)
    root = tmp_path / "iter"
    for name, where in (
        ("in.pt", "../a/file.pt"),
        ("notes", "../../outside/file.pt"),
        ("broken.pt", "nowhere"),
        ("loop.pt", "loop.pt"),
    ):
        (root / "b" / name).symlink_to(where)
    check_links([root / "a", root / "b"])
    with open_source(root / "b" / "in.pt") as file:
        assert file.read() == b"iter/a/file.pt"
    (root / "b" / "out.pt").symlink_to("../../outside/file.pt")
    (root / "b" / "twice.pt").symlink_to("out.pt")
    (root / "b" / "beside.pt").symlink_to(tmp_path / "iter2" / "file.pt")
    (root / "c").symlink_to("../outside")
    (root / "d").symlink_to("b")
    with pytest.raises(CheckpointError) as caught:
        check_links(root / name for name in "abc")
    assert [line.split(": it is a link out of")[0] for line in caught.value.problems] == [
        str(root / name) for name in ("b/beside.pt", "b/out.pt", "b/twice.pt", "c")
    ]
    assert all("--follow-links" in line for line in caught.value.problems)
    with pytest.raises(CheckpointError, match="b/file: cannot be read"):
        check_links([root / "b" / "file"])


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    path = tmp_path / "rank" / "numbers"
    path.parent.mkdir()
    path.write_bytes(bytes(i % 251 for i in range(1000)))
    return path


def test_samples_are_the_ends(numbers: Path) -> None:
    data = numbers.read_bytes()
    whole = Extent(str(numbers), 0, len(data))
    with RangeReader() as reader:
        assert reader.ends(whole.cut(10, 900), 4) == data[10:74] + data[846:910]
        assert reader.ends(whole.cut(10, 900)) == data[10:26] + data[894:910], "of bytes"
        for length in (0, 4, 128):
            assert reader.ends(whole.cut(10, length), 4) == data[10 : 10 + length], "all of it"
        assert reader.ends(whole.cut(10, 129), 4) == data[10:74] + data[75:139]
        with pytest.raises(CheckpointError, match="it is cut off"):
            reader.read(whole.cut(999, 2))


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_any_range_is_read(start: int, end: int) -> None:
    found = family(DENSE, "source").ranks[0].files.model.path
    with RangeReader() as reader:
        low, high = min(start, end), max(start, end)
        assert reader.read(Extent(found, low, high - low)) == Path(found).read_bytes()[low:high]


@pytest.mark.parametrize("length", [0, 1, 4 << 20, (4 << 20) + 1, (9 << 20) + 5])
def test_long_ranges_are_read_in_chunks(length: int, tmp_path: Path) -> None:
    """Of whole elements of any size, but for the end."""
    path = tmp_path / "rank" / "long"
    path.parent.mkdir()
    data = bytes(i % 251 for i in range(1009)) * (length // 1009 + 1)
    path.write_bytes(data)
    with RangeReader() as reader:
        chunks = list(reader.chunks(Extent(str(path), 3, length)))
    assert b"".join(chunks) == data[3 : 3 + length]
    assert all(len(chunk) % 16 == 0 for chunk in chunks[:-1])
    assert all(0 < len(chunk) <= 4 << 20 for chunk in chunks)


def test_each_file_is_opened_once(numbers: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with RangeReader() as reader:
        for offset in range(50):
            reader.read(Extent(str(numbers), offset, 1))
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
