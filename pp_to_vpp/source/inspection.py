"""What looking at a family of ranks shows beside the proof: bytes by stage, states, groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.family import Family
from ..megatron.arguments import SavedArguments
from ..megatron.optimizer_chain import OptimizerKind
from ..megatron.rounding import HALVES, REMAINDERS, UNCOMPARED
from ..options import MANIFEST
from .files import sizes_in
from .proven import FamilyJob, ProvenFamily, proven, read_proven
from .survey import Survey

_IN_PLACE_OF_ROUNDED: Mapping[str, str] = {
    REMAINDERS: "main parameters are stored as remainders, which no weight can be compared with",
    HALVES: "main parameters were kept in fp16, which no weight can be compared with",
}
_UNLOADED = (
    "in the place of main parameters the files hold remainders of 16 bits (precision-aware "
    "optimizer, Transformer Engine 2.1 and later): Megatron's loader, up to its development branch "
    "of August 2026, fails on them ('assert unscaled_state.dtype == torch.int16'), in this "
    "checkpoint as in a converted one; it needs a correction, or --no-load-optim"
)


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Bytes of the tensors that a (pipeline rank, virtual stage) holds."""

    weights: int = 0
    optimizer: int = 0

    def __add__(self, other: StageBytes) -> StageBytes:
        return StageBytes(self.weights + other.weights, self.optimizer + other.optimizer)


@dataclass(frozen=True, slots=True)
class Look:
    """What looking at a family has shown."""

    proven: ProvenFamily
    stages: Mapping[tuple[int, int], StageBytes]
    """By (pipeline rank, virtual stage): what lies in the family's own folders."""
    states: frozenset[tuple[str, str]]
    """Name and dtype of each kind of optimizer state."""
    samples: int
    """Weights that were compared with their main parameters."""
    views: bool
    """Weights are views of flat buffers, at the offsets that the rules compute."""
    odd_groups: bool
    """Param groups that the rules do not make, kept as they are."""
    files: int
    length: int
    """Bytes of the files."""


def look_at(job: FamilyJob) -> Look:
    """Read and prove a family.

    Raises:
        CheckpointError: it cannot be read, or no rules explain it.
    """
    family, rounding = read_proven(job)
    manifest = family.manifest()
    files = [
        size
        for rank in job.folders.ranks.values()
        for size in sizes_in(Path(job.folders.directory) / rank.folder)
    ]
    return Look(
        proven=proven(family, rounding, job.folders),
        stages=_stages(family),
        states=frozenset((name.kind, t.dtype) for name, t in manifest.items() if name.kind),
        samples=sum(1 for _ in family.samples()),
        views=family.shares_storages,
        odd_groups=bool(family.odd_groups),
        files=len(files),
        length=sum(files),
    )


def _stages(family: Family) -> dict[tuple[int, int], StageBytes]:
    own = {rank.files.id.folder for rank in family.ranks.values()}
    found: dict[tuple[int, int], StageBytes] = {}
    for pp_rank, rank in family.ranks.items():
        for vp_stage, content in enumerate(rank.contents):
            weights = optimizer = 0
            for name, tensor in family.manifest(content.all_items).items():
                # State that several families share counts where it lies.
                if Path(tensor.extent.path).parent.name in own:
                    weights += 0 if name.kind else tensor.extent.length
                    optimizer += tensor.extent.length if name.kind else 0
            found[pp_rank, vp_stage] = StageBytes(weights, optimizer)
    return found


def facts(arguments: SavedArguments, family: ProvenFamily) -> tuple[str, ...]:
    """What a source was found to be, in words."""
    sizes = (
        f"TP {arguments.tp_size}, PP {arguments.pp_size}, EP {arguments.ep_size}, "
        f"DP {arguments.dp_size}, {arguments.num_layers} layers"
    )
    if arguments.mtp_num_layers:
        sizes += f", {arguments.mtp_num_layers} MTP layers"
    found = [family.kind.value, sizes]
    if family.rounding in UNCOMPARED:
        found.append(_IN_PLACE_OF_ROUNDED[family.rounding])
    elif family.rounding:
        found.append(f"16-bit weights are their main parameters {family.rounding}")
    if arguments.clips_qk:
        found.append("but for those that --qk-clip scales, which cannot be compared")
    return tuple(found)


def oddities(survey: Survey, families: Iterable[ProvenFamily]) -> list[str]:
    """What of a source a user should know that is no part of a checkpoint, or that nobody knows."""
    families = list(families)
    odd = [name for name in survey.told if name.startswith("entry ")]
    left: dict[str, list[str]] = {}
    for path in (path for family in families for path in family.left_behind):
        left.setdefault(path.rpartition("/")[2], []).append(path)
    left |= {name: [name] for name in survey.ignored if name != MANIFEST}
    unlike = dict.fromkeys(name for family in families for name in family.unlike_embeddings[:1])
    return [
        *(f"{name} is unknown, alike in all files, and copied" for name in odd),
        *(
            "not copied, no part of a checkpoint: "
            + (paths[0] if len(paths) == 1 else f"{name} in {len(paths)} rank folders")
            for name, paths in left.items()
        ),
        *(f"{name} is not equal to the word embedding, of which it is a copy" for name in unlike),
        *([_UNLOADED] if any(family.rounding == REMAINDERS for family in families) else []),
    ]


def proofs(look: Look, samples: int) -> tuple[str, ...]:
    """By what the rules of a checkpoint were proved, in words.

    Args:
        look: at one of its families.
        samples: in all families.
    """
    found = []
    if look.proven.kind is OptimizerKind.DISTRIBUTED:
        offsets = ", and the offsets of all weights in them," if look.views else ""
        found.append(f"the sizes of all flat buffers{offsets} are those that the rules compute")
    if samples and look.proven.rounding not in UNCOMPARED:
        found.append(
            f"{samples} weights of 16 bits are their main parameters {look.proven.rounding}, "
            "compared at both ends"
        )
    if look.proven.source.embedding_copies and not look.proven.unlike_embeddings:
        found.append(
            "the copies of the word embedding are equal, weights and states, compared at both ends"
        )
    if look.proven.groups and look.odd_groups:
        found.append("its param groups are not those of the rules: they are taken as they are")
    elif look.proven.groups:
        found.append(f"its {len(look.proven.groups)} kinds of param groups are those of the rules")
    if look.proven.frozen:
        found.append(f"{len(look.proven.frozen)} parameters of {look.proven.name} are frozen")
    return tuple(found)
