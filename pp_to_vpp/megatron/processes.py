"""Which process of a run saves which rank folder: what ``args.rank`` tells of a folder's identity.

The tensor rank is innermost in every order of processes. The pipeline rank is outermost or, with
``--use-tp-pp-dp-mapping``, inside the data-parallel ranks (initialize.py and parallel_state.py, 0.7
to 0.19). In both orders the savers of successive stages are equally far apart.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from .ranks import RankId


@dataclass(frozen=True, slots=True)
class Processes:
    """The parallel sizes of a run, by which its processes are numbered."""

    tp_size: int
    cp_size: int
    dp_size: int
    ep_size: int
    etp_size: int
    maps_pp_inside: bool
    """use_tp_pp_dp_mapping."""

    @property
    def stride(self) -> int:
        """How far apart the savers of successive stages are."""
        return self._step if self.maps_pp_inside else self._dense * self.dp_size

    @property
    def _dense(self) -> int:
        return self.tp_size * self.cp_size

    @property
    def _step(self) -> int:
        """Of which that is a multiple in either order."""
        return math.lcm(self._dense, self.etp_size * self.ep_size)

    def misnamed(self, savers: Mapping[RankId, int]) -> dict[RankId, RankId | None]:
        """The folders that the process of another folder has saved, with that other one; None for
        a process that saves into none. Nothing where all folders tell one process, as those of
        converters do.

        Args:
            savers: ``args.rank`` in each folder, as far as they tell it.
        """
        if len(set(savers.values())) < 2:
            return {}
        best = self._odd(savers, self.stride)
        # Files that were made from those of a run of other sizes tell its processes.
        found = Counter(distance for distance in _distances(savers) if distance % self._step == 0)
        guessed = (distance for distance, _ in found.most_common(1))
        return {} if best and any(not self._odd(savers, stride) for stride in guessed) else best

    def _odd(self, savers: Mapping[RankId, int], stride: int) -> dict[RankId, RankId | None]:
        """What ``misnamed`` says where the savers of successive stages are so far apart."""
        homes = (
            {r: self._home(r, saver, stride, is_old=is_old) for r, saver in savers.items()}
            for is_old in (False, True)
        )
        odd = ({r: home for r, home in each.items() if home != r} for each in homes)
        return min(odd, key=len)

    def _home(self, like: RankId, saver: int, stride: int, *, is_old: bool) -> RankId | None:
        """The folder that a process saves into; None if it saves into none (FORMAT 1.2).

        Of a stage's processes those save that are the first of their expert data-parallel group
        (0.10 and later) or of their data-parallel group (too, 0.18.2 and later). Up to 0.9 expert
        ranks lie outside the context-parallel ones, the first or each of which saves.
        """
        pp_rank, place = divmod(saver, stride)
        dense, experts = self._dense, self.etp_size * self.ep_size
        if place >= (dense * self.ep_size if is_old else max(dense, experts)):
            return None
        ep_rank = place // dense if is_old else place // self.etp_size % self.ep_size
        return replace(
            like,
            tp_rank=place % self.tp_size,
            pp_rank=None if like.pp_rank is None and not pp_rank else pp_rank,
            ep_rank=None if like.ep_rank is None else ep_rank,
        )


def _distances(savers: Mapping[RankId, int]) -> Iterator[int]:
    """How far apart the savers of successive stages are."""
    stages = sorted((rank.family, rank.pp_rank or 0, saver) for rank, saver in savers.items())
    for (family, pp_rank, low), (other, next_rank, high) in itertools.pairwise(stages):
        if family == other and pp_rank + 1 == next_rank and low < high:
            yield high - low
