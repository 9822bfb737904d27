"""What is wrong with bytes is told without a file, then with one."""

from __future__ import annotations

import io

import pytest

from pp_to_vpp.container import archive
from pp_to_vpp.errors import (
    ANOTHER_COPY,
    CheckpointError,
    ConversionError,
    FormatError,
    UsageError,
    located,
    problem,
)


def test_a_format_error_says_where_it_was() -> None:
    with pytest.raises(CheckpointError) as caught, located("a/file.pt"):
        archive.read_records(io.BytesIO(b""))
    text = "the file is too short for a zip archive"
    assert caught.value.problems == (problem("a/file.pt", text, cure=ANOTHER_COPY),)
    assert caught.value.__suppress_context__, "one line, not two tracebacks"


def test_what_was_expected_and_what_to_do_may_be_told_too() -> None:
    with (
        pytest.raises(CheckpointError) as caught,
        located("f", expected="a tensor", cure="look again"),
    ):
        raise FormatError("no\ntensor")
    assert caught.value.problems == ("f: no tensor, expected a tensor; look again",)


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), UsageError("x")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, located("f"):
        raise error
    assert caught.value is error


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    with located("f"):
        found = 1
    assert found == 1


def test_a_format_error_is_no_refusal_yet() -> None:
    assert not issubclass(FormatError, ConversionError)


@pytest.mark.parametrize("kind", [ConversionError, *ConversionError.__subclasses__()])
def test_an_error_of_one_problem_is_of_its_own_kind(kind: type[ConversionError]) -> None:
    error = kind.of("here", "it is odd", expected=3, found="4", cure="mend it")
    assert type(error) is kind
    assert error.problems == ("here: it is odd, expected 3, found 4; mend it",)
    assert kind.of("here", "it is odd", cure="mend it").problems == ("here: it is odd; mend it",)
