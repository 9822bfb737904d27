"""How Megatron places decoder layers, embedding, MTP and loss on (pipeline rank, virtual stage).

The layers of a chunk are a contiguous range that follows from the counts of all chunks that run
before it. So a placement is *counts in order of execution*, from one of several forms, and a *map
from the number of a chunk to its pipeline rank and virtual stage* (FORMAT 4).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ..errors import LayoutError
from .forms import Ends, Even, Form, Order, Shape
from .layout import ModelChunk, PipelineLayout
from .naming import Section

LISTS = ("num_layer_list", "decoder_pipeline_manual_split_list", "num_layers_to_build")
"""Arguments of forks that hold the layers of each stage: MindSpeed-LLM, Primus, others."""

_ARGUMENTS: Mapping[str, object] = {
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "decoder_first_pipeline_num_layers_split": None,
    "decoder_last_pipeline_num_layers_split": None,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,  # the older name, whose value the other has then
    **dict.fromkeys(LISTS),
}
"""The attributes of ``args`` that tell a placement, with the values of those not used."""
PLACEMENT_ARGUMENTS = frozenset(_ARGUMENTS)
FORK_SIGN = "decoder_first_pipeline_num_layers_split"
"""An argument that Microsoft's fork alone knows."""
LAYOUT_SIGN = "pipeline_model_parallel_layout"
"""The argument of layout strings, which Megatron knows from 0.13 on."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A run's own words for its layer placement: the values of Megatron's arguments."""

    vp_size: int = 1
    form: Form = field(default_factory=Even)
    order: Order = Order.INTERLEAVED

    @property
    def is_interleaved(self) -> bool:
        """Megatron's own schedule for virtual stages runs it."""
        return self.vp_size > 1 and self.order is Order.INTERLEAVED

    @property
    def has_last_stage_alone(self) -> bool:
        """Virtual stages of which the layers of the last pipeline stage alone are given."""
        form = self.form
        is_alone = isinstance(form, Ends) and form.first is None and form.last is not None
        return is_alone and self.is_interleaved

    def place(
        self,
        num_layers: int,
        pp_size: int,
        *,
        mtp_num_layers: int | None = None,
        mtp_may_stand_alone: bool = False,
        noop_layers: Collection[int] = (),
    ) -> PipelineLayout:
        """The layout that these arguments mean.

        Args:
            num_layers: decoder layers of the whole model.
            pp_size: pipeline_model_parallel_size.
            mtp_num_layers: layers of multi-token prediction; None where nobody told any number.
            mtp_may_stand_alone: MTP layers may have another stage than the loss, and where their
                number was told, even 0, the final norm belongs to the chunk of the last decoder
                layer (0.16 and later), but for hybrids.
            noop_layers: layers without parameters, which count like others (MindSpeed).

        Raises:
            LayoutError: Megatron could not build it either.
        """
        beyond = sorted(layer for layer in noop_layers if layer >= num_layers)
        if beyond:
            raise LayoutError(
                f"layer placement: args.noop_layers names layer {beyond[0]} of {num_layers}; check "
                "that the arguments are those of this checkpoint"
            )
        shape = Shape(num_layers, pp_size, self.vp_size, mtp_num_layers or 0, self.order)
        cut = self.form.cut(shape)
        last = norm_chunk = len(cut.counts) - 1
        if mtp_num_layers is not None and mtp_may_stand_alone and cut.letters is None:
            # Then the norm goes with the last decoder layer (FORMAT 3.4).
            norm_chunk = max((i for i, count in enumerate(cut.counts) if count), default=last)
        elif mtp_num_layers and cut.mtp_chunk != last:
            raise LayoutError(
                f"layer placement: MTP layers in another stage ({cut.mtp_chunk}) than the loss "
                f"({last}), where Megatron before 0.16 does not put them; put m before L"
            )
        mtp_chunk = cut.mtp_chunk if mtp_num_layers else None
        # Layers are dealt out in order of execution, so the counts say all (FORMAT 4).
        starts = [0, *itertools.accumulate(cut.counts)]
        chunks = []
        for index, count in enumerate(cut.counts):
            held = {
                Section.EMBEDDING: index == 0,
                Section.MTP_EMBEDDING: index == mtp_chunk != 0,
                Section.FINAL_NORM: index == norm_chunk,
                Section.MTP: index == mtp_chunk,
                Section.HEAD: index == last,
            }
            pp_rank, vp_stage = shape.place(index)
            layers = range(starts[index], starts[index] + count)
            sections = tuple(section for section, here in held.items() if here)
            letters = None if cut.letters is None else cut.letters[layers.start : layers.stop]
            noop = frozenset(layers).intersection(noop_layers)
            chunks.append(ModelChunk(pp_rank, vp_stage, layers, sections, letters, noop))
        return PipelineLayout(pp_size, self.vp_size, tuple(chunks))

    def arguments(self, num_layers: int, pp_size: int) -> Mapping[str, object]:
        """The attributes of ``args`` that say this placement, as validate_args leaves them."""
        return {
            **_ARGUMENTS,
            "virtual_pipeline_model_parallel_size": self.vp_size if self.vp_size > 1 else None,
            **self.form.arguments(Shape(num_layers, pp_size, self.vp_size, 0, self.order)),
        }

    def launch_flags(self, num_layers: int, pp_size: int) -> str:
        """Megatron's command-line flags for this placement."""
        flags = []
        for name, value in self.arguments(num_layers, pp_size).items():
            flag = "--" + name.replace("_", "-")
            if value is None or value is False or name == "virtual_pipeline_model_parallel_size":
                continue
            if value is True:
                flags.append(flag)
            elif isinstance(value, list):
                flags.append(f"{flag} {' '.join(map(str, value))}")
            elif isinstance(value, str):
                flags.append(f"{flag} '{value}'")
            else:
                flags.append(f"{flag} {value}")
        return " ".join(flags)
