"""Changing real rank files, to make the checkpoints that must be refused."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pp_to_vpp.container import archive, torch_file
from pp_to_vpp.container.extents import Extent, Literal, Piece, Zeros
from pp_to_vpp.container.pickling import Global, Storage, ordered_dict
from pp_to_vpp.container.tensors import TensorRef, flat_tensor
from pp_to_vpp.container.torch_file import EncodedFile
from pp_to_vpp.source import files


def assemble(encoded: EncodedFile, read: Callable[[Extent], bytes]) -> bytes:
    """The bytes of a planned file."""
    written = bytearray(encoded.archive.length)
    crc32s = []
    for record, pieces in zip(encoded.archive.records, encoded.contents, strict=True):
        payload = b""
        for piece in pieces:
            match piece:
                case Extent():
                    payload += read(piece)
                case Zeros(length):
                    payload += bytes(length)
                case Literal(data):
                    payload += data
        written[record.offset : record.offset + record.length] = payload
        crc32s.append(zlib.crc32(payload))
    for offset, part in archive.frame(encoded.archive, crc32s):
        written[offset : offset + len(part)] = part
    return bytes(written)


def rewrite(path: Path, edit: Callable[[Any], Any]) -> None:
    """Apply a change to the object graph of a file; ``edit`` changes it in place or returns it."""
    file = files.read_torch_file(path)
    changed = edit(file.root)
    root = file.root if changed is None else changed
    data = path.read_bytes()
    encoded = torch_file.encode(root, file)
    path.write_bytes(assemble(encoded, lambda e: data[e.offset : e.offset + e.length]))


def copy_of(source: Path, folder: Path) -> Path:
    """A copy of an iteration folder that may be changed."""
    target = folder / "copy" / source.name
    shutil.copytree(source, target)
    return target


def rewrite_all(
    iteration: Path, edit: Callable[[Any], Any], name: str = "model_optim_rng.pt"
) -> None:
    """Apply a change to the same file of every rank folder."""
    for path in sorted(iteration.glob(f"*/{name}")):
        rewrite(path, edit)


def set_arguments(iteration: Path, **values: Any) -> None:
    """Change saved training arguments in all rank files."""
    rewrite_all(iteration, lambda root: root["args"].state.update(values))


def float_tensor(data: bytes) -> Any:
    """A flat float32 tensor with these bytes."""
    storage = Storage(Global("torch", "FloatStorage"), "cpu", len(data) // 4, (Literal(data),))
    return flat_tensor(storage)


def pieces_of(tensor: TensorRef) -> tuple[Piece, ...]:
    """What a tensor that is to be written covers of its storage, first to last element."""
    start, length = tensor.offset * tensor.item_bytes, tensor.span * tensor.item_bytes
    taken: list[Piece] = []
    position = 0
    for piece in tensor.storage.content:
        low, high = max(start, position), min(start + length, position + piece.length)
        if low < high:
            match piece:
                case Extent():
                    taken.append(piece.cut(low - position, high - low))
                case Zeros():
                    taken.append(Zeros(high - low))
                case Literal(data):
                    taken.append(Literal(data[low - position : high - position]))
        position += piece.length
    return tuple(taken)


def flip_byte(path: Path, offset: int, bit: int = 0x10) -> None:
    """Damage one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bit]))


__all__ = [
    "assemble",
    "copy_of",
    "flip_byte",
    "float_tensor",
    "ordered_dict",
    "pieces_of",
    "rewrite",
    "rewrite_all",
    "set_arguments",
]
