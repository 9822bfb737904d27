"""A run of Megatron-LM: the one that saved a checkpoint, or the one that will load it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

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

    def __str__(self) -> str:
        """For messages: what ``is_laid_out_like`` compares."""
        arguments = self.arguments
        overlaps = ", its first chunk apart" if arguments.overlaps_param_gather_with_step else ""
        return f"{self.layout}, data-parallel size {arguments.dp_size}{overlaps}"

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
        both = {Section.MTP, Section.HEAD}
        is_beside = any(both.issubset(chunk.sections) for chunk in self.layout.chunks)
        return self.second_embeddings - ({Section.HEAD} if is_beside else set())

    @cached_property
    def second_embeddings(self) -> frozenset[Section]:
        """The sections that have a weight which begins as a copy of the word embedding: the chunk
        with the embedding has none (gpt_model.py ``skip_weight_param_allocation``, 0.6 to 0.19)."""
        others = {Section.MTP_EMBEDDING}
        others |= {Section.HEAD} if self.arguments.ties_embeddings else set()
        found = set()
        for chunk in self.layout.chunks:
            if Section.EMBEDDING not in chunk.sections:
                found |= others.intersection(chunk.sections)
        return frozenset(found)

    def made_for(self, target: Megatron) -> frozenset[Section]:
        """Those of another run that are made of the embedding of this one."""
        new = target.embedding_copies - self.embedding_copies
        return new | (target.second_embeddings - self.second_embeddings)

    def dropped_for(self, target: Megatron) -> frozenset[Section]:
        """Those of this run that another one has not."""
        return self.second_embeddings - target.second_embeddings

    def sources_of(self, target: Megatron, pp_rank: int) -> tuple[int, ...]:
        """The pipeline ranks of this run that hold what rank ``pp_rank`` of another needs; the
        first one, whose param groups are those of all, for a rank that needs nothing."""
        wanted = target.layout.rank_chunks(pp_rank)
        layers = {layer for chunk in wanted for layer in chunk.layers}
        sections = {section for chunk in wanted for section in chunk.sections}
        if sections & self.made_for(target):
            sections.add(Section.EMBEDDING)  # which they are made of
        holders = {
            chunk.pp_rank
            for chunk in self.layout.chunks
            if layers.intersection(chunk.layers) or sections.intersection(chunk.sections)
        }
        return tuple(sorted(holders)) or (0,)

    def launch_flags(self, source: Megatron) -> str:
        """Megatron's flags for the placement, where a run goes on with another one."""
        arguments = self.arguments
        flags = arguments.placement.launch_flags(arguments.num_layers, arguments.pp_size)
        if arguments.overlaps_param_gather_with_step:
            flags += " --overlap-param-gather-with-optimizer-step"
        if arguments.pp_size != source.arguments.pp_size:
            flags = f"--pipeline-model-parallel-size {arguments.pp_size} {flags}"
        return flags.strip() or NO_FLAGS

    def relaunched(self, placement: Placement, *, overlaps: bool, **sizes: Any) -> Megatron:
        """The same run with another placement, with or without
        ``--overlap-param-gather-with-optimizer-step``, and with other ``pp_size`` or ``dp_size``.
        """
        sizes["overlaps_param_gather_with_step"] = overlaps
        return Megatron(replace(self.arguments, placement=placement, **sizes), self.rules)

    def is_laid_out_like(self, other: Megatron) -> bool:
        """Whether both save the same files: the same layers, and the same optimizers."""
        ours, theirs = self.arguments, other.arguments
        return (self.layout, ours.dp_size, ours.overlaps_param_gather_with_step) == (
            other.layout,
            theirs.dp_size,
            theirs.overlaps_param_gather_with_step,
        )

    def counterpart(self, target: Megatron, pp_rank: int) -> int:
        """The pipeline rank of this run from which rank ``pp_rank`` of another has what belongs to
        no layer: that of the same number or, beyond the last, the first that holds what it needs.
        """
        is_here = pp_rank < self.layout.pp_size
        return pp_rank if is_here else self.sources_of(target, pp_rank)[0]
