"""Processes that save rank folders, as each version numbers and chooses them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from pp_to_vpp.megatron.processes import Processes
from pp_to_vpp.megatron.ranks import RankId

Sizes = tuple[int, int, int, int, int, int]
"""TP, CP, DP, EP, expert TP, PP."""
OUTERMOST, INSIDE = "pipeline ranks outermost", "--use-tp-pp-dp-mapping"


def digits(number: int, *sizes: int) -> list[int]:
    """A number of mixed radix, the first digit innermost."""
    found = []
    for size in sizes:
        number, digit = divmod(number, size)
        found.append(digit)
    return found


def since_0_10(sizes: Sizes, order: str, *, union: bool) -> Iterator[tuple[RankId, int]]:
    """Who saves what: a grid of dense ranks, another one of experts (RankGenerator)."""
    tp, cp, dp, ep, etp, pp = sizes
    edp = tp * cp * dp // (ep * etp)
    for process in range(tp * cp * dp * pp):
        if order == OUTERMOST:
            tp_rank, _, dp_rank, pp_rank = digits(process, tp, cp, dp, pp)
            _, ep_rank, edp_rank, also_pp = digits(process, etp, ep, edp, pp)
        else:
            tp_rank, _, pp_rank, dp_rank = digits(process, tp, cp, pp, dp)
            _, ep_rank, also_pp, edp_rank = digits(process, etp, ep, pp, edp)
        assert pp_rank == also_pp, "parallel_state.py asserts it"
        if edp_rank == 0 or (union and dp_rank == 0):
            yield RankId(tp_rank, pp_rank, ep_rank if ep > 1 else None), process


def until_0_9(sizes: Sizes, order: str, *, each_cp_rank: bool) -> Iterator[tuple[RankId, int]]:
    """Who saves what: expert ranks are part of the data-parallel ones."""
    tp, cp, dp, ep, _, pp = sizes
    for process in range(tp * cp * dp * pp):
        if order == OUTERMOST:
            tp_rank, cp_rank, ep_rank, rest, pp_rank = digits(process, tp, cp, ep, dp // ep, pp)
        else:
            tp_rank, pp_rank, rest = digits(process, tp, pp, dp)
            cp_rank = ep_rank = 0
        if rest == 0 and (each_cp_rank or cp_rank == 0):
            yield RankId(tp_rank, pp_rank, ep_rank if ep > 1 else None), process


VERSIONS: dict[str, Callable[[Sizes, str], Iterator[tuple[RankId, int]]]] = {
    "0.7": lambda sizes, order: until_0_9(sizes, order, each_cp_rank=True),
    "0.9": lambda sizes, order: until_0_9(sizes, order, each_cp_rank=False),
    "0.16": lambda sizes, order: since_0_10(sizes, order, union=False),
    "0.19": lambda sizes, order: since_0_10(sizes, order, union=True),
}


def runs() -> Iterator[tuple[str, str, Sizes]]:
    """Every version with every order and sizes that it can have."""
    for sizes in itertools.product((1, 2, 4), (1, 2), (1, 2, 3, 4), (1, 2, 4), (1, 2, 4), (2, 3)):
        tp, cp, dp, ep, etp, _ = sizes
        for version in VERSIONS:
            is_old = version in ("0.7", "0.9")
            divides = dp % ep == 0 and etp == tp if is_old else tp * cp * dp % (ep * etp) == 0
            if etp > tp or not divides or (version != "0.19" and etp * ep < tp):
                continue
            yield version, OUTERMOST, sizes
            if (cp * ep == 1) if is_old else (tp * cp == etp * ep):
                yield version, INSIDE, sizes


def test_folders_of_every_version_are_their_own() -> None:
    """Whichever process wrote last, where several write one file."""
    draw = random.Random(1)
    seen = set()
    for version, order, sizes in runs():
        seen.add((version, order))
        writers: dict[RankId, list[int]] = {}
        for rank, process in VERSIONS[version](sizes, order):
            writers.setdefault(rank, []).append(process)
        for _ in range(3):
            savers = {rank: draw.choice(processes) for rank, processes in writers.items()}
            assert Processes(*sizes[:5], order == INSIDE).misnamed(savers) == {}, (
                version,
                order,
                sizes,
            )
    assert len(seen) == 2 * len(VERSIONS)


def test_copies_and_exchanged_folders_are_found() -> None:
    """With the folder of which each is a copy, or with which it was exchanged."""
    draw = random.Random(2)
    for version, order, sizes in runs():
        savers = dict(VERSIONS[version](sizes, order))
        if len(savers) < 3:
            continue
        one, other = draw.sample(sorted(savers), 2)
        processes = Processes(*sizes[:5], order == INSIDE)
        copied = processes.misnamed({**savers, other: savers[one]})
        assert copied == {other: one}, (version, order, sizes)
        exchanged = processes.misnamed({**savers, one: savers[other], other: savers[one]})
        assert exchanged == {one: other, other: one}, (version, order, sizes)


def test_what_tells_nothing_is_no_reason_to_refuse() -> None:
    one, two = RankId(0, 0, None), RankId(0, 1, None)
    alone = Processes(1, 1, 1, 1, 1, maps_pp_inside=False)
    for savers in ({}, {two: 5}, {one: 0, two: 0}, {one: 7, two: 7}):
        assert alone.misnamed(savers) == {}


def test_the_distance_of_stages_need_not_be_told() -> None:
    """Files made for half as many pipeline ranks, each from the first of two."""
    savers = {RankId(0, pp_rank, None): 2 * pp_rank for pp_rank in range(4)}
    assert Processes(1, 1, 1, 1, 1, maps_pp_inside=False).misnamed(savers) == {}


@pytest.mark.parametrize("saver", [1, 2, 3, 5, 1 << 30])
def test_a_folder_of_no_rank_is_found(saver: int) -> None:
    savers = {RankId(tp_rank, pp_rank, None): tp_rank + 4 * pp_rank
              for tp_rank in range(2) for pp_rank in range(3)}  # fmt: skip
    found = Processes(2, 1, 2, 1, 2, maps_pp_inside=False).misnamed(
        {**savers, RankId(0, 0, None): saver}
    )
    assert list(found) == [RankId(0, 0, None)]
