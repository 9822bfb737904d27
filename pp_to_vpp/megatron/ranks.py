"""Rank folders: the coordinates in their names, the files in them (FORMAT 1.1)."""

from __future__ import annotations

import re
from dataclasses import dataclass

MODEL_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"
TRACKER = "latest_checkpointed_iteration.txt"
"""Beside the iteration folders. Megatron finds the optimizer file through it, even with --ckpt-step
(FORMAT 1.2)."""
_LAYER_WISE_FILE = re.compile(r"layer_wise_optimizer_(0|[1-9][0-9]{0,8})\.pt")

# Widths are minimums; without the second number the last would be the expert rank (FORMAT 1.1).
_RANK_FOLDER = re.compile(r"mp_rank_([0-9]{2,9})_([0-9]{3,9})(?:_([0-9]{3,9}))?")


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


@dataclass(frozen=True, slots=True)
class RankId:
    """The model-parallel coordinates that name a rank folder (checkpointing.py, 0.6 to 0.19)."""

    tp_rank: int
    pp_rank: int
    ep_rank: int | None
    """None when expert_model_parallel_size is 1: the folder name has no third number then."""

    @classmethod
    def parse(cls, folder: str) -> RankId | None:
        """``mp_rank_00_003_001`` -> (0, 3, 1); None for any other name, e.g. without a PP rank."""
        match = _RANK_FOLDER.fullmatch(folder)
        if match is None:
            return None
        tp_rank, pp_rank, ep_rank = match.groups()
        return cls(int(tp_rank), int(pp_rank), None if ep_rank is None else int(ep_rank))

    def __lt__(self, other: RankId) -> bool:
        """By coordinates; a rank without an expert rank comes first."""
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, int, int]:
        return self.tp_rank, self.pp_rank, -1 if self.ep_rank is None else self.ep_rank

    @property
    def folder(self) -> str:
        """The folder's name; the widths are minimums."""
        name = f"mp_rank_{self.tp_rank:02d}_{self.pp_rank:03d}"
        return name if self.ep_rank is None else f"{name}_{self.ep_rank:03d}"

    @property
    def family(self) -> tuple[int, int]:
        """(tp_rank, ep_rank): layers move only between ranks that share it."""
        return (self.tp_rank, self.ep_rank or 0)
