"""Rank folders: the coordinates in their names, the files in them (FORMAT 1.1)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

MODEL_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"
TRACKER = "latest_checkpointed_iteration.txt"
"""Beside the iteration folders. Megatron finds the optimizer file through it, even with --ckpt-step
(FORMAT 1.2)."""
_LAYER_WISE_FILE = re.compile(r"layer_wise_optimizer_(0|[1-9][0-9]{0,8})\.pt")

_RANK_FOLDER = re.compile(r"mp_rank_[0-9]{2,9}(?:_[0-9]{3,9}){0,2}")
"""Widths are minimums."""


def layer_wise_file(dp_rank: int) -> str:
    """The file of a data-parallel rank of a layer-wise optimizer."""
    return f"layer_wise_optimizer_{dp_rank}.pt"


def dp_rank_of(name: str) -> int | None:
    """The data-parallel rank whose layer-wise optimizer a file is; None for any other name."""
    match = _LAYER_WISE_FILE.fullmatch(name)
    return None if match is None else int(match[1])


def is_rank_file(name: str) -> bool:
    """Whether it is the name of a file with what layers take along."""
    return name in (MODEL_FILE, OPTIMIZER_FILE) or dp_rank_of(name) is not None


def is_rank_folder(name: str) -> bool:
    """Whether a rank of some run has a folder of this name."""
    return _RANK_FOLDER.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class RankId:
    """The model-parallel coordinates that name a rank folder (checkpointing.py, 0.6 to 0.19)."""

    tp_rank: int
    pp_rank: int | None
    """None when pipeline_model_parallel_size is 1: the folder's name has no such number then."""
    ep_rank: int | None
    """None when expert_model_parallel_size is 1, likewise."""

    @classmethod
    def parse(cls, folder: str, pp_size: int, ep_size: int) -> RankId | None:
        """The rank of a run of these sizes whose folder has this name, None if none has:
        ``mp_rank_00_003`` is pipeline rank 3, or expert rank 3 where there is one pipeline rank."""
        if not is_rank_folder(folder):
            return None
        tp_rank, *others = map(int, folder.removeprefix("mp_rank_").split("_"))
        if len(others) != (pp_size > 1) + (ep_size > 1):
            return None
        pp_rank = others.pop(0) if pp_size > 1 else None
        rank = cls(tp_rank, pp_rank, others.pop() if others else None)
        return rank if rank.folder == folder else None

    def __lt__(self, other: RankId) -> bool:
        """By coordinates; a rank without one of them comes first."""
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, ...]:
        numbers = (self.tp_rank, self.pp_rank, self.ep_rank)
        return tuple(-1 if number is None else number for number in numbers)

    @property
    def folder(self) -> str:
        """The folder's name; the widths are minimums."""
        others = (f"_{rank:03d}" for rank in (self.pp_rank, self.ep_rank) if rank is not None)
        return f"mp_rank_{self.tp_rank:02d}{''.join(others)}"

    def at(self, pp_rank: int, pp_size: int) -> RankId:
        """The rank of the same family in a run of so many pipeline ranks."""
        return replace(self, pp_rank=pp_rank if pp_size > 1 else None)

    @property
    def family(self) -> tuple[int, int]:
        """(tp_rank, ep_rank): layers move only between ranks that share it."""
        return (self.tp_rank, self.ep_rank or 0)
