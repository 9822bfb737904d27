"""What can go wrong, each kind with the exit status that scripts may rely on.

    ConversionError          1  (never raised itself)
    ├── UsageError           2  the call contradicts itself or the checkpoint
    ├── LayoutError          3  the wanted layer placement is impossible
    ├── CheckpointError      4  the source is unreadable, unsupported or not what it should be
    ├── CopyError            5  reading or writing failed: disk full, I/O error, a killed worker
    └── VerificationError    6  the written files are not what they must be

An error carries one line per problem, so a user sees all of them at once. What is wrong with bytes
or objects of a file begins as a ``FormatError``, which knows no file; ``located`` says which.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, TypeVar

_Kind = TypeVar("_Kind", bound="ConversionError")

# What to do, where several refusals ask for the same.
ONE_SAVE = "use the folders of one save, with all their files"
ANOTHER_COPY = "the file is damaged: use another copy of it"
AS_SAVED = "the file is damaged or was rewritten: use the one that Megatron saved"
FROM_MEGATRON = "use an iteration folder that Megatron-LM saved with --ckpt-format torch"
NOT_CONVERTED = "it cannot be converted exactly; see docs/support.md"
ASK_FOR_SUPPORT = "it could change the layout, so it is not converted: ask for support of it"
WITH_A_PATTERN = (
    "load and save it once with Megatron 0.17 or 0.18 and a --hybrid-layer-pattern of one segment "
    "for each pipeline stage"
)
COPY_MISSING = "copy what is missing from where the checkpoint was saved"
PUT_FILE_THERE = "put the file itself there, as cp -rL does"
AT_REST = "nothing may write to the source: run again when it is at rest"


class ConversionError(Exception):
    """Base of all refusals; its arguments are the lines to print, one problem each.

    All arguments go to ``Exception`` unchanged: only then does the error survive the way back
    from a worker process.
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)

    @classmethod
    def of(
        cls: type[_Kind],
        where: object,
        what: str,
        *,
        expected: object = None,
        found: object = None,
        cure: str,
    ) -> _Kind:
        """An error of one problem (see ``problem``)."""
        return cls(problem(where, what, expected=expected, found=found, cure=cure))

    @property
    def problems(self) -> tuple[str, ...]:
        """The lines to print."""
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.args)


class UsageError(ConversionError):
    """The options contradict each other or the checkpoint."""

    exit_status = 2


class LayoutError(ConversionError):
    """The layers cannot be placed as asked."""

    exit_status = 3


class CheckpointError(ConversionError):
    """The checkpoint cannot be read, or cannot be converted exactly."""

    exit_status = 4


class CopyError(ConversionError):
    """Bytes could not be read or written."""

    exit_status = 5


class VerificationError(ConversionError):
    """What was written differs from what must be there."""

    exit_status = 6


class FormatError(ValueError):
    """Bytes or objects that are not what torch.save writes; says what, not where."""

    def __init__(self, *what: str, cure: str | None = None) -> None:
        super().__init__(*what)
        self.cure = cure


@contextmanager
def located(where: object, *, expected: object = None, cure: str = ANOTHER_COPY) -> Iterator[None]:
    """Say of a ``FormatError`` where it was.

    Raises:
        CheckpointError: instead of it.
    """
    try:
        yield
    except FormatError as error:
        raise CheckpointError.of(
            where, str(error), expected=expected, cure=error.cure or cure
        ) from None


_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_IMPOSSIBLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EXDEV)
"""What file systems say that have no such call, as mounts of object stores do."""


def refused(where: object, what: str, error: OSError, kind: type[_Kind]) -> _Kind | CopyError:
    """A refusal by the operating system, as one line; of a limit of the process, whatever it wanted
    then, it is a ``CopyError``."""
    text = f"{what} ({error.strerror or error})"
    if error.errno in _LIMITS:
        cure = "raise the limit (ulimit -a), or use fewer --num-max-processing-processes"
        return CopyError.of(where, text, cure=cure)
    cure = "check the file system, then run again with --resume"
    if issubclass(kind, CheckpointError):
        cure = "check the path, its mode and its file system"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = "free some space, then run again with --resume"
    elif error.errno in _IMPOSSIBLE:
        cure = (
            "if this file system has no such call, as mounts of object stores, write elsewhere and "
            "copy the target there; else run again with --resume"
        )
    return kind.of(where, text, cure=cure)


@contextmanager
def refusals(where: object, what: str, kind: type[ConversionError] | None = None) -> Iterator[None]:
    """Say of what the operating system refuses where it was: every call of it may fail.

    Args:
        where: the path; None for that of the error, if it tells one.
        what: could not be done.
        kind: of error; ``CopyError`` if None.

    Raises:
        ConversionError: instead of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        place = error.filename if where is None else where
        if place is None:
            raise
        raise refused(place, what, error, kind or CopyError) from error


def is_refusal(error: ConversionError) -> bool:
    """Whether it tells that the operating system refuses to read what is there."""
    missing = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    return isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, missing)


_SHOWN = 120


def show(value: object) -> str:
    """A short printable form of a value that came from a file, whatever the value is.

    Containers are named, not printed: a small hostile graph can have an endless ``repr``.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        text = repr(value[:_SHOWN] if isinstance(value, (str, bytes)) else value)
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    if type(value).__str__ is not object.__str__:  # the container's own kinds say what they are
        return str(value)
    return f"a {type(value).__name__}"


def problem(
    where: object, what: str, *, expected: object = None, found: object = None, cure: str
) -> str:
    """One line that tells where, what is wrong, what was expected and found, and what to do.

    Strings for ``expected`` and ``found`` are printed as they are; pass ``show(value)`` for
    values from a file.
    """
    parts = [f"{where}: {what}"]
    if expected is not None:
        parts.append(f"expected {expected}")
    if found is not None:
        parts.append(f"found {found}")
    line = ", ".join(parts) + f"; {cure}"
    return " ".join(line.split())
