"""States of optimizers that are not distributed; what contradicts the parameters is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from pp_to_vpp.checkpoint.flat_states import Unexplained
from pp_to_vpp.checkpoint.optimizer_entries import MAINS, OPTIMIZER, OptimizerEntry
from pp_to_vpp.checkpoint.plain_states import MAIN, PlainState, read_plain_states
from pp_to_vpp.container.tensors import TensorRef, as_tensor, unwrap_tensor
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.optimizer_chain import OptimizerKind, share_of
from pp_to_vpp.megatron.parameters import is_layer_matrix

from ..edit import float_tensor
from ..families import family, of_kind, values_of
from ..pairs import PLAIN

ADAM = ["exp_avg", "exp_avg_sq"]
MATRIX_STATES = {
    "lion": ["exp_avg"],
    "muon": ["momentum_buffer"],
    "soap": ["step", *ADAM, "L", "R", "Q_L", "Q_R"],
}
SQUARE = {"L": 0, "Q_L": 0, "R": 1, "Q_R": 1}
"""Which side of the parameter those states have twice."""


@pytest.mark.parametrize(("name", "side"), of_kind(OptimizerKind.PLAIN))
def test_plain_states_are_those_of_their_parameters(name: str, side: str) -> None:
    """By torch: shapes, and main parameters that round to the weights."""
    of = family(name, side)
    held = [item for item in of.items() if item.is_trained]
    assert set(of.states) == {item.name for item in held}
    for item in held:
        state = of.states[item.name]
        assert isinstance(state, PlainState)
        main = unwrap_tensor(state.main_node)
        assert item.tensor is not None
        assert main is not None
        assert state.main is not None
        assert state.main.extent == main.extent
        assert main.shape == item.tensor.shape
        assert torch.equal(values_of(main).to(torch.bfloat16), values_of(item.tensor)), item.name
        is_matrix = is_layer_matrix(item, of.megatron)
        words = next((w for part, w in MATRIX_STATES.items() if part in name and is_matrix), ADAM)
        assert list(state.entry) == (["momentum_buffer"] if "sgd" in name else words)
        moments = {word: unwrap_tensor(state.entry[word]) for word in state.entry}
        assert seen(state.tensors) == seen({**moments, MAIN: main})
        assert state.values == ({"step": 1} if "step" in words else {})
        for word, moment in moments.items():
            if moment is None:
                assert word == "step"
            elif word in SQUARE:
                assert moment.shape == (item.tensor.shape[SQUARE[word]],) * 2
            else:
                assert moment.shape == item.tensor.shape


def seen(tensors: Mapping[str, TensorRef | None]) -> list[object]:
    """Tensors without the nodes that rebuild them: those in a wrapper are unwrapped anew."""
    return [(k, t.extent, t.dtype, t.shape, t.stride) for k, t in tensors.items() if t is not None]


def read_plain(edit: Callable[[dict[str, Any]], None]) -> dict[str, PlainState]:
    """The plain states of rank 0 after an edit of its (copied) entry."""
    of = family(PLAIN, "source")
    rank = of.ranks[0]
    entry = rank.root[OPTIMIZER]
    inner = entry["optimizer"]
    copy = {
        "optimizer": {
            "state": {number: dict(state) for number, state in inner["state"].items()},
            "param_groups": [dict(group) for group in inner["param_groups"]],
        },
        "fp32_from_fp16_params": [list(mains) for mains in entry["fp32_from_fp16_params"]],
    }
    edit(copy)
    entries = [OptimizerEntry(copy)]
    chain = [own.kind for own in rank.optimizers]
    share = share_of(rank.parameters, chain, of.megatron)
    return read_plain_states(entries, chain, share, "file")


def test_an_unchanged_copy_is_read_the_same() -> None:
    of = family(PLAIN, "source")
    found = read_plain(lambda _: None)
    for name, state in found.items():
        original = of.states[name]
        assert isinstance(original, PlainState)
        assert (state.entry, state.main_node) == (original.entry, original.main_node)
        assert seen(state.tensors) == seen(original.tensors)


def halve_a_main(entry: dict[str, Any]) -> None:
    """A 16-bit weight in the place of its main parameter."""
    mains = entry[MAINS][0]
    main = unwrap_tensor(mains[0])
    assert main is not None
    items = family(PLAIN, "source").ranks[0].contents[0].parameters
    mains[0] = next(i.value for i in items if i.tensor and i.tensor.shape == main.shape)


ODD_ENTRIES: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "no state": (lambda e: e["optimizer"].pop("state"), CheckpointError, "of an unknown kind"),
    "odd mains": (
        lambda e: e.update(fp32_from_fp16_params={}), CheckpointError, "of an unknown kind",
    ),
    "a parameter too many": (
        lambda e: e["optimizer"]["param_groups"][0]["params"].append(99), Unexplained,
        "param group 0 does not have 18 parameters",
    ),
    "a main too few": (
        lambda e: e["fp32_from_fp16_params"][1].pop(), Unexplained, "32 main parameters",
    ),
    "a list of mains too few": (
        lambda e: e["fp32_from_fp16_params"].pop(), Unexplained, "32 main parameters",
    ),
    "a group too few": (
        lambda e: (
            e["optimizer"]["param_groups"].pop(), e["fp32_from_fp16_params"].pop(),
            e["optimizer"]["state"].clear(),
        ),
        Unexplained, "no param group for 32 parameters",
    ),
    "equal groups": (
        lambda e: e["optimizer"]["param_groups"][1].update(wd_mult=1.0), Unexplained,
        "param group 0 does not have 0 parameters",
    ),
    "another shape": (
        lambda e: e["optimizer"]["state"][3].update(exp_avg=float_tensor(bytes(8))), Unexplained,
        "'exp_avg' differs",
    ),
    "no mains": (
        lambda e: e.pop("fp32_from_fp16_params"), Unexplained, "18 main parameters",
    ),
    "a main in half": (
        halve_a_main, Unexplained, "main parameter is no float32 tensor",
    ),
    "a number twice": (
        lambda e: e["optimizer"]["param_groups"][0]["params"].__setitem__(1, 0),
        CheckpointError, "0 is not the number of one parameter",
    ),
    "a number that is none": (
        lambda e: e["optimizer"]["param_groups"][0]["params"].__setitem__(1, []),
        CheckpointError, "is not the number of one parameter",
    ),
    "a state too many": (
        lambda e: e["optimizer"]["state"].update({99: e["optimizer"]["state"][0]}), CheckpointError,
        "state 99 belongs to no parameter",
    ),
    "another main": (
        lambda e: e["fp32_from_fp16_params"][0].reverse(), Unexplained, "'main parameter' differs",
    ),
}  # fmt: skip


def own_lists(edit: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Give each group a list of numbers of its own before an edit: the family must not change."""

    def apply(entry: dict[str, Any]) -> None:
        for group in entry["optimizer"]["param_groups"]:
            group["params"] = list(group["params"])
        edit(entry)

    return apply


@pytest.mark.parametrize("case", ODD_ENTRIES)
def test_odd_plain_optimizers(case: str) -> None:
    edit, kind, reason = ODD_ENTRIES[case]
    with pytest.raises(kind, match=reason):
        read_plain(own_lists(edit))


def test_parameters_may_have_no_state() -> None:
    """As before the first step."""
    found = read_plain(lambda entry: entry["optimizer"]["state"].clear())
    assert all(state.entry is None and state.main is not None for state in found.values())


def test_scalars_are_of_no_shape() -> None:
    """Such as a step that is kept in each state."""
    step = as_tensor(float_tensor(bytes(4)))
    assert step is not None
    node = step.node
    storage, offset, _, _, *rest = node.arguments
    scalar = type(node)(node.factory, (storage, offset, (), (), *rest))

    def add(entry: dict[str, Any]) -> None:
        entry["optimizer"]["state"][0]["step"] = scalar

    assert any(
        isinstance(state.entry, dict)
        and state.entry.get("step") is scalar
        and state.tensors["step"].node is scalar
        for state in read_plain(add).values()
    )
