"""The words shared by all floors: ranks, byte ranges, storages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

MODEL_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"

_RANK_FOLDER = re.compile(r"mp_rank_([0-9]{2,9})_([0-9]{3,9})(?:_([0-9]{3,9}))?")


@dataclass(frozen=True, slots=True, order=True)
class RankId:
    """The model-parallel coordinates that name a rank folder (checkpointing.py, 0.6 to 0.19)."""

    tp_rank: int
    pp_rank: int
    ep_rank: int | None
    """None when expert_model_parallel_size is 1: the folder name has no third number then."""

    @classmethod
    def parse(cls, folder: str) -> RankId | None:
        """``mp_rank_00_003_001`` -> (0, 3, 1); None for any other name, e.g. without a PP rank."""
        match = _RANK_FOLDER.fullmatch(folder)
        if match is None:
            return None
        tp_rank, pp_rank, ep_rank = match.groups()
        return cls(int(tp_rank), int(pp_rank), None if ep_rank is None else int(ep_rank))

    @property
    def folder(self) -> str:
        """The folder's name; the widths are minimums."""
        name = f"mp_rank_{self.tp_rank:02d}_{self.pp_rank:03d}"
        return name if self.ep_rank is None else f"{name}_{self.ep_rank:03d}"

    @property
    def family(self) -> tuple[int, int]:
        """(tp_rank, ep_rank): layers move only between ranks that share it."""
        return (self.tp_rank, self.ep_rank or 0)


@dataclass(frozen=True, slots=True)
class Extent:
    """``length`` bytes of the file ``path``, from ``offset`` on."""

    path: str
    offset: int
    length: int

    def cut(self, start: int, length: int) -> Extent:
        """The part that begins ``start`` bytes into this extent."""
        return Extent(self.path, self.offset + start, length)


@dataclass(frozen=True, slots=True)
class Zeros:
    """``length`` zero bytes: alignment holes and bucket padding."""

    length: int

    def cut(self, start: int, length: int) -> Zeros:  # noqa: ARG002  (zeros are alike everywhere)
        """A part of these zeros."""
        return Zeros(length)


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes made by this program: a pickle, a version record."""

    data: bytes

    @property
    def length(self) -> int:
        """Number of bytes."""
        return len(self.data)

    def cut(self, start: int, length: int) -> Literal:
        """The part that begins ``start`` bytes into this literal."""
        return Literal(self.data[start : start + length])


Piece: TypeAlias = Extent | Zeros | Literal


def cut_pieces(pieces: tuple[Piece, ...], start: int, length: int) -> tuple[Piece, ...]:
    """The bytes ``start .. start + length`` of a sequence of pieces, as pieces."""
    if len(pieces) == 1:
        return (pieces[0].cut(start, length),)
    taken: list[Piece] = []
    position = 0
    for piece in pieces:
        low, high = max(start, position), min(start + length, position + piece.length)
        if low < high:
            taken.append(piece.cut(low - position, high - low))
        position += piece.length
    return tuple(taken)


def join_pieces(pieces: list[Piece]) -> tuple[Piece, ...]:
    """The same bytes in as few pieces as possible: neighbours in one file become one extent."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if (
            isinstance(piece, Extent)
            and isinstance(last, Extent)
            and piece.path == last.path
            and piece.offset == last.offset + last.length
        ):
            joined[-1] = Extent(last.path, last.offset, last.length + piece.length)
        elif isinstance(piece, Zeros) and isinstance(last, Zeros):
            joined[-1] = Zeros(last.length + piece.length)
        elif piece.length:
            joined.append(piece)
    return tuple(joined)
