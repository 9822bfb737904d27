"""Saving and loading as megatron/training/checkpointing.py does with ``--ckpt-format torch``."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.rerun_state_machine import get_rerun_state_machine

if TYPE_CHECKING:
    from .building import Trainee

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_folder(root: Path, iteration: int) -> Path:
    """Where an iteration is kept."""
    return root / f"iter_{iteration:07d}"


def _rank_folder(root: Path, iteration: int) -> Path:
    """As ``get_checkpoint_name``."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return iteration_folder(root, iteration) / name


def save(trainee: Trainee, root: Path, iteration: int) -> None:
    """As ``save_checkpoint``."""
    folder = _rank_folder(root, iteration)
    folder.mkdir(parents=True, exist_ok=True)
    if trainee.args.use_distributed_optimizer:
        trainee.optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
    if _is_layer_wise(trainee):
        trainee.optimizer.save_state_dict_to_file(str(folder / _layer_wise_name()))
    if parallel_state.get_expert_data_parallel_rank() == 0:
        torch.save(_state_dict(trainee, iteration), folder / "model_optim_rng.pt")
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (root / TRACKER).write_text(str(iteration))


def _state_dict(trainee: Trainee, iteration: int) -> dict[str, Any]:
    """As ``generate_state_dict``."""
    state: dict[str, Any] = {
        "args": trainee.args,
        "checkpoint_version": 3.0,
        "iteration": iteration,
    }
    for index, module in enumerate(trainee.modules):
        key = "model" if len(trainee.modules) == 1 else f"model{index}"
        state[key] = module.state_dict_for_save_checkpoint()  # type: ignore[operator]
    state["optimizer"] = trainee.optimizer.state_dict()
    state["opt_param_scheduler"] = trainee.scheduler.state_dict()
    # Until 0.13; later versions answer with nothing in this format.
    rerun = get_rerun_state_machine().state_dict(data_iterator=None, ckpt_format="torch")
    if rerun:
        state["rerun_state_machine"] = rerun
    state["rng_state"] = [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.cuda.get_rng_state(),
            "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
    ]
    state["num_floating_point_operations_so_far"] = float(iteration)
    return state


def _is_layer_wise(trainee: Trainee) -> bool:
    return str(trainee.args.optimizer).startswith("dist_")


def _layer_wise_name() -> str:
    return f"layer_wise_optimizer_{parallel_state.get_data_parallel_rank()}.pt"


def load(trainee: Trainee, root: Path, *, with_optimizer: bool = True) -> int:
    """As ``load_checkpoint``, but never content with less than all keys.

    Args:
        with_optimizer: not so is ``--no-load-optim``.

    Returns:
        the iteration.
    """
    iteration = int((root / TRACKER).read_text())
    folder = _rank_folder(root, iteration)
    state = _read(folder / "model_optim_rng.pt")
    for index, chunk in enumerate(trainee.chunks):
        key = "model" if len(trainee.chunks) == 1 else f"model{index}"
        chunk.load_state_dict(state[key], strict=True)
    if with_optimizer:
        _load_optimizer(trainee, folder, state)
    else:
        trainee.optimizer.reload_model_params()
    rng = state["rng_state"][0]
    random.setstate(rng["random_rng_state"])
    np.random.set_state(rng["np_rng_state"])
    torch.set_rng_state(rng["torch_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(rng["rng_tracker_states"])
    return iteration


def _load_optimizer(trainee: Trainee, folder: Path, state: dict[str, Any]) -> None:
    if _is_layer_wise(trainee):
        trainee.optimizer.load_state_dict_from_file(str(folder / _layer_wise_name()))
    else:
        trainee.optimizer.load_state_dict(state["optimizer"])
    if trainee.args.use_distributed_optimizer:
        trainee.optimizer.load_parameter_state(str(folder / "distrib_optim.pt"))
    trainee.scheduler.load_state_dict(state["opt_param_scheduler"])


def _read(path: Path) -> Any:
    """Later versions load with weights_only, which accepts no class that Megatron does not list;
    earlier ones without."""
    try:
        from megatron.core.safe_globals import register_safe_globals
    except ImportError:
        return torch.load(path, map_location="cpu", weights_only=False)
    register_safe_globals()
    if (3, 11) <= sys.version_info < (3, 11, 4):
        torch.serialization.add_safe_globals(
            [getattr]
        )  # in these Pythons a member of an enum is one
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") is None
    return torch.load(path, map_location="cpu", weights_only=True)
