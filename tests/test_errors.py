"""Errors must survive the way back from a worker, and print hostile values without harm."""

from __future__ import annotations

import errno
import os
import pickle
from typing import Any

import pytest

from pp_to_vpp import errors
from pp_to_vpp.errors import (
    CheckpointError,
    ConversionError,
    CopyError,
    FormatError,
    located,
    problem,
    refusals,
    show,
)


def _subclasses(kind: type[ConversionError]) -> list[type[ConversionError]]:
    return [kind, *(sub for child in kind.__subclasses__() for sub in _subclasses(child))]


@pytest.mark.parametrize("kind", _subclasses(ConversionError))
def test_errors_keep_their_problems_across_processes(kind: type[ConversionError]) -> None:
    error = kind("one", "two")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert back.problems == ("one", "two")
    assert str(back) == "one\ntwo"


def test_exit_statuses_are_those_that_scripts_rely_on() -> None:
    statuses = {kind.__name__: kind.exit_status for kind in _subclasses(ConversionError)}
    assert statuses == {
        "ConversionError": 1,
        "UsageError": 2,
        "LayoutError": 3,
        "CheckpointError": 4,
        "CopyError": 5,
        "VerificationError": 6,
    }


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    for kind in _subclasses(ConversionError):
        assert f"{kind.__name__}" in (errors.__doc__ or "")


def test_a_problem_is_one_line_with_everything_in_it() -> None:
    line = problem("a/b", "is\nodd", expected=3, found=show("x\ny"), cure="do this")
    assert line == "a/b: is odd, expected 3, found 'x\\ny'; do this"


def _bomb() -> tuple[Any, ...]:
    value: tuple[Any, ...] = ()
    for _ in range(60):
        value = (value, value)
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "None"),
        (7, "7"),
        ("a", "'a'"),
        (10**5000, "an integer of 16610 bits"),
        (_bomb(), "a tuple of 2"),
        ({"k": 1}, "a dict of 1"),
        (object(), "a object"),
    ],
    ids=["none", "int", "str", "huge int", "endless tuple", "dict", "object"],
)
def test_show_is_short_whatever_it_is_given(value: object, expected: str) -> None:
    assert show(value) == expected


def test_show_cuts_long_texts() -> None:
    assert len(show("x" * 10**6)) < 200


def test_what_is_wrong_with_bytes_is_told_with_their_file() -> None:
    with pytest.raises(CheckpointError) as caught, located("a/b", expected="x", cure="do this"):
        raise FormatError("two\nlines")
    assert caught.value.problems == ("a/b: two lines, expected x; do this",)
    with pytest.raises(CheckpointError, match="the file is damaged: use another copy"), located(1):
        raise FormatError
    with pytest.raises(CheckpointError, match=r"^1: odd; burn it$"), located(1):
        raise FormatError("odd", cure="burn it")
    for error in (KeyError("other"), CheckpointError("located already")):
        with pytest.raises(type(error)) as same, located("a/b"):
            raise error
        assert same.value is error


@pytest.mark.parametrize(
    ("number", "kind", "found", "cure"),
    [
        (errno.EDQUOT, CopyError, CopyError, "free some space, then run again with --resume"),
        (errno.EIO, CopyError, CopyError, "check the file system, then run again with --resume"),
        (errno.ENOSYS, CopyError, CopyError, "write elsewhere and copy the target there"),
        (errno.EIO, CheckpointError, CheckpointError, "check the path, its mode and its file sy"),
        (errno.EMFILE, CheckpointError, CopyError, "raise the limit (ulimit -a), or use fewer"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_a_cure(
    number: int, kind: type[ConversionError], found: type[ConversionError], cure: str
) -> None:
    for where, error in (
        ("/x/y", OSError(number, os.strerror(number))),
        (None, OSError(number, os.strerror(number), "/x/y")),
    ):
        with pytest.raises(found) as told, refusals(where, "cannot be read", kind):
            raise error
        assert str(told.value).startswith(f"/x/y: cannot be read ({os.strerror(number)}); ")
        assert cure in str(told.value)


def test_an_error_without_a_place_is_left_alone() -> None:
    with pytest.raises(OSError, match="nowhere"), refusals(None, "cannot be read"):
        raise OSError("nowhere")
