"""The inert pickle machines: identical bytes out, and nothing that a pickle names ever runs."""

from __future__ import annotations

import collections
import datetime
import enum
import functools
import io
import operator
import os
import pathlib
import pickle
import pickletools
import re
import signal
import struct
import subprocess
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.container import pickling
from pp_to_vpp.container.pickling import Global, Instance, Storage, fresh, ordered_dict
from pp_to_vpp.errors import FormatError

from ..pairs import names, rank_files


def no_storage(_kind: Global, _key: str, _location: str, _numel: int) -> Storage:
    raise AssertionError("this pickle has no storages")


def make_storage(kind: Global, _key: str, location: str, numel: int) -> Storage:
    return Storage(kind, location, numel, ())


@pytest.mark.parametrize("name", names())
def test_every_real_pickle_comes_back_byte_for_byte(name: str, read_pickle: Any) -> None:
    for path in rank_files(name):
        data = read_pickle(path)
        written, storages = pickling.dump(pickling.load(data, make_storage))
        assert written == data, path
        assert len(set(storages)) == len(storages), path


class Plain:
    """A class of this test, to be pickled by reference."""

    def __init__(self) -> None:
        self.number = 3


_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30)
)
_graphs = st.recursive(
    _scalars,
    lambda part: (
        st.lists(part, max_size=5)
        | st.tuples(part, part)
        | st.dictionaries(st.text(max_size=5) | st.integers(), part, max_size=5)
        | st.dictionaries(st.text(max_size=5), part, max_size=3).map(collections.OrderedDict)
        | st.dictionaries(st.text(max_size=5), part, max_size=3).map(
            lambda names: types.SimpleNamespace(**names)
        )
    ),
    max_leaves=30,
)


@given(_graphs)
def test_graphs_of_the_c_pickler_come_back_opcode_for_opcode(graph: Any) -> None:
    data = pickle.dumps(graph, protocol=2)
    written, storages = pickling.dump(pickling.load(data, no_storage))
    assert [(o.name, a) for o, a, _ in pickletools.genops(written)] == [
        (o.name, a) for o, a, _ in pickletools.genops(data)
    ]
    assert storages == ()
    assert pickle.loads(written) == graph


def test_shared_and_recursive_objects_stay_so() -> None:
    shared = [1]
    graph: dict[str, Any] = {"a": shared, "b": shared, "long": list(range(3000))}
    graph["self"] = graph
    data = pickle.dumps(graph, protocol=2)
    loaded = pickling.load(data, no_storage)
    assert loaded["a"] is loaded["b"]
    assert loaded["self"] is loaded
    assert pickling.dump(loaded)[0] == data


def test_objects_remember_what_they_were_made_of() -> None:
    loaded = pickling.load(pickle.dumps(Plain(), protocol=2), no_storage)
    assert isinstance(loaded, Instance)
    assert loaded.factory == Global(__name__, "Plain")
    assert loaded.by_new
    assert loaded.state == {"number": 3}


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, *reduction: Any) -> None:
        self.reduction = reduction

    def __reduce__(self) -> Any:
        return self.reduction


class Outer:
    """Classes that stand in another one."""

    class Mode(enum.Enum):
        ON = 1

    @staticmethod
    def compute(code: str) -> Any:
        return code


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (Evil(os.system, ("touch RAN",)), f"{os.name}.system"),
        (Evil(eval, ("open('RAN', 'w')",)), "builtins.eval"),
        (Evil(getattr, (Evil(__import__, ("os",)), "system")), "builtins.__import__"),
        (Evil(getattr, (os.path.join, "__globals__")), "posixpath.join"),
        (Evil(getattr, (Plain, "__init__")), "getattr(..., '__init__')"),
        (Evil(getattr, (no_storage, "x")), "getattr(..., 'x')"),
        (Evil(getattr, (types.SimpleNamespace(), "x")), "getattr(..., 'x')"),
        (Evil(getattr, (Plain, 3)), "calls or names getattr"),
        (Evil(Outer.compute, ("1",)), "getattr(..., 'compute')"),
        (Evil(Plain, (), {"x": Evil(os.mkdir, ("RAN",))}), f"{os.name}.mkdir"),
        (
            [Evil(collections.OrderedDict, (), None, None, iter([("k", Evil(os.mkdir, ("R",)))]))],
            f"{os.name}.mkdir",
        ),
        ({"a bare reference": [subprocess.Popen]}, "subprocess.Popen"),
        (operator.attrgetter("x"), "operator.attrgetter"),
        (Evil(torch.hub.load, ("a", "b")), "torch.hub.load"),
    ],
)
def test_nothing_that_acts_is_read(evil: Any, name: str) -> None:
    """It is neither run nor carried on to whoever loads the target."""
    with pytest.raises(FormatError, match=re.escape(name)):
        pickling.load(pickle.dumps(evil, protocol=2), no_storage)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("cPickle", "pickle.loads"),
        ("commands", "subprocess.loads"),
        ("importlib.util", "importlib.util.loads"),
        ("pip._internal", "pip._internal.loads"),
        ("nt", "nt.loads"),
    ],
)
def test_names_of_other_pythons_and_parts_of_packages_act_too(module: str, name: str) -> None:
    with pytest.raises(FormatError, match=f"{re.escape(name)}, which does more than"):
        pickling.load(f"c{module}\nloads\n.".encode(), no_storage)


@pytest.mark.parametrize(
    "value",
    [
        Outer.Mode.ON,
        Evil(getattr, (Evil(getattr, (Outer, "Mode")), "ON")),
        {1, 2},
        frozenset((1,)),
        collections.defaultdict(list, a=[1]),
        pathlib.PurePosixPath("a"),
        datetime.timedelta(3),
        functools.partial(Plain),
        signal.SIGTERM,
        b"bytes",
        torch.optim.AdamW,
        torch.bfloat16,
        torch.nn.functional.gelu,
        Plain(),
    ],
    ids=str,
)
def test_objects_that_are_values_come_back_byte_for_byte(value: Any) -> None:
    data = pickle.dumps([value], protocol=2)
    graph = pickling.load(data, no_storage)
    assert pickling.dump(graph)[0] == data


def _doubling_tuple(depth: int) -> bytes:
    """A tuple that holds itself twice, ``depth`` times over: hashing it takes 2**depth steps."""
    data = b"\x80\x02K\x01"
    for index in range(depth):
        data += b"q" + bytes([index]) + b"h" + bytes([index]) + b"\x86"
    return data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "announced"),
        (b"\x80\x02", "announced"),
        (b"\x80\x04K\x01.", "protocol 4"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "announced"),
        (b"\x80\x02\x8b\xff\xff\xff\x7fabc.", "announced"),
        (b"\x80\x02cos\nsystem", "without an end"),
        (b"\x80\x02B\x01\x00\x00\x00a.", "opcode"),
        (b"\x80\x02(ca\nb\nQ.", "persistent id"),
        (b"\x80\x02i__main__\nPlain\n.", "opcode"),
        (b"\x80\x02\x82\x01.", "opcode"),
        (b"\x80\x02K\x01)R.", "no global"),
        (b"\x80\x02]}b.", "state"),
        (b"\x80\x02]K\x01K\x02s.", "no dictionary"),
        (b"\x80\x02h\x05.", "Memo value not found"),
        (b"\x80\x020.", "not a pickle"),
        (b"\x80\x02K\x01e.", "not a pickle"),
        (b"\x80\x02}" + b"]" + b"K\x01s.", "not a pickle"),
        (b"\x80\x02}" + _doubling_tuple(60)[2:] + b"K\x01s.", "64 parts"),
        (b"\x80\x02Kr" + struct.pack("<I", 2**32 - 1) + b".", "opcode"),
    ],
)
def test_bad_pickles_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=rf"^its pickle is refused: .*{reason}"):
        pickling.load(data, no_storage)


def test_huge_memo_indices_take_no_memory() -> None:
    data = b"\x80\x02K\x07r" + struct.pack("<I", 2**32 - 1) + b"."
    assert pickling.load(data, no_storage) == 7


def test_deep_nesting_is_refused_when_written() -> None:
    depth = 100_000
    data = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    graph = pickling.load(data, no_storage)
    with pytest.raises(FormatError, match=r"^its objects cannot be written back: .*deeply"):
        pickling.dump(graph)
    while graph:  # taken apart by hand: the interpreter would recurse too
        graph = graph.pop()


def test_objects_made_of_themselves_are_refused_when_written() -> None:
    """No pickler can write them: the object would be needed before it is there."""
    made = b"cplaces\nthing\n]q\x00\x85Rq\x01h\x00h\x01a0"  # appended to the list it is made of
    graph = pickling.load(b"\x80\x02}X\x01\x00\x00\x00x" + made + b"s.", no_storage)
    assert graph["x"].arguments == ([graph["x"]],)
    with pytest.raises(FormatError, match=r"^its objects cannot be .*made of itself"):
        pickling.dump(graph)


def test_live_objects_cannot_be_written() -> None:
    for value in (object(), Plain, b"bytes", {1, 2}, 1j):
        with pytest.raises(FormatError, match="one does not belong in a checkpoint"):
            pickling.dump({"x": value})


def _pickle_with_storages(location: str) -> bytes:
    """Two tensors of one storage and one of another, as torch.save persists them."""
    kinds = {"x": ("0", 4), "y": ("0", 4), "z": ("1", 2)}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, Plain):
                key, numel = kinds[obj.__dict__["name"]]
                place = location if location == "cpu" else location[:4] + location[4:]
                return ("storage", collections.OrderedDict, key, "".join(list(place)), numel)
            return None

    found = {}
    for name in kinds:
        found[name] = Plain()
        found[name].__dict__["name"] = name
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(found)
    return file.getvalue()


def test_storages_keep_their_identity_and_are_numbered_in_order() -> None:
    graph = pickling.load(_pickle_with_storages("cuda:3"), make_storage)
    assert graph["x"] is graph["y"]
    assert graph["x"] is not graph["z"]
    written, storages = pickling.dump({"z": graph["z"], "x": graph["x"], "y": graph["y"]})
    assert storages == (graph["z"], graph["x"])
    again = pickling.load(written, make_storage)
    assert again["x"] is again["y"]
    assert again["x"].location == "cuda:3"


def test_errors_of_storages_are_told_as_they_are() -> None:
    """Nothing is wrong with the pickle then."""

    def refuse(*_: Any) -> Storage:
        raise FormatError("no such record")

    with pytest.raises(FormatError, match=r"^no such record$"):
        pickling.load(_pickle_with_storages("cpu"), refuse)


def test_a_storage_described_in_two_ways_is_refused() -> None:
    data = (
        _pickle_with_storages("cpu")
        .replace(b"K\x02t", b"K\x03t")
        .replace(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000")
    )
    with pytest.raises(FormatError, match=r"^its pickle is refused: .*two ways"):
        pickling.load(data, make_storage)


def test_keys_and_words_of_calls_are_written_once_whichever_file_they_came_from() -> None:
    """As Python itself shares the strings that stand in code; values and ordered keys are not."""

    def call(word: str) -> Instance:
        return Instance(Global("somewhere", "Kind"), (word, 1))

    graph = [{fresh("exp_avg"): fresh("zz")}, {fresh("exp_avg"): fresh("zz")}]
    data, _ = pickling.dump([*graph, call(fresh("mode")), call(fresh("mode"))])
    assert (data.count(b"exp_avg"), data.count(b"mode"), data.count(b"zz")) == (1, 1, 2)
    named, _ = pickling.dump([ordered_dict({fresh("key"): n}) for n in range(2)])
    assert named.count(b"key") == 2
    found = pickling.load(data, no_storage)
    assert found[:2] == graph
    assert found[2].arguments == ("mode", 1)
