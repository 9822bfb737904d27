"""Which rank folders an iteration has, held to the sizes that its arguments tell."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.one_save import told
from ..container.pickling import as_mapping
from ..errors import COPY_MISSING, ONE_SAVE, CheckpointError, problem, refusals
from ..megatron.arguments import SavedArguments, read_arguments
from ..megatron.ranks import MODEL_FILE, RankId, is_rank_folder
from .files import FamilyFolders, check_links, names_in, read_torch_file
from .foreign import DISTRIBUTED, why_foreign, why_no_folder, why_no_ranks

_MAX_ITERATION = 1 << 62


@dataclass(frozen=True, slots=True)
class Survey:
    """The folders of an iteration."""

    path: str
    ranks: tuple[RankId, ...]
    arguments: SavedArguments
    """Of the first rank."""
    told: Mapping[str, object]
    """What all rank files of one save tell alike (see ``one_save``), as the first one does."""
    ignored: tuple[str, ...]
    """Entries beside the rank folders that are no part of the checkpoint."""

    @property
    def families(self) -> tuple[tuple[int, int], ...]:
        """Each (tp_rank, ep_rank)."""
        return tuple(sorted({rank.family for rank in self.ranks}))

    @property
    def iteration(self) -> int | None:
        """Of training; None if the files do not tell."""
        found = self.told.get("iteration")
        return found if type(found) is int and 0 <= found < _MAX_ITERATION else None

    def family(self, family: tuple[int, int]) -> FamilyFolders:
        """The folders of one family."""
        ranks = {rank.pp_rank or 0: rank for rank in self.ranks if rank.family == family}
        return FamilyFolders(self.path, ranks, self.arguments.processes)

    def ranks_of(self, pp_size: int) -> tuple[RankId, ...]:
        """The rank folders of the same families in a run of so many pipeline ranks."""
        found = {rank.at(pp_rank, pp_size) for rank in self.ranks for pp_rank in range(pp_size)}
        return tuple(sorted(found))


def take_survey(iteration_dir: str, *, follow_links: bool = False) -> Survey:
    """List an iteration folder and read the files of its first rank.

    Args:
        iteration_dir: where it is.
        follow_links: its files may be links to files elsewhere.

    Raises:
        CheckpointError: not a Megatron checkpoint of --ckpt-format torch, or ranks are missing, or
            files lie elsewhere.
    """
    path = Path(iteration_dir)
    with refusals(path, "cannot be read", CheckpointError):
        if path.is_file():
            raise CheckpointError(why_no_folder(path))
    names = names_in(path)
    folders = [name for name in names if is_rank_folder(name)]
    if not folders:
        raise CheckpointError(why_no_ranks(path, names))
    # What the numbers of a name mean its arguments tell, and a folder without a file is nobody's.
    saved = [name for name in folders if os.path.lexists(path / name / MODEL_FILE)]
    first = (saved or folders)[0]
    _check_format(path, first)
    if not follow_links:
        check_links([path / first])
    where = path / first / MODEL_FILE
    root = as_mapping(read_torch_file(where).root) or {}
    arguments = read_arguments(root, str(where))
    sizes = arguments.pp_size, arguments.ep_size
    named = {name: RankId.parse(name, *sizes) for name in folders}
    ranks = sorted(rank for rank in named.values() if rank is not None)
    _check_names(path, [name for name in saved if named[name] is None], arguments)
    if not follow_links:
        check_links(path / rank.folder for rank in ranks)
    _check_sizes(path, ranks, arguments)
    ignored = tuple(name for name in names if named.get(name) is None)
    return Survey(str(path), tuple(ranks), arguments, told(root, str(where)), ignored)


def _check_format(path: Path, first: str) -> None:
    """Rank folders must be those of Megatron, and all that Megatron may load.

    Raises:
        CheckpointError: they are not.
    """
    sign = DISTRIBUTED.sign_in(path)
    if sign is not None:
        raise CheckpointError.of(
            path,
            f"{DISTRIBUTED.what} lies beside the rank folders, and Megatron would load that one",
            expected="rank folders alone",
            found=sign,
            cure="move one of the two into a folder of its own",
        )
    is_there = os.path.lexists(path / first / MODEL_FILE)
    foreign = None if is_there else why_foreign(path)
    if foreign is not None:
        raise CheckpointError(foreign)


def _check_names(path: Path, strange: list[str], arguments: SavedArguments) -> None:
    """The numbers in the folders' names must be those of a run of these sizes (FORMAT 1.1).

    Raises:
        CheckpointError: they are not: the folders are of several saves.
    """
    if strange:
        pp_size, ep_size = arguments.pp_size, arguments.ep_size
        raise CheckpointError.of(
            path,
            "its folder names do not fit pipeline_model_parallel_size and "
            "expert_model_parallel_size",
            expected=f"names like {RankId(0, 0, 0 if ep_size > 1 else None).at(0, pp_size).folder}"
            f" for PP {pp_size} and EP {ep_size}",
            found=", ".join(strange[:3]),
            cure=ONE_SAVE,
        )


def _check_sizes(path: Path, ranks: list[RankId], arguments: SavedArguments) -> None:
    """The folders must be those of the sizes in the arguments."""
    problems = _odd_sizes(path, ranks, arguments)
    problems = problems or list(itertools.islice(_missing(path, ranks, arguments), 8))
    if problems:
        raise CheckpointError(*problems)


_NEVER_SAVED = (
    "Megatron never saved the others, for expert_tensor_parallel_size times "
    "expert_model_parallel_size is less: no run can load it; save with a larger expert tensor size"
)
"""FORMAT 1.3."""


def _odd_sizes(path: Path, ranks: list[RankId], arguments: SavedArguments) -> list[str]:
    """Sizes that are not those of the folders; they may be absurd."""
    sizes = (
        ("tensor", arguments.tp_size, {rank: rank.tp_rank for rank in ranks}),
        ("expert", arguments.ep_size, {rank: rank.ep_rank or 0 for rank in ranks}),
        ("pipeline", arguments.pp_size, {rank: rank.pp_rank or 0 for rank in ranks}),
    )
    problems = []
    for kind, size, numbers in sizes:
        there = set(numbers.values())
        missing = next(number for number in itertools.count() if number not in there)
        too_many = [rank.folder for rank, number in numbers.items() if number >= size]
        found, cure = f"{len(there)} of them", COPY_MISSING
        if missing < size:
            found += f", rank {missing} is missing"
            is_lost = kind == "tensor" and missing == arguments.etp_size * arguments.ep_size
            cure = _NEVER_SAVED if is_lost else COPY_MISSING
        elif too_many:
            found = f"{len(too_many)} folders too many: {', '.join(too_many[:4])}"
            cure = "an older save may have left them over: remove them"
        else:
            continue
        problems.append(
            problem(
                path,
                f"its folders do not fit {kind}_model_parallel_size",
                expected=f"ranks 0 to {size - 1}",
                found=found,
                cure=cure,
            )
        )
    return problems


def _missing(path: Path, ranks: list[RankId], arguments: SavedArguments) -> Iterator[str]:
    """Folders of the sizes that are there in part."""
    found = set(ranks)
    families = {rank.family for rank in ranks}
    wanted = set(families)
    if arguments.etp_size == arguments.tp_size:  # else no full product of the sizes (FORMAT 1.3)
        wanted |= set(itertools.product(range(arguments.tp_size), range(arguments.ep_size)))
    for tp_rank, ep_rank in sorted(wanted):
        folders = [
            RankId(tp_rank, 0, ep_rank if arguments.ep_size > 1 else None).at(
                pp_rank, arguments.pp_size
            )
            for pp_rank in range(arguments.pp_size)
        ]
        if (tp_rank, ep_rank) not in families:
            yield problem(
                path / folders[0].folder,
                "this rank folder and its siblings are missing",
                cure=COPY_MISSING,
            )
            continue
        for rank in folders:
            if rank not in found:
                yield problem(
                    path / rank.folder,
                    "this rank folder is missing",
                    expected=f"{arguments.pp_size} pipeline ranks of each family",
                    cure=COPY_MISSING,
                )
