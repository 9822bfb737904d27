"""What a run is asked to do."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError

CRC32, NO_CHECKSUMS = "crc32", "none"
MANIFEST = "pp_to_vpp.json"
"""In the iteration folder of a target: which conversion wrote it."""
_GIVE_LAYOUT = (
    "give --target-virtual-pipeline-model-parallel-size, "
    "--target-pipeline-model-parallel-layout or --target-hybrid-layer-pattern"
)
_OF_A_TARGET = (
    "first_layers", "last_layers", "first_split", "last_split", "overlaps", "no_save_optim",
    "pp_ranks", "share", "is_dry_run", "depth", "checksums", "resume",
)  # fmt: skip
"""Options that mean nothing where a checkpoint is only described."""


class Depth(enum.Enum):
    """How much of a target is verified."""

    NONE = "none"
    STRUCTURE = "structure"
    FULL = "full"

    def __str__(self) -> str:
        return self.value


class Task(enum.Enum):
    """What a run does, as its options tell."""

    INSPECT = enum.auto()
    """A checkpoint is described."""
    PLAN = enum.auto()
    """A conversion is looked at, a dry run."""
    CONVERT = enum.auto()
    VERIFY = enum.auto()
    """A target that is there is held to its source."""


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
    target_pp_size: int | None = None
    """None for the source's, like the next."""
    target_dp_size: int | None = None
    target_vp_size: int | None = None
    first_layers: int | None = None
    """decoder_first_pipeline_num_layers of the target."""
    last_layers: int | None = None
    first_split: Sequence[int] | None = None
    """Layers of each virtual stage of the target's first pipeline stage."""
    last_split: Sequence[int] | None = None
    layout_string: str | None = None
    """pipeline_model_parallel_layout of the target."""
    hybrid_pattern: str | None = None
    """hybrid_layer_pattern of the target."""
    overlaps: bool = False
    """overlap_param_gather_with_optimizer_step of the target."""
    no_save_optim: bool = False
    """The target has no optimizer state."""
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
    picture: Path | None = None
    report: Path | None = None
    log_file: Path | None = None

    @property
    def task(self) -> Task:
        """Without a target layout nothing can be converted: what is there is looked at."""
        sizes = (self.target_pp_size, self.target_dp_size, self.target_vp_size)
        if any(words is not None for words in (*sizes, self.layout_string, self.hybrid_pattern)):
            return Task.PLAN if self.is_dry_run else Task.CONVERT
        return Task.INSPECT if self.save_dir is None else Task.VERIFY

    def check(self) -> None:
        """Refuse what contradicts itself, before anything is read.

        Raises:
            UsageError: it does.
        """
        self._check_values()
        task = self.task
        if task is Task.INSPECT and self._wants_a_target():
            raise UsageError(f"{_GIVE_LAYOUT}; or --save-iteration-dir, to verify what is there")
        verifies = task is Task.VERIFY
        if verifies and (self.is_dry_run or self.resume or self.depth is Depth.NONE):
            raise UsageError(_GIVE_LAYOUT)
        if task is Task.CONVERT and self.save_dir is None:
            raise UsageError("--save-iteration-dir is required unless --dry-run is given")
        self._check_splits()

    def _wants_a_target(self) -> bool:
        """Whether something is asked for that is more than a look at the source."""
        bare = Options(self.load_dir)
        return any(getattr(self, name) != getattr(bare, name) for name in _OF_A_TARGET)

    def _check_values(self) -> None:
        """What the command line's own types refuse, for callers from Python."""
        numbers = (
            ("pipeline model parallel size", self.target_pp_size),
            ("data parallel size", self.target_dp_size),
            ("virtual pipeline model parallel size", self.target_vp_size),
            ("layers of the first pipeline stage", self.first_layers),
            ("layers of the last pipeline stage", self.last_layers),
            ("number of processes", self.processes),
        )
        for name, value in numbers:
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name}: {value!r} is not a positive number")
        if self.pp_ranks is not None and not self.pp_ranks:
            raise UsageError("pipeline ranks to process: none is named")
        if self.checksums not in (CRC32, NO_CHECKSUMS):
            raise UsageError(
                f"checksums: {self.checksums!r} is neither {CRC32!r} nor {NO_CHECKSUMS!r}"
            )

    def _check_splits(self) -> None:
        first, last, vp_size = self.first_split, self.last_split, self.target_vp_size
        ends = {self.first_layers, self.last_layers} - {None}
        if ends and any(words is not None for words in (self.layout_string, first, last)):
            raise UsageError(
                "give the layers of the first and last pipeline stage, their splits or a layout "
                "string, one of the three"
            )
        if (first is None) != (last is None):
            raise UsageError(
                "give both --target-first-... and --target-last-...-num-layers-split, or none"
            )
        if first is None or last is None:
            return
        if self.layout_string is not None:
            raise UsageError("give layer splits or a layout string, not both")
        if vp_size is None or {len(first), len(last)} != {vp_size}:
            raise UsageError(
                "each layer split needs one number for each of the "
                "--target-virtual-pipeline-model-parallel-size virtual stages"
            )
        if min(*first, *last) < 1:
            raise UsageError("layer splits are positive numbers")
