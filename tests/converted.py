"""Conversions of the pairs, each made once for all tests that ask something of it."""

from __future__ import annotations

import contextlib
import functools
import io
from pathlib import Path

from pp_to_vpp import cli

from .pairs import pair, scratch


@functools.cache
def converted(name: str) -> Path:
    """The iteration folder that the program makes of a pair's source. Nobody may write into it."""
    case = pair(name)
    target = scratch() / "converted" / name / case.truth.name
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(
            [
                *("--load-iteration-dir", str(case.source), "--save-iteration-dir", str(target)),
                *("--num-max-processing-processes", "1", *case.options),
            ]
        )
    assert status == 0, errors.getvalue()
    return target
