"""Bytes of real families, under the rules that they prove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pp_to_vpp.checkpoint.family import RankFiles, Sample
from pp_to_vpp.container.extents import Extent
from pp_to_vpp.container.pickling import Storage, as_mapping, ordered_dict
from pp_to_vpp.container.tensors import as_tensor
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.optimizer_chain import OptimizerKind
from pp_to_vpp.megatron.ranks import RankId
from pp_to_vpp.megatron.rounding import WAYS
from pp_to_vpp.megatron.rules import CHANGES
from pp_to_vpp.source.files import RangeReader, read_rank
from pp_to_vpp.source.proof import check_samples, proven_family

from ..edit import copy_of, flip_byte
from ..families import SIDES, edited, families, family, files_of, surveyed
from ..pairs import DENSE, FROZEN, UNCOMPARED, WEIGHTS, names, pair


@pytest.mark.parametrize("name", names())
def test_both_sides_hold_the_same_model(name: str) -> None:
    """Under global names: Megatron saved one logical state twice."""
    with RangeReader() as reader:
        for source, truth in zip(families(name, "source"), families(name, "truth"), strict=True):
            assert {i.name for i in source.items()} == {i.name for i in truth.items()}
            assert source.states.keys() == truth.states.keys()
            ours, theirs = source.manifest(), truth.manifest()
            assert ours.keys() == theirs.keys()
            for key, tensor in ours.items():
                size = tensor.item_bytes
                assert size == theirs[key].item_bytes
                ends = reader.ends(tensor.extent, size)
                assert ends == reader.ends(theirs[key].extent, size), key


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_the_rules_and_the_rounding_are_proved(name: str, side: str) -> None:
    found = surveyed(name, side)
    folders = found.family(found.families[-1])
    of, way = proven_family(folders.read(folders.ranks))
    has_none = of.kind is OptimizerKind.NONE or name == FROZEN  # the last family has no state
    assert way == ("" if has_none else UNCOMPARED.get(name, "rounded"))
    version = {"fork": 12, "202512": 15, "dev": 20}.get(name.rpartition("-")[2]) or int(name[-2:])
    for change in CHANGES:
        since = int(change.since.removeprefix("0."))
        assert getattr(of.megatron.rules, change.rule) is (version >= since), change


def changed_main(name: str, sample: Sample, tmp_path: Path, *, at_end: bool) -> RankFiles:
    """The files of a rank after one bit of one sampled main parameter has been changed."""
    main = sample.main
    source = copy_of(pair(name).source, tmp_path)
    folder = Path(main.path).parent.name
    place = main.offset + (main.length - 1 if at_end else 3)
    flip_byte(source / folder / "distrib_optim.pt", place, 0x02)
    rank = RankId.parse(folder, 2, 1)
    assert rank is not None
    return read_rank(str(source), rank)


@pytest.mark.parametrize("at_end", [False, True])
def test_one_wrong_element_at_an_end_is_noticed(at_end: bool, tmp_path: Path) -> None:
    sample = list(family(DENSE, "source").samples())[7]
    files = changed_main(DENSE, sample, tmp_path, at_end=at_end)
    with pytest.raises(CheckpointError) as caught:
        proven_family({files.id.pp_rank or 0: files})
    assert f"1 weights are not their main parameters rounded, {sample.name} first" in str(
        caught.value
    )


def with_own_storages(files: RankFiles) -> RankFiles:
    """As other tools rewrite files: no two weights share a storage."""

    def moved(value: Any) -> Any:
        tensor = as_tensor(value)
        if tensor is None:
            return value
        storage = tensor.storage
        own = Storage(storage.type, storage.location, tensor.numel, (tensor.extent,))
        return tensor.moved(own, 0)

    chunk = (as_mapping(files.model.root) or {})["model"]
    entries = {key: moved(value) for key, value in (as_mapping(chunk) or {}).items()}
    return edited(files, model=ordered_dict(entries, chunk.state))


@pytest.mark.parametrize("name", [DENSE, *UNCOMPARED])
def test_something_must_prove_where_states_lie(name: str) -> None:
    """Offsets of views, or values: rewritten files have the second alone."""
    files = {pp: with_own_storages(of) for pp, of in files_of(family(name, "source")).items()}
    if name in UNCOMPARED:
        with pytest.raises(CheckpointError, match="nothing proves where optimizer states lie"):
            proven_family(files)
    else:
        of, way = proven_family(files)
        assert not of.shares_storages
        assert way == "rounded"


def test_without_samples_there_is_no_way() -> None:
    assert check_samples([], WAYS) == ("", [])
    assert check_samples(family(WEIGHTS, "source").samples(), WAYS) == ("", [])


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
        return Sample(kind, "bfloat16", Extent(weight, 0, 4), Extent(main, 0, 8))

    assert check_samples([sample("rounded")], WAYS)[0] == "rounded"
    assert check_samples([sample("cut")], WAYS)[0] == "cut off"
    way, differing = check_samples([sample("cut"), sample("rounded")], WAYS)
    assert way is None
    assert differing
