"""What a run is asked to do."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CRC32, NO_CHECKSUMS = "crc32", "none"


class Depth(enum.Enum):
    """How much of a target is verified."""

    NONE = "none"
    STRUCTURE = "structure"
    FULL = "full"

    def __str__(self) -> str:
        return self.value


@dataclass(slots=True)
class Options:
    """The command line; argparse fills the fields (see ``cli``)."""

    load_dir: Path
    """Iteration folder of the source."""
    save_dir: Path | None = None
    """Iteration folder of the target."""
    pp_size: int | None = None
    ep_size: int | None = None
    tp_size: int | None = None
    target_vp_size: int | None = None
    first_split: Sequence[int] | None = None
    """Layers of each virtual stage of the target's first pipeline stage."""
    last_split: Sequence[int] | None = None
    layout_string: str | None = None
    """pipeline_model_parallel_layout of the target."""
    hybrid_pattern: str | None = None
    """hybrid_layer_pattern of the target."""
    overlaps: bool = False
    """overlap_param_gather_with_optimizer_step of the target."""
    processes: int | None = None
    """Worker processes; None for as many as this process has cores, up to 8."""
    pp_ranks: Sequence[int] | None = None
    """Target pipeline ranks to be written; None for all."""
    share: str | None = None
    """Which of how many processes that share the work this is: I/N, or auto."""
    is_dry_run: bool = False
    depth: Depth = Depth.STRUCTURE
    checksums: str = CRC32
    """Of the records that are written: ``CRC32``, or ``NO_CHECKSUMS``."""
    resume: bool = False
    follow_links: bool = False
    """Files of the source may be links to files elsewhere."""
    is_quiet: bool = False
    """Nothing is printed but errors."""
    is_verbose: bool = False
    report: Path | None = None
    log_file: Path | None = None

    @property
    def verifies_only(self) -> bool:
        """No target layout is asked for: the target is there and is to be verified."""
        wanted = (self.target_vp_size, self.layout_string, self.hybrid_pattern)
        return all(words is None for words in wanted)
