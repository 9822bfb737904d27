"""Pieces of files: the bytes that a target is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


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
