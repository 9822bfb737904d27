"""What is said on standard output: in colour only where somebody looks who has not forbidden it."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping

import pytest

from pp_to_vpp import screen
from pp_to_vpp.options import Options, Task
from pp_to_vpp.run.convert import plan
from pp_to_vpp.run.listener import Listener

from .pairs import DENSE, pair

_COLOUR = "\x1b["


class Terminal(io.StringIO):
    """A terminal, as far as a program can tell."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "variables", "is_coloured"),
    [
        (Terminal, {"TERM": "xterm"}, True),
        (Terminal, {"TERM": "xterm", "NO_COLOR": ""}, True),
        (Terminal, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "dumb"}, False),
        (Terminal, {}, False),
        (io.StringIO, {"TERM": "xterm"}, False),
    ],
)
def test_colour(
    stream: type[io.StringIO],
    variables: Mapping[str, str],
    is_coloured: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stream())
    options = Options(pair(DENSE).source, target_vp_size=2, is_dry_run=True, processes=1)
    assert options.task is Task.PLAN
    found = plan(options, Listener())
    screen.show_plan(found)
    screen.show(found, options)
    assert isinstance(sys.stdout, io.StringIO)
    text = sys.stdout.getvalue()
    assert (_COLOUR in text) == is_coloured
    assert "dry run: nothing was written" in text
