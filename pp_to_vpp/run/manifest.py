"""One target, one conversion: a small file in the target's iteration folder says which.

The first run makes it, exclusively; every later one, on this node or another, must agree with it.
It holds nothing of hosts, paths or times, so that each node may read its own copy of the source.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..container.archive import MAX_DIVISOR
from ..errors import CopyError, UsageError, problem, refusals, show
from ..megatron.megatron import Megatron
from ..options import CRC32, MANIFEST, Depth, Options
from . import folders

_SCHEMA = 1
_MAX_BYTES = 1 << 20
SIZES = ("pipeline_model_parallel_size", "data_parallel_size")
_BLOCK = "block"
_NO_SAVE_OPTIM = "no_save_optim"
_LATER = ("verified",)
"""What is added when all folders are there."""


def manifest_of(
    fingerprint: str,
    iteration: int | None,
    runs: tuple[Megatron, Megatron],
    block: int,
    options: Options,
) -> dict[str, Any]:
    """What a conversion is known by.

    Args:
        fingerprint: of the whole source (see ``source.fingerprint``).
        iteration: of training.
        runs: the one that saved the source, and the one that will load the target.
        block: bytes of the blocks that it may share with the source; 1 if it cannot.
        options: that change what is written.
    """
    source, target = runs
    arguments = target.arguments
    words = arguments.placement.arguments(arguments.num_layers, arguments.pp_size)
    return {
        "schema": _SCHEMA,
        "pp_to_vpp": __version__,
        "source": {"fingerprint": fingerprint, "iteration": iteration},
        "target": {
            "layout": str(target.layout),
            "arguments": dict(words),
            "overlap_param_gather_with_optimizer_step": arguments.overlaps_param_gather_with_step,
            # Told where they change what is written.
            **sizes_told(source, target),
            **({_BLOCK: block} if block > 1 else {}),
            **({"checksums": options.checksums} if options.checksums != CRC32 else {}),
            **({_NO_SAVE_OPTIM: True} if options.no_save_optim else {}),
        },
    }


def sizes_told(source: Megatron, target: Megatron) -> dict[str, int]:
    """The numbers of ranks of a target that are others than its source's."""
    own, others = source.arguments.sizes, target.arguments.sizes
    return {name: others[name] for name in SIZES if others[name] != own[name]}


def block_of(found: Mapping[str, Any]) -> int:
    """The block for which the files of a conversion were placed: so are all later ones, on
    whatever file system."""
    target = found.get("target")
    block = target.get(_BLOCK, 1) if isinstance(target, dict) else 1
    return block if type(block) is int and 0 < block <= MAX_DIVISOR else 1


def read_manifest(save_dir: Path) -> Mapping[str, Any] | None:
    """The manifest of a target; None where there is none.

    Raises:
        UsageError: it is no manifest.
        CopyError: it cannot be read.
    """
    path = save_dir / MANIFEST
    try:
        with refusals(path, "cannot be read"):
            try:
                with path.open("rb") as file:
                    found = json.loads(file.read(_MAX_BYTES))
            except (FileNotFoundError, NotADirectoryError):
                return None
    except ValueError as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(found, dict):
        raise _unreadable(path, show(found))
    return found


def _unreadable(path: Path, why: str) -> UsageError:
    return UsageError.of(
        path, "it is no manifest of a conversion", found=why, cure="choose another target folder"
    )


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> list[str]:
    """Where two conversions differ, both sides named; nothing if they are one."""
    ours, theirs = _flat(wanted), _flat(found)
    return [
        problem(
            path,
            f"another conversion writes, or wrote, this target ({name})",
            expected=show(ours.get(name)),
            found=show(theirs.get(name)),
            cure="give every run of one conversion the same source and options; for another "
            "conversion choose another --save-iteration-dir, or remove this one",
        )
        for name in dict.fromkeys((*ours, *theirs))
        if ours.get(name) != theirs.get(name) and name.partition(".")[0] not in _LATER
    ]


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def claim(save_dir: Path, manifest: Mapping[str, Any]) -> bool:
    """Make the manifest, or agree with the one that is there; whether it was made.

    It comes into being whole, by a link from a private name: that is exclusive on NFS too.

    Raises:
        UsageError: another conversion has this target.
        CopyError: it cannot be written.
    """
    path = save_dir / MANIFEST
    with refusals(save_dir, "cannot be written"):
        save_dir.mkdir(parents=True, exist_ok=True)
    try:
        if folders.write_first(path, _text(manifest)):
            return True
    except CopyError:  # it may have its name, and not have come to disk
        withdraw(save_dir)
        raise
    check(save_dir, manifest)
    return False


def check(save_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Agree with the manifest that is there, if there is one.

    Raises:
        UsageError: another conversion has this target.
    """
    found = read_manifest(save_dir)
    problems = [] if found is None else differences(found, manifest, save_dir / MANIFEST)
    if problems:
        raise UsageError(problems[0])


def finish(save_dir: Path, manifest: Mapping[str, Any], depth: Depth) -> None:
    """Note in the manifest how a target that is whole was verified.

    Raises:
        CopyError: it cannot be written.
    """
    folders.write_whole(save_dir / MANIFEST, _text({**manifest, "verified": depth.value}))


def withdraw(save_dir: Path) -> None:
    """Remove the manifest of a run that has published nothing, unless another run has begun."""
    with contextlib.suppress(OSError):
        if [entry.name for entry in os.scandir(save_dir)] == [MANIFEST]:
            (save_dir / MANIFEST).unlink()
            save_dir.rmdir()


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1) + "\n"
