"""How Megatron places decoder layers, embedding, MTP and loss on (pipeline rank, virtual stage).

Chunks run in the order (v=0: p=0..P-1), (v=1: p=0..P-1), ...; the layers of a chunk are a
contiguous range that follows from the counts of all chunks before it. So a placement is a list of
counts in that order (transformer_block.py and transformer_layer.py, 0.6 to 0.19;
pipeline_parallel_layer_layout.py, 0.13 to 0.19; microsoft/ltp-megatron-lm, branch uneven-pp-opt).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import LayoutError, show
from .naming import Section


@dataclass(frozen=True, slots=True)
class ModelChunk:
    """What one (pipeline rank, virtual stage) holds."""

    pp_rank: int
    vp_stage: int
    layers: range
    """Global numbers, from 0."""
    sections: tuple[Section, ...]
    """The other sections it holds, in order."""


@dataclass(frozen=True, slots=True)
class PipelineLayout:
    """The placement of a whole model."""

    pp_size: int
    vp_size: int
    chunks: tuple[ModelChunk, ...]
    """In execution order: chunk of (p, v) at v * pp_size + p."""

    def __str__(self) -> str:
        """For messages: virtual pipeline size and layers of each chunk in order of execution."""
        counts = " ".join(str(len(chunk.layers)) for chunk in self.chunks)
        return f"virtual pipeline size {self.vp_size}, layers {counts}"

    def chunk(self, pp_rank: int, vp_stage: int) -> ModelChunk:
        """The chunk of one pipeline rank and virtual stage."""
        return self.chunks[vp_stage * self.pp_size + pp_rank]

    def rank_chunks(self, pp_rank: int) -> tuple[ModelChunk, ...]:
        """The chunks of one pipeline rank, by virtual stage."""
        return self.chunks[pp_rank :: self.pp_size]

    def sources_of(self, target: PipelineLayout, pp_rank: int) -> tuple[int, ...]:
        """The pipeline ranks of this layout that hold what rank ``pp_rank`` of another needs; the
        first one, whose param groups are those of all, for a rank that needs nothing."""
        wanted = target.rank_chunks(pp_rank)
        layers = {layer for chunk in wanted for layer in chunk.layers}
        sections = {section for chunk in wanted for section in chunk.sections}
        holders = {
            chunk.pp_rank
            for chunk in self.chunks
            if layers.intersection(chunk.layers) or sections.intersection(chunk.sections)
        }
        return tuple(sorted(holders)) or (0,)

    def table(self) -> str:
        """The layers of each rank and virtual stage, as text."""
        marks = {
            Section.EMBEDDING: "E", Section.MTP: "M", Section.HEAD: "L",
        }  # fmt: skip
        rows = [["", *(f"vp{v}" for v in range(self.vp_size))]]
        for p in range(self.pp_size):
            row = [f"pp{p}"]
            for chunk in self.rank_chunks(p):
                cells = [marks[s] for s in chunk.sections if s in marks and s < Section.LAYERS]
                cells += [str(layer) for layer in chunk.layers]
                cells += [marks[s] for s in chunk.sections if s in marks and s > Section.LAYERS]
                row.append(" ".join(cells) or "-")
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Placement:
    """A run's own words for its layer placement: the values of Megatron's arguments.

    At most one of the three uneven forms (account_for_*, first/last, layout string) may be used.
    """

    vp_size: int = 1
    account_for_embedding: bool = False
    account_for_loss: bool = False
    first_layers: int | None = None
    """decoder_first_pipeline_num_layers."""
    last_layers: int | None = None
    first_split: tuple[int, ...] | None = None
    """decoder_first_pipeline_num_layers_split of the Microsoft fork: layers of each virtual stage
    of the first pipeline stage."""
    last_split: tuple[int, ...] | None = None
    layout: str | None = None
    """pipeline_model_parallel_layout."""

    def place(
        self,
        num_layers: int,
        pp_size: int,
        *,
        mtp_num_layers: int = 0,
        mtp_may_stand_alone: bool = False,
    ) -> PipelineLayout:
        """The layout that these arguments mean.

        Args:
            num_layers: decoder layers of the whole model.
            pp_size: pipeline_model_parallel_size.
            mtp_num_layers: layers of multi-token prediction.
            mtp_may_stand_alone: MTP layers may have another stage than the loss, and with them the
                final norm belongs to the chunk of the last decoder layer (0.16 and later).

        Raises:
            LayoutError: Megatron could not build it either.
        """
        if self.layout is not None:
            stages = parse_layout(self.layout)
            counts, mtp_chunk = self._counts_of_string(stages, num_layers, pp_size, mtp_num_layers)
            if mtp_num_layers and mtp_chunk != len(counts) - 1 and not mtp_may_stand_alone:
                raise LayoutError(
                    f"pipeline layout {show(self.layout)}: MTP layers in another stage than the "
                    "loss, which Megatron before 0.16 cannot build; put m before L"
                )
        else:
            counts = self._counts(num_layers, pp_size)
            mtp_chunk = len(counts) - 1
        return _build(
            counts,
            pp_size,
            mtp_chunk if mtp_num_layers else None,
            mtp_may_stand_alone=mtp_may_stand_alone and mtp_num_layers > 0,
        )

    def _counts_of_string(
        self, stages: tuple[str, ...], num_layers: int, pp_size: int, mtp_num_layers: int
    ) -> tuple[list[int], int]:
        """Layers of each chunk and the chunk that holds the MTP layers (validate_layer_layout)."""
        text = f"pipeline layout {show(self.layout)}"
        if len(stages) != pp_size * self.vp_size:
            raise LayoutError(
                f"{text}: {len(stages)} stages do not make {self.vp_size} virtual stages on "
                f"{pp_size} pipeline ranks; give {pp_size * self.vp_size} stages (empty ones "
                "count, each | begins a new one)"
            )
        flat = "".join(stages)
        problems = []
        for letter, count, meaning in (
            ("E", 1, "embedding"),
            ("t", num_layers, "decoder layers"),
            ("m", mtp_num_layers, "MTP layers"),
            ("L", 1, "loss"),
        ):
            if flat.count(letter) != count:
                problems.append(
                    f"{text}: expected {count} of {letter} ({meaning}), found "
                    f"{flat.count(letter)}; write one letter for each"
                )
        if not flat.startswith("E") or not flat.endswith("L"):
            problems.append(f"{text}: the first element must be E and the last one L; reorder it")
        if "t" in flat.partition("m")[2]:
            problems.append(f"{text}: a decoder layer t after an MTP layer m; put all t first")
        holders = [index for index, stage in enumerate(stages) if "m" in stage]
        if len(holders) > 1:
            problems.append(f"{text}: MTP layers in more than one stage; put all m together")
        if holders and (holders[0] // pp_size != self.vp_size - 1 or holders[0] == 0):
            problems.append(
                f"{text}: MTP layers before the last virtual stage of their rank; Megatron allows "
                "m only in the last one"
            )
        if problems:
            raise LayoutError(*problems)
        return [stage.count("t") for stage in stages], holders[0] if holders else len(stages) - 1

    def _counts(self, num_layers: int, pp_size: int) -> list[int]:
        """Layers of each chunk in execution order, without a layout string."""
        if self.first_layers is None and self.last_layers is None:
            return self._accounted_counts(num_layers, pp_size)
        if self.account_for_embedding or self.account_for_loss:
            raise LayoutError(
                "layer placement: account_for_*_in_pipeline_split together with "
                "decoder_first/last_pipeline_num_layers; Megatron takes one of the two"
            )
        stages = self._stage_counts(num_layers, pp_size)
        by_rank = [[count // self.vp_size] * self.vp_size for count in stages]
        splits = {0: self.first_split, pp_size - 1: self.last_split}
        for pp_rank, count in enumerate(stages):
            split = splits.get(pp_rank)
            if split is not None:
                by_rank[pp_rank] = self._checked_split(split, count, pp_rank)
            elif count % self.vp_size:
                raise LayoutError(
                    f"pipeline rank {pp_rank}: its {count} layers do not divide into "
                    f"{self.vp_size} virtual stages; choose another VPP size, or give "
                    "--target-first-virtual-pipeline-num-layers-split and "
                    "--target-last-virtual-pipeline-num-layers-split or a layout string"
                )
        return [by_rank[p][v] for v in range(self.vp_size) for p in range(pp_size)]

    def _checked_split(self, split: tuple[int, ...], count: int, pp_rank: int) -> list[int]:
        if len(split) != self.vp_size or min(split) < 1 or sum(split) != count:
            shown = " ".join(map(str, split))
            raise LayoutError(
                f"pipeline rank {pp_rank}: virtual stages of {shown} layers do not fit; expected "
                f"{self.vp_size} positive numbers that add up to {count}"
            )
        return list(split)

    def _stage_counts(self, num_layers: int, pp_size: int) -> list[int]:
        """Layers of each pipeline stage with decoder_first/last_pipeline_num_layers."""
        fixed = {0: self.first_layers, pp_size - 1: self.last_layers}
        given = {rank: count for rank, count in fixed.items() if count is not None}
        rest, middle = num_layers - sum(given.values()), pp_size - len(given)
        if rest < 0 or (rest if middle == 0 else rest % middle):
            raise LayoutError(
                f"layer placement: {rest} of {num_layers} layers are left for {middle} middle "
                f"stages when the first and last take {self.first_layers} and {self.last_layers}; "
                "they must divide evenly"
            )
        return [given.get(rank, rest // middle if middle else 0) for rank in range(pp_size)]

    def _accounted_counts(self, num_layers: int, pp_size: int) -> list[int]:
        """Even counts; embedding and loss may count as a layer each."""
        slots = num_layers + self.account_for_embedding + self.account_for_loss
        chunks = pp_size * self.vp_size
        if slots % chunks:
            extra = " (embedding and loss included)" if slots != num_layers else ""
            raise LayoutError(
                f"layer placement: {slots} layers{extra} do not divide into {pp_size} pipeline "
                f"ranks x {self.vp_size} virtual stages; choose another VPP size, or give "
                "--target-pipeline-model-parallel-layout"
            )
        counts = [slots // chunks] * chunks
        counts[0] -= self.account_for_embedding
        counts[-1] -= self.account_for_loss
        return counts

    def arguments(self, num_layers: int, pp_size: int) -> Mapping[str, object]:
        """The attributes of ``args`` that say this placement, as validate_args leaves them."""
        is_virtual = self.vp_size > 1
        slots = num_layers + self.account_for_embedding + self.account_for_loss
        by_count = is_virtual and self.layout is None and self.first_layers is None
        by_count = by_count and self.last_layers is None
        return {
            "virtual_pipeline_model_parallel_size": self.vp_size if is_virtual else None,
            "num_layers_per_virtual_pipeline_stage": (
                slots // (pp_size * self.vp_size) if by_count else None
            ),
            "num_virtual_stages_per_pipeline_rank": (
                self.vp_size if is_virtual and not by_count and self.layout is None else None
            ),
            "pipeline_model_parallel_layout": self.layout,
            "account_for_embedding_in_pipeline_split": self.account_for_embedding,
            "account_for_loss_in_pipeline_split": self.account_for_loss,
            "decoder_first_pipeline_num_layers": self.first_layers,
            "decoder_last_pipeline_num_layers": self.last_layers,
            "decoder_first_pipeline_num_layers_split": (
                None if self.first_split is None else list(self.first_split)
            ),
            "decoder_last_pipeline_num_layers_split": (
                None if self.last_split is None else list(self.last_split)
            ),
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

    def with_even_splits(self) -> Placement:
        """The splits that the fork chooses itself where V does not divide a stage: the remainder
        goes to the first chunks (transformer_config.py of the fork)."""

        def split(count: int | None, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
            if given is not None or count is None or count % self.vp_size == 0:
                return given
            quotient, remainder = divmod(count, self.vp_size)
            return tuple(quotient + (v < remainder) for v in range(self.vp_size))

        return replace(
            self,
            first_split=split(self.first_layers, self.first_split),
            last_split=split(self.last_layers, self.last_split),
        )


def _build(
    counts: list[int], pp_size: int, mtp_chunk: int | None, *, mtp_may_stand_alone: bool
) -> PipelineLayout:
    last = len(counts) - 1
    norm_chunk = last
    if mtp_may_stand_alone:
        norm_chunk = max((i for i, count in enumerate(counts) if count), default=last)
    starts = [0, *itertools.accumulate(counts)]
    chunks = []
    for index, count in enumerate(counts):
        held = {
            Section.EMBEDDING: index == 0,
            Section.MTP_EMBEDDING: index == mtp_chunk != 0,
            Section.FINAL_NORM: index == norm_chunk,
            Section.MTP: index == mtp_chunk,
            Section.HEAD: index == last,
        }
        chunks.append(
            ModelChunk(
                pp_rank=index % pp_size,
                vp_stage=index // pp_size,
                layers=range(starts[index], starts[index] + count),
                sections=tuple(section for section, here in held.items() if here),
            )
        )
    return PipelineLayout(pp_size, len(counts) // pp_size, tuple(chunks))


_GROUP_TIMES = re.compile(r"\(([^()]+)\)\*([0-9]+)")
_LETTER_TIMES = re.compile(r"(.)\*([0-9]+)")
_MAX_LAYOUT_LENGTH = 100_000


def parse_layout(text: str) -> tuple[str, ...]:
    """The stages of a layout string, each as its letters: ``Et*2|(t|)*2L`` -> Ett, t, t, L.

    The grammar is that of PipelineParallelLayerLayout.parse_str_to_list (0.14): commas are
    cosmetic, ``(...)*n`` unrolls first and does not nest, then ``x*n``.

    Raises:
        LayoutError: a letter that is not one of E, t, m, L, or an absurd length.
    """
    unrolled = text.replace(",", "")
    for pattern in (_GROUP_TIMES, _LETTER_TIMES):
        length = len(unrolled)
        for match in pattern.finditer(unrolled):
            times = match[2]
            length += len(match[1]) * (int(times) if len(times) < 7 else _MAX_LAYOUT_LENGTH)
        if length > _MAX_LAYOUT_LENGTH:
            raise LayoutError(f"pipeline layout {show(text)}: absurdly long; check its numbers")
        unrolled = pattern.sub(lambda match: match[1] * int(match[2]), unrolled)
    strange = sorted(set(unrolled) - set("EtmL|"))
    if strange:
        raise LayoutError(
            f"pipeline layout {show(text)}: letter {strange[0]!r} is unknown; use E (embedding), "
            "t (decoder layer), m (MTP layer), L (loss), | between stages, without spaces"
        )
    return tuple(unrolled.split("|"))
