"""Rank folders read in full: each byte once, and what is equal, damaged or lost is told."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest

from pp_to_vpp.container import archive
from pp_to_vpp.container.extents import Extent
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.options import Depth, Options
from pp_to_vpp.run import convert, verify_pair
from pp_to_vpp.run.listener import Listener
from pp_to_vpp.source.files import read_directory
from pp_to_vpp.source.proven import FamilyJob, prove
from pp_to_vpp.source.survey import take_survey
from pp_to_vpp.verification.compare import Proof, VerifyJob, verify_folder
from pp_to_vpp.verification.in_full import check_source

from ..edit import copy_of, flip_byte
from ..families import family, target_of
from ..inline import run
from ..pairs import DENSE, LAYER_WISE, MOE, SOAP, pair


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that are read of each file, by this process and not by torch."""
    found: Counter[str] = Counter()
    read_at, preadv = archive.read_at, os.preadv

    def count(descriptor: int, length: int) -> None:
        found[os.readlink(f"/proc/self/fd/{descriptor}")] += length

    def counted(file: BinaryIO, offset: int, length: int) -> bytes:
        data = read_at(file, offset, length)
        count(file.fileno(), len(data))
        return data

    def counted_into(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        length = preadv(descriptor, buffers, offset)
        count(descriptor, length)
        return length

    monkeypatch.setattr(archive, "read_at", counted)
    monkeypatch.setattr(os, "preadv", counted_into)
    return found


def times_read(read: Counter[str], folder: Path) -> float:
    """How often the bytes of a folder's large files were read."""
    sizes = {str(path): path.stat().st_size for path in folder.resolve().glob("*/*.pt")}
    return sum(read[path] for path in sizes) / sum(sizes.values())


@pytest.mark.parametrize("name", [DENSE, MOE, SOAP])
def test_each_byte_is_read_once_on_either_side(
    name: str, read: Counter[str], tmp_path: Path
) -> None:
    """But for the metadata, which small checkpoints have much of."""
    case = pair(name)
    options = Options(case.source, tmp_path / "iter_0000001", depth=Depth.FULL, processes=1)
    options.target_vp_size = 2
    assert options.save_dir is not None
    convert.convert(options, Listener())
    assert 1 <= times_read(read, case.source) < 1.3
    read.clear()
    options.target_vp_size = None
    verify_pair.verify_existing(options, Listener())
    assert 1 <= times_read(read, case.source) < 1.3
    assert 1 <= times_read(read, options.save_dir) < 1.3


def proof_of(name: str, source: Path) -> Proof:
    """The first family of a source, and the layout of its truth."""
    survey = take_survey(str(source))
    proven = prove(FamilyJob(survey.family((0, 0)), survey.told))
    return Proof.of(proven, family(name, "truth").megatron, Depth.FULL, no_save_optim=False)


def bytes_of(extent: Extent) -> bytes:
    with open(extent.path, "rb") as file:
        file.seek(extent.offset)
        return file.read(extent.length)


@pytest.mark.parametrize("name", [MOE, LAYER_WISE])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_the_checksums_of_the_source_are_those_of_its_bytes(
    name: str, is_damaged: bool, tmp_path: Path
) -> None:
    """Also where those of the target are others."""
    target = tmp_path / "iter_0000001"
    run(pair(name).source, target, target_of(name, "truth").arguments.placement)
    proof = proof_of(name, pair(name).source)
    first = VerifyJob(proof, str(target), proof.source.ranks[0])
    path = target / first.rank.folder / "model_optim_rng.pt"
    if is_damaged:
        flip_byte(path, path.stat().st_size // 2)
    verdict = verify_folder(first)
    assert bool(verdict.problems) == is_damaged, verdict.problems
    assert verdict.source
    for extent, crc32 in verdict.source.items():
        assert crc32 == zlib.crc32(bytes_of(extent)), extent
    again = verify_folder(replace(first, known=verdict.source))
    assert bool(again.problems) == is_damaged, "by what copying has read, instead of the source"
    other = {extent: crc32 ^ 1 for extent, crc32 in verdict.source.items()}
    assert "differs from its source" in str(verify_folder(replace(first, known=other)).problems)


def test_what_nobody_wants_of_a_source_is_held_to_its_checksums_too(tmp_path: Path) -> None:
    """States of random generators, which are no tensors of the model."""
    source = copy_of(pair(DENSE).source, tmp_path)
    proof = proof_of(DENSE, source)
    path = str(source / proof.source.ranks[1].folder / "model_optim_rng.pt")
    record = next(r for r in read_directory(Path(path)) if r.name == "data/2")
    weights = {tensor.extent for tensor in family(DENSE, "source").manifest().values()}
    found = {
        replace(extent, path=path): zlib.crc32(bytes_of(extent))
        for extent in weights
        if extent.path.endswith("1/model_optim_rng.pt")
    }
    check_source(proof.source_job(found))
    flip_byte(Path(path), record.offset)
    with pytest.raises(CheckpointError, match=r"record 'data/2' is damaged \(no parameter\)"):
        check_source(proof.source_job(found))
    check_source(proof.source_job({}))
