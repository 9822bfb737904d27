"""Where the parts of a model are."""

from __future__ import annotations

from hypothesis import assume, given

from pp_to_vpp.megatron.placement import Placement

from ..strategies import placements


@given(placements())
def test_sources_are_the_ranks_that_hold_what_is_needed(case: tuple[int, int, Placement]) -> None:
    num_layers, pp_size, placement = case
    assume(num_layers % pp_size == 0)
    source = placement.place(num_layers, pp_size)
    target = Placement().place(num_layers, pp_size)
    for p in range(pp_size):
        needed = {layer for chunk in target.rank_chunks(p) for layer in chunk.layers}
        holders = {c.pp_rank for c in source.chunks if needed & set(c.layers)}
        ends = {0} if p == 0 else {source.chunks[-1].pp_rank} if p == pp_size - 1 else set()
        assert set(source.sources_of(target, p)) == (holders | ends or {0})
