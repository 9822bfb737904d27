"""Rewrite a Megatron checkpoint from one pipeline layout into another, bit for bit."""

from typing import TYPE_CHECKING

__version__ = "0.2.2"

from .api import convert, inspect, plan, verify
from .errors import (
    CheckpointError,
    ConversionError,
    CopyError,
    LayoutError,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    from .megatron.layout import PipelineLayout
else:

    def __getattr__(name):
        """The one name that is looked up when it is wanted: ``--help`` must not wait for it."""
        if name != "PipelineLayout":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .megatron.layout import PipelineLayout

        return PipelineLayout


__all__ = [
    "CheckpointError", "ConversionError", "CopyError", "LayoutError", "PipelineLayout",
    "UsageError", "VerificationError", "convert", "inspect", "plan", "verify",
]  # fmt: skip
