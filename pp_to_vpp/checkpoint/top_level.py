"""The keys of a rank file's top level: each is known, explained, or refused by its name.

Known ones belong to the rank, and are copied, or are keyed by chunk or layer, and are converted
(checkpointing.py ``generate_state_dict``, 0.6 to 0.19).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..container.pickling import leaves
from ..errors import CheckpointError, show
from ..megatron.arguments import SavedArguments, with_no_save_optim
from ..megatron.naming import all_chunk_keys, split_layer
from .optimizer_entries import OPTIMIZER

_RANDOM = "rng_state"
_OF_THE_RANK = frozenset(
    (
        "args", "checkpoint_version", "iteration", "opt_param_scheduler", _RANDOM,
        "rerun_state_machine", "num_floating_point_operations_so_far", "content_metadata",
        "tokens", "lr_scheduler",
    )
)  # fmt: skip
_OF_THE_OPTIMIZER = (OPTIMIZER, "opt_param_scheduler", "lr_scheduler")
"""Absent with ``--no-save-optim``; the last is the older name of the second."""
_KEYED_BY_LAYER = {
    "modelopt_state": "the state of a model that ModelOpt has changed, which names modules of "
    "each chunk, and nothing proves which parameters such a model has"
}
_CURE = (
    "what it holds could belong to layers that move, so it is not converted: ask for support of "
    "it, or remove it from all files of a copy if the relaunch can do without"
)


def unknown_values(root: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """What no rule knows, but holds plain values alone and may be copied if it is alike in all
    rank files.

    Raises:
        CheckpointError: a key that could hold what moves with layers.
    """
    known = {*_OF_THE_RANK, OPTIMIZER, *all_chunk_keys(root)}
    found: dict[str, Any] = {}
    for key, value in root.items():
        if key in known:
            continue
        what = next(
            (f": {text}" for name, text in _KEYED_BY_LAYER.items() if str(key).startswith(name)), ""
        )
        if what or not isinstance(key, str) or not all(_is_plain(part) for part in leaves(value)):
            raise CheckpointError.of(where, f"unknown entry {show(key)}{what}", cure=_CURE)
        found[key] = value
    return found


def without_optimizer(root: Mapping[Any, Any]) -> dict[Any, Any]:
    """The top level of a rank file as ``--no-save-optim`` leaves it."""
    bare = {key: value for key, value in root.items() if key not in _OF_THE_OPTIMIZER}
    return {**bare, "args": with_no_save_optim(bare["args"])}


def for_data_parallel(root: Mapping[Any, Any], arguments: SavedArguments) -> dict[Any, Any]:
    """The top level of a rank file with the random states of as many data-parallel ranks as a run
    has, where each has its own (``--data-parallel-random-init``; get_rng_state, 0.7 to 0.19)."""
    states = root.get(_RANDOM)
    if not arguments.random_by_dp_rank or not isinstance(states, list):
        return dict(root)
    return {**root, _RANDOM: states[: arguments.dp_size]}


def _is_plain(value: Any) -> bool:
    """Whether it is a number or a text that names no layer."""
    if isinstance(value, str):
        return split_layer(value) is None and ".layers." not in value
    return value is None or isinstance(value, (bool, int, float))
