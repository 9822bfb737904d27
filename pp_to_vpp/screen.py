"""What a run says on standard output."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from . import picture
from .errors import CopyError
from .options import NO_CHECKSUMS
from .progress import size
from .run.convert import Outcome
from .run.inspect_checkpoint import Inspection
from .run.plan import Plan
from .run.share import number_of_workers

if TYPE_CHECKING:
    from .megatron.layout import PipelineLayout
    from .options import Options
    from .report import Done
    from .run.verify_pair import Verified

_LISTED_FOLDERS = 64
_BASE_MEGABYTES, _WORKER_MEGABYTES = 50, 30
"""Resident memory, measured: it does not grow with the checkpoint."""


def _say(text: str) -> None:
    """Print a line. A reader that went away, as in ``| head``, must not end a conversion.

    Raises:
        CopyError: standard output is a full disk, or the like.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the rest of the run
        if not isinstance(error, BrokenPipeError):
            cure = "what was copied is whole: send the output elsewhere and use --resume"
            text = f"cannot be written ({error.strerror})"
            raise CopyError.of("standard output", text, cure=cure) from None


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _say_moves(source: PipelineLayout, target: PipelineLayout) -> None:
    """The picture of what moves, in colour where somebody looks who has not forbidden it."""
    coloured = (
        bool(sys.stdout and sys.stdout.isatty())  # None where a caller has closed it
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") not in (None, "dumb")
    )
    width = shutil.get_terminal_size().columns - 4  # 80 where there is no terminal
    _say(_indented(picture.moves(source, target, width, coloured=coloured)))


def show(done: Done, options: Options) -> None:
    """What was done."""
    if isinstance(done, Inspection):
        _show_inspection(done)
    elif isinstance(done, Plan):
        _show_dry_run(done, number_of_workers(options))
    elif isinstance(done, Outcome):
        _show_outcome(done)
    else:
        _show_verified(done)


def show_plan(plan: Plan) -> None:
    """What moves, and what will be written."""
    _say(f"source: {plan.survey.path} ({'; '.join(plan.facts)})")
    _say("layers (E embedding, M multi-token prediction, L loss):")
    _say_moves(plan.source.layout, plan.target.layout)
    files = sum(len(rank.files) for rank in plan.ranks)
    bare = ", without optimizer state" if plan.no_save_optim else ""
    _say(f"to write: {len(plan.ranks)} rank folders, {files} files, {size(plan.length)}{bare}")
    if plan.part is not None:
        part, own = plan.part, len(plan.part.ranks)
        _say(
            f"share {part.share}: {own} rank folders of {own + len(part.awaited)}; the largest "
            f"share is {part.largest_over_mean:.2f} x the mean"
        )
    for note in plan.notes:
        _say(f"note: {note}")


def _show_dry_run(plan: Plan, processes: int) -> None:
    """What only a dry run tells: each folder, memory and disk."""
    width = max(len(rank.id.folder) for rank in plan.ranks)
    for rank in plan.ranks if len(plan.ranks) <= _LISTED_FOLDERS else ():
        files = ", ".join(f"{file.name} {size(file.length)}" for file in rank.files)
        _say(f"  {rank.id.folder:<{width}}  {files}")
    memory = _BASE_MEGABYTES + _WORKER_MEGABYTES * processes
    _say(f"memory: about {memory} MB with {processes} workers")
    _say(f"disk: {plan.length} bytes ({size(plan.length)})")
    _say(f"launch Megatron with: {plan.launch_flags}")
    _say("dry run: nothing was written")


def _show_outcome(outcome: Outcome) -> None:
    """What was done, and how to go on."""
    plan = outcome.plan
    kept = sum(rank.was_kept for rank in outcome.ranks)
    rate = size(outcome.written / max(outcome.seconds, 1e-3))
    share = f"share {plan.part}: " if plan.part is not None else ""
    _say(
        f"{share}wrote {len(outcome.ranks) - kept} rank folders, {size(outcome.written)} in "
        f"{outcome.seconds:.1f} s ({rate}/s)"
        + (f"; kept {kept} from an earlier run" if kept else "")
    )
    for path in outcome.left_behind:
        _say(f"note: {path} was left by an earlier run and is still in use; it may be removed")
    if not plan.writes_tracker:
        return
    _say_moves(*plan.layouts)  # again, hours later
    bare = "; records without checksums" if outcome.checksums == NO_CHECKSUMS else ""
    _say(f"verified: {outcome.depth.value}{bare}")
    _say(f"tracker: {outcome.tracker}")
    _say(f"launch Megatron with: {plan.launch_flags}")
    for note in plan.notes:
        _say(f"note: {note}")


def _show_verified(verified: Verified) -> None:
    """What was verified."""
    _say_moves(verified.source_layout, verified.layout)
    _say(
        f"verified ({verified.depth.value}): {verified.ranks} rank folders, "
        f"{size(verified.length)} in {verified.seconds:.1f} s; every tensor is where it must be"
    )


def _show_inspection(found: Inspection) -> None:
    """What a checkpoint is, and what it can become."""
    iteration = "" if found.iteration is None else f"iteration {found.iteration}, "
    _say(
        f"checkpoint: {found.path} ({iteration}{found.folders} rank folders, {found.files} files, "
        f"{size(found.length)})"
    )
    _say(f"written by: {found.written_by}")
    _say(f"it is: {'; '.join(found.facts)}")
    if found.states:
        _say(f"optimizer state: {', '.join(f'{name} ({dtype})' for name, dtype in found.states)}")
    for is_in_force, words in ((True, "rules in force"), (False, "rules not in force")):
        rules = [f"{r.name} ({r.since})" for r in found.rules if r.is_in_force is is_in_force]
        if rules:
            _say(f"{words}: {', '.join(rules).replace('_', ' ')}")
    for proof in found.proofs:
        _say(f"proved: {proof}")
    _say("stages (E embedding, M multi-token prediction, L loss):")
    _say(_indented(_stages(found)))
    for note in found.notes:
        _say(f"note: {note}")
    _say(
        "it can be converted with:"
        if found.choices
        else "no virtual pipeline size divides its layers: give a layout of your own"
    )
    for choice in found.choices:
        _say(f"    {choice.options}\n        launch Megatron with: {choice.launch_flags}")


def _stages(found: Inspection) -> str:
    """Layers and bytes of each (pipeline rank, virtual stage)."""
    layout = found.source.layout
    cells = picture.grid(layout, layout)
    rows = [("", "", "layers", "weights", "optimizer")]
    for chunk in sorted(layout.chunks, key=lambda chunk: (chunk.pp_rank, chunk.vp_stage)):
        stage = found.stages[chunk.pp_rank, chunk.vp_stage]
        layers = " ".join(part.text for part in cells[chunk.pp_rank][chunk.vp_stage]) or "-"
        is_first = chunk.vp_stage == 0
        rows.append(
            (
                f"pp{chunk.pp_rank}" if is_first else "",
                f"vp{chunk.vp_stage}",
                layers,
                size(stage.weights),
                size(stage.optimizer),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{p:<{widths[0]}}  {v:<{widths[1]}}  {layers:<{widths[2]}}  "
        f"{weights:>{widths[3]}}  {optimizer:>{widths[4]}}".rstrip()
        for p, v, layers, weights, optimizer in rows
    )
