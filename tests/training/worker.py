"""What one process of a Megatron run does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state

from . import checkpoint, values
from .building import build, initialize, param_groups
from .train import train

if TYPE_CHECKING:
    from collections.abc import Callable

    from .spec import Run


def save(run: Run, root: str, iteration: int = 10) -> Any:
    """Build a model, give it the values of ``values.fill``, and save it."""
    trainee = build(initialize(run))
    values.fill(trainee)
    trainee.scheduler.step(increment=iteration * trainee.args.global_batch_size)
    checkpoint.save(trainee, Path(root), iteration)
    return values.digests(trainee)


def load(run: Run, root: str) -> Any:
    """Build a model, load a checkpoint into it, and tell what it then holds."""
    trainee = build(initialize(run))
    checkpoint.load(trainee, Path(root))
    return values.digests(trainee)


def damage(run: Run, folder: str, kind: str) -> None:
    """Spoil a rank folder that holds virtual stages, in ways that loading alone does not notice."""
    assert run.world_size == 1
    paths = [Path(folder, name) for name in ("model_optim_rng.pt", "distrib_optim.pt")]
    model, optimizer = (torch.load(path, weights_only=False) for path in paths)
    chunk = model["model1"]
    one, other = (f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in (0, 1))
    dense = optimizer[0] if isinstance(optimizer, list) else optimizer
    (states,) = dense[1].values()
    if kind == "weight":
        chunk[one][3, 5] *= 1.01
    elif kind == "moment":
        states["exp_avg_sq"][5] *= 1.0001
    elif kind == "order of layers":
        chunk[one], chunk[other] = chunk[other], chunk[one]
    elif kind == "order of keys":
        chunk.move_to_end(one)
    elif kind == "step":
        for group in model["optimizer"]["optimizer"]["param_groups"]:
            group["step"] -= 1
    else:
        raise ValueError(kind)
    torch.save(model, paths[0])
    torch.save(optimizer, paths[1])


def reverse_moments(run: Run, folder: str) -> None:
    """Reverse the order of the first moments of a rank folder, which loading does not notice."""
    assert run.world_size == 1
    for path in Path(folder).iterdir():
        state = torch.load(path, weights_only=False)
        _reverse_moments(state)
        torch.save(state, path)


def _reverse_moments(state: Any) -> None:
    if isinstance(state, list):
        state = dict(enumerate(state))
    if isinstance(state, dict):
        for name, value in state.items():
            if name in ("exp_avg", "momentum_buffer"):
                state[name] = value.flip(0)
            else:
                _reverse_moments(value)


def groups(run: Run) -> dict[str, Any]:
    """The param groups of one rank, as ``_get_param_groups`` makes them of its chunks: what each
    tells of itself, and its members, by virtual stage and place in ``named_parameters()``."""
    trainee = build(initialize(run))
    places = {
        id(parameter): (stage, place)
        for stage, module in enumerate(trainee.modules)
        for place, parameter in enumerate(module.parameters())
    }
    return {
        "pp_rank": parallel_state.get_pipeline_model_parallel_rank(),
        "ep_rank": parallel_state.get_expert_model_parallel_rank(),
        "groups": [
            {
                "key": {name: value for name, value in group.items() if name in _TELLING},
                "members": [places[id(parameter)] for parameter in group["params"]],
            }
            for group in param_groups(trainee)
        ],
    }


_TELLING = ("wd_mult", "is_expert_parallel", "is_decoupled_lr", "default_config")


ACTIONS: dict[str, Callable[..., Any]] = {
    action.__name__: action for action in (save, load, train, damage, reverse_moments, groups)
}
