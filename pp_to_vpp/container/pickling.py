"""The object graph of a ``.pt`` file, read and written without importing what it names.

``torch.save`` pickles at protocol 2; tensors are calls of ``torch._utils._rebuild_tensor_v2`` over
a persistent id that names a storage record. ``load`` turns every global into an inert ``Global``
and every call into an inert ``Instance`` that remembers what it was made of, so nothing in a
checkpoint can run. ``dump`` writes such a graph back with the opcodes that ``torch.save`` itself
would have chosen.
"""

from __future__ import annotations

import hashlib
import io
import operator
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, cast

from ..errors import FormatError
from .callables import acting, is_attribute
from .extents import Extent, Piece


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Instance:
    """An object of a class that is not imported: what it was made of.

    ``entries`` and ``appended`` are what was set or appended after construction (an OrderedDict's
    items), ``state`` what ``__setstate__`` would get.
    """

    factory: Global | Instance
    """The latter only for a class that stands in another one: ``getattr(Outer, "Inner")``."""
    arguments: tuple[Any, ...]
    by_new: bool = False
    """Made by ``factory.__new__`` (opcode NEWOBJ) instead of a call (REDUCE)."""
    entries: dict[Any, Any] = field(default_factory=dict)
    appended: list[Any] = field(default_factory=list)
    state: Any = None

    def __str__(self) -> str:
        return f"an object of {str(self.factory)[:80]}"

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Opcode APPEND."""
        self.appended.append(value)

    def extend(self, values: list[Any]) -> None:
        """Opcode APPENDS."""
        self.appended.extend(values)


@dataclass(eq=False, slots=True)
class Storage:
    """A tensor storage: its type, and where its bytes come from.

    Compared by identity: two tensors over one ``Storage`` share one record of the file.
    """

    type: Global
    """``torch.BFloat16Storage`` and the like."""
    location: str
    """Device tag such as ``cpu`` or ``cuda:3``."""
    numel: int
    """Number of elements."""
    content: tuple[Piece, ...]
    """The bytes, in order."""

    @property
    def extent(self) -> Extent:
        """The bytes of a storage that was read: one range of its file."""
        (extent,) = self.content
        assert isinstance(extent, Extent)
        return extent


ORDERED_DICT = Global("collections", "OrderedDict")


def ordered_dict(entries: dict[Any, Any], state: Any = None) -> Instance:
    """An inert ``collections.OrderedDict``."""
    return Instance(ORDERED_DICT, (), entries=entries, state=state)


def as_mapping(node: object) -> dict[Any, Any] | None:
    """The items of a dict or an OrderedDict, else None."""
    if isinstance(node, dict):
        return node
    if isinstance(node, Instance) and node.factory == ORDERED_DICT and not node.arguments:
        return node.entries
    return None


def leaves(value: Any) -> Iterator[Any]:
    """The leaves of dicts, lists and tuples, and the keys of dicts."""
    pending, seen = [value], {id(value)}
    while pending:
        node = pending.pop()
        mapping = as_mapping(node)
        inner = (
            [*mapping, *mapping.values()]
            if mapping is not None
            else list(node)
            if isinstance(node, (list, tuple))
            else None
        )
        if inner is None:
            yield node
            continue
        for part in inner:
            if id(part) not in seen or not isinstance(part, (dict, list, tuple)):
                seen.add(id(part))
                pending.append(part)


def fresh(text: str) -> str:
    """An equal string that is another object: pickle writes it again instead of referring back."""
    return "".join(list(text))


class _Bytes:
    """The pickle's bytes; a read past the end is an error, never a short answer."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def read(self, size: int) -> bytes:
        start = self._position
        self._position = end = start + size
        if size < 0 or end > len(self._data):
            raise pickle.UnpicklingError(f"{size} bytes announced, {len(self._data) - start} left")
        return self._data[start:end]

    def opcode(self) -> int:
        """One byte, as a number."""
        position = self._position
        self._position = position + 1
        try:
            return self._data[position]
        except IndexError:
            raise pickle.UnpicklingError("an opcode announced, nothing left") from None

    def readline(self) -> bytes:
        end = self._data.find(b"\n", self._position) + 1
        if not end:
            raise pickle.UnpicklingError("a name without an end")
        return self.read(end - self._position)


# What torch.save emits at protocol 2, and nothing else: no INST, OBJ, EXT, no frames, no BYTES.
_OPCODES = (
    pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4, pickle.BINFLOAT,
    pickle.BINUNICODE, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.APPEND,
    pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2,
    pickle.TUPLE3, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET,
    pickle.POP, pickle.POP_MARK, pickle.GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD,
    pickle.BINPERSID,
)  # fmt: skip
_PROTOCOL = 2
_UNWRITABLE = "its objects cannot be written back: {}"
_MAX_KEY_PARTS = 64
_GETATTR = tuple(Global(module, "getattr") for module in ("builtins", "__builtin__"))


def _check_key(key: object) -> None:
    """Refuse keys whose hash could take for ever: tuples that hold each other many times over."""
    pending, parts = [key], 0
    while pending:
        part = pending.pop()
        parts += 1
        if parts > _MAX_KEY_PARTS:
            raise pickle.UnpicklingError("a dictionary key of more than 64 parts")
        if isinstance(part, tuple):
            pending.extend(part)


def _check_attribute(arguments: tuple[Any, ...], *, is_called: bool) -> None:
    """Refuse arguments of ``getattr`` that name no member of an Enum and no nested class."""
    match arguments:
        case (Global(name=owner), str() as name) if is_attribute(owner, name, is_called=is_called):
            return
        case (Instance(factory=factory, arguments=(_, str() as owner)), str() as name) if (
            factory in _GETATTR and is_attribute(owner, name, is_called=is_called)
        ):
            return
        case (_, str() as name):
            _refuse_acting(f"getattr(..., {name[:40]!r})")
        case _:
            _refuse_acting("getattr")


def _refuse_acting(name: str) -> NoReturn:
    raise FormatError(
        f"it calls or names {name[:200]}, which does more than make a value when the file is "
        "loaded",
        cure="use another copy of the file, and trust no other file of where this came from",
    )


class _InertUnpickler(pickle._Unpickler):  # the C one calls what it loads
    """Builds inert nodes. The pure-Python base keeps its memo in a dict: no index can be a bomb."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _OPCODES
    }
    stack: list[Any]
    metastack: list[list[Any]]

    def __init__(
        self, data: bytes, make_storage: Callable[[Global, str, str, int], Storage]
    ) -> None:
        self._bytes = _Bytes(data)
        super().__init__(self._bytes)
        self._make_storage = make_storage
        self._storages: dict[str, Storage] = {}
        self._globals: dict[tuple[str, str], Global] = {}

    def load(self) -> Any:
        """The base's loop without the frames, which protocol 2 does not have: a seventh less
        time."""
        self.read, self.readline = self._bytes.read, self._bytes.readline
        self.metastack, self.stack = [], []
        self.append = self.stack.append
        next_opcode, dispatch = self._bytes.opcode, self.dispatch
        try:
            while True:
                dispatch[next_opcode()](self)
        except cast("Any", pickle)._Stop as stop:
            return stop.value

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self._globals:
            name_of_acting = acting(module, name)
            if name_of_acting is not None:
                _refuse_acting(name_of_acting)
            self._globals[key] = Global(module, name)
        return self._globals[key]

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", Global() as storage_type, str() as key, str() as location, int() as n):
                known = self._storages.get(key)
                if known is None:
                    known = self._make_storage(storage_type, key, location, n)
                    self._storages[key] = known
                if (known.type, known.location, known.numel) != (storage_type, location, n):
                    raise pickle.UnpicklingError(f"storage {key!r} is described in two ways")
                return known
            case _:
                raise pickle.UnpicklingError("a persistent id that is no storage")

    def _load_proto(self) -> None:
        version = cast("Any", self).read(1)[0]
        if version != _PROTOCOL:
            raise pickle.UnpicklingError(f"pickle protocol {version}; torch.save writes 2")

    def _load_call(self, *, by_new: bool) -> None:
        arguments = self.stack.pop()
        factory = self.stack[-1]
        is_class = isinstance(factory, Instance) and factory.factory in _GETATTR
        if not (isinstance(factory, Global) or is_class) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("a call of something that is no global")
        if is_class:
            _check_attribute(factory.arguments, is_called=True)
        elif factory in _GETATTR:
            _check_attribute(arguments, is_called=False)
        self.stack[-1] = Instance(factory, arguments, by_new)

    def _load_reduce(self) -> None:
        self._load_call(by_new=False)

    def _load_newobj(self) -> None:
        self._load_call(by_new=True)

    def _load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Instance) or target.state is not None:
            raise pickle.UnpicklingError("a state for something that takes none")
        target.state = state

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, (dict, Instance)):
            raise pickle.UnpicklingError("items for something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            target[key] = value

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items(self.stack[-1], [key, value])

    def _load_setitems(self) -> None:
        items = cast("Any", self).pop_mark()
        self._set_items(self.stack[-1], items)

    dispatch[pickle.PROTO[0]] = _load_proto
    dispatch[pickle.REDUCE[0]] = _load_reduce
    dispatch[pickle.NEWOBJ[0]] = _load_newobj
    dispatch[pickle.BUILD[0]] = _load_build
    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.SETITEMS[0]] = _load_setitems


def load(data: bytes, make_storage: Callable[[Global, str, str, int], Storage]) -> Any:
    """The object graph of a ``data.pkl``: builtin containers and scalars, ``Global``,
    ``Instance``, ``Storage``.

    Args:
        data: the whole pickle.
        make_storage: called once per storage key with (type, key, location, numel).

    Raises:
        FormatError: the pickle is not one that torch.save writes at protocol 2.
    """
    try:
        return _InertUnpickler(data, make_storage).load()
    except FormatError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error)
    except KeyError as error:
        opcode = error.args[0] if error.args else None
        reason = f"opcode {opcode!r} is not one that torch.save writes at protocol 2"
    except (ValueError, IndexError, AttributeError, TypeError, EOFError, RecursionError) as error:
        reason = f"not a pickle of torch.save ({error})"
    raise FormatError(f"its pickle is refused: {reason}")


class _InertPickler(pickle._Pickler):  # the C one cannot name what it cannot import
    """Writes a graph of ``load`` back, opcode for opcode, whichever files its parts came from.

    Python keeps one object of each string that stands in code, and pickle writes an object once:
    so Megatron's files hold the keys of plain dicts and the arguments of calls once, whichever rank
    they came from.
    """

    dispatch: ClassVar[dict[type, Callable[..., None]]] = {
        kind: pickle._Pickler.dispatch[kind]
        for kind in (type(None), bool, int, float, str, tuple, list)
    }
    memo: dict[int, Any]
    write: Callable[[bytes], object]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, _PROTOCOL)
        self.write = file.write  # the base's goes through frames, which protocol 2 does not have
        self.storages: dict[Storage, str] = {}
        self._globals: dict[Global, Global] = {}
        self._words: dict[str, str] = {}

    def _word(self, value: Any) -> Any:
        return self._words.setdefault(value, value) if type(value) is str else value

    def save(self, obj: Any, *_: Any) -> None:
        """The base's, but for its ways of pickling any live object."""
        known = self.memo.get(id(obj))
        if known is not None:
            self.write(cast("Any", self).get(known[0]))
        else:
            handler: Any = self.dispatch.get(type(obj), _InertPickler._refuse)
            handler(self, obj)

    def _save_storage(self, obj: Storage) -> None:
        key = self.storages.setdefault(obj, str(len(self.storages)))
        # torch makes a new string for each tag but the literal "cpu", which pickle so writes once.
        location = "cpu" if obj.location == "cpu" else fresh(obj.location)
        self.save(("storage", obj.type, key, location, obj.numel))
        self.write(pickle.BINPERSID)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise FormatError(_UNWRITABLE.format("one does not belong in a checkpoint"))

    def _save_global(self, obj: Global) -> None:
        """Equal globals of different source files are one global of the target."""
        known = self._globals.setdefault(obj, obj)
        if known is not obj:
            self.save(known)
            return
        name = f"c{obj.module}\n{obj.name}\n"
        self.write(name.encode("utf-8", "surrogatepass"))
        cast("Any", self).memoize(obj)

    def _save_instance(self, obj: Instance) -> None:
        me = cast("Any", self)
        me.save(obj.factory)
        words = tuple(map(self._word, obj.arguments))
        me.save(obj.arguments if all(map(operator.is_, words, obj.arguments)) else words)
        if id(obj) in self.memo:
            raise FormatError(_UNWRITABLE.format("one is made of itself"))
        me.write(pickle.NEWOBJ if obj.by_new else pickle.REDUCE)
        me.memoize(obj)
        me._batch_appends(obj.appended)
        me._batch_setitems(obj.entries.items())
        if obj.state is not None:
            me.save(obj.state)
            me.write(pickle.BUILD)

    def _save_dict(self, obj: dict[Any, Any]) -> None:
        me = cast("Any", self)
        me.write(pickle.EMPTY_DICT)
        me.memoize(obj)
        me._batch_setitems((self._word(key), value) for key, value in obj.items())

    dispatch[Storage] = _save_storage
    dispatch[dict] = _save_dict
    dispatch[Global] = _save_global
    dispatch[Instance] = _save_instance


def dump(graph: Any) -> tuple[bytes, tuple[Storage, ...]]:
    """Pickle a graph; the i-th storage returned is the record ``data/i`` of the file.

    Raises:
        FormatError: the graph holds an object of another kind, or is nested too deeply.
    """
    file = io.BytesIO()
    pickler = _InertPickler(file)
    try:
        pickler.dump(graph)
    except RecursionError:
        raise FormatError(_UNWRITABLE.format("they are nested too deeply")) from None
    return file.getvalue(), tuple(pickler.storages)


def digest(value: Any) -> str:
    """SHA-256 in hexadecimal of how a value would be written; see ``is_same``.

    Raises:
        FormatError: it cannot be.
    """
    return hashlib.sha256(dump(value)[0]).hexdigest()


def is_same(one: Any, other: Any) -> bool:
    """Whether two values would be written alike; the contents of storages do not count."""
    if type(one) is type(other) and isinstance(one, (str, int, type(None))):
        return bool(one == other)
    try:
        return dump(one)[0] == dump(other)[0]
    except FormatError:
        return False
