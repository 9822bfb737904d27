"""Whole parameters dealt out to data-parallel ranks, and put together again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.megatron.layer_wise import deal, gathered

_SIZES = st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=40)


@given(_SIZES, st.integers(1, 3), st.integers(1, 3))
def test_what_is_dealt_out_is_gathered_in_order(
    sizes: list[tuple[int, bool]], expert_ranks: int, ep_size: int
) -> None:
    """Dense ones from all ranks, those of an expert rank from its own; smallest first."""
    dp_size = expert_ranks * ep_size
    dealt = deal(sizes, dp_size, ep_size)
    order = sorted(range(len(sizes)), key=lambda index: sizes[index][0] if dp_size > 1 else 0)
    for is_expert, ranks in (
        (False, dealt),
        *((True, dealt[ep::ep_size]) for ep in range(ep_size)),
    ):
        kept = [[index for index in own if sizes[index][1] == is_expert] for own in ranks]
        assert gathered(kept) == [index for index in order if sizes[index][1] == is_expert]
