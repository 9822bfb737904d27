"""The files of a layer-wise optimizer, whole, missing, exchanged and edited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pp_to_vpp.checkpoint.family import Family, RankFiles, TensorName
from pp_to_vpp.checkpoint.layer_wise_states import LayerWiseFiles
from pp_to_vpp.checkpoint.optimizer_entries import OPTIMIZER
from pp_to_vpp.checkpoint.plain_states import MAIN
from pp_to_vpp.container.pickling import as_mapping
from pp_to_vpp.container.torch_file import TorchFile
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.optimizer_chain import OptimizerKind

from ..families import families, family, of_kind, read_family, values_of, with_arguments
from ..pairs import LAYER_WISE, LAYER_WISE_ODD

SIDES = of_kind(OptimizerKind.LAYER_WISE)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_every_parameter_has_its_own_state(name: str, side: str) -> None:
    """By torch: main parameters that round to the weights, wherever they lie."""
    for of in families(name, side):
        held = [item for item in of.items() if item.is_trained]
        assert set(of.states) == {item.name for item in held}
        assert of.elsewhere == frozenset()
        for item in held:
            main = of.states[item.name].tensors[MAIN]
            assert torch.equal(values_of(main).to(torch.bfloat16), values_of(item.weight))


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_one_folder_holds_a_part_of_the_states(name: str, side: str) -> None:
    """And all folders together each dense one once, and the experts of each once."""
    found: dict[tuple[int, str], int] = {}
    for ep_rank, of in enumerate(families(name, side)):
        for pp_rank, rank in of.ranks.items():
            alone = replace(rank.files, layer_wise=LayerWiseFiles(rank.files.layer_wise.own))
            part = next(read_family({pp_rank: alone}, of.megatron.rules, of.frozen))
            names = {item.name for item in part.items() if item.is_trained}
            assert set(part.states) == names - part.elsewhere
            for parameter in part.states:
                key = (ep_rank if ".experts." in parameter else -1, parameter)
                found[key] = found.get(key, 0) + 1
    assert set(found.values()) == {1}
    assert {parameter for _, parameter in found} == set(family(name, side).states)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_the_model_file_repeats_the_first_file(name: str, side: str) -> None:
    for of in families(name, side):
        for rank in of.ranks.values():
            first = of.megatron.arguments.ep_size and (rank.files.id.ep_rank or 0)
            own = [
                path for path in {e.path for _, _, e in of.copies()} if rank.files.id.folder in path
            ]
            assert [path.rpartition("_")[2] for path in own] == [f"{first}.pt"]
            assert rank.copies
    copies = list(family(name, side).copies())
    assert TensorName("decoder.layers.0.input_layernorm.weight", MAIN) in {n for n, _, _ in copies}
    assert all(copy.length == original.length for _, copy, original in copies)


Change = Callable[[RankFiles], RankFiles]


def files(own: Callable[[dict[int, TorchFile]], Any]) -> Change:
    """Other files in the rank's own folder."""

    def change(rank: RankFiles) -> RankFiles:
        found = dict(rank.layer_wise.own)
        own(found)
        return replace(rank, layer_wise=replace(rank.layer_wise, own=found))

    return change


def edited(entry: Callable[[Any], Any]) -> Change:
    """Another content of the first file."""

    def change(found: dict[int, TorchFile]) -> None:
        first = min(found)
        found[first] = replace(found[first], root=entry(found[first].root))

    return files(change)


def arguments(**changes: Any) -> Change:
    return lambda rank: with_arguments(rank, **changes)


def repeated(entry: Callable[[Any], Any]) -> Change:
    """Another entry in the model file."""

    def change(rank: RankFiles) -> RankFiles:
        root = dict(as_mapping(rank.model.root) or {})
        root[OPTIMIZER] = entry(root[OPTIMIZER])
        return replace(rank, model=replace(rank.model, root=root))

    return change


def other_rate(entries: list[Any]) -> list[Any]:
    """A copy with another learning rate in a group."""
    matrices, *others = entries
    inner = matrices[OPTIMIZER]
    first, *groups = inner["param_groups"]
    changed = {**inner, "param_groups": [{**first, "lr": 0.5}, *groups]}
    return [{**matrices, OPTIMIZER: changed}, *others]


def without_a_moment(entries: list[Any]) -> list[Any]:
    matrices, scalars = entries
    inner = scalars[OPTIMIZER]
    number, state = next(iter(inner["state"].items()))
    less = {word: tensor for word, tensor in state.items() if word != "exp_avg_sq"}
    return [matrices, {**scalars, OPTIMIZER: {**inner, "state": {**inner["state"], number: less}}}]


def exchanged(found: dict[int, TorchFile]) -> None:
    found[0], found[2] = found[2], found[0]


CASES: dict[str, tuple[str, Change, str]] = {
    "a file is missing": (LAYER_WISE_ODD, files(lambda own: own.pop(1)), "_1.pt is missing"),
    "a file too many": (
        LAYER_WISE_ODD,
        files(lambda own: own.update({7: own[0]})),
        "_7.pt is one too many",
    ),
    "another expert rank's": (
        LAYER_WISE,
        files(lambda own: own.update({1: own[0]})),
        "_1.pt is one too many",
    ),
    "files exchanged": (LAYER_WISE_ODD, files(exchanged), "'momentum_buffer' differs"),
    "other data-parallel size": (
        LAYER_WISE_ODD,
        arguments(data_parallel_size=4),
        "_3.pt is missing",
    ),
    "context-parallel": (
        LAYER_WISE_ODD,
        arguments(context_parallel_size=2),
        "overwrote each other's files; states are lost",
    ),
    "experts cut otherwise": (
        LAYER_WISE_ODD,
        arguments(expert_tensor_parallel_size=1, tensor_model_parallel_size=2),
        "experts have a tensor-parallel size of their own",
    ),
    "one chain is shorter": (LAYER_WISE_ODD, edited(lambda e: e[:1]), "does not have 5 parameters"),
    "repeated entry of another rate": (LAYER_WISE_ODD, repeated(other_rate), "does not repeat"),
    "repeated entry is shorter": (LAYER_WISE_ODD, repeated(lambda e: e[:1]), "does not repeat"),
    "repeated state has less": (LAYER_WISE_ODD, repeated(without_a_moment), "does not repeat"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str) -> None:
    name, change, text = CASES[case]
    of: Family = family(name, "source")
    changed = {pp_rank: change(rank.files) for pp_rank, rank in of.ranks.items()}
    with pytest.raises(CheckpointError, match=text):
        list(read_family(changed))


def test_without_an_entry_the_files_do() -> None:
    """As Megatron saves them with --no-save-optim."""
    of = family(LAYER_WISE_ODD, "source")

    def without(rank: RankFiles) -> RankFiles:
        root = as_mapping(rank.model.root) or {}
        kept = {key: value for key, value in root.items() if key != OPTIMIZER}
        return replace(rank, model=replace(rank.model, root=kept))

    found = next(read_family({p: without(rank.files) for p, rank in of.ranks.items()}))
    assert set(found.states) == set(of.states)
    assert list(found.copies()) == []
