"""The program as a library: what the command line does, with the same checks and the same errors.

Every function raises a ``ConversionError`` with one line per problem, prints nothing, and logs to
the logger ``pp_to_vpp``. Worker processes are forked (on Linux): call from a program that has not
started threads, or has ``if __name__ == "__main__":`` around what it does elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from .errors import UsageError
from .options import Depth, Options
from .run.ready import ready

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .run.convert import Outcome, Plan
    from .run.inspect_checkpoint import Inspection
    from .run.listener import Listener, Phase
    from .run.verify_pair import Verified

Folder: TypeAlias = "str | os.PathLike[str]"
"""An iteration folder, or the root of a checkpoint: the iteration that its tracker names."""
ProgressFunction: TypeAlias = Callable[[str, int, int], None]
"""Is told the phase (``plan``, ``check``, ``copy`` or ``verify``), how much is done and how much
there is: folders while planning, bytes in the other phases."""


class Layout(TypedDict, total=False):
    """The layout of a target: a size, a layout string or a hybrid pattern, as on the command
    line."""

    virtual_pipeline_model_parallel_size: int
    """Virtual stages per pipeline rank; 1 for plain pipeline parallelism."""
    first_virtual_pipeline_num_layers_split: Sequence[int]
    """Layers of each virtual stage of the first pipeline stage (Microsoft's fork)."""
    last_virtual_pipeline_num_layers_split: Sequence[int]
    pipeline_model_parallel_layout: str
    """Megatron's layout string."""
    hybrid_layer_pattern: str
    """Megatron's pattern of a hybrid model."""
    overlap_param_gather_with_optimizer_step: bool
    """The target run uses this flag."""
    no_save_optim: bool
    """The target has no optimizer state."""


class Running(TypedDict, total=False):
    """How a task is run."""

    processes: int
    """Workers; as many as this process has cores, up to 8, unless told otherwise."""
    follow_links: bool
    """Files of the source may be links to regular files elsewhere."""
    progress: ProgressFunction


class Conversion(Layout, Running, total=False):
    """What a conversion is asked for."""

    verify: str
    """How deep each folder is verified before it gets its name: ``none``, ``structure`` (the
    default) or ``full``."""
    checksums: str
    """``crc32`` (the default) or ``none``."""
    resume: bool
    """Keep rank folders that an earlier run of the same conversion finished."""
    pipeline_ranks_to_process: Sequence[int]
    """Only these target pipeline ranks."""
    share: str
    """``I/N`` or ``auto``: this process is one of several that share the work."""


_FIELDS = {
    "virtual_pipeline_model_parallel_size": "target_vp_size",
    "first_virtual_pipeline_num_layers_split": "first_split",
    "last_virtual_pipeline_num_layers_split": "last_split",
    "pipeline_model_parallel_layout": "layout_string",
    "hybrid_layer_pattern": "hybrid_pattern",
    "overlap_param_gather_with_optimizer_step": "overlaps",
    "no_save_optim": "no_save_optim",
    "processes": "processes",
    "follow_links": "follow_links",
    "verify": "depth",
    "checksums": "checksums",
    "resume": "resume",
    "pipeline_ranks_to_process": "pp_ranks",
    "share": "share",
}
"""The fields of ``Options`` by the names that callers use, which are Megatron's."""


def inspect(checkpoint: Folder, **running: Unpack[Running]) -> Inspection:
    """Describe a checkpoint: sizes, rules and how they were proved, bytes, possible layouts.

    Raises:
        CheckpointError: it cannot be read, or no rules explain it.
        UsageError: an option has an impossible value.
    """
    from .run.inspect_checkpoint import inspect as run

    return run(*_asked(checkpoint, None, running))


def plan(source: Folder, target: Folder | None = None, **asked: Unpack[Conversion]) -> Plan:
    """What a conversion would write, after reading and proving the source; nothing is written.

    Args:
        source: the checkpoint to be converted.
        target: looked at, if it is named: an existing one, too little room.
        asked: layout of the target, and how to run.

    Raises:
        UsageError: options contradict each other or the checkpoint.
        LayoutError: the layout is impossible.
        CheckpointError: the source cannot be read, or not be converted exactly.
        CopyError: there is too little room.
    """
    from .run.convert import plan as run

    return run(*_asked(source, target, asked, is_dry_run=True))


def convert(source: Folder, target: Folder, **asked: Unpack[Conversion]) -> Outcome:
    """Convert a checkpoint; see ``plan`` for arguments and errors.

    Raises:
        VerificationError: what was written is not what it must be. Nothing that is not whole and
            verified has its name.
        ConversionError: as for ``plan``.
    """
    from .run.convert import convert as run

    return run(*_asked(source, target, asked))


def verify(
    source: Folder,
    target: Folder,
    *,
    depth: str = "full",
    no_save_optim: bool = False,
    **running: Unpack[Running],
) -> Verified:
    """Hold an existing target to its source.

    Args:
        source: the checkpoint that was converted.
        target: what it was converted to.
        depth: ``structure`` samples the bytes of tensors, ``full`` compares all.
        no_save_optim: the target was written without optimizer state.
        running: how to run.

    Raises:
        VerificationError: the target does not hold what the source holds.
        CheckpointError: the source cannot be read, or is damaged.
    """
    from .run.verify_pair import verify_existing

    asked = {**running, "verify": depth, "no_save_optim": no_save_optim}
    return verify_existing(*_asked(source, target, asked))


def _asked(
    source: Folder, target: Folder | None, asked: object, *, is_dry_run: bool = False
) -> tuple[Options, Listener]:
    """What a run needs.

    Raises:
        UsageError: see ``Options.check``.
        TypeError: a keyword that is none.
    """
    from .run.listener import Listener

    options = Options(Path(source), None if target is None else Path(target), is_dry_run=is_dry_run)
    listener = Listener()
    assert isinstance(asked, dict)
    for name, value in asked.items():
        if name == "progress":
            _Told(value).listen(listener)
        elif name == "verify":
            options.depth = _depth(value)
        elif name in _FIELDS:
            setattr(options, _FIELDS[name], value)
        else:
            raise TypeError(f"unexpected keyword argument {name!r}")
    return ready(options), listener


def _depth(text: str) -> Depth:
    try:
        return Depth(text)
    except ValueError:
        known = ", ".join(map(str, Depth))
        raise UsageError.of(
            "verify", "no such depth", expected=known, found=text, cure="give one of them"
        ) from None


class _Told:
    """Counts for a progress function."""

    def __init__(self, function: ProgressFunction) -> None:
        self._function = function
        self._phase = ""
        self._done = self._total = 0

    def listen(self, listener: Listener) -> None:
        """Be told what the listener is told."""
        listener.began, listener.advanced = self._begin, self._advance

    def _begin(self, phase: Phase, total: int) -> None:
        self._phase, self._done, self._total = phase.word, 0, total
        self._function(self._phase, 0, total)

    def _advance(self, count: int) -> None:
        self._done += count
        self._function(self._phase, self._done, self._total)
