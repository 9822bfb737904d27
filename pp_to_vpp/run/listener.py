"""Who wants to hear of a run."""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..source.files import FamilyFolders
from .workers import Workers

if TYPE_CHECKING:
    from .plan import Plan

log = logging.getLogger("pp_to_vpp")


class _OfFamily(Protocol):
    """A job about a family of the source."""

    @property
    def folders(self) -> FamilyFolders:
        """Of its ranks."""


_Job = TypeVar("_Job", bound=_OfFamily)
_Found = TypeVar("_Found")


class Phase(enum.Enum):
    """What a run is doing; in words, and what its progress is counted in."""

    PLAN = "plan", "folders"
    """Source folders are read and proved."""
    CHECK = "check", "B"
    """Kept folders are verified."""
    COPY = "copy", "B"
    """The target is written; each folder is verified before it gets its name. What is then read
    in full counts a second time."""
    VERIFY = "verify", "B"
    """A target that is there is verified."""

    def __init__(self, word: str, unit: str) -> None:
        self.word, self.unit = word, unit


@dataclass(slots=True)
class Listener:
    """The functions do nothing unless replaced. All are called in the process that called."""

    planned: Callable[[Plan], None] = field(default=lambda _: None)
    """The plan stands, and no byte has been written."""
    began: Callable[[Phase, int], None] = field(default=lambda _phase, _total: None)
    """A phase begins; how much there is to do."""
    advanced: Callable[[int], None] = field(default=lambda _: None)
    """So much more of it is done."""
    finished: Callable[[str], None] = field(default=lambda _: None)
    """A folder is done."""
    waits: Callable[[str], None] = field(default=lambda _: None)
    """The run waits for another one; for whom, and until when."""
    looked: Callable[[], None] = field(default=lambda: None)
    """Nothing new, about once a second: time may be shown."""


def read_families(
    workers: Workers, read: Callable[[_Job], _Found], jobs: Sequence[_Job], listener: Listener
) -> list[_Found]:
    """What reading families of the source in workers has shown; folders count as they are read."""
    listener.began(Phase.PLAN, sum(len(job.folders.ranks) for job in jobs))
    found = []
    for job, family in zip(jobs, workers.map(read, jobs), strict=True):
        found.append(family)
        listener.advanced(len(job.folders.ranks))
        log.debug("%s and its family: read", min(job.folders.ranks.values()).folder)
    return found
