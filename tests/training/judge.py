"""Two judgements of a conversion: against what Megatron saves itself, and by what it loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compare import differences
from .command import convert

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .launch import Megatron
    from .spec import Run

ITERATION = 10
Digests = dict[str, dict[str, Any]]
"""What is held of a parameter, by its global name."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that Megatron saved, and what the model held."""

    root: Path
    digests: Digests

    @property
    def iteration(self) -> Path:
        """The iteration folder."""
        return self.root / f"iter_{ITERATION:07d}"


@dataclass
class Judge:
    """Compares conversions with what one Megatron version does."""

    server: Megatron
    folder: Path
    """Checkpoints are kept here: runs are compared with several others."""
    _saved: dict[Run, Saved] = field(default_factory=dict)

    def saved(self, run: Run) -> Saved:
        """The state of ``values.fill``, saved under the layout of a run."""
        if run not in self._saved:
            root = self.folder / str(len(self._saved))
            digests = self.server.run("save", run, root=str(root), iteration=ITERATION)
            self._saved[run] = Saved(root, _merged(digests))
        return self._saved[run]

    def loaded(self, run: Run, root: Path) -> Digests:
        """What a run holds after loading a checkpoint."""
        return _merged(self.server.run("load", run, root=str(root)))

    def problems(self, source: Run, target: Run, root: Path) -> Iterator[str]:
        """Convert what ``source`` saved to the layout of ``target``, and say what is wrong."""
        before, truth = self.saved(source), self.saved(target)
        if before.digests != truth.digests:
            yield "the same state was not saved twice"
        converted = convert(before.iteration, root, target)
        yield from differences(converted, truth.iteration, before.iteration)
        loaded = self.loaded(target, root)
        for name in sorted(before.digests.keys() | loaded.keys()):
            if before.digests.get(name) != loaded.get(name):
                yield f"{name} is loaded as {loaded.get(name)}, was {before.digests.get(name)}"


def _merged(ranks: list[Digests]) -> Digests:
    """What all ranks hold. Ranks that share a parameter must agree about it."""
    merged: Digests = {}
    for rank in ranks:
        for name, record in rank.items():
            known = merged.setdefault(name, {})
            for kind, digest in record.items():
                if known.setdefault(kind, digest) != digest:
                    raise ValueError(f"{kind} of {name} differs between ranks")
    return merged
