"""Rewrite a Megatron checkpoint from one pipeline layout into another, bit for bit."""

from typing import TYPE_CHECKING

__version__ = "0.3.0"

if TYPE_CHECKING:
    from .api import convert, inspect, plan, verify
    from .errors import (
        CheckpointError,
        ConversionError,
        CopyError,
        LayoutError,
        UsageError,
        VerificationError,
    )
    from .megatron.layout import PipelineLayout
else:

    def __getattr__(name):
        """Import a name when it is asked for, so that ``--help`` need not wait for all of them."""
        from importlib import import_module

        for module, names in _NAMES.items():
            if name in names:
                return getattr(import_module(module, __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_NAMES = {
    ".api": ("convert", "inspect", "plan", "verify"),
    ".errors": (
        "CheckpointError", "ConversionError", "CopyError", "LayoutError", "UsageError",
        "VerificationError",
    ),
    ".megatron.layout": ("PipelineLayout",),
}  # fmt: skip
__all__ = [
    "CheckpointError", "ConversionError", "CopyError", "LayoutError", "PipelineLayout",
    "UsageError", "VerificationError", "convert", "inspect", "plan", "verify",
]  # fmt: skip
