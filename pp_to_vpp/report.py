"""The JSON report of a run; its fields are documented in the README."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import __version__
from .errors import ConversionError

if TYPE_CHECKING:
    from .megatron.pipeline import PipelineLayout
    from .run.convert import Outcome, Part, Prepared
    from .run.verify_pair import Verified

SCHEMA = 1


def of_plan(prepared: Prepared) -> dict[str, object]:
    """A dry run."""
    return {
        **_head("plan"),
        **_sides(prepared),
        "ranks": [
            {
                "folder": rank.id.folder,
                "files": [{"name": file.name, "bytes": file.length} for file in rank.files],
            }
            for rank in prepared.ranks
        ],
    }


def of_conversion(prepared: Prepared, outcome: Outcome) -> dict[str, object]:
    """A finished conversion."""
    return {
        **_head("conversion"),
        **_sides(prepared),
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


def of_verification(verified: Verified) -> dict[str, object]:
    """An existing pair of folders that was verified."""
    return {
        **_head("verification"),
        "source": {"path": verified.source},
        "target": {"path": verified.target, **_layout(verified.layout)},
        "seconds": round(verified.seconds, 3),
        "bytes_verified": verified.length,
        "verification": verified.depth.value,
    }


def of_refusal(error: ConversionError) -> dict[str, object]:
    """A run that did not do what it was asked for."""
    return {**_head("refusal"), "status": error.exit_status, "problems": list(error.problems)}


def _head(kind: str) -> dict[str, object]:
    return {"schema": SCHEMA, "tool": "pp_to_vpp", "version": __version__, "kind": kind}


def _sides(prepared: Prepared) -> dict[str, object]:
    return {
        "source": {
            "path": prepared.survey.path,
            "iteration": prepared.survey.iteration,
            "facts": list(prepared.facts),
            **_layout(prepared.source.layout),
        },
        "target": {
            "path": None if prepared.save_dir is None else str(prepared.save_dir),
            **_layout(prepared.target.layout),
            "launch_flags": prepared.launch_flags,
        },
        "notes": list(prepared.notes),
        "bytes": prepared.length,
        **_share(prepared.part),
    }


def _share(part: Part | None) -> dict[str, object]:
    """What this process does of a conversion that several share."""
    if part is None:
        return {}
    return {
        "share": {
            "index": part.share.index,
            "count": part.share.count,
            "folders": len(part.ranks),
            "bytes": part.length,
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
