"""Which classes and functions may stand in a pickle: those that do nothing but make a value.

A file that is converted is carried on to somebody who loads it with torch, and loading calls what
the file names. Of Python's standard library the few that make values are known. Outside it a name
does not tell what it does: classes of Megatron and its forks are carried on, and what is known to
act (run, import, unpickle, download) is refused.
"""

from __future__ import annotations

import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

_VALUES: dict[str, tuple[str, ...]] = {
    "builtins": (
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list",
        "object", "range", "set", "slice", "str", "tuple", "type", "getattr",
    ),
    "_codecs": ("encode",), "_io": ("BytesIO", "StringIO"), "io": ("BytesIO", "StringIO"),
    "argparse": ("Namespace",), "array": ("array", "_array_reconstructor"),
    "collections": ("OrderedDict", "defaultdict", "deque", "Counter", "ChainMap", "UserDict"),
    "copyreg": ("_reconstructor", "__newobj__", "__newobj_ex__"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",), "fractions": ("Fraction",), "functools": ("partial",),
    "pathlib": ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "random": ("Random",), "re": ("_compile",), "signal": ("Signals", "Handlers"),
    "types": ("SimpleNamespace",), "uuid": ("UUID", "SafeUUID"),
}  # fmt: skip
"""Of the standard library, by module; ``getattr`` is held to its arguments by who reads it."""
_ACTING = tuple(
    f"{name}."
    for name in (
        "torch.hub", "torch.load", "torch.serialization", "torch.storage._load_from_bytes",
        "torch.jit", "torch.package", "torch.compile", "torch._dynamo", "torch._inductor",
        "torch.fx", "torch.multiprocessing", "torch.utils.bottleneck", "torch.utils.collect_env",
        "torch.utils.cpp_extension", "torch.utils.data", "torch.distributed.elastic",
        "numpy.load", "numpy.distutils", "numpy.f2py", "numpy.testing", "pip", "pkg_resources",
        "setuptools", "dill", "cloudpickle", "joblib", "requests", "aiohttp", "httpx", "urllib3",
        "IPython",
    )
)  # fmt: skip
"""Of other packages, modules or names, with a dot behind."""


def acting(module: str, name: str) -> str | None:
    """What a class or function is called, if it does more than make a value; None for others.

    Pickles of protocol 2 have the names of Python 2, where those are others.
    """
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    full = f"{module}.{name}"
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names:
        return None if name in _VALUES.get(package, ()) else full
    return full if f"{full}.".startswith(_ACTING) else None


def is_attribute(owner: str, name: str, *, is_called: bool) -> bool:
    """Whether ``getattr(owner, name)`` can be a member of an Enum, or a class that stands in
    another one: so pickle at protocol 2 calls the class of such a member, and Python 3.11 names any
    member (Enum.__reduce_ex__).

    A class is known by its capital: a module or a method that some package exports is none.

    Args:
        owner: name of the class, without its module.
        name: of the attribute.
        is_called: the attribute is, so it must be a class.
    """
    classes = (owner, name) if is_called else (owner,)
    return (
        name.isidentifier()
        and name[:1] != "_"
        and all(c.lstrip("_")[:1].isupper() for c in classes)
    )
