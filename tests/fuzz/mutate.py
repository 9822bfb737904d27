"""Small damages and clever lies: one mutation of one real file, drawn from a random generator."""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from pp_to_vpp.container import archive, pickling
from pp_to_vpp.container.extents import Extent
from pp_to_vpp.container.pickling import Global, Instance, Storage
from pp_to_vpp.errors import FormatError

_EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 4, -1, 7, 255, 65536, 1 << 24, 1 << 31, 1 << 63, 10**30,
    1 << 20_000, 0.0, -0.0, 1.5, math.nan, math.inf, "", "x", "8", "cpu", "\0", "\ud800", "E" * 300,
    "t*99999999|", (), [], {}, (1, 2), [1, 2], {"a": 1}, Global("os", "system"),
)  # fmt: skip
_NUMBERS = (0, 1, 2, 3, 64, 127, 128, 255, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_HEADERS = (
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"PK\x06\x07",
    b"PK\x07\x08",
)
_HEADER_BYTES = 56
_LONG = 4096
"""Bytes of the longest range that is moved, but for tails."""
_OPCODES = [ord(opcode.code) for opcode in pickletools.opcodes]


def mutated(data: bytes, random: Random) -> bytes:
    """A file with one to three mutations of one kind."""
    mutation = random.choices(*zip(*_MUTATIONS, strict=True))[0]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        try:
            data = mutation(data, random)
        except _Unreadable:
            break
    return data


class _Unreadable(Exception):  # noqa: N818  (an earlier mutation has seen to that)
    """The file is too damaged for a further mutation of this kind."""


# Bytes


def _range(data: bytes, random: Random) -> tuple[int, int]:
    """A range of a file: anywhere, or near an end, where the pickle and the directory are."""
    if not data:
        raise _Unreadable
    size = len(data)
    place = random.choice((random.randrange(size), random.randrange(min(size, 30_000))))
    start = random.choice((place, max(0, size - 1 - random.randrange(min(size, 4000)))))
    length = random.choice((1, 2, 4, 8, 64, random.randrange(1, _LONG)))
    return start, min(size, start + length)


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        start, _ = _range(data, random)
        changed[start] ^= random.choice((1 << random.randrange(8), random.randrange(1, 256)))
    return bytes(changed)


def _zero(data: bytes, random: Random) -> bytes:
    start, end = _range(data, random)
    return data[:start] + bytes(end - start) + data[end:]


def _repeat(data: bytes, random: Random) -> bytes:
    start, end = _range(data, random)
    return data[:end] + data[start:end] * random.choice((1, 1, 3)) + data[end:]


def _delete(data: bytes, random: Random) -> bytes:
    start, end = _range(data, random)
    return data[:start] + data[end:]


def _insert(data: bytes, random: Random) -> bytes:
    start, end = _range(data, random)
    return data[:start] + random.randbytes(end - start) + data[start:]


def _move(data: bytes, random: Random) -> bytes:
    start, end = _range(data, random)
    place, _ = _range(data, random)
    return data[:place] + data[start:end] + data[place + end - start :]


def _truncate(data: bytes, random: Random) -> bytes:
    return data[: _range(data, random)[0]]


_BYTES = (_flip, _flip, _zero, _repeat, _delete, _insert, _move)


# The container


def _header(data: bytes, random: Random) -> bytes:
    """A field of one of the archive's headers becomes another number."""
    signature = random.choice(_HEADERS)
    places = list(_find(data, signature))
    if not places:
        raise _Unreadable
    place = random.choice(places) + random.randrange(4, _HEADER_BYTES)
    width = random.choice((1, 2, 4, 8))
    number = random.choice((*_NUMBERS, random.randrange(1 << 16), len(data)))
    changed = number.to_bytes(8, "little")[:width]
    return (data[:place] + changed + data[place + width :])[: len(data)]


def _find(data: bytes, wanted: bytes) -> Iterator[int]:
    place = data.find(wanted)
    while place >= 0:
        yield place
        place = data.find(wanted, place + 1)


@dataclass
class _Parts:
    """A file taken apart: its records can be changed, and it is put together with true sums."""

    stem: str
    records: list[tuple[str, bytes]]

    @classmethod
    def of(cls, data: bytes) -> _Parts:
        try:
            stem, records = archive.read_records(io.BytesIO(data))
        except FormatError:
            raise _Unreadable from None
        taken = [(r.name, data[r.offset : r.offset + r.length]) for r in records.values()]
        return cls(stem, taken)

    @property
    def pickled(self) -> bytes:
        return dict(self.records).get("data.pkl", b"")

    def with_pickle(self, pickled: bytes) -> bytes:
        return _Parts(
            self.stem, [(n, pickled if n == "data.pkl" else data) for n, data in self.records]
        ).joined()

    def joined(self) -> bytes:
        layout = archive.plan_archive(self.stem, [(name, len(data)) for name, data in self.records])
        written = bytearray(layout.length)
        for record, (_, data) in zip(layout.records, self.records, strict=True):
            written[record.offset : record.offset + record.length] = data
        for offset, part in archive.frame(layout, [zlib.crc32(data) for _, data in self.records]):
            written[offset : offset + len(part)] = part
        return bytes(written)


def _records(data: bytes, random: Random) -> bytes:
    """Records lost, doubled, swapped, renamed, or of another length."""
    parts = _Parts.of(data)
    records = parts.records
    one, other = random.randrange(len(records)), random.randrange(len(records))
    name, content = records[one]
    match random.randrange(6):
        case 0:
            del records[one]
        case 1:
            records.insert(other, (name + random.choice(("", "0")), content))
        case 2:
            records[one], records[other] = records[other], records[one]
        case 3:
            records[one] = (records[other][0], content)
        case 4:
            records[one] = (name, content[: random.randrange(len(content) + 1)])
        case _:
            records[one] = (name, content + bytes(random.choice((1, 4, 4096))))
    if not records:
        raise _Unreadable
    return parts.joined()


# The pickle


def _pickle_bytes(data: bytes, random: Random) -> bytes:
    """Damage in the pickle, under a true checksum."""
    parts = _Parts.of(data)
    return parts.with_pickle(random.choice(_BYTES)(parts.pickled, random))


def _opcodes(data: bytes, random: Random) -> bytes:
    """Opcodes of the pickle changed, lost, doubled or moved."""
    parts = _Parts.of(data)
    pickled = parts.pickled
    try:
        starts = [place for _, _, place in pickletools.genops(pickled) if place is not None]
    except Exception:
        raise _Unreadable from None
    pieces = [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]
    for _ in range(random.choice((1, 1, 2, 5))):
        one, other = random.randrange(len(pieces)), random.randrange(len(pieces))
        match random.randrange(6):
            case 0:
                pieces[one] = b""
            case 1:
                pieces.insert(other, pieces[one])
            case 2:
                pieces[one] = pieces[other]
            case 3:
                pieces[one] = bytes([random.choice(_OPCODES)]) + pieces[one][1:]
            case 4:
                pieces.insert(one, bytes([random.choice(_OPCODES)]) + random.randbytes(2))
            case _:
                pieces[one] = _other_number(pieces[one], random)
    return parts.with_pickle(b"".join(pieces))


def _other_number(piece: bytes, random: Random) -> bytes:
    """An opcode with another number in its argument."""
    number = random.choice(_NUMBERS)
    match piece[:1]:
        case b"K" | b"M" | b"J":
            return b"J" + struct.pack("<I", number)
        case b"h" | b"j":
            return b"j" + struct.pack("<I", random.choice((number, random.randrange(400))))
        case b"q" | b"r":
            return b"r" + struct.pack("<I", random.choice((number, random.randrange(400))))
        case b"X" | b"\x8b":
            return piece[:1] + struct.pack("<I", number) + piece[5:]
        case _:
            return piece


# The objects


def _objects(data: bytes, random: Random) -> bytes:
    """Values of the object graph replaced: by extremes, by other values of it, by their owners."""
    return _edited(data, random, _replace)


def _beside(data: bytes, random: Random) -> bytes:
    """Lies about what stands beside the tensors: entries, param groups, of which save it is."""
    return _edited(data, random, _mislead)


def _edited(data: bytes, random: Random, edit: Callable[[Any, Random], None]) -> bytes:
    parts = _Parts.of(data)
    contents = dict(parts.records)

    def make_storage(kind: Global, key: str, location: str, numel: int) -> Storage:
        return Storage(kind, location, numel, (Extent(key, 0, 0),))

    try:
        root = pickling.load(parts.pickled, make_storage)
        for _ in range(random.choice((1, 1, 2, 4))):
            edit(root, random)
        pickled, storages = pickling.dump(root)
    except Exception:
        raise _Unreadable from None
    names = [s.content[0].path for s in storages if isinstance(s.content[0], Extent)]
    small = [(n, c) for n, c in parts.records if not n.startswith("data/")]
    data_records = [(f"data/{i}", contents.get(f"data/{n}", b"")) for i, n in enumerate(names)]
    return _Parts(parts.stem, [small[0], *data_records, *small[1:]]).with_pickle(pickled)


_Place = tuple[Any, Any]
"""A container, and a key or index or attribute in it."""


def _places(root: Any) -> list[_Place]:
    """Every place in a graph that holds a value."""
    found: list[_Place] = []
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        here: list[_Place] = []
        if isinstance(node, dict):
            here = [(node, key) for key in node]
        elif isinstance(node, list):
            here = [(node, index) for index in range(len(node))]
        elif isinstance(node, Instance):
            here = [(node.entries, key) for key in node.entries]
            here += [(node, index) for index in range(len(node.arguments))]
            pending.append(node.state)
        elif isinstance(node, Storage):
            found += [(node, "numel"), (node, "location")]
        found += here
        pending += [_value(place) for place in here]
    return found


def _value(place: _Place) -> Any:
    owner, key = place
    if isinstance(owner, Instance):
        return owner.arguments[key]
    return getattr(owner, key) if isinstance(owner, Storage) else owner[key]


def _set(place: _Place, value: Any) -> None:
    owner, key = place
    if isinstance(owner, Instance):
        owner.arguments = (*owner.arguments[:key], value, *owner.arguments[key + 1 :])
    elif isinstance(owner, Storage):
        setattr(owner, key, value)
    else:
        owner[key] = value


def _replace(root: Any, random: Random) -> None:
    places = _places(root)
    if random.random() < 0.3:  # the arguments and the top are few, and decide much
        top = [(root, key) for key in root]
        top += [(root["args"].state, key) for key in root["args"].state] if "args" in root else []
        places = top
    place = random.choice(places)
    owner, key = place
    match random.randrange(8):
        case 0 if isinstance(owner, dict):
            del owner[key]
        case 1 if isinstance(owner, dict):
            owner[random.choice(("x", 0, None, 1 << 70, (1, 2), f"{key}x"))] = owner.pop(key)
        case 2 if isinstance(owner, dict):
            other = random.choice(list(owner))
            owner[key], owner[other] = owner[other], owner[key]
        case 3:
            _set(place, _value(random.choice(places)))
        case 4:
            _set(place, random.choice((root, owner, [owner], _value(place), (_value(place),))))
        case 5 if isinstance(_value(place), tuple) and _value(place):
            value = list(_value(place))
            value[random.randrange(len(value))] = random.choice(_EXTREMES)
            _set(place, tuple(value))
        case 6 if type(_value(place)) is int:
            _set(place, _value(place) + random.choice((-1, 1, 64, -(1 << 40))))
        case _:
            _set(place, random.choice(_EXTREMES))


_PLAIN = (0, 1.5, "x", None, [1, {"a": 2}])
_OF_LAYERS: tuple[Any, ...] = (
    {"decoder.layers.1.mlp": 2}, [".layers.3."], Instance(Global("a", "B"), ()),
)  # fmt: skip
_GROUP_KEYS = ("wd_mult", "lr_mult", "max_lr", "min_lr", "is_expert_parallel", "is_decoupled_lr")


def _groups(root: Any) -> list[list[dict[str, Any]]]:
    """The param groups of each optimizer of a rank file."""
    node = root.get("optimizer", [])
    entries = node if isinstance(node, list) else [node]
    return [entry.get("optimizer", entry)["param_groups"] for entry in entries if entry]


def _mislead(root: Any, random: Random) -> None:
    if "args" not in root:  # an optimizer file
        owner = random.choice([root, *(v for v in root.values() if isinstance(v, dict))])
        owner[random.choice(("ema", "x", 7))] = random.choice((*_PLAIN, *_OF_LAYERS))
        return
    groups = random.choice(_groups(root) or [[{}]])
    group = random.choice(groups)
    match random.randrange(8):
        case 0:
            root[random.choice(("ema_model", "notes", "modelopt_state"))] = random.choice(_PLAIN)
        case 1:
            root[random.choice(("ema", "x"))] = random.choice(_OF_LAYERS)
        case 2:
            random.shuffle(groups)
        case 3:
            group[random.choice(_GROUP_KEYS)] = random.choice((0.0, 1.0, 0.25, True, False))
        case 4:
            groups.append({**group, "lr_mult": random.choice((0.5, 1.0))})
        case 5:
            groups.remove(group)
        case 6:
            root["iteration"] += random.choice((-1, 1, 1000))
        case _:
            values = root["args"].state
            name = random.choice([n for n, v in values.items() if type(v) in (int, float)])
            values[name] += random.choice((1, -1))


_Mutation = Callable[[bytes, Random], bytes]
_MUTATIONS: tuple[tuple[_Mutation, int], ...] = (
    *((mutation, 1) for mutation in _BYTES),
    (_truncate, 1),
    (_header, 4),
    (_records, 2),
    (_pickle_bytes, 6),
    (_opcodes, 6),
    (_beside, 25),
    (_objects, 12),
)
