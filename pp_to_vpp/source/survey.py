"""Which rank folders an iteration has, held to the sizes that its arguments tell."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.one_save import told
from ..container.pickling import as_mapping
from ..errors import COPY_MISSING, NOTHING_TO_CONVERT, ONE_SAVE, CheckpointError, problem, refusals
from ..megatron.arguments import SavedArguments, read_arguments
from ..megatron.ranks import MODEL_FILE, RankId
from .files import FamilyFolders, check_links, names_in, read_rank
from .foreign import DISTRIBUTED, why_foreign, why_no_folder, why_no_ranks

_MAX_ITERATION = 1 << 62
_RANK_LIKE = re.compile(r"mp_rank_[0-9]+(_[0-9]+)*")


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
        ranks = {rank.pp_rank: rank for rank in self.ranks if rank.family == family}
        return FamilyFolders(self.path, ranks, self.arguments.processes)


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
    ranks = {rank: name for name in names if (rank := RankId.parse(name)) is not None}
    odd = [name for name in names if _RANK_LIKE.fullmatch(name) and RankId.parse(name) is None]
    if not ranks:
        if odd:
            raise CheckpointError(why_foreign(path) or _why_pp_1(path, odd))
        raise CheckpointError(why_no_ranks(path, names))
    _check_format(path, min(ranks))
    if not follow_links:
        check_links(path / name for name in ranks.values())
    first = min(ranks)
    files = read_rank(str(path), first)
    root, where = as_mapping(files.model.root) or {}, files.model.path
    arguments = read_arguments(root, where)
    _check_sizes(path, sorted(ranks), arguments)
    ignored = tuple(name for name in names if RankId.parse(name) is None)
    return Survey(str(path), tuple(sorted(ranks)), arguments, told(root, where), ignored)


def _why_pp_1(path: Path, odd: list[str]) -> str:
    return problem(
        path,
        f"its rank folders ({odd[0]}) name no pipeline rank: it was saved with PP 1",
        cure=NOTHING_TO_CONVERT,
    )


def _check_format(path: Path, first: RankId) -> None:
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
    is_there = os.path.lexists(path / first.folder / MODEL_FILE)
    foreign = None if is_there else why_foreign(path)
    if foreign is not None:
        raise CheckpointError(foreign)


def _check_sizes(path: Path, ranks: list[RankId], arguments: SavedArguments) -> None:
    """The folders must be those of the sizes in the arguments."""
    problems = []
    if arguments.pp_size < 2:
        problems.append(
            problem(
                path, "it was saved with pipeline_model_parallel_size 1", cure=NOTHING_TO_CONVERT
            )
        )
    if any((rank.ep_rank is None) != (arguments.ep_size == 1) for rank in ranks):
        problems.append(
            problem(
                path,
                "its folder names do not fit expert_model_parallel_size",
                expected=f"{'two' if arguments.ep_size == 1 else 'three'} numbers in each name",
                found=ranks[0].folder,
                cure=ONE_SAVE,
            )
        )
    problems = problems or _odd_sizes(path, ranks, arguments)
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
        ("pipeline", arguments.pp_size, {rank: rank.pp_rank for rank in ranks}),
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
            RankId(tp_rank, pp_rank, ep_rank if arguments.ep_size > 1 else None)
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
