"""How many examples the properties try: the same few in every run, or many new ones."""

from __future__ import annotations

import os

from hypothesis import settings

FACTOR = int(os.environ.get("PP_TO_VPP_EXAMPLES", "1"))
"""1 draws the same examples each time; more multiplies their number and draws new ones."""


def examples(count: int) -> settings:
    """Settings of one property."""
    return settings(max_examples=count * FACTOR)
