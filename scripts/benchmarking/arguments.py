"""The training arguments of a made checkpoint: those that Megatron 0.16 saves, some 680."""

from __future__ import annotations

import argparse
import enum
import importlib
import json
import signal
import sys
import types
from pathlib import Path
from typing import Any

_ENUMS = {
    "megatron.core.enums": {"ModelType": {"encoder_or_decoder": 1}},
    "megatron.core.transformer.enums": {"AttnBackend": {"auto": 5}},
}


def register_enums() -> None:
    """Make Megatron's enums importable where Megatron is not, for ``torch.save`` and ``load``."""
    for path, classes in _ENUMS.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            sys.modules.setdefault(name, types.ModuleType(name))
        for name, members in classes.items():
            made = enum.Enum(name, members, module=path)  # type: ignore[misc]
            setattr(sys.modules[path], name, made)


def _decoded(value: Any) -> Any:
    """A value of ``arguments.json``; objects and enum members stand there by name."""
    if not isinstance(value, dict):
        return value
    if value.get("enum") == "signal.Signals":
        return signal.Signals(value["value"])
    full_name: str = value["enum"] if "enum" in value else value["object"]
    path, _, name = full_name.rpartition(".")
    found = getattr(importlib.import_module(path), name)
    return found(value["value"]) if "enum" in value else found


def saved_arguments(changes: dict[str, Any]) -> argparse.Namespace:
    """The saved ``args`` with some values changed. ``register_enums`` must have been called."""
    text = Path(__file__).with_name("arguments.json").read_text()
    values = {name: _decoded(value) for name, value in json.loads(text).items()}
    unknown = changes.keys() - values.keys()
    if unknown:
        raise ValueError(f"Megatron 0.16 has no arguments {sorted(unknown)}")
    return argparse.Namespace(**{**values, **changes})
