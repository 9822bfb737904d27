"""The program as a library: what the command line does, with the same checks and the same errors.

Every function raises a ``ConversionError`` with one line per problem, prints nothing, and logs to
the logger ``pp_to_vpp``. Call it from any thread, from several at a time, and in a notebook: it
touches no process but its own workers, in which nothing of the caller's main module runs. With
``processes=1``, and in a daemonic process, the caller's own process does all the work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from .errors import UsageError
from .options import Depth, Options, Task
from .run.ready import ready

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .run.convert import Outcome
    from .run.inspect_checkpoint import Inspection
    from .run.listener import Listener, Phase
    from .run.plan import Plan
    from .run.verify_pair import Verified

Folder: TypeAlias = "str | os.PathLike[str]"
"""An iteration folder, or the root of a checkpoint: the iteration that its tracker names."""
ProgressFunction: TypeAlias = Callable[[str, int, int], None]
"""Is told the phase (``plan``, ``check``, ``copy`` or ``verify``), how much is done and how much
there is: folders while planning, bytes in the other phases."""


class Running(TypedDict, total=False):
    """How a task is run: see ``convert``."""

    processes: int
    follow_links: bool
    progress: ProgressFunction


class Conversion(Running, total=False):
    """What is asked of a conversion: see ``convert``."""

    pipeline_model_parallel_size: int
    data_parallel_size: int
    virtual_pipeline_model_parallel_size: int
    decoder_first_pipeline_num_layers: int
    decoder_last_pipeline_num_layers: int
    first_virtual_pipeline_num_layers_split: Sequence[int]
    last_virtual_pipeline_num_layers_split: Sequence[int]
    pipeline_model_parallel_layout: str
    hybrid_layer_pattern: str
    overlap_param_gather_with_optimizer_step: bool
    no_save_optim: bool
    verify: str
    checksums: str
    resume: bool
    pipeline_ranks_to_process: Sequence[int]
    share: str


_FIELDS = {
    "pipeline_model_parallel_size": "target_pp_size",
    "data_parallel_size": "target_dp_size",
    "virtual_pipeline_model_parallel_size": "target_vp_size",
    "decoder_first_pipeline_num_layers": "first_layers",
    "decoder_last_pipeline_num_layers": "last_layers",
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

    Args:
        checkpoint: to be described.
        running: processes, follow_links, progress as of ``convert``.

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
        asked: as of ``convert``, whose errors this raises too.
    """
    from .run.convert import plan as run

    return run(*_asked(source, target, asked, Task.PLAN))


def convert(source: Folder, target: Folder, **asked: Unpack[Conversion]) -> Outcome:
    """Convert a checkpoint.

    Args:
        source: the checkpoint to be converted.
        target: what it is converted to; other than the source.
        asked: one of these asks for a layout:

            pipeline_model_parallel_size (int), data_parallel_size (int): those of the target; the
                source's if not told
            virtual_pipeline_model_parallel_size (int): virtual stages per pipeline rank, 1 for
                plain pipeline parallelism; with first_virtual_pipeline_num_layers_split and
                last_virtual_pipeline_num_layers_split (numbers), the layers of each virtual stage
                of the first and last pipeline stage (Microsoft's fork); with
                decoder_first_pipeline_num_layers and decoder_last_pipeline_num_layers (int), the
                layers of these stages
            pipeline_model_parallel_layout (str): Megatron's layout string
            hybrid_layer_pattern (str): Megatron's pattern of a hybrid model

            and these how the target is made:

            overlap_param_gather_with_optimizer_step (bool): the target run uses this flag
            no_save_optim (bool): leave the optimizer state out
            verify (str): how deep each folder is verified before it gets its name, "none",
                "structure" (unless told otherwise) or "full"
            checksums (str): of records, "crc32" (unless told otherwise) or "none"
            resume (bool): keep what an earlier run of the same conversion finished
            pipeline_ranks_to_process (numbers): only these target pipeline ranks
            share (str): "I/N" or "auto", where several processes share the work
            processes (int): workers; as many as this process has cores, up to 8, if not told
            follow_links (bool): files of the source may be links to regular files elsewhere
            progress (function): see ``ProgressFunction``

    Raises:
        UsageError: options contradict each other or the checkpoint.
        LayoutError: the layout is impossible.
        CheckpointError: the source cannot be read, or not be converted exactly.
        CopyError: reading or writing failed, or there is too little room.
        VerificationError: what was written is not what it must be. Nothing that is not whole and
            verified has its name.
    """
    from .run.convert import convert as run

    return run(*_asked(source, target, asked, Task.CONVERT))


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
        running: processes, follow_links, progress as of ``convert``.

    Raises:
        VerificationError: the target does not hold what the source holds.
        CheckpointError: the source cannot be read, or is damaged.
    """
    from .run.verify_pair import verify_existing

    asked = {**running, "verify": depth, "no_save_optim": no_save_optim}
    return verify_existing(*_asked(source, target, asked))


def _asked(
    source: Folder, target: Folder | None, asked: Mapping[str, object], task: Task | None = None
) -> tuple[Options, Listener]:
    """What a run needs.

    Args:
        source: the checkpoint.
        target: of the conversion.
        asked: by keyword.
        task: what a function does that wants a layout.

    Raises:
        UsageError: see ``Options.check``; or there is no layout.
        TypeError: a keyword that is none.
    """
    from .run.listener import Listener

    options = Options(Path(source), None if target is None else Path(target))
    options.is_dry_run = task is Task.PLAN
    listener = Listener()
    given: dict[str, Any] = dict(asked)
    for name, value in given.items():
        if name == "progress":
            _Told(value).listen(listener)
        elif name == "verify":
            options.depth = _depth(value)
        elif name in _FIELDS:
            setattr(options, _FIELDS[name], value)
        else:
            raise TypeError(f"unexpected keyword argument {name!r}")
    if task is not None and options.task is not task:
        raise UsageError(
            "no target layout; pass virtual_pipeline_model_parallel_size, "
            "pipeline_model_parallel_layout or hybrid_layer_pattern"
        )
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
