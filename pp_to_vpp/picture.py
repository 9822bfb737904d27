"""What moves, at a glance: stages down, virtual stages across, as text or as a drawing."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError
from .megatron.layout import ModelChunk, PipelineLayout
from .megatron.naming import Section

_MARKS = {Section.EMBEDDING: "E", Section.MTP: "M", Section.HEAD: "L"}
_FORMATS = (".svg", ".png", ".pdf")
_INCHES_PER_LAYER, _MIN_INCHES, _MAX_INCHES = 0.3, 7.0, 24.0


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive layers of a chunk, or the embedding, MTP layers or loss, that come from one
    rank."""

    text: str
    size: int
    """Number of layers; 1 for what is none."""
    origin: int
    """The pipeline rank of the source that has it."""
    moves: bool
    """That is another one than the target's."""


class _Origins:
    """The pipeline ranks of a source that hold its layers and sections."""

    def __init__(self, source: PipelineLayout) -> None:
        self._layers = {layer: held.pp_rank for held in source.chunks for layer in held.layers}
        self._sections = {own: held.pp_rank for held in source.chunks for own in held.sections}

    def parts(self, chunk: ModelChunk) -> Iterator[Part]:
        """What a chunk of a target is made of, in order; those of the source come from
        themselves."""
        yield from self._marks(chunk, before=True)
        for (origin, is_noop), group in itertools.groupby(
            chunk.layers, lambda layer: (self._layers[layer], layer in chunk.noop_layers)
        ):
            run = list(group)
            text = str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
            text = f"({text})" if is_noop else text
            yield Part(text, len(run), origin, origin != chunk.pp_rank)
        yield from self._marks(chunk, before=False)

    def _marks(self, chunk: ModelChunk, *, before: bool) -> Iterator[Part]:
        for section in chunk.sections:
            if section in _MARKS and (section < Section.LAYERS) == before:
                origin = self._sections.get(section, chunk.pp_rank)
                yield Part(_MARKS[section], 1, origin, origin != chunk.pp_rank)


Cell = Sequence[Part]
Words = Callable[[Part], str]


def moves(
    source: PipelineLayout, target: PipelineLayout, width: int = 80, *, coloured: bool = False
) -> str:
    """Source and target side by side, as text.

    What comes from another rank is followed by that rank, ``4-5<1``; where that takes more than
    ``width`` columns, by a star, and where that does too, the target stands below the source.
    """
    sides = grid(source, source), grid(target, source)
    titles = "source", "target"

    def from_rank(part: Part) -> str:
        return f"{part.text}<{part.origin}" if part.moves else part.text

    def star(part: Part) -> str:
        return f"{part.text}*" if part.moves else part.text

    stay, leave = travelling(source, target)
    said = f"{stay} layers stay on their rank, {leave} travel"
    keys = "; <1 says that it comes from pp1", "; * says that it comes from another rank"
    if not any(part.moves for row in sides[1] for cell in row for part in cell):
        keys = "", ""
    for words, key in zip((from_rank, star), keys, strict=True):
        lines = _beside([_block(cells, words, coloured=coloured) for cells in sides], titles)
        if max(map(_length, lines)) <= width:
            return "\n".join((*lines, said + key))
    below = (
        line
        for cells, title in zip(sides, titles, strict=True)
        for line in (title, *_block(cells, star, coloured=coloured))
    )
    return "\n".join((*below, said + keys[1]))


def travelling(source: PipelineLayout, target: PipelineLayout) -> tuple[int, int]:
    """How many decoder layers stay on their pipeline rank, and how many leave it."""
    before, after = (
        {layer: chunk.pp_rank for chunk in layout.chunks for layer in chunk.layers}
        for layout in (source, target)
    )
    leaving = sum(before[layer] != rank for layer, rank in after.items())
    return len(after) - leaving, leaving


def grid(layout: PipelineLayout, source: PipelineLayout) -> list[list[Cell]]:
    """What each chunk of a layout is made of, by pipeline rank and virtual stage, when it comes
    from ``source``."""
    origins = _Origins(source)
    return [
        [tuple(origins.parts(chunk)) for chunk in layout.rank_chunks(pp_rank)]
        for pp_rank in range(layout.pp_size)
    ]


_COLOUR, _PLAIN = "\x1b[36m", "\x1b[0m"


def _length(text: str) -> int:
    """Columns that a text takes."""
    return len(text.replace(_COLOUR, "").replace(_PLAIN, ""))


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _length(text))


def _lines(cells: Sequence[Sequence[Cell]], words: Words) -> list[str]:
    """Cells in columns, each with its heading."""
    rows = [["", *(f"vp{v}" for v in range(len(cells[0])))]]
    for pp_rank, row in enumerate(cells):
        texts = (" ".join(map(words, cell)) or "-" for cell in row)
        rows.append([f"pp{pp_rank}", *texts])
    widths = [max(map(_length, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(_padded, row, widths)).rstrip() for row in rows]


def _block(cells: Sequence[Sequence[Cell]], words: Words, *, coloured: bool) -> list[str]:
    def painted(part: Part) -> str:
        text = words(part)
        return f"{_COLOUR}{text}{_PLAIN}" if coloured and part.moves else text

    return _lines(cells, painted)


def _beside(blocks: Sequence[Sequence[str]], titles: Sequence[str]) -> list[str]:
    """Blocks side by side under their titles."""
    left, right = ([title, *block] for title, block in zip(titles, blocks, strict=True))
    indent = len(left[1]) - len(left[1].lstrip())
    left[0] = " " * indent + left[0]
    right[0] = " " * indent + right[0]
    width = max(map(_length, left)) + 4
    lines = itertools.zip_longest(left, right, fillvalue="")
    return [(_padded(one, width) + other).rstrip() for one, other in lines]


def check_drawing(path: Path) -> None:
    """What drawing needs, before hours of copying.

    Raises:
        UsageError: the name has no known ending, or matplotlib is missing.
    """
    if path.suffix not in _FORMATS:
        raise UsageError.of(
            "--picture",
            "the name tells no format that can be drawn",
            expected=f"a name that ends with {', '.join(_FORMATS)}",
            found=path.name,
            cure="name the file so",
        )
    try:
        import matplotlib.figure  # noqa: F401 - nobody else must wait for it
    except ImportError as error:
        raise UsageError.of(
            "--picture",
            f"it is drawn by matplotlib, which cannot be imported ({error})",
            cure="pip install matplotlib, or leave the option out",
        ) from None


def drawn(source: PipelineLayout, target: PipelineLayout | None, path: Path) -> bytes:
    """A drawing of a layout, or of two side by side with one colour for all that comes from a rank.

    Args:
        source: of the checkpoint.
        target: None where nothing is to be converted.
        path: where it will be; its ending tells the format.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    sides = [grid(layout, source) for layout in (source, target) if layout is not None]
    widths = [len(side[0]) * _column(side) for side in sides]
    inches = min(_MAX_INCHES, max(_MIN_INCHES, _INCHES_PER_LAYER * sum(widths) + 1))
    height = 0.34 * max(map(len, sides)) + 1.1
    figure = Figure(figsize=(inches, height), layout="constrained")
    axes = figure.subplots(1, len(sides), squeeze=False, width_ratios=widths)[0]
    for index, (each, side) in enumerate(zip(axes, sides, strict=True)):
        _draw_side(each, side, _colours(source.pp_size), tells_staying=index > 0)
    if target is not None:
        for each, title in zip(axes, ("source", "target"), strict=True):
            each.set_title(title, fontsize=9)
        stay, leave = travelling(source, target)
        figure.supxlabel(
            f"colour: rank of the source. {stay} layers stay on their rank (bold), {leave} travel",
            fontsize=8,
        )
    # The same picture, the same bytes.
    told = {"Date": None} if path.suffix == ".svg" else None
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "pp_to_vpp"}):
        figure.savefig(content, format=path.suffix[1:], dpi=150, metadata=told)
    return content.getvalue()


def _column(cells: Sequence[Sequence[Cell]]) -> float:
    """The width of a column, in layers."""
    return max(sum(part.size for part in cell) for row in cells for cell in row) + 0.7


def _colours(count: int) -> list[Any]:
    import matplotlib

    if count <= 10:
        return [matplotlib.colormaps["Set3"](index) for index in range(count)]
    return [
        matplotlib.colormaps["gist_rainbow"](index / count, alpha=0.55) for index in range(count)
    ]


def _draw_side(
    axes: Any, cells: Sequence[Sequence[Cell]], colours: Sequence[Any], *, tells_staying: bool
) -> None:
    column = _column(cells)
    for pp_rank, row in enumerate(cells):
        for vp_stage, cell in enumerate(row):
            left = vp_stage * column
            for part in cell:
                axes.barh(
                    pp_rank, part.size, 0.8, left, align="center", color=colours[part.origin],
                    edgecolor="0.35", linewidth=0.6,
                )  # fmt: skip
                weight = "bold" if tells_staying and not part.moves else "normal"
                axes.text(
                    left + part.size / 2, pp_rank, part.text, ha="center", va="center", fontsize=7,
                    fontweight=weight,
                )  # fmt: skip
                left += part.size
    stages = range(len(cells[0]))
    axes.set_xlim(-0.2, len(stages) * column)
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.set_yticks(range(len(cells)), [f"pp{rank}" for rank in range(len(cells))])
    axes.set_xticks([(stage + 0.5) * column - 0.35 for stage in stages], [f"vp{v}" for v in stages])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
