"""Tests that need Megatron-Core are skipped without."""

from __future__ import annotations

import importlib.util

import pytest


def _has_megatron() -> bool:
    try:
        return importlib.util.find_spec("megatron.core") is not None
    except ModuleNotFoundError:
        return False


NEEDS_MEGATRON = [
    pytest.mark.megatron,
    pytest.mark.skipif(not _has_megatron(), reason="megatron-core is not installed"),
]
