"""The optimizers that a rank chains: which there are, and whose parameters they take."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest

from pp_to_vpp.checkpoint.family import Family
from pp_to_vpp.megatron.megatron import Megatron
from pp_to_vpp.megatron.optimizer_chain import (
    ChainedOptimizer,
    OptimizerKind,
    chain_in_rank_order,
    chain_of,
    first_seen,
    has_expert_optimizer,
    has_optimizer,
    in_rank_order,
    items_by_group,
)
from pp_to_vpp.megatron.param_groups import keys_of_groups
from pp_to_vpp.megatron.parameters import GroupKey, Parameters, is_layer_matrix

from ..families import OF_KINDS, families, family
from ..pairs import (
    DEEPSEEK,
    DENSE,
    EMPTY,
    EMPTY_OLD,
    EXPERTS_FIRST,
    FROZEN_DECOUPLED,
    FROZEN_LAYER_WISE,
    LAYER_WISE,
    LAYER_WISE_ODD,
    LAYER_WISE_WIDE,
    LION,
    MOE,
    MUON,
    OVERLAP,
    SOAP,
    names,
)


@pytest.mark.parametrize(
    ("vp_size", "expert", "overlaps", "chain"),
    [
        (1, False, False, [(False, (0,))]),
        (2, True, False, [(False, (0, 1)), (True, (0, 1))]),
        (3, False, True, [(False, (0,)), (False, (1, 2))]),
        (2, True, True, [(False, (0,)), (False, (1,)), (True, (0, 1))]),
    ],
)
def test_optimizers_in_the_order_of_their_entries(
    vp_size: int, expert: bool, overlaps: bool, chain: list[tuple[bool, tuple[int, ...]]]
) -> None:
    saved = family(DENSE, "source").megatron
    megatron = saved.relaunched(saved.arguments.placement, overlaps=overlaps)
    found = chain_of([()] * vp_size, megatron, has_experts=expert)
    assert found == tuple(ChainedOptimizer(is_expert, stages) for is_expert, stages in chain)


ROUTED = (
    LION,
    MUON,
    SOAP,
    LAYER_WISE,
    LAYER_WISE_ODD,
    LAYER_WISE_WIDE,
    FROZEN_LAYER_WISE,
    EXPERTS_FIRST,
)
"""Pairs whose files tell which optimizer takes what."""


@pytest.mark.parametrize("name", [name for name in names() if name not in ROUTED])
def test_real_files_have_the_optimizers_that_are_computed(name: str) -> None:
    """By the rules of their version, whichever parameters a rank has."""
    for side in ("source", "truth"):
        for of in families(name, side):
            others_have = of.has_expert_optimizer
            for rank in of.ranks.values():
                own = has_expert_optimizer(rank.parameters, of.megatron, others_have=others_have)
                chain = chain_of(rank.parameters, of.megatron, has_experts=own)
                is_saved = of.kind is not OptimizerKind.NONE
                has_one = is_saved and has_optimizer(rank.parameters, of.megatron)
                found = tuple(own.kind for own in rank.optimizers)
                assert found == (chain if has_one else ())


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
def test_groups_take_each_parameter_once(name: str, side: str) -> None:
    for of in families(name, side):
        for rank in of.ranks.values():
            chain = dict.fromkeys(own.kind for own in rank.optimizers)
            found = [
                item.name
                for kind in chain
                for items in items_by_group(rank.parameters, kind, of.megatron).values()
                for item in items
            ]
            held = [item.name for items in rank.parameters for item in items]
            assert sorted(found) == sorted(held if rank.optimizers else [])


def test_groups_keep_the_order_of_parameters() -> None:
    of = family(OVERLAP, "truth")
    parameters = of.ranks[0].parameters
    second = ChainedOptimizer(is_expert=False, vp_stages=(1,))
    by_key = items_by_group(parameters, second, of.megatron)
    order = [item.name for item in parameters[1]]
    for items in by_key.values():
        places = [order.index(item.name) for item in items]
        assert places == sorted(places)
    first = [order.index(items[0].name) for items in by_key.values()]
    assert first == sorted(first)


def test_matrices_of_layers_and_all_others() -> None:
    of = family(MOE, "source")
    parameters = of.ranks[0].parameters
    held = [item for items in parameters for item in items]
    for is_expert in (False, True):
        for takes in (False, True):
            optimizer = ChainedOptimizer(is_expert, (0,), takes)
            found = items_by_group(parameters, optimizer, of.megatron)
            taken = {item.name for items in found.values() for item in items}
            assert taken == {
                item.name
                for item in held
                if (".experts." in item.name) is is_expert
                and is_layer_matrix(item, of.megatron) is takes
            }
    matrices = {item.name for item in held if is_layer_matrix(item, of.megatron)}
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in matrices
    assert "decoder.layers.0.input_layernorm.weight" not in matrices
    assert "embedding.word_embeddings.weight" not in matrices


def by(run: Megatron, rules: Mapping[str, bool]) -> Megatron:
    """A run by other rules."""
    return replace(run, rules=replace(run.rules, **rules))


@pytest.mark.parametrize("stages", [1, 3])
def test_a_rank_without_parameters_has_an_optimizer_for_the_groups_of_others(stages: int) -> None:
    of = family(DENSE, "source")
    nothing: Parameters = [()] * stages
    some = [*nothing, of.ranks[0].parameters[0]]
    for keeps in (False, True):
        megatron = by(of.megatron, {"keeps_all_groups": keeps})
        assert has_optimizer(nothing, megatron) is keeps
        assert has_optimizer(some, megatron)


@pytest.mark.parametrize(("name", "keeps"), [(EMPTY_OLD, False), (EMPTY, True)])
def test_real_ranks_without_parameters(name: str, keeps: bool) -> None:
    """Megatron saved an entry for those of newer versions alone."""
    empty = 0
    for side in ("source", "truth"):
        of = family(name, side)
        for rank in of.ranks.values():
            if not any(rank.parameters):
                empty += 1
                assert has_optimizer(rank.parameters, of.megatron) is keeps
                assert bool(rank.optimizers) is keeps
    assert empty


def test_every_rank_has_an_expert_optimizer_if_any_has_by_newer_rules() -> None:
    of = family(MOE, "source")
    experts = of.ranks[0].parameters
    dense = [[item for item in items if ".experts." not in item.name] for items in experts]
    for keeps in (False, True):
        megatron = by(of.megatron, {"keeps_all_groups": keeps})
        for others_have in (False, True):
            assert has_expert_optimizer(experts, megatron, others_have=others_have)
            assert has_expert_optimizer([(), *experts], megatron, others_have=others_have)
            expected = keeps and others_have
            for parameters in (dense, [()], [(), ()]):
                found = has_expert_optimizer(parameters, megatron, others_have=others_have)
                assert found is expected


@pytest.mark.parametrize(("name", "have"), [(MOE, True), (DEEPSEEK, True), (DENSE, False)])
def test_families_with_experts_have_an_expert_optimizer(name: str, have: bool) -> None:
    for side in ("source", "truth"):
        for of in families(name, side):
            assert of.has_expert_optimizer is have
            for rank in of.ranks.values():
                assert any(own.kind.is_expert for own in rank.optimizers) is have


def parameters_of(of: Family, pp_rank: int) -> Parameters:
    return [content.parameters for content in of.ranks[pp_rank].contents]


SORTED = (LAYER_WISE, LAYER_WISE_WIDE, FROZEN_LAYER_WISE, EXPERTS_FIRST)
"""Pairs with an optimizer that takes dense matrices and those of experts."""


@pytest.mark.parametrize("side", ["source", "truth"])
@pytest.mark.parametrize("name", SORTED)
def test_groups_stand_as_their_first_parameters_do(name: str, side: str) -> None:
    """In Megatron's own files, whatever order they are given in."""
    firsts = set()
    for of in families(name, side):
        for pp_rank, rank in of.ranks.items():
            own = next(own for own in rank.optimizers if own.kind.takes_matrices)
            keys = keys_of_groups(own.entry.groups)
            assert {key.is_expert for key in keys} == {False, True}
            for given in (keys, keys[::-1]):
                ranks = functools.partial(iter, [parameters_of(of, pp_rank)])
                assert in_rank_order(given, own.kind, ranks, of.megatron) == keys
            firsts.add(keys[0].is_expert)
    assert (True in firsts) == (name == EXPERTS_FIRST)


def test_groups_that_a_rank_has_nothing_of_stand_as_on_others() -> None:
    """Nobody is asked for the order of what is known already."""
    of = family(FROZEN_DECOUPLED, "truth")
    everyone = [parameters_of(of, pp_rank) for pp_rank in sorted(of.ranks)]
    for pp_rank, rank in of.ranks.items():
        (own,) = rank.optimizers
        keys = keys_of_groups(own.entry.groups)
        ranks = [everyone[pp_rank], *everyone]
        assert first_seen(keys[::-1], own.kind, ranks, of.megatron) == keys
        asked = iter(ranks)
        first_seen(keys, own.kind, asked, of.megatron)
        assert len(list(asked)) == (2 if pp_rank == 1 else 3)
    (own,) = of.ranks[0].optimizers
    for keys in ([], *(keys_of_groups(own.entry.groups)[:n] for n in (1, 3))):
        assert first_seen(keys, own.kind, iter(()), of.megatron) == keys


@pytest.mark.parametrize(("pp_rank", "is_expert"), [(0, True), (1, False)])
def test_a_chain_begins_with_the_group_that_comes_first(pp_rank: int, is_expert: bool) -> None:
    """Where matrices have an optimizer for dense ones and one for experts: by the source of 0.18
    alone, for a run of such ranks and others hangs before it saves."""
    of = family(EXPERTS_FIRST, "source")
    dense, experts = (ChainedOptimizer(own, (0,), takes_matrices=True) for own in (False, True))
    others = ChainedOptimizer(is_expert=False, vp_stages=(0,), takes_matrices=False)
    group = GroupKey(decays=True, is_expert=False, is_decoupled=False)
    first = {dense: group, experts: replace(group, is_expert=True), others: group}
    expected = (experts, dense, others) if is_expert else (dense, experts, others)

    def ranks() -> Iterator[Parameters]:
        yield parameters_of(of, pp_rank)

    for chain in ((dense, experts, others), (experts, dense, others)):
        assert chain_in_rank_order(chain, first, ranks, of.megatron) == expected
    twice = (dense, dense, others)  # of a damaged file
    assert chain_in_rank_order(twice, first, ranks, of.megatron) == twice
    without = {dense: group, experts: replace(group, decays=False, is_expert=True)}
    assert chain_in_rank_order((dense, experts), without, ranks, of.megatron) == (dense, experts)
