"""What reading a family of ranks has shown, and what only all families together can show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint import one_save
from ..checkpoint.family import Family, RankFiles, StateKind
from ..container.pickling import digest
from ..errors import COPY_MISSING, ONE_SAVE, CheckpointError, problem, show
from ..megatron.megatron import Megatron
from ..megatron.optimizer_chain import OptimizerKind
from ..megatron.processes import Processes
from ..megatron.ranks import OPTIMIZER_FILE, RankId
from . import fingerprint
from .files import FamilyFolders, other_files
from .fingerprint import Identity
from .proof import proven_family, unlike_embeddings


@dataclass(frozen=True, slots=True)
class ProvenFamily:
    """A family whose bytes agree with the rules, without its objects."""

    folders: FamilyFolders
    source: Megatron
    """The run that saved it."""
    kind: OptimizerKind
    rounding: str
    """How the 16-bit weights come from their main parameters; "" if there are none."""
    optimizer_states: Mapping[str, bool]
    """The optimizer states that the family's parameters have, in words, and whether its own files
    hold them. Families with the same dense or expert parameters share one."""
    left_behind: tuple[str, ...]
    """Files of the rank folders that are no part of the checkpoint."""
    identities: Mapping[RankId, Identity]
    """What the rank folders that were read are known by."""
    frozen: frozenset[str]
    """Names of the parameters that the run does not train."""
    groups: Mapping[str, str]
    """What tells each param group from its siblings, as a digest, by what it is known by."""
    state_entries: Mapping[StateKind, tuple[str, ...]]
    """What optimizer states of each kind have beside bytes, in words."""
    unlike_embeddings: tuple[str, ...]
    """Tensors of the copies of the word embedding that are not equal to its own."""

    @property
    def name(self) -> str:
        """Its first folder."""
        return min(self.folders.ranks.values()).folder


def proven(family: Family, rounding: str, folders: FamilyFolders) -> ProvenFamily:
    """What the program must know of a family that was read.

    Raises:
        CheckpointError: a file of it cannot be read.
    """
    read = [rank.files for rank in family.ranks.values()]
    ignored = (name for files in read for name in other_files(folders.directory, files.id)[1])
    return ProvenFamily(
        folders=folders,
        source=family.megatron,
        kind=family.kind,
        rounding=rounding,
        optimizer_states=_optimizer_states(family),
        left_behind=tuple(ignored),
        identities={files.id: fingerprint.of_rank(files, folders.directory) for files in read},
        frozen=family.frozen,
        groups={
            repr(kind): digest(told)
            for kind, told in family.group_identities.items()
            if told is not None
        },
        state_entries={
            kind: tuple(sorted(map(show, entries)))
            for kind, (_, entries) in family.state_entries.items()
        },
        unlike_embeddings=tuple(
            str(name)
            for name in unlike_embeddings(family, family.megatron.embedding_copies, in_full=False)
        ),
    )


def check_told(files: Iterable[RankFiles], told: Mapping[str, object]) -> None:
    """Hold rank files to what all of one save tell alike.

    Raises:
        CheckpointError: they are of another save.
    """
    problems = [text for each in files for text in one_save.differences(each, told)]
    if problems:
        raise CheckpointError(*problems[:8])


def check_savers(
    savers: Mapping[RankId, int | None], processes: Processes, iteration_dir: str
) -> None:
    """Each rank folder must be the one that its name says.

    Args:
        savers: the process that saved each folder, if that is told.
        processes: of the run that saved the checkpoint.
        iteration_dir: where they lie.

    Raises:
        CheckpointError: folders are copies of others, or have the names of others.
    """
    known = {rank: saver for rank, saver in savers.items() if saver is not None}
    problems = [
        problem(
            f"{iteration_dir}/{rank.folder}",
            "it is not what its name says: by its args.rank it was saved "
            + ("as no rank folder of this run" if home is None else f"as {home.folder}"),
            expected="a folder for each rank, no copies and none exchanged",
            found=f"args.rank {known[rank]}",
            cure="copy each folder again from where it was saved, under its own name",
        )
        for rank, home in sorted(processes.misnamed(known).items())
    ]
    if problems:
        raise CheckpointError(*problems[:8])


def read_one_save(
    folders: FamilyFolders, pp_ranks: Iterable[int], told: Mapping[str, object]
) -> dict[int, RankFiles]:
    """The files of some ranks of a family, which are of one save and are what their names say.

    Raises:
        CheckpointError: they are not, or a file is missing or damaged.
    """
    files = folders.read(pp_ranks)
    check_told(files.values(), told)
    savers = {each.id: one_save.saver(each) for each in files.values()}
    check_savers(savers, folders.processes, folders.directory)
    return files


@dataclass(frozen=True, slots=True)
class FamilyJob:
    """A family to be read."""

    folders: FamilyFolders
    told: Mapping[str, object]
    """What all rank files of the save tell alike."""


def read_proven(job: FamilyJob) -> tuple[Family, str]:
    """All ranks of a family under the first rules that their bytes agree with, and the rounding.

    Raises:
        CheckpointError: no rules do, or the ranks are not of one save.
    """
    return proven_family(read_one_save(job.folders, job.folders.ranks, job.told))


def prove(job: FamilyJob) -> ProvenFamily:
    """Read a family, and prove it.

    Raises:
        CheckpointError: no rules explain it, or the ranks are not of one save.
    """
    return proven(*read_proven(job), job.folders)


def _optimizer_states(family: Family) -> dict[str, bool]:
    """What ``optimizer_states`` of a proven family says."""
    if family.kind is not OptimizerKind.DISTRIBUTED:
        return {}
    rank = family.any_rank.files.id
    dense = f"dense optimizer state of tp rank {rank.tp_rank}"
    found = {dense: family.holds_state(is_expert=False)}
    if family.has_expert_optimizer:
        # Consecutive ranks are those of one tensor-parallel group, of experts too.
        etp_rank = rank.tp_rank % family.megatron.arguments.etp_size
        experts = f"expert optimizer state of etp rank {etp_rank} and ep rank {rank.ep_rank or 0}"
        found[experts] = family.holds_state(is_expert=True)
    return found


def check_families(families: Sequence[ProvenFamily], iteration_dir: str) -> None:
    """What only all families together can show.

    Raises:
        CheckpointError: they are not of one save, or optimizer state is missing.
    """
    check_alike(families, iteration_dir)
    _check_states(families, iteration_dir)


def check_alike(families: Sequence[ProvenFamily], iteration_dir: str) -> None:
    """Hold some families to the first one of them.

    Raises:
        CheckpointError: they are not of one save.
    """
    first = families[0]
    for family in families:
        if (family.source.rules, family.kind) != (first.source.rules, first.kind):
            raise CheckpointError.of(
                iteration_dir,
                "its families of ranks were written in different ways "
                f"({family.name} and {first.name})",
                cure=ONE_SAVE,
            )
        common = family.groups.keys() & first.groups.keys()
        if any(family.groups[kind] != first.groups[kind] for kind in common):
            raise CheckpointError.of(
                f"{iteration_dir}/{family.name}",
                f"a param group differs from that of {first.name}",
                cure=ONE_SAVE,
            )
        for kind in family.state_entries.keys() & first.state_entries.keys():
            found, expected = family.state_entries[kind], first.state_entries[kind]
            if found != expected:
                raise CheckpointError.of(
                    f"{iteration_dir}/{family.name}",
                    f"its optimizer states have other entries than those of {first.name}",
                    expected=", ".join(expected),
                    found=", ".join(found),
                    cure=ONE_SAVE,
                )


def _check_states(families: Iterable[ProvenFamily], iteration_dir: str) -> None:
    is_held: dict[str, bool] = {}
    for family in families:
        for name, here in family.optimizer_states.items():
            is_held[name] = here or is_held.get(name, False)
    problems = [
        problem(
            iteration_dir,
            f"no {OPTIMIZER_FILE} holds the {name}",
            expected="one in the folders of its ranks",
            cure=COPY_MISSING,
        )
        for name, somewhere in is_held.items()
        if not somewhere
    ]
    if problems:
        raise CheckpointError(*problems)
