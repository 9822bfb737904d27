"""Where real Megatron-LM lies: work trees and releases of emerging optimizers, by variables."""

from __future__ import annotations

import os
import re
from pathlib import Path

TREES = "MEGATRON_TREES"
"""A folder with a work tree of each version, such as ``0.16.1/pretrain_gpt.py``."""
EMERGING = "EMERGING_OPTIMIZERS"
"""A folder with the releases of emerging-optimizers (Muon, SOAP), such as
``0.2.0/emerging_optimizers``; without it they are not drawn."""


def trees() -> dict[str, Path]:
    """The work trees, by version; none where the variable does not name any."""
    where = os.environ.get(TREES)
    scripts = sorted(Path(where).glob("*/pretrain_gpt.py")) if where else []
    return {script.parent.name: script.parent.resolve() for script in scripts}


def emerging_optimizers(tree: Path) -> Path | None:
    """The release that a tree's ``pyproject.toml`` asks for, if it is there."""
    where, project = os.environ.get(EMERGING), tree / "pyproject.toml"
    asked = re.search(r'emerging_optimizers = .*rev = "v([\d.]+)"', project.read_text())
    found = Path(where, asked[1]).resolve() if where and asked else None
    return found if found is not None and found.is_dir() else None
