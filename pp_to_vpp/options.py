"""What a run is asked to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path


class Depth(enum.Enum):
    """How much of a target is verified."""

    NONE = "none"
    STRUCTURE = "structure"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked to do (the command line, typed)."""

    load_dir: Path
    save_dir: Path | None = None
    pp_size: int | None = None
    ep_size: int | None = None
    tp_size: int | None = None
    target_vp_size: int | None = None
    first_split: tuple[int, ...] | None = None
    last_split: tuple[int, ...] | None = None
    target_layout: str | None = None
    overlaps_param_gather_with_step: bool = False
    processes: int = 8
    pp_ranks: tuple[int, ...] | None = None
    is_dry_run: bool = False
    depth: Depth = Depth.STRUCTURE
    resume: bool = False

    @property
    def verifies_only(self) -> bool:
        """No target layout is asked for: the target is there and is to be verified."""
        return self.target_vp_size is None and self.target_layout is None
