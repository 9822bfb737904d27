"""The forms in which Megatron and its forks tell how many layers each chunk has.

Each is a table of arguments over *counts in order of execution* (transformer_block.py and
transformer_layer.py, 0.6 to 0.19; pipeline_parallel_layer_layout.py, 0.13 to 0.19;
hybrid_layer_allocation.py, 0.17 to 0.19; microsoft/ltp-megatron-lm, branch uneven-pp-opt).
"""

from __future__ import annotations

import enum
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ..errors import LayoutError, show


class Order(enum.Enum):
    """Which pipeline rank and virtual stage a chunk has, by its number in order of execution."""

    INTERLEAVED = enum.auto()
    """All ranks of virtual stage 0, then all of 1, ..."""
    V_SHAPED = enum.auto()
    """All ranks of virtual stage 0, then those of 1 from the last to the first: schedules of
    forks, a source's only (FORMAT 4.9)."""

    def place(self, index: int, pp_size: int) -> tuple[int, int]:
        """Pipeline rank and virtual stage of the chunk that runs as number ``index``."""
        vp_stage, pp_rank = divmod(index, pp_size)
        if self is Order.V_SHAPED and vp_stage:
            pp_rank = pp_size - 1 - pp_rank
        return pp_rank, vp_stage


@dataclass(frozen=True, slots=True)
class Shape:
    """What is to be cut, and into what."""

    num_layers: int
    """Decoder layers."""
    pp_size: int
    vp_size: int
    mtp_num_layers: int
    order: Order

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return self.pp_size * self.vp_size

    def place(self, index: int) -> tuple[int, int]:
        """Pipeline rank and virtual stage of a chunk."""
        return self.order.place(index, self.pp_size)


@dataclass(frozen=True, slots=True)
class Cut:
    """A model cut into chunks, in order of execution."""

    counts: tuple[int, ...]
    """Decoder layers of each."""
    mtp_chunk: int
    """The one that holds the MTP layers, if there are any."""
    letters: str | None = None
    """What a hybrid's pattern calls each layer of the model; None for other models."""


def _instead(slots: int, shape: Shape) -> str:
    """What to ask for where layers do not divide evenly into chunks."""
    per_rank, rest = divmod(slots, shape.pp_size)
    another = "" if rest else _another_size([per_rank])
    if another:
        return f"{another} a layout string"
    text = even_layout_string(shape)
    option = "--target-pipeline-model-parallel-layout"
    return f"no VPP size divides them: give {option}" + (f" {text!r}" if text else "")


def _another_size(counts: Iterable[int]) -> str:
    """The beginning of advice that names the VPP sizes by which all of some numbers of layers can
    be divided; "" if there are none."""
    common = math.gcd(*counts)
    sizes = [str(size) for size in range(2, min(common, 1000) + 1) if not common % size]
    return f"choose another VPP size ({' or '.join(sizes[:8])}), or give" if sizes else ""


def even_layout_string(shape: Shape) -> str | None:
    """A layout string of chunks as even as can be, the first and last the lightest, for they hold
    embedding and loss too; None where there are fewer layers than chunks."""
    each, rest = divmod(shape.num_layers, shape.chunks)
    if not each:
        return None
    counts = [each + (1 <= index <= rest) for index in range(shape.chunks)]
    text = "E"
    for count, run in itertools.groupby(counts[:-1]):
        stages = len(list(run))
        text += f"({'t' * count}|)*{stages}" if stages > 1 else f"{'t' * count}|"
    return f"{text}{'t' * counts[-1]}{'m' * shape.mtp_num_layers}L"


@dataclass(frozen=True, slots=True)
class Even:
    """The same number of layers for all chunks; embedding and loss may count as a layer each."""

    counts_embedding: bool = False
    """account_for_embedding_in_pipeline_split."""
    counts_loss: bool = False

    def _slots(self, shape: Shape) -> int:
        return shape.num_layers + self.counts_embedding + self.counts_loss

    def cut(self, shape: Shape) -> Cut:
        """See ``Placement.place``."""
        slots, chunks = self._slots(shape), shape.chunks
        if slots % chunks:
            extra = " (embedding and loss included)" if slots != shape.num_layers else ""
            raise LayoutError(
                f"layer placement: {slots} layers{extra} do not divide into {shape.pp_size} "
                f"pipeline ranks x {shape.vp_size} virtual stages; {_instead(slots, shape)}"
            )
        counts = [slots // chunks] * chunks
        counts[0] -= self.counts_embedding
        counts[-1] -= self.counts_loss
        return Cut(tuple(counts), chunks - 1)

    def arguments(self, shape: Shape) -> dict[str, object]:
        """See ``Placement.arguments``."""
        per_stage = self._slots(shape) // shape.chunks
        return {
            "num_layers_per_virtual_pipeline_stage": per_stage if shape.vp_size > 1 else None,
            "account_for_embedding_in_pipeline_split": self.counts_embedding,
            "account_for_loss_in_pipeline_split": self.counts_loss,
        }


@dataclass(frozen=True, slots=True)
class Ends:
    """Numbers of layers of their own for the first and last pipeline stage; the others are even."""

    first: int | None = None
    """decoder_first_pipeline_num_layers."""
    last: int | None = None
    first_split: tuple[int, ...] | None = None
    """decoder_first_pipeline_num_layers_split of the Microsoft fork: layers of each virtual stage
    of the first pipeline stage."""
    last_split: tuple[int, ...] | None = None

    def with_splits(self, vp_size: int) -> Ends:
        """With those that the fork chooses itself where V does not divide a stage: the remainder
        goes to the first chunks (transformer_config.py of the fork)."""

        def split(count: int | None, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
            if given is not None or count is None or count % vp_size == 0:
                return given
            quotient, remainder = divmod(count, vp_size)
            return tuple(quotient + (v < remainder) for v in range(vp_size))

        return replace(
            self,
            first_split=split(self.first, self.first_split),
            last_split=split(self.last, self.last_split),
        )

    def cut(self, shape: Shape) -> Cut:
        """See ``Placement.place``."""
        if shape.order is Order.V_SHAPED:  # each chunk is a stage of its own
            counts = self._stage_counts(shape.num_layers, shape.chunks)
            return Cut(tuple(counts), shape.chunks - 1)
        splits = {0: self.first_split, shape.pp_size - 1: self.last_split}
        stages = self._stage_counts(shape.num_layers, shape.pp_size)
        by_rank = [
            _split_stage(pp_rank, stages, shape.vp_size, splits.get(pp_rank))
            for pp_rank in range(shape.pp_size)
        ]
        places = map(shape.place, range(shape.chunks))
        return Cut(tuple(by_rank[p][v] for p, v in places), shape.chunks - 1)

    def _stage_counts(self, num_layers: int, pp_size: int) -> list[int]:
        fixed = {0: self.first, pp_size - 1: self.last}
        given = {rank: count for rank, count in fixed.items() if count is not None}
        rest, middle = num_layers - sum(given.values()), pp_size - len(given)
        if rest < 0 or (rest if middle == 0 else rest % middle):
            raise LayoutError(
                f"layer placement: {rest} of {num_layers} layers are left for {middle} middle "
                f"stages when the first and last take {self.first} and {self.last}; "
                "they must divide evenly"
            )
        return [given.get(rank, rest // middle if middle else 0) for rank in range(pp_size)]

    def arguments(self, shape: Shape) -> dict[str, object]:
        """See ``Placement.arguments``."""
        return {
            "num_virtual_stages_per_pipeline_rank": shape.vp_size if shape.vp_size > 1 else None,
            "decoder_first_pipeline_num_layers": self.first,
            "decoder_last_pipeline_num_layers": self.last,
            "decoder_first_pipeline_num_layers_split": self.first_split and [*self.first_split],
            "decoder_last_pipeline_num_layers_split": self.last_split and [*self.last_split],
        }


def _split_stage(
    pp_rank: int, stages: Sequence[int], vp_size: int, split: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The layers of each virtual stage of one of the pipeline stages, given those of all."""
    count = stages[pp_rank]
    if split is None:
        if count % vp_size:
            raise LayoutError(
                f"pipeline rank {pp_rank}: its {count} layers (all: {_shown(stages)}) do not "
                f"divide into {vp_size} virtual stages; {_another_size(stages) or 'give'} "
                "--target-first-virtual-pipeline-num-layers-split and "
                "--target-last-virtual-pipeline-num-layers-split or a layout string"
            )
        return (count // vp_size,) * vp_size
    if len(split) != vp_size or min(split) < 1 or sum(split) != count:
        raise LayoutError(
            f"pipeline rank {pp_rank}: virtual stages of {_shown(split)} layers do not "
            f"fit; expected {vp_size} positive numbers that add up to {count}"
        )
    return split


def _shown(counts: Sequence[int]) -> str:
    return " ".join(map(str, counts[:64])) + (" ..." if counts[64:] else "")


def _check_stages(text: str, stages: int, shape: Shape) -> None:
    """Hold the stages that a text spells out to the number of chunks.

    Raises:
        LayoutError: there are more or fewer.
    """
    if stages != shape.chunks:
        raise LayoutError(
            f"{text}: {stages} stages do not make {shape.vp_size} virtual stages on "
            f"{shape.pp_size} pipeline ranks; give {shape.chunks} stages, or another multiple of "
            f"{shape.pp_size} (empty ones count, each | begins a new one)"
        )


@dataclass(frozen=True, slots=True)
class LayoutString:
    """Every stage by itself: pipeline_model_parallel_layout."""

    text: str

    def cut(self, shape: Shape) -> Cut:
        """See ``Placement.place`` (validate_layer_layout)."""
        text = f"pipeline layout {show(self.text)}"
        stages = parse_layout(self.text)
        _check_stages(text, len(stages), shape)
        letters = "".join(stages)
        problems = [
            f"{text}: expected {count} of {letter} ({meaning}), found {letters.count(letter)}; "
            "write one letter for each"
            for letter, count, meaning in (
                ("E", 1, "embedding"),
                ("t", shape.num_layers, "decoder layers"),
                ("m", shape.mtp_num_layers, "MTP layers"),
                ("L", 1, "loss"),
            )
            if letters.count(letter) != count
        ]
        if not letters.startswith("E") or not letters.endswith("L"):
            problems.append(f"{text}: the first element must be E and the last one L; reorder it")
        if "t" in letters.partition("m")[2]:
            problems.append(f"{text}: a decoder layer t after an MTP layer m; put all t first")
        holders = [index for index, stage in enumerate(stages) if "m" in stage]
        if len(holders) > 1:
            problems.append(f"{text}: MTP layers in more than one stage; put all m together")
        if holders and shape.place(holders[0])[1] != shape.vp_size - 1:
            problems.append(
                f"{text}: MTP layers before the last virtual stage of their rank; Megatron allows "
                "m only in the last one"
            )
        if holders and shape.vp_size > 1 and shape.place(holders[0])[0] == 0:
            problems.append(
                f"{text}: MTP layers on the first pipeline rank, which with virtual stages would "
                "hold two embeddings: Megatron hangs when it saves that; put m on another rank"
            )
        if problems:
            raise LayoutError(*problems)
        counts = tuple(stage.count("t") for stage in stages)
        return Cut(counts, holders[0] if holders else len(stages) - 1)

    def arguments(self, _: Shape) -> dict[str, object]:
        """See ``Placement.arguments``."""
        return {"pipeline_model_parallel_layout": self.text}


@dataclass(frozen=True, slots=True)
class HybridPattern:
    """hybrid_layer_pattern: a letter for each layer and ``|`` between stages, then ``/`` and the
    letters of a depth of multi-token prediction, for each depth (FORMAT 4.7).

    Without any ``|`` the stages are plain pipeline stages, even but for the ends that are given.
    """

    text: str
    ends: Ends = Ends()

    @property
    def stages(self) -> tuple[str, ...]:
        """The letters of each."""
        return tuple(self.text.partition("/")[0].split("|"))

    @property
    def letters(self) -> str:
        """What each decoder layer is."""
        return "".join(self.stages)

    @property
    def depths(self) -> tuple[str, ...]:
        """The letters of each depth of multi-token prediction."""
        found = tuple(self.text.split("/")[1:])
        return found if any(found) else ()

    @property
    def kinds(self) -> str:
        """What all layers are, wherever they stand."""
        return "/".join((self.letters, *self.depths))

    def divided(self, pp_size: int, vp_size: int) -> HybridPattern:
        """The same layers, as many in each chunk.

        Raises:
            LayoutError: they do not divide.
        """
        size, rest = divmod(len(self.letters), pp_size * vp_size)
        if rest:
            per_rank, odd = divmod(len(self.letters), pp_size)
            advice = "" if odd else _another_size([per_rank])
            raise LayoutError(
                f"hybrid pattern {show(self.text)}: its {len(self.letters)} layers do not divide "
                f"into {pp_size} pipeline ranks x {vp_size} virtual stages; {advice or 'give'} "
                "--target-hybrid-layer-pattern with a | between stages"
            )
        stages = (self.letters[i * size :][:size] for i in range(pp_size * vp_size))
        return HybridPattern("/".join(("|".join(stages), *self.depths)))

    def cut(self, shape: Shape) -> Cut:
        """See ``Placement.place`` (select_pipeline_segment)."""
        text, stages = f"hybrid pattern {show(self.text)}", self.stages
        problems = [
            f"{text}: {found} {what} where args.{name} tells {expected}; check that the arguments "
            "are those of this checkpoint"
            for what, name, found, expected in (
                ("layers", "num_layers", len(self.letters), shape.num_layers),
                ("MTP layers", "mtp_num_layers", len(self.depths), shape.mtp_num_layers),
            )
            if found != expected
        ]
        if problems:
            raise LayoutError(*problems)
        if len(stages) > 1 or shape.vp_size > 1:
            _check_stages(text, len(stages), shape)
            counts = tuple(map(len, stages))
        elif self.ends == Ends():
            counts = tuple(map(len, self.divided(shape.pp_size, 1).stages))
        else:
            counts = self.ends.cut(shape).counts
        return Cut(counts, shape.chunks - 1, self.letters)

    def arguments(self, _: Shape) -> dict[str, object]:
        """See ``Placement.arguments``."""
        return {
            "hybrid_layer_pattern": self.text,
            "decoder_first_pipeline_num_layers": self.ends.first,
            "decoder_last_pipeline_num_layers": self.ends.last,
        }


@dataclass(frozen=True, slots=True)
class Listed:
    """The layers of each chunk as a list, in arguments of forks; a source's only.

    The list is rank by rank: virtual stages of pipeline rank 0, of rank 1, ... (MindSpeed's
    num_layer_list and others have no virtual stages, Primus has); for V-shaped schedules it is in
    order of execution (FORMAT 4.6).
    """

    counts: tuple[int, ...]
    argument: str
    """That tells them."""

    def cut(self, shape: Shape) -> Cut:
        """See ``Placement.place``."""
        if len(self.counts) != shape.chunks or sum(self.counts) != shape.num_layers:
            raise LayoutError(
                f"layer placement: args.{self.argument} tells {len(self.counts)} stages of "
                f"{sum(self.counts)} layers, not {shape.chunks} of {shape.num_layers}; "
                "check that the arguments are those of this checkpoint"
            )
        counts = self.counts
        if shape.order is Order.INTERLEAVED:
            places = map(shape.place, range(shape.chunks))
            counts = tuple(counts[p * shape.vp_size + v] for p, v in places)
        return Cut(counts, shape.chunks - 1)

    def arguments(self, _: Shape) -> dict[str, object]:
        """See ``Placement.arguments``."""
        return {}


Form: TypeAlias = Even | Ends | LayoutString | HybridPattern | Listed


# Groups first, and once: Megatron's do not nest (FORMAT 4.4).
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
    if strange and strange[0] in "()*0123456789":
        raise LayoutError(
            f"pipeline layout {show(text)}: groups are written (...)*n, in whole numbers, and do "
            "not nest; write the inner ones out"
        )
    if strange:
        raise LayoutError(
            f"pipeline layout {show(text)}: letter {strange[0]!r} is unknown; use E (embedding), "
            "t (decoder layer), m (MTP layer), L (loss), | between stages, without spaces"
        )
    return tuple(unrolled.split("|"))
