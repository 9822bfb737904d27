"""An old torch in a virtual environment, without the gigabytes of CUDA libraries it is linked to.

The wheels on PyPI cannot be imported without those libraries, though a CPU uses nothing in them.
Empty libraries take their place, and one that has the names that are asked for at once. What runs
is torch's own code, unchanged.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_LIBRARIES = re.compile(r"NEEDED.*\[(lib(?:cu(?!dart)|nv|nccl)[^]]*)\]")
_SYMBOLS = re.compile(r" U ((?:cu(?!da)|nv|nccl)\w+)")
"""All but the CUDA runtime, which is small: its answer that there is no device is needed."""
_REQUIREMENTS = """\
import importlib.metadata as metadata
for requirement in metadata.requires("torch"):
    if requirement.startswith(("nvidia-cuda-runtime", "sympy", "typing")):
        print(requirement)
"""
"""Prints what torch cannot be imported without."""
_OF_SYMPY = "mpmath"


def install(python: Path, version: str) -> None:
    """Put torch into the environment of a Python.

    Raises:
        subprocess.CalledProcessError: a package does not install.
        OSError: there is no C compiler.
    """
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, f"torch=={version}"], check=True)
    requirements = _printed(python, "-c", _REQUIREMENTS).splitlines()
    subprocess.run([*pip, *requirements, _OF_SYMPY], check=True)
    _make_stand_ins(_packages(python) / "torch" / "lib", _stand_ins(python))


def environment(python: Path) -> dict[str, str]:
    """The variables with which this torch is imported."""
    places = [_stand_ins(python), *_packages(python).glob("nvidia/*/lib")]
    return {
        "LD_LIBRARY_PATH": ":".join(map(str, places)),
        "LD_PRELOAD": str(_stand_ins(python) / "symbols.so"),
    }


def _packages(python: Path) -> Path:
    return Path(_printed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))


def _stand_ins(python: Path) -> Path:
    return python.parent.parent / "stand-ins"


def _make_stand_ins(libraries: Path, folder: Path) -> None:
    folder.mkdir()
    files = sorted(libraries.glob("lib*.so"))
    symbols = set(_SYMBOLS.findall(_printed("nm", "--dynamic", *files)))
    functions = "".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(symbols))
    _compile("", folder / "empty.so")
    _compile(functions, folder / "symbols.so")
    for name in set(_LIBRARIES.findall(_printed("readelf", "--dynamic", *files))):
        (folder / name).symlink_to("empty.so")


def _compile(source: str, library: Path) -> None:
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)


def _printed(*command: str | Path) -> str:
    return subprocess.check_output(command, text=True).strip()
