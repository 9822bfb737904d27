"""Pieces of files: the bytes that a target is made of."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Extent:
    """``length`` bytes of the file ``path``, from ``offset`` on."""

    path: str
    offset: int
    length: int

    def blocks(self, offset: int, block: int) -> Extent:
        """The whole blocks of the file in it that can be shared with a file in which it stands at
        ``offset``; none, at its start, where it does not stand alike in its block there."""
        start = -self.offset % block
        length = (self.length - start) // block * block
        is_alike = block > 1 and (self.offset - offset) % block == 0
        return self.cut(start, length) if is_alike and length > 0 else self.cut(0, 0)

    def cut(self, start: int, length: int) -> Extent:
        """The part that begins ``start`` bytes into this extent."""
        return Extent(self.path, self.offset + start, length)

    def segments(self, length: int) -> Iterator[Extent]:
        """The extent in parts of ``length`` bytes, the last one shorter."""
        for start in range(0, self.length, length):
            yield self.cut(start, min(length, self.length - start))


@dataclass(frozen=True, slots=True)
class Zeros:
    """``length`` zero bytes: alignment holes and bucket padding."""

    length: int


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes made by this program: a pickle, a version record."""

    data: bytes

    @property
    def length(self) -> int:
        """Number of bytes."""
        return len(self.data)


Piece: TypeAlias = Extent | Zeros | Literal


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


def cut_pieces(pieces: Iterable[Piece], borders: Mapping[str, Sequence[int]]) -> tuple[Piece, ...]:
    """The same bytes with no piece across a border: sorted offsets in each file."""
    found: list[Piece] = []
    for piece in pieces:
        if not isinstance(piece, Extent):
            found.append(piece)
            continue
        own = borders.get(piece.path, ())
        first = bisect.bisect_right(own, piece.offset)
        last = bisect.bisect_left(own, piece.offset + piece.length)
        cuts = (piece.offset, *own[first:last], piece.offset + piece.length)
        found += (Extent(piece.path, a, b - a) for a, b in itertools.pairwise(cuts))
    return tuple(found)
