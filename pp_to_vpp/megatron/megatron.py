"""A run of Megatron-LM: the one that saved a checkpoint, or the one that will load it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from .arguments import SavedArguments
from .layout import PipelineLayout
from .naming import Section
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

    @cached_property
    def embedding_copies(self) -> frozenset[Section]:
        """The sections that hold a copy of the word embedding, equal to it in weight and states:
        that of the MTP layers, and the output layer if it is tied. Beside MTP layers the tied
        weight is their copy, and no forward uses the output layer's own (language_module.py
        ``shared_embedding_or_output_weight``, 0.17 to 0.19; gpt_model.py, before)."""
        found = set()
        for held in (set(chunk.sections) for chunk in self.layout.chunks):
            found |= held & {Section.MTP_EMBEDDING}
            if self.arguments.ties_embeddings and not held & {Section.EMBEDDING, Section.MTP}:
                found |= held & {Section.HEAD}
        return frozenset(found)

    def sources_of(self, target: Megatron, pp_rank: int) -> tuple[int, ...]:
        """The pipeline ranks of this run that hold what rank ``pp_rank`` of another needs; the
        first one, whose param groups are those of all, for a rank that needs nothing."""
        wanted = target.layout.rank_chunks(pp_rank)
        layers = {layer for chunk in wanted for layer in chunk.layers}
        sections = {section for chunk in wanted for section in chunk.sections}
        if sections & (target.embedding_copies - self.embedding_copies):
            sections.add(Section.EMBEDDING)  # which they are made of
        holders = {
            chunk.pp_rank
            for chunk in self.layout.chunks
            if layers.intersection(chunk.layers) or sections.intersection(chunk.sections)
        }
        return tuple(sorted(holders)) or (0,)

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
