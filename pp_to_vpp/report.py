"""The JSON report of a run: ``report.schema.json`` beside this file tells its fields."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from . import __version__
from .errors import ConversionError

if TYPE_CHECKING:
    from .megatron.layout import PipelineLayout
    from .run.convert import Outcome
    from .run.inspect_checkpoint import Inspection
    from .run.plan import Plan
    from .run.verify_pair import Verified

    Done: TypeAlias = Inspection | Plan | Outcome | Verified

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Call:
    """How the program was called."""

    argv: tuple[str, ...]
    """Its arguments."""
    start: float
    """When; seconds since 1970."""


def of(done: Done, call: Call) -> str:
    """What was done, as JSON."""
    from .run.convert import Outcome  # --help must not wait for numpy
    from .run.inspect_checkpoint import Inspection
    from .run.plan import Plan

    if isinstance(done, Inspection):
        kind, content = "inspection", _inspection(done)
    elif isinstance(done, Plan):
        kind, content = "plan", _plan(done)
    elif isinstance(done, Outcome):
        kind, content = "conversion", _conversion(done)
    else:
        kind, content = "verification", _verification(done)
    return _json(kind, 0, call, content)


def of_refusal(error: ConversionError, call: Call) -> str:
    """A run that did not do what it was asked for, as JSON."""
    return _json("refusal", error.exit_status, call, {"problems": list(error.problems)})


def _json(kind: str, status: int, call: Call, content: dict[str, object]) -> str:
    start = datetime.datetime.fromtimestamp(call.start, datetime.timezone.utc)
    head = {
        "schema": SCHEMA,
        "tool": "pp_to_vpp",
        "version": __version__,
        "kind": kind,
        "status": status,
        "host": os.uname().nodename,
        "argv": list(call.argv),
        "start": start.isoformat(timespec="seconds"),
    }
    return json.dumps({**head, **content}, indent=1) + "\n"


def _inspection(found: Inspection) -> dict[str, object]:
    return {
        "source": {
            "path": found.path,
            "iteration": found.iteration,
            "facts": list(found.facts),
            **_layout(found.source.layout),
        },
        "written_by": found.written_by,
        "rules": [
            {"name": rule.name, "since": rule.since, "in_force": rule.is_in_force}
            for rule in found.rules
        ],
        "optimizer_states": [{"name": name, "dtype": dtype} for name, dtype in found.states],
        "proofs": list(found.proofs),
        "stages": [
            {
                "pp_rank": pp_rank,
                "vp_stage": vp_stage,
                "weight_bytes": stage.weights,
                "optimizer_bytes": stage.optimizer,
            }
            for (pp_rank, vp_stage), stage in sorted(found.stages.items())
        ],
        "choices": [
            {"options": choice.options, "launch_flags": choice.launch_flags}
            for choice in found.choices
        ],
        "notes": list(found.notes),
        "folders": found.folders,
        "files": found.files,
        "bytes": found.length,
    }


def _plan(plan: Plan) -> dict[str, object]:
    return {
        **_sides(plan),
        "ranks": [
            {
                "folder": rank.id.folder,
                "files": [{"name": file.name, "bytes": file.length} for file in rank.files],
            }
            for rank in plan.ranks
        ],
    }


def _conversion(outcome: Outcome) -> dict[str, object]:
    return {
        **_sides(outcome.plan),
        "seconds": round(outcome.seconds, 3),
        "bytes_written": outcome.written,
        "verification": outcome.depth.value,
        "checksums": outcome.checksums,
        "tracker": outcome.tracker,
        "ranks": [
            {
                "folder": rank.id.folder,
                "kept": rank.was_kept,
                "seconds": round(rank.seconds, 3),
                "files": [
                    {
                        "name": file.name,
                        "bytes": file.length,
                        "crc32": None if file.crc32 is None else f"{file.crc32:08x}",
                    }
                    for file in rank.files
                ],
            }
            for rank in outcome.ranks
        ],
    }


def _verification(verified: Verified) -> dict[str, object]:
    return {
        "source": {"path": verified.source, **_layout(verified.source_layout)},
        "target": {"path": verified.target, **_layout(verified.layout)},
        "seconds": round(verified.seconds, 3),
        "bytes_verified": verified.length,
        "verification": verified.depth.value,
    }


def _sides(plan: Plan) -> dict[str, object]:
    return {
        "source": {
            "path": plan.survey.path,
            "iteration": plan.survey.iteration,
            "facts": list(plan.facts),
            **_layout(plan.source.layout),
        },
        "target": {
            "path": None if plan.save_dir is None else str(plan.save_dir),
            "has_optimizer_state": not plan.no_save_optim,
            **_layout(plan.target.layout),
            "launch_flags": plan.launch_flags,
        },
        "notes": list(plan.notes),
        "bytes": plan.length,
        **_share(plan),
    }


def _share(plan: Plan) -> dict[str, object]:
    """What this process does of a conversion that several share."""
    part = plan.part
    if part is None:
        return {}
    return {
        "share": {
            "index": part.share.index,
            "count": part.share.count,
            "folders": len(part.ranks),
            "bytes": plan.length,
            "largest_over_mean": round(part.largest_over_mean, 4),
        }
    }


def _layout(layout: PipelineLayout) -> dict[str, object]:
    """Layers of each chunk: ``layers[pp_rank][vp_stage]``."""
    return {
        "pipeline_model_parallel_size": layout.pp_size,
        "virtual_pipeline_model_parallel_size": layout.vp_size,
        "layers": [
            [list(chunk.layers) for chunk in layout.rank_chunks(p)] for p in range(layout.pp_size)
        ],
    }
