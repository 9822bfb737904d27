"""Where the parts of a model are: layers and sections of each (pipeline rank, virtual stage)."""

from __future__ import annotations

from dataclasses import dataclass

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
    letters: str | None = None
    """What a hybrid's pattern calls each of its layers; None for other models."""
    noop_layers: frozenset[int] = frozenset()
    """Those of its layers that have no parameters, hence no keys."""


@dataclass(frozen=True, slots=True)
class PipelineLayout:
    """The placement of a whole model."""

    pp_size: int
    vp_size: int
    chunks: tuple[ModelChunk, ...]
    """In order of execution."""

    def __str__(self) -> str:
        """For messages: virtual pipeline size and layers of each chunk in order of execution."""
        counts = " ".join(str(len(chunk.layers)) for chunk in self.chunks)
        return f"virtual pipeline size {self.vp_size}, layers {counts}"

    def rank_chunks(self, pp_rank: int) -> tuple[ModelChunk, ...]:
        """The chunks of one pipeline rank, by virtual stage."""
        own = (chunk for chunk in self.chunks if chunk.pp_rank == pp_rank)
        return tuple(sorted(own, key=lambda chunk: chunk.vp_stage))
