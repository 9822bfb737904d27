"""A conversion before its first byte: what will be done, and by whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..megatron.layout import PipelineLayout
from ..megatron.megatron import NO_FLAGS, Megatron
from ..megatron.ranks import RankId
from ..source.survey import Survey
from ..target.plan import RankPlan
from .share import Share


@dataclass(frozen=True, slots=True)
class Part:
    """What one of several processes does."""

    share: Share
    ranks: frozenset[RankId]
    """The rank folders that it writes."""
    largest_over_mean: float
    """Of the source's bytes of all processes: 1 if they share evenly."""
    awaited: Mapping[RankId, int]
    """What others write, with the bytes of the source's folders."""

    def __str__(self) -> str:
        return str(self.share)


@dataclass(frozen=True, slots=True)
class Plan:
    """A run before its first byte: what will be done."""

    survey: Survey
    save_dir: Path | None
    source: Megatron
    """The run that saved the source."""
    target: Megatron
    """The run that will load the target."""
    no_save_optim: bool
    """The target has no optimizer state."""
    manifest: Mapping[str, Any]
    """What this conversion is known by."""
    ranks: tuple[RankPlan, ...]
    """What this run writes; after a dry run, without contents."""
    facts: tuple[str, ...]
    """What the source was found to be."""
    notes: tuple[str, ...]
    """What the user should know."""
    part: Part | None = None
    """What this process does, if several share the work."""

    @property
    def length(self) -> int:
        """Bytes of what this run writes."""
        return sum(rank.length for rank in self.ranks)

    @property
    def awaited(self) -> Mapping[RankId, int]:
        """What others write and this process waits for."""
        return self.part.awaited if self.part is not None and self.writes_tracker else {}

    @property
    def writes_tracker(self) -> bool:
        """Whether this process waits for the others, and ends the conversion."""
        return self.part is None or self.part.share.index == 0

    @property
    def folders(self) -> tuple[RankId, ...]:
        """All rank folders that the target will have, whoever writes them."""
        return self.survey.ranks_of(self.target.arguments.pp_size)

    @property
    def layouts(self) -> tuple[PipelineLayout, PipelineLayout]:
        """Of source and target."""
        return self.source.layout, self.target.layout

    @property
    def launch_flags(self) -> str:
        """Megatron's flags to train from the target."""
        flags = self.target.launch_flags(self.source)
        if self.no_save_optim:
            return f"{'' if flags == NO_FLAGS else flags} --no-load-optim".strip()
        return flags
