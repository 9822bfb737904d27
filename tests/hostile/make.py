"""Makes the hostile files of this folder: ``python -m tests.hostile.make``.

Each is put in place of one file of a real checkpoint (``model-*`` for ``model_optim_rng.pt``,
``optim-*`` for ``distrib_optim.pt``) and must be refused: nothing in it may run, and neither time
nor memory may follow the sizes it announces. All are small, and a function of this script alone.
"""

from __future__ import annotations

import math
import pickle
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pp_to_vpp.container import pickling
from pp_to_vpp.container.extents import Literal
from pp_to_vpp.container.pickling import Global, Instance, Storage, ordered_dict

FOLDER = Path(__file__).parent
CANARY = "canary"
"""The file that the pickles would create, in the current folder, if anything in them ran."""
DEPTH = 50_000


# The container


@dataclass(frozen=True)
class Entry:
    """A record of an archive, and the lies told about it (None: the truth)."""

    name: str
    data: bytes
    local_name: str | None = None
    method: int = 0
    flags: int = 0x0800
    length: int | None = None
    packed: int | None = None
    offset: int | None = None
    extra: bytes = b""
    local_extra: int | None = None
    crc32: int | None = None


def zipped(
    entries: list[Entry],
    *,
    prefix: bytes = b"",
    count: int | None = None,
    size: int | None = None,
    start: int | None = None,
    before_end: bytes = b"",
) -> bytes:
    """An archive of these records; the other arguments are lies in its end record."""
    body, directory = prefix, b""
    for entry in entries:
        crc32 = zlib.crc32(entry.data) if entry.crc32 is None else entry.crc32
        numbers = (
            crc32,
            len(entry.data) if entry.packed is None else entry.packed,
            len(entry.data) if entry.length is None else entry.length,
        )
        name = entry.name.encode()
        local = name if entry.local_name is None else entry.local_name.encode()
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", 0, 0, entry.flags, entry.method, 0, 0, *numbers,
            len(name), len(entry.extra), 0, 0, 0, 0,
            len(body) if entry.offset is None else entry.offset,
        )  # fmt: skip
        directory += name + entry.extra
        body += struct.pack(
            "<4s5H3L2H", b"PK\x03\x04", 0, entry.flags, entry.method, 0, 0, *numbers,
            len(local), entry.local_extra or 0,
        )  # fmt: skip
        body += local + entry.data
    shown = len(entries) if count is None else count
    end = struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, shown, shown,
        len(directory) if size is None else size, len(body) if start is None else start, 0,
    )  # fmt: skip
    return body + directory + before_end + end


def records(pickled: bytes, storages: list[bytes]) -> list[Entry]:
    """The records of a file of torch.save."""
    data = [Entry(f"archive/data/{index}", part) for index, part in enumerate(storages)]
    return [
        Entry("archive/data.pkl", pickled),
        Entry("archive/byteorder", b"little"),
        *data,
        Entry("archive/version", b"3\n"),
    ]


def file(pickled: bytes, *storages: bytes) -> bytes:
    """A file of torch.save around a pickle."""
    return zipped(records(pickled, list(storages)))


# The pickle


def spliced(graph: Any, code: bytes) -> bytes:
    """A pickle of a graph with opcodes, which push one object, in place of the string "HERE"."""
    pickled, _ = pickling.dump(graph)
    assert pickled.count(text("HERE")) == 1
    return pickled.replace(text("HERE"), code)


def graph_file(graph: Any) -> bytes:
    """A file of an inert graph; its storages hold what they say, or lie."""
    pickled, storages = pickling.dump(graph)
    parts = [piece for storage in storages for piece in storage.content]
    return file(pickled, *(part.data for part in parts if isinstance(part, Literal)))


def text(value: str) -> bytes:
    """Opcodes of a string."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def program(code: bytes, protocol: int = 2) -> bytes:
    """A whole pickle."""
    return b"\x80" + bytes([protocol]) + code + b"."


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """Opcodes of a call."""
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


SYSTEM = call("os", "system", text(f"touch {CANARY}"))
EVAL = call("builtins", "eval", text(f"open({CANARY!r}, 'w')"))
EXEC = call("builtins", "exec", text(f"open({CANARY!r}, 'w')"))


def doubled(depth: int, first: bytes = b"K\x01") -> bytes:
    """Opcodes of a tuple that holds itself twice, ``depth`` times over: 2**depth leaves."""
    numbers = (struct.pack("<I", 1000 + index) for index in range(depth))
    return first + b"".join(b"r" + number + b"j" + number + b"\x86" for number in numbers)


def long(value: int) -> bytes:
    """Opcodes of an integer of any size."""
    data = pickle.encode_long(value)
    return b"\x8b" + struct.pack("<i", len(data)) + data


def running() -> Iterator[tuple[str, bytes]]:
    """Pickles that would run code."""
    yield "reduce-system", program(SYSTEM)
    yield "reduce-eval", program(EVAL)
    yield "reduce-exec", program(EXEC)
    yield "reduce-python2-eval", program(EVAL.replace(b"builtins", b"__builtin__"))
    yield "reduce-getattr", program(
        call("builtins", "getattr", call("builtins", "__import__", text("os")), text("system"))
        + text(f"touch {CANARY}")
        + b"\x85R"
    )  # fmt: skip
    yield "nested", spliced({"args": arguments(), "a": [({"b": ["HERE"]},)]}, SYSTEM)
    yield "in-arguments", spliced({"args": arguments(optimizer="HERE")}, EVAL)
    yield "key", program(b"}" + EVAL + b"K\x01s")
    yield "build", program(b"ctypes\nSimpleNamespace\n)\x81}" + text("x") + SYSTEM + b"sb")
    yield "build-setstate", program(b"cfunctools\npartial\n)\x81(cos\nsystem\n)}NtbK\x01\x85R")
    yield "persistent-id", program(b"(" + text("storage") + SYSTEM + text("0") * 2 + b"K\x01tQ")
    yield "persistent-id-global", program(b"(" + text("storage") + b"cos\nsystem\nK\x01K\x01tQ")
    popen = text("touch") + text(CANARY)
    yield "newobj", program(b"csubprocess\nPopen\n(" + b"(" + popen + b"tt\x81")
    yield "newobj-ex", program(b"csubprocess\nPopen\n((" + popen + b"t}\x92", 4)
    code = b"\x8c\x02os\x8c\x06system\x93" + text(f"touch {CANARY}") + b"\x85R"
    yield "stack-global", program(code, 4)
    yield "stack-global-protocol-2", program(code, 2)
    yield "frame", program(b"\x95" + struct.pack("<Q", len(code) + 1) + code, 4)
    touch = f"S'touch {CANARY}'\n".encode()
    yield "inst", program(b"(" + touch + b"ios\nsystem\n")
    yield "obj", program(b"(cos\nsystem\n" + touch + b"o")
    yield "protocol-0", b"cos\nsystem\n(" + touch + b"tR."
    yield "extension", program(b"\x82\x01")
    yield "extension-registered", program(
        call("copyreg", "add_extension", text("os"), text("system"), b"K\x01")
        + b"0\x82\x01(" + text(f"touch {CANARY}") + b"tR"
    )  # fmt: skip
    yield (
        "reconstructor",
        program(call("copyreg", "_reconstructor", b"cos\nsystem\n", b"cos\nsystem\n", SYSTEM)),
    )
    yield "buffer", program(b"\x97\x98", 5)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Pickles that are small and would take all memory, all time, or the whole stack."""
    lists = b"]" * DEPTH + b"a" * (DEPTH - 1)
    yield "deep-lists", program(lists)
    yield "deep-tuples", program(b")" + b"\x85" * DEPTH)
    keys = b"}" + (b"K\x01}") * (DEPTH // 4) + b"s" * (DEPTH // 4)
    yield "deep-dicts", program(keys)
    yield "deep-calls", program(b"ca\nb\n" * (DEPTH // 10) + b")R" + b"\x85R" * (DEPTH // 10 - 1))
    yield "deep-key", program(b"})" + b"\x85" * DEPTH + b"K\x01s")
    yield "deep-marks", program(b"(" * DEPTH)
    yield "deep-argument", spliced({"args": arguments(optimizer="HERE")}, lists)
    yield "deep-number", spliced({"args": arguments(num_layers="HERE")}, lists)
    yield "laughing-key", program(b"}" + doubled(60) + b"K\x01s")
    yield "laughing-value", spliced({"args": arguments(num_layers="HERE")}, doubled(60))
    yield "laughing-argument", spliced({"args": arguments(optimizer="HERE")}, doubled(60))
    yield (
        "laughing-version",
        spliced({"args": arguments(), "checkpoint_version": "HERE"}, doubled(60)),
    )
    yield "laughing-namespace", program(b"cargparse\nNamespace\n" + doubled(60) + b"\x81")
    for name, code in (
        ("string", b"X\xff\xff\xff\x7fabc"),
        ("string8", b"\x8d" + struct.pack("<Q", 1 << 62) + b"abc"),
        ("long", b"\x8b\xff\xff\xff\x7fabc"),
        ("negative-long", b"\x8b\xff\xff\xff\xffabc"),
        ("bytes8", b"\x8e" + struct.pack("<Q", 1 << 62) + b"abc"),
        ("bytearray8", b"\x96" + struct.pack("<Q", 1 << 62) + b"abc"),
    ):
        yield f"announced-{name}", program(code)
    yield "announced-frame", program(b"\x95" + struct.pack("<Q", 1 << 62) + b"N", 4)
    yield "memo-index", program(b"]r" + struct.pack("<I", 1 << 31) + b"j\xff\xff\xff\xff")
    yield "dup", program(b"]" + b"2" * 1000)
    yield "no-stop", b"\x80\x02]"
    yield "empty", b""
    yield "dots", program(b"ca" + b".a" * (DEPTH // 2) + b"\nb" + b".b" * (DEPTH // 2) + b"\n")
    yield "huge-integer", spliced({"args": arguments(num_layers="HERE")}, long(1 << 500_000))
    yield "huge-iteration", spliced({"args": arguments(), "iteration": "HERE"}, long(1 << 99_999))
    yield "huge-flag", spliced({"args": arguments(optimizer="HERE")}, long(1 << 99_999))


def containers() -> Iterator[tuple[str, bytes]]:
    """Archives that are not what they say."""
    good = records(pickling.dump({"args": arguments()})[0], [bytes(64)])
    first, order, data, version = good
    packed = zlib.compress(bytes(200_000), 9)[2:-4]
    bomb = Entry(first.name, packed, method=8, length=200_000)
    whole = zipped(good)
    yield "deflated", zipped([bomb, order, version])
    yield "deflated-unmarked", zipped([replace(bomb, method=0), order, version])
    yield "encrypted", zipped([replace(first, flags=0x0801), order, version])
    yield "long-pickle", zipped([replace(first, length=1 << 31, packed=1 << 31), order, version])
    yield "long-data", zipped([*good[:2], replace(data, length=1 << 31, packed=1 << 31), version])
    yield "long-version", zipped([*good[:3], replace(version, length=99, packed=99)])
    yield "overlap", zipped([first, order, replace(data, offset=0), version])
    yield "same-offset", zipped([first, replace(order, name=first.name + "x", offset=0), version])
    yield "absolute", zipped([first, Entry("/etc/passwd", b""), version])
    yield "parent", zipped([first, Entry("archive/../../x", b""), version])
    yield "parent-data", zipped([first, Entry("archive/data/../0", b""), version])
    yield "duplicate", zipped([first, order, data, data, version])
    yield "duplicate-pickle", zipped([first, replace(first, data=program(SYSTEM)), version])
    yield "no-stem", zipped([replace(entry, name=entry.name[8:]) for entry in good])
    yield "two-stems", zipped([first, order, replace(version, name="other/version")])
    yield "empty-name", zipped([first, order, Entry("", b""), version])
    yield "zero-name", zipped([first, order, Entry("archive/da\0ta", b""), version])
    yield "not-utf8", whole.replace(b"archive/byteorder", b"archive/\xff\xfeteorder")
    yield "past-end", zipped([first, order, replace(data, offset=1 << 31), version])
    yield "local-name", zipped([first, order, replace(data, local_name="archive/data/1"), version])
    yield "local-extra", zipped([first, order, data, replace(version, local_extra=60_000)])
    wide = struct.pack("<2H3Q", 1, 24, 1 << 62, 1 << 62, 1 << 63)
    lie = replace(data, length=0xFFFFFFFF, packed=0xFFFFFFFF, offset=0xFFFFFFFF, extra=wide)
    yield "zip64", zipped([first, order, lie, version])
    yield "zip64-empty", zipped([first, order, replace(lie, extra=b"\x01\x00\x08\x00"), version])
    end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1 << 62, 1 << 62, 99, 1 << 63)
    for name, place in (("far", 1 << 63), ("here", len(whole) - 22), ("itself", len(whole) + 34)):
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, place, 1)
        yield f"end64-{name}", zipped(good, before_end=end + locator)
    yield "no-pickle", zipped([order, data, version])
    yield "no-version", zipped([first, order, data])
    yield "no-records", zipped([])
    yield "torchscript", zipped([*good, Entry("archive/constants.pkl", b"")])
    yield "big-endian", zipped([first, replace(order, data=b"big"), version])
    yield "wrong-crc", zipped([replace(first, crc32=1), order, version])
    yield "truncated", whole[: len(whole) // 2]
    yield "truncated-directory", zipped(good, size=60)
    yield "directory-size", zipped(good, size=1 << 31)
    yield "directory-start", zipped(good, start=1 << 31)
    yield "directory-elsewhere", zipped(good, start=0)
    yield "count", zipped(good, count=60_000)
    yield "count-zero", zipped(good, count=0)
    yield "prefix", b"#!/bin/sh\ntouch canary\n" + whole
    yield "suffix", whole + b"\0"
    yield "nothing", b""
    yield "text", b"this is no archive\n" * 9
    yield "long-name", zipped([first, Entry("archive/" + "n" * 20_000, b""), version])


def arguments(**changed: Any) -> Instance:
    """Saved arguments of two pipeline ranks."""
    values = {
        "num_layers": 8,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 1,
        "context_parallel_size": 1,
        "data_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "use_distributed_optimizer": True,
    }
    return Instance(Global("argparse", "Namespace"), (), by_new=True, state=values | changed)


PARENTHESES = "(" * 90_000
LAYOUTS = {
    "times": "t*1000000000|" * 3,
    "group-times": "(t|)*999999999",
    "digits": "t*" + "9" * 5000,
    "nested": "(" * 50 + "t" + ")*9" * 50,
    "products": "(t*999)*99|" * 9 + "L",
    "parentheses": PARENTHESES,
    "bars": "|" * 90_000,
    "strange": "E\N{SNOWMAN}L\x1b[2J\n",
}
"""Layout strings that would take all memory or time, for the arguments and the command line."""
IMPOSSIBLE = frozenset(
    (
        "model-argument-num_layers-none",
        "model-argument-virtual-most",
        *(f"model-layout-{name}" for name in LAYOUTS),
    )
)
"""Files that tell a placement no run can have."""


def absurd() -> Iterator[tuple[str, Any]]:
    """Absurd arguments."""
    numbers: dict[str, Any] = {
        "billion": 10**9, "text": "8", "true": True, "negative": -8, "zero": 0, "float": 8.0,
        "nan": math.nan, "infinite": math.inf, "none": None, "list": [8] * 5000, "huge": 10**30,
        "endless": 10**5000, "dict": {8: 8}, "global": Global("os", "system"),
    }  # fmt: skip
    for kind, value in numbers.items():
        yield f"num_layers-{kind}", {"num_layers": value}
    for name in ("tensor", "pipeline", "expert"):
        for kind, value in (("zero", 0), ("minus", -1), ("huge", 10**30), ("most", 1 << 24)):
            yield f"{name}-{kind}", {f"{name}_model_parallel_size": value}
    virtual = {"virtual_pipeline_model_parallel_size": 1 << 24}
    yield "virtual-minus", {"virtual_pipeline_model_parallel_size": -1}
    yield "virtual-most", virtual | {"decoder_first_pipeline_num_layers": 3}
    yield "split-long", virtual | {"decoder_first_pipeline_num_layers_split": [0] * 5000}
    yield "split-text", {"decoder_first_pipeline_num_layers_split": ["1", "2"]}
    yield "first-huge", {"decoder_first_pipeline_num_layers": 10**30}
    yield "layout-list", {"pipeline_model_parallel_layout": [["t"] * 10] * 100}
    yield "bucket-text", {"ddp_bucket_size": "big"}
    yield "flag-number", {"untie_embeddings_and_output_weights": 1}


def around_arguments() -> Iterator[tuple[str, Any]]:
    """Files without usable arguments."""
    yield "none", {"args": None}
    yield "dict", {"args": {"num_layers": 8}}
    yield "no-state", {"args": Instance(Global("argparse", "Namespace"), (), by_new=True)}
    yield "class", {"args": Instance(Global("os", "Namespace"), (), state={})}
    yield "list", [arguments()]
    numbered = arguments()
    numbered.state[3] = 3
    yield "numbered", {"args": numbered}


# Tensors


def tensor(
    shape: Any,
    stride: Any,
    *,
    offset: Any = 0,
    kind: str = "FloatStorage",
    numel: int | None = None,
    data: bytes = bytes(256),
) -> Instance:
    """A view of a storage of its own."""
    count = len(data) // 4 if numel is None else numel
    storage = Storage(Global("torch", kind), "cpu", count, (Literal(data),))
    hooks = ordered_dict({})
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Instance(rebuild, (storage, offset, shape, stride, False, hooks))


def cycle() -> dict[str, Any]:
    """A dict that holds itself."""
    made: dict[str, Any] = {}
    made["self"] = made
    return made


def odd_tensors(numel: int) -> Iterator[tuple[str, Any]]:
    """What may stand where a flat fp32 tensor of ``numel`` elements is expected."""
    whole = bytes(4 * numel)
    yield "out-of-bounds", tensor((numel + 1,), (1,), data=whole)
    yield "offset", tensor((numel,), (1,), offset=numel, data=whole)
    yield "negative-offset", tensor((numel,), (1,), offset=-1, data=whole)
    yield "negative-stride", tensor((numel,), (-1,), offset=numel - 1, data=whole)
    yield "zero-stride", tensor((1 << 40,), (0,), data=whole)
    yield "strides", tensor((2, 2), (1 << 62, 1 << 62), data=whole)
    yield "huge-shape", tensor((1 << 62, 1 << 62), (1 << 62, 1), data=whole)
    yield "endless-shape", tensor((1 << 50_000,), (1,), data=whole)
    yield "endless-empty-shape", tensor((0, 1 << 50_000), (1, 1), data=whole)
    yield "dimensions", tensor((1,) * 5000, (1,) * 5000, data=whole)
    yield "negative-shape", tensor((-numel,), (1,), data=whole)
    yield "shape-of-text", tensor(("8",), (1,), data=whole)
    yield "shape-list", tensor([numel], [1], data=whole)
    yield "uneven", tensor((numel,), (1, 1), data=whole)
    yield "huge-numel", tensor((numel,), (1,), numel=1 << 60, data=whole)
    yield "endless-numel", tensor((numel,), (1,), numel=1 << 50_000, data=whole)
    yield "negative-numel", tensor((numel,), (1,), numel=-1, data=whole)
    yield "short-record", tensor((numel,), (1,), numel=numel, data=whole[:-4])
    yield "unknown-storage", tensor((numel,), (1,), kind="Float6Storage", data=whole)
    yield "dotted-storage", tensor((numel,), (1,), kind="os.system", data=whole)
    yield "quantized", tensor((numel,), (1,), kind="QInt32Storage", data=whole)
    yield "no-storage", Instance(Global("torch._utils", "_rebuild_tensor_v2"), (1, 0, (), (), 0, 0))
    yield "cycle", cycle()


def ranks(parameter: Any) -> dict[str, Any]:
    """The first of two ranks with four layers, with this as one of its parameters."""
    chunk = {
        "embedding.word_embeddings.weight": tensor((64,), (1,)),
        "decoder.layers.0.weight": parameter,
        "decoder.layers.1.weight": tensor((64,), (1,)),
    }
    return {
        "args": arguments(num_layers=4),
        "checkpoint_version": 3.0,
        "iteration": 1,
        "model": ordered_dict(chunk),
        "optimizer": {"optimizer": {"param_groups": []}},
    }


def odd_models() -> Iterator[tuple[str, Any]]:
    """Model files whose chunks are impossible."""
    for name, value in odd_tensors(64):
        yield f"tensor-{name}", ranks(value)
    good = ranks(tensor((64,), (1,)))
    yield "cycle", good | {"model": cycle()}
    loop = ordered_dict({})
    loop.entries["decoder.layers.0.weight"] = loop
    yield "cycle-chunk", good | {"model": loop}
    yield "chunk-list", good | {"model": [1]}
    yield "chunk-numbers", good | {"model": ordered_dict({1: 1})}
    yield "chunk-many", good | {f"model{index}": {} for index in range(2000)}
    yield "version-text", good | {"checkpoint_version": "3.0"}
    yield "version-nan", good | {"checkpoint_version": math.nan}
    far = ordered_dict({"decoder.layers.999999999.weight": 1})
    yield "layer-number", good | {"model": far}
    yield "optimizer-cycle", good | {"optimizer": cycle()}
    numbered = ordered_dict({1: {"version": 1}})
    modules = ordered_dict(dict(good["model"].entries), {"_metadata": numbered})
    yield "metadata-numbers", good | {"model": modules}


def flat_states(**changed: Any) -> dict[Any, Any]:
    """An optimizer file with one short buffer."""
    key = (Global("torch", "bfloat16"), Global("torch", "float32"))
    states = {
        name: tensor((64,), (1,), numel=64) for name in ("param", "exp_avg", "exp_avg_sq")
    } | {"numel_unpadded": 64}
    return {"buckets_coalesced": True, 0: {key: states | changed}}


def odd_optimizers() -> Iterator[tuple[str, Any]]:
    """Optimizer files that are impossible."""
    for name, value in odd_tensors(64):
        yield f"tensor-{name}", flat_states(param=value)
    for name, value in (
        ("text", "64"), ("huge", 10**30), ("endless", 1 << 50_000), ("nan", math.nan),
        ("cycle", cycle()),
    ):  # fmt: skip
        yield f"numel-{name}", flat_states(numel_unpadded=value)
    yield "cycle", cycle()
    yield "list", [None] * 5000
    yield "not-coalesced", {"buckets_coalesced": 1}
    yield "endless-index", {"buckets_coalesced": True, 1 << 50_000: {}}
    yield "indices", {"buckets_coalesced": True, **{index: {} for index in range(5000)}}
    yield "no-dtype", {"buckets_coalesced": True, 0: {}}
    yield "odd-dtype", {"buckets_coalesced": True, 0: {("float32", "float32"): {}}}


def cases() -> Iterator[tuple[str, bytes]]:
    """Name and content of every file."""
    for name, pickled in running():
        yield f"model-run-{name}", file(pickled)
        if "reduce" in name:
            yield f"optim-run-{name}", file(pickled)
    for name, pickled in bombs():
        yield f"model-bomb-{name}", file(pickled)
    for name, content in containers():
        yield f"model-zip-{name}", content
    for name, values in absurd():
        yield f"model-argument-{name}", graph_file({"args": arguments(**values)})
    for name, graph in around_arguments():
        yield f"model-arguments-{name}", graph_file(graph)
    for name, layout in LAYOUTS.items():
        told = arguments(pipeline_model_parallel_layout=layout)
        yield f"model-layout-{name}", graph_file({"args": told})
    for name, graph in odd_models():
        yield f"model-{name}", graph_file(graph)
    for name, graph in odd_optimizers():
        yield f"optim-{name}", graph_file(graph)


def main() -> None:
    """Write all files anew."""
    for old in FOLDER.glob("*.pt"):
        old.unlink()
    for name, content in cases():
        (FOLDER / f"{name}.pt").write_bytes(content)


if __name__ == "__main__":
    main()
