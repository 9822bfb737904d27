"""A run of Megatron-LM: the one that saved a checkpoint, or the one that will load it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from .arguments import SavedArguments
from .layout import PipelineLayout
from .placement import Placement
from .rules import Rules

NO_FLAGS = "(none: plain pipeline parallelism)"


@dataclass(frozen=True)
class Megatron:
    """What all that a run writes follows from: its arguments, and the rules of its version."""

    arguments: SavedArguments
    rules: Rules

    @cached_property
    def layout(self) -> PipelineLayout:
        """Where the run's layers are.

        Raises:
            LayoutError: its arguments tell an impossible placement.
        """
        return self.arguments.placement.place(
            self.arguments.num_layers,
            self.arguments.pp_size,
            mtp_num_layers=self.arguments.mtp_num_layers,
            mtp_may_stand_alone=self.rules.mtp_may_stand_alone,
            noop_layers=self.arguments.noop_layers,
        )

    @property
    def launch_flags(self) -> str:
        """Megatron's flags for the placement."""
        arguments = self.arguments
        flags = arguments.placement.launch_flags(arguments.num_layers, arguments.pp_size)
        if arguments.overlaps_param_gather_with_step:
            flags += " --overlap-param-gather-with-optimizer-step"
        return flags or NO_FLAGS

    def relaunched(self, placement: Placement, *, overlaps: bool) -> Megatron:
        """The same run with another placement, and with or without
        ``--overlap-param-gather-with-optimizer-step``."""
        arguments = replace(
            self.arguments, placement=placement, overlaps_param_gather_with_step=overlaps
        )
        return Megatron(arguments, self.rules)

    def is_laid_out_like(self, other: Megatron) -> bool:
        """Whether both save the same files: the same layers, and the same optimizers."""
        ours, theirs = self.arguments, other.arguments
        overlaps = ours.overlaps_param_gather_with_step
        return self.layout == other.layout and overlaps == theirs.overlaps_param_gather_with_step
