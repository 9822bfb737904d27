"""Whole files: what torch.save wrote is decoded and encoded again to the same bytes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.container import archive, torch_file
from pp_to_vpp.container.tensors import as_tensor
from pp_to_vpp.container.torch_file import TorchFile
from pp_to_vpp.errors import FormatError

from ..edit import assemble
from ..pairs import names, rank_files


def decode(data: bytes) -> TorchFile:
    """Decode a file that is in memory."""
    stem, records = archive.read_records(io.BytesIO(data))
    return torch_file.decode(
        "file", stem, records, lambda record: data[record.offset : record.offset + record.length]
    )


def rebuilt(file: TorchFile, data: bytes) -> bytes:
    """The file, encoded from what it was decoded to."""
    encoded = torch_file.encode(file.root, file)
    return assemble(encoded, lambda extent: data[extent.offset : extent.offset + extent.length])


def saved(value: Any) -> bytes:
    """What torch.save makes of a value."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def without_identity(data: bytes) -> bytes:
    """A file without its serialization id and that record's checksum, which are random."""
    _, records = archive.read_records(io.BytesIO(data))
    blank = bytearray(data)
    identity = records[".data/serialization_id"]
    blank[identity.offset : identity.offset + identity.length + 8] = bytes(identity.length + 8)
    return bytes(blank).replace(identity.crc32.to_bytes(4, "little"), bytes(4))


@pytest.mark.parametrize("name", names())
def test_real_files_are_encoded_to_the_same_bytes(name: str) -> None:
    for path in rank_files(name)[::3]:
        data = path.read_bytes()
        again = rebuilt(decode(data), data)
        assert len(again) == len(data), path
        assert without_identity(again) == without_identity(data), path


@given(st.lists(st.integers(0, 50), max_size=30), st.booleans())
def test_tensors_of_this_torch_are_found_and_written_back(sizes: list[int], shared: bool) -> None:
    whole = torch.arange(1 + sum(sizes), dtype=torch.bfloat16)
    value = {
        str(i): (whole[:n] if shared else whole[:n].clone()).reshape(n, 1)
        for i, n in enumerate(sizes)
    }
    data = saved(value)
    file = decode(data)
    for name, node in file.root.items():
        tensor = as_tensor(node)
        assert tensor is not None
        assert tensor.shape == tuple(value[name].shape)
        extent = tensor.extent
        raw = value[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert data[extent.offset : extent.offset + extent.length] == raw
    again = rebuilt(file, data)
    assert without_identity(again) == without_identity(data)
    loaded = torch.load(io.BytesIO(again), weights_only=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in value.items())


def test_encoding_is_deterministic() -> None:
    file = decode(saved({"a": torch.zeros(5)}))
    assert torch_file.encode(file.root, file) == torch_file.encode(file.root, file)


def _renamed(data: bytes, old: str, new: str) -> bytes:
    assert len(old) == len(new)
    return data.replace(f"archive/{old}".encode(), f"archive/{new}".encode())


_GOOD = saved({"a": torch.arange(8)})


def _with_flipped(record: str) -> bytes:
    _, records = archive.read_records(io.BytesIO(_GOOD))
    data = bytearray(_GOOD)
    data[records[record].offset] ^= 0x40
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_renamed(_GOOD, "data.pkl", "data.pkx"), "'data.pkl' is missing"),
        (_renamed(_GOOD, "version", "versiox"), "'version' is missing"),
        (_renamed(_GOOD, "data/0", "data/9"), "'data/0' is missing"),
        (_with_flipped("data.pkl"), "'data.pkl' is damaged"),
        (_with_flipped("version"), "'version' is damaged"),
        (_GOOD.replace(b"LongStorage", b"NoneStorage"), "damaged"),
    ],
)
def test_odd_files_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        decode(data)


def test_files_without_checksums_are_read() -> None:
    torch.serialization.set_crc32_options(False)
    try:
        data = saved({"a": torch.arange(8)})
    finally:
        torch.serialization.set_crc32_options(True)
    file = decode(data)
    assert not any(record.has_checksum for record in file.records.values())
