"""Opening files by ``torch.load``: it finds what the program finds, and runs nothing."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pp_to_vpp.container.extents import Extent
from pp_to_vpp.container.pickling import Instance, as_mapping, ordered_dict
from pp_to_vpp.container.tensors import as_tensor
from pp_to_vpp.container.torch_file import TorchFile
from pp_to_vpp.source.files import read_torch_file
from pp_to_vpp.verification import torch_loading

from ..pairs import DENSE, names, pair, rank_files

CHUNK_KEY = "decoder.layers.1.mlp.linear_fc1.weight"


def read(extent: Extent) -> bytes:
    """The bytes of a range."""
    with open(extent.path, "rb") as file:
        file.seek(extent.offset)
        return file.read(extent.length)


def found_in(file: TorchFile) -> list[str]:
    return list(torch_loading.differences(file, read))


@pytest.mark.parametrize("name", names())
def test_torch_finds_what_is_there(name: str) -> None:
    found = {path: found_in(read_torch_file(path)) for path in rank_files(name)[::2]}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.fixture(scope="module")
def model() -> TorchFile:
    return read_torch_file(pair(DENSE).source / "mp_rank_00_000" / "model_optim_rng.pt")


def with_weight(file: TorchFile, edit: Callable[[Any], Any]) -> TorchFile:
    """A file as the program would have decoded it, with one weight otherwise."""
    chunk = as_mapping(file.root["model"]) or {}
    changed = ordered_dict({**chunk, CHUNK_KEY: edit(chunk[CHUNK_KEY])})
    return replace(file, root={**file.root, "model": changed})


def moved(number: int, value: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Another argument of the tensor: storage, offset, shape, strides."""

    def edit(node: Any) -> Any:
        arguments = list(node.arguments)
        arguments[number] = value(arguments[number])
        return Instance(node.factory, tuple(arguments))

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (moved(1, lambda offset: offset + 1), "torch.load finds other values"),
        (moved(2, lambda shape: (shape[0] // 2, shape[1])), "torch.load finds bfloat16"),
        (moved(2, lambda shape: (*shape[:-1], 1)), "torch.load finds bfloat16"),
        (lambda _: {"a": 1}, "torch.load finds something else"),
        (lambda _: [1], "torch.load finds something else"),
    ],
)
def test_other_opinions_are_named(
    edit: Callable[[Any], Any], reason: str, model: TorchFile
) -> None:
    (line,) = found_in(with_weight(model, edit))
    assert reason in line
    assert line.startswith(f"top level: model: {CHUNK_KEY}: ")


def test_another_dtype_is_named(model: TorchFile) -> None:
    def edit(node: Any) -> Any:
        storage = node.arguments[0]
        halves = type(storage)(
            replace_name(storage.type, "HalfStorage"),
            storage.location,
            storage.numel,
            storage.content,
        )
        return Instance(node.factory, (halves, *node.arguments[1:]))

    (line,) = found_in(with_weight(model, edit))
    assert "torch.load finds bfloat16" in line
    assert "not float16" in line


def replace_name(kind: Any, name: str) -> Any:
    return type(kind)(kind.module, name)


def test_other_numbers_of_entries_are_found(model: TorchFile) -> None:
    chunk = as_mapping(model.root["model"]) or {}
    fewer = ordered_dict({key: value for key, value in chunk.items() if key != CHUNK_KEY})
    assert len(found_in(replace(model, root={**model.root, "model": fewer}))) == 1
    groups = model.root["optimizer"]["optimizer"]["param_groups"]
    less = {"optimizer": {"param_groups": groups[:1]}}
    assert found_in(replace(model, root={**model.root, "optimizer": less}))
    del less


def test_bytes_that_are_read_otherwise_are_found(model: TorchFile) -> None:
    def flipped(extent: Extent) -> bytes:
        data = read(extent)
        return bytes([data[0] ^ 1]) + data[1:]

    tensors = [v for v in (as_mapping(model.root["model"]) or {}).values() if as_tensor(v)]
    lines = list(torch_loading.differences(model, flipped))
    assert len([line for line in lines if ": model: " in line]) == len(tensors)
    assert all("finds other values" in line for line in lines)


def test_files_that_torch_refuses_are_told(model: TorchFile, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    shutil.copy(model.path, path)
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size - 100)
    (line,) = found_in(replace(model, path=str(path)))
    assert line.startswith("torch.load fails: ")


def make_folder(path: str) -> None:
    """Of a package that nobody knows."""
    Path(path).mkdir()


class Hostile:
    """Makes a folder when it is unpickled by anything that calls what it loads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (make_folder, (str(self.path),))


def test_nothing_in_a_file_runs(tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "rank" / "hostile.pt"
    path.parent.mkdir()
    torch.save({"weight": torch.arange(5), "trap": Hostile(trap)}, path)
    assert found_in(read_torch_file(path)) == []
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the file would have made it"


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (7, 5)])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.int64,
        torch.bool,
        torch.uint8,
        torch.float8_e4m3fn,
        torch.uint16,
        torch.complex64,
    ],
)
def test_tensors_of_all_kinds_agree(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "rank" / "made.pt"
    path.parent.mkdir()
    whole = torch.randint(0, 2, (100,)).to(dtype)
    count = int(torch.Size(shape).numel())
    made = {"t": whole[7 : 7 + count].view(shape), "more": [whole, {"x": (whole[::3], 1.5, None)}]}
    torch.save(made, path)
    assert found_in(read_torch_file(path)) == []
    with zipfile.ZipFile(path) as file:
        assert len([name for name in file.namelist() if "/data/" in name]) == 1


def test_tensors_that_only_torch_understands_are_left_to_it(tmp_path: Path) -> None:
    """A conjugate view has an argument more; it stands in no model, and is copied as it is."""
    path = tmp_path / "odd.pt"
    torch.save({"rng_state": torch.ones(2, dtype=torch.complex64).conj(), "iteration": 1}, path)
    assert found_in(read_torch_file(path)) == []


def test_loading_torch_leaves_the_number_of_its_threads() -> None:
    """It is that of the whole process, which may be a caller's."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch_loading.load_torch()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
