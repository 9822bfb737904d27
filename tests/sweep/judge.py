"""The program's two conversions of a pair, and whether they are what Megatron saved."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pp_to_vpp import cli

from ..compare import differences
from ..training.launch import Megatron, RankError
from .draw import BASE, Draw, Side

if TYPE_CHECKING:
    from collections.abc import Sequence

_ERROR = "pp_to_vpp: error: "
_RAISED = re.compile(r"[\w.]*(Error|Exception)\b|pretrain_gpt\.py: error: ")


@dataclass(frozen=True)
class Verdict:
    """What came of a draw."""

    refusal: str | None = None
    """Megatron's own line; nothing is judged then."""
    there: str = ""
    back: str = ""
    """"equal", or what the program or the comparison said."""

    @property
    def is_wrong(self) -> bool:
        """Something was written that is not what Megatron saved."""
        return any(said.startswith("WRONG") for said in (self.there, self.back))

    @property
    def is_equal(self) -> bool:
        """Both ways."""
        return self.there == self.back == "equal"


def judge(host: Megatron, draw: Draw, folder: Path) -> Verdict:
    """Have Megatron save a pair, convert each side and compare it with the other."""
    names, unused = ("source", "truth"), []
    try:
        for name, side in zip(names, draw.sides, strict=True):
            unused.append(_save(host, draw, side, folder / name))
        source, truth = (folder / name for name in names)
        answers = _as_answers(host, draw, unused, (source, truth))
    except RankError as error:
        return Verdict(refusal=last_line(str(error)))
    there = _convert(source, answers[1], draw.sides[1].options, folder / "there")
    back = _convert(truth, answers[0], draw.sides[0].options, folder / "back")
    return Verdict(there=there, back=back)


def _save(
    host: Megatron, draw: Draw, side: Side, root: Path, *, shares_unused: bool = False
) -> bool:
    """One side; is there a tied weight that no forward uses?"""
    flags = [*BASE, *draw.flags, *side.flags, "--save", str(root)]
    given = {"world_size": draw.world_size, "flags": flags, "frozen": draw.frozen}
    job: dict[str, Any] = {"action": "train", "given": {**given, "shares_unused": shares_unused}}
    return any(host.ask(job))


def _as_answers(
    host: Megatron, draw: Draw, unused: Sequence[bool], roots: tuple[Path, Path]
) -> list[Path]:
    """What a conversion to each side must give. A tied weight that only this side does not use
    comes from where it is used, so that the side is saved again with the embedding's values."""
    answers = list(roots)
    if unused[0] != unused[1]:
        index = unused.index(True)
        answers[index] = roots[index].with_name(f"{roots[index].name}-shared")
        _save(host, draw, draw.sides[index], answers[index], shares_unused=True)
    return answers


def last_line(log: str) -> str:
    """The error that a log ends with."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if _RAISED.match(line)]
    return (errors or lines)[-1][:300]


def _convert(source: Path, truth: Path, options: Sequence[str], target: Path) -> str:
    (iteration,) = (path.name for path in source.glob("iter_*"))
    folders = [source / iteration, truth / iteration, target / iteration]
    given = ["--load-iteration-dir", str(folders[0]), "--save-iteration-dir", str(folders[2])]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(
            [*given, *options, "--verify", "full", "--num-max-processing-processes", "1"]
        )
    errors = said.getvalue()
    if status in (2, 3, 4):
        lines = [line for line in errors.splitlines() if line.startswith(_ERROR)]
        return f"refused: {lines[0].removeprefix(_ERROR).replace(f'{folders[0]}/', '')}"
    if status:
        return f"WRONG: status {status}: {errors.strip()[-300:]}"
    different = differences(folders[2], folders[1], folders[0])
    shutil.rmtree(target)
    return f"WRONG: {len(different)} differences: {different[0]}" if different else "equal"
