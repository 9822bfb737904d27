"""Source files: what there is, what is refused, and samples of their bytes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.checkpoint.family import RankFiles, Sample, samples
from pp_to_vpp.checkpoint.flat_states import FlatState
from pp_to_vpp.container.extents import Extent, Zeros
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.optimizer_chain import OptimizerKind
from pp_to_vpp.megatron.ranks import RankId
from pp_to_vpp.megatron.rules import CHANGES
from pp_to_vpp.source.files import (
    SampleReader,
    open_source,
    other_files,
    read_rank,
    read_source_rank,
    source_files,
)
from pp_to_vpp.source.proof import check_samples, proven_family
from pp_to_vpp.source.survey import take_survey

from ..compare import load
from ..edit import copy_of, flip_byte, rewrite, rewrite_all, set_arguments
from ..families import SIDES, families, family, iteration, surveyed
from ..pairs import names, pair

DENSE, MOE = "dense-pp2-v016", "moe-pp2ep2-v016"


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_a_survey_finds_the_folders(name: str, side: str) -> None:
    """As they stand on the disk, with the iteration that torch finds in them."""
    found = surveyed(name, side)
    folders = sorted(path.name for path in iteration(name, side).iterdir())
    assert [rank.folder for rank in found.ranks] == folders
    assert found.ignored == ()
    first = load(iteration(name, side) / folders[0] / "model_optim_rng.pt")
    assert found.iteration == first["iteration"] == 1
    assert found.arguments.num_layers == first["args"].num_layers
    assert len(found.families) * found.arguments.pp_size == len(folders)
    for key in found.families:
        ranks = found.family(key)
        assert list(ranks) == list(range(found.arguments.pp_size))
        assert {rank.family for rank in ranks.values()} == {key}


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
    (extent,) = found.content()
    ours = data[extent.offset : extent.offset + extent.length]
    assert ours == bytes(truth.contiguous().flatten().view(torch.uint8).tolist())


@pytest.mark.parametrize("name", names())
def test_both_sides_hold_the_same_model(name: str) -> None:
    """Under global names: Megatron saved one logical state twice."""
    with SampleReader() as sampler:

        def ends(path: tuple[Any, ...], size: int) -> bytes:
            return sampler.ends(path, size)

        for source, truth in zip(families(name, "source"), families(name, "truth"), strict=True):
            ours = {item.name: item for item in source.items()}
            theirs = {item.name: item for item in truth.items()}
            assert ours.keys() == theirs.keys()
            assert source.states.keys() == truth.states.keys()
            for key, item in ours.items():
                if item.tensor is not None:
                    other = theirs[key].tensor
                    assert other is not None
                    size = item.tensor.item_bytes
                    assert ends(item.tensor.content(), size) == ends(other.content(), size), key
                one, two = source.states.get(key), truth.states.get(key)
                if isinstance(one, FlatState) and isinstance(two, FlatState):
                    for part, pieces in one.parts.items():
                        assert ends(pieces, 4) == ends(two.parts[part], 4), (key, part)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_the_rules_and_the_rounding_are_proved(name: str, side: str) -> None:
    found, key = surveyed(name, side), surveyed(name, side).families[-1]
    files = {p: read_source_rank(found.path, r) for p, r in found.family(key).items()}
    of, way = proven_family(files)
    assert way == ("" if of.kind is OptimizerKind.NONE else "rounded")
    version = 12 if name.endswith("fork") else int(name[-2:])
    for change in CHANGES:
        since = int(change.since.removeprefix("0."))
        assert getattr(of.rules, change.rule) is (version >= since), change


def test_entries_beside_the_ranks_are_named(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    (source / "README").write_text("mine")
    (source / "mp_rank_00").mkdir()
    assert take_survey(str(source)).ignored == ("README", "mp_rank_00")


def test_a_release_has_no_iteration(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    rewrite(source / "mp_rank_00_000" / "model_optim_rng.pt", lambda r: r.update(iteration="x"))
    assert take_survey(str(source)).iteration is None


@pytest.mark.parametrize(
    ("arguments", "folders", "reasons"),
    [
        ({"pipeline_model_parallel_size": 1}, (), ["saved with pipeline_model_parallel_size 1"]),
        ({"pipeline_model_parallel_size": 3}, (), ["rank 2 is missing"]),
        ({"expert_model_parallel_size": 2}, (), ["do not fit expert", "three numbers"]),
        ({"tensor_model_parallel_size": 2}, (), ["do not fit tensor_model", "rank 1 is missing"]),
        ({}, ("mp_rank_01_000", "mp_rank_01_001"), ["do not fit tensor_model_parallel_size"]),
        ({}, ("mp_rank_00_002",), ["do not fit pipeline_model_parallel_size"]),
        ({}, ("mp_rank_01_000",), ["do not fit tensor_model_parallel_size"]),
    ],
)
def test_folders_must_be_those_of_the_arguments(
    arguments: dict[str, int], folders: tuple[str, ...], reasons: list[str], tmp_path: Path
) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    if arguments:
        set_arguments(source, **arguments)
    for folder in folders:
        shutil.copytree(source / "mp_rank_00_000", source / folder)
    with pytest.raises(CheckpointError) as caught:
        take_survey(str(source))
    for reason in reasons:
        assert reason in str(caught.value)


def test_a_whole_family_that_is_missing_is_noticed(tmp_path: Path) -> None:
    """Each number is there, but not each pair of numbers."""
    source = copy_of(pair(MOE).source, tmp_path)
    set_arguments(source, tensor_model_parallel_size=2, expert_tensor_parallel_size=2)
    for pp_rank in range(2):
        shutil.copytree(
            source / f"mp_rank_00_00{pp_rank}_000", source / f"mp_rank_01_00{pp_rank}_000"
        )
    with pytest.raises(CheckpointError, match="mp_rank_01_000_001: this rank folder and its sib"):
        take_survey(str(source))


def test_data_loaders_are_kept_and_others_left(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    rank, folder = RankId(0, 1, None), source / "mp_rank_00_001"
    assert other_files(str(source), rank) == ([], [])
    for name in ("train_dataloader_dprank000.pt", "train_dataloader_dprank001.pt", "b", "a.pt"):
        (folder / name).write_bytes(name.encode())
    kept, left = other_files(str(source), rank)
    path = str(folder / "train_dataloader_dprank000.pt")
    assert kept[0] == ("train_dataloader_dprank000.pt", Extent(path, 0, 29))
    assert [name for name, _ in kept] == [f"train_dataloader_dprank00{i}.pt" for i in (0, 1)]
    assert left == ["mp_rank_00_001/a.pt", "mp_rank_00_001/b"]


@pytest.mark.parametrize("name", ["layer_wise_optimizer_0.pt", "optim.pt", "model_rng.pt"])
def test_files_of_other_optimizers_are_refused(name: str, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    (source / "mp_rank_00_001" / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name}: a file of an optimizer"):
        other_files(str(source), RankId(0, 1, None))


def test_temporary_folders_are_read_under_their_name(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    (source / "mp_rank_00_001").rename(source / ".writing")
    rank = RankId(0, 1, None)
    found = read_rank(str(source), rank, ".writing")
    assert isinstance(found, RankFiles)
    assert found.rank == rank
    assert found.optimizer is not None
    assert found.model.path == str(source / ".writing" / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_rank(str(source), rank)


def test_a_rank_may_have_no_optimizer_file() -> None:
    found = surveyed("dense-pp2-nodistopt-v016", "source")
    assert read_rank(found.path, found.ranks[0]).optimizer is None


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


def test_links_inside_the_checkpoint_are_followed(tmp_path: Path) -> None:
    for folder in ("iter/a", "iter/b", "outside"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "iter" / "a" / "file").write_text("inside")
    (tmp_path / "outside" / "file").write_text("outside")
    link, out = tmp_path / "iter" / "b" / "link", tmp_path / "iter" / "b" / "out"
    link.symlink_to("../a/file")
    out.symlink_to("../../outside/file")
    with open_source(link) as file:
        assert file.read() == b"inside"
    with pytest.raises(CheckpointError, match="a link out of"), open_source(out):
        pass


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    path = tmp_path / "rank" / "numbers"
    path.parent.mkdir()
    path.write_bytes(bytes(i % 251 for i in range(1000)))
    return path


def test_samples_are_the_ends(numbers: Path) -> None:
    data = numbers.read_bytes()
    with SampleReader() as sampler:
        assert sampler.ends((Extent(str(numbers), 10, 900),), 4) == data[10:74] + data[846:910]
        for length in (0, 4, 128):
            short = (Extent(str(numbers), 10, length),)
            assert sampler.ends(short, 4) == data[10 : 10 + length], "all of it"
        long = sampler.ends((Extent(str(numbers), 10, 129),), 4)
        assert long == data[10:74] + data[75:139]
        with pytest.raises(TypeError, match="one extent"):
            sampler.ends((Zeros(3),), 4)
        with pytest.raises(CheckpointError, match="it is cut off"):
            sampler.read(str(numbers), 999, 2)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_any_range_is_read(start: int, end: int) -> None:
    found = family(DENSE, "source").ranks[0].files.model.path
    with SampleReader() as sampler:
        low, high = min(start, end), max(start, end)
        assert sampler.read(found, low, high - low) == Path(found).read_bytes()[low:high]


def test_each_file_is_opened_once(numbers: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with SampleReader() as sampler:
        for offset in range(50):
            sampler.read(str(numbers), offset, 1)
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


def changed_main(name: str, sample: Sample, tmp_path: Path, *, at_end: bool) -> RankFiles:
    """The files of a rank after one bit of one sampled main parameter has been changed."""
    (main,) = sample.main
    assert isinstance(main, Extent)
    source = copy_of(pair(name).source, tmp_path)
    folder = Path(main.path).parent.name
    place = main.offset + (main.length - 1 if at_end else 3)
    flip_byte(source / folder / "distrib_optim.pt", place, 0x02)
    rank = RankId.parse(folder)
    assert rank is not None
    return read_rank(str(source), rank)


@pytest.mark.parametrize("at_end", [False, True])
def test_one_wrong_element_at_an_end_is_noticed(at_end: bool, tmp_path: Path) -> None:
    sample = list(samples(family(DENSE, "source")))[7]
    files = changed_main(DENSE, sample, tmp_path, at_end=at_end)
    with pytest.raises(CheckpointError) as caught:
        proven_family({files.rank.pp_rank: files})
    assert f"1 weights are not their main parameters rounded, {sample.name} first" in str(
        caught.value
    )


def test_without_samples_there_is_no_way() -> None:
    assert check_samples([]) == ("", [])
    assert check_samples(samples(family("dense-pp2-nosaveoptim-v016", "source"))) == ("", [])


def test_all_samples_must_have_one_way(tmp_path: Path) -> None:
    """A weight that is cut off among weights that are rounded is an error in one of them."""
    rank = tmp_path / "rank"
    rank.mkdir()
    mains = torch.tensor([1.0 + 2**-8 * 1.5, 3.0])
    words = mains.view(torch.int32) >> 16
    cut = words.to(torch.int16)
    rounded = mains.to(torch.bfloat16).view(torch.int16)
    assert not torch.equal(cut, rounded)
    data = {"main": mains, "cut": cut, "rounded": rounded}
    for name, tensor in data.items():
        (rank / name).write_bytes(bytes(tensor.view(torch.uint8).tolist()))

    def sample(kind: str) -> Sample:
        weight, main = (str(rank / name) for name in (kind, "main"))
        return Sample(kind, "bfloat16", (Extent(weight, 0, 4),), (Extent(main, 0, 8),))

    assert check_samples([sample("rounded")])[0] == "rounded"
    assert check_samples([sample("cut")])[0] == "cut off"
    way, differing = check_samples([sample("cut"), sample("rounded")])
    assert way is None
    assert differing


def test_rank_files_that_are_no_dictionaries_are_refused(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    rewrite_all(source, lambda _: [1, 2])
    with pytest.raises(CheckpointError, match="no training arguments"):
        take_survey(str(source))
