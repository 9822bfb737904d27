"""Values that depend on nothing but a parameter's global name and its tensor- and expert-parallel
rank: the same logical state under every pipeline layout."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

if TYPE_CHECKING:
    from .building import Trainee

SAVED_STEP = 7
"""As if so many steps had been made."""
_SCALES = {"param": 0.05, "exp_avg": 1e-3, "exp_avg_sq": 1e-6}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


@dataclass
class Named:
    """A parameter of a model chunk, by the name that no pipeline layout changes."""

    name: str
    parameter: torch.nn.Parameter
    is_expert: bool
    values_of: str
    """The name from which its values follow: that of the word embedding for an output layer that is
    tied to it, for training keeps them equal."""

    @property
    def place(self) -> str:
        """The ranks on which its values depend."""
        place = f"tp{parallel_state.get_tensor_model_parallel_rank()}"
        if self.is_expert:
            place += f" ep{parallel_state.get_expert_model_parallel_rank()}"
        return place


def global_name(module: Any, name: str) -> str:
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    number = module.decoder.layers[int(layer[1])].layer_number
    return f"decoder.layers.{number - 1}.{layer[2]}"


def named_parameters(modules: Iterable[torch.nn.Module]) -> Iterator[Named]:
    """The parameters of all chunks of this rank."""
    for module in modules:
        for name, parameter in module.named_parameters():
            is_expert = re.search(r"(^|\.)experts\.", name) is not None
            known = global_name(module, name)
            is_copy = name == "output_layer.weight" and module.share_embeddings_and_output_weights
            values_of = "embedding.word_embeddings.weight" if is_copy else known
            yield Named(known, parameter, is_expert, values_of)


def named_buffers(modules: Iterable[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """What is saved with a model but is no parameter (the bias of routers)."""
    for module in modules:
        parameters = dict(module.named_parameters())
        for name, value in module.state_dict().items():
            if isinstance(value, torch.Tensor) and name not in parameters:
                yield global_name(module, name), value


def random(key: str, numel: int, scale: float) -> torch.Tensor:
    """Normal numbers that follow from the key alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * scale


def _state(trainee: Trainee, parameter: torch.nn.Parameter) -> tuple[Any, Any, Any]:
    """The optimizer that owns a shard of the parameter here, and the shard's range in it; nothing
    if the shard of another data-parallel rank has it all."""
    for optimizer in trainee.optimizer.chained_optimizers:
        if parameter in optimizer.model_param_group_index_map:
            shard = optimizer._get_model_param_range_map(parameter)["param"]
            return optimizer, shard.start, shard.end
    return None, 0, 0


@torch.no_grad()
def fill(trainee: Trainee) -> None:
    """Set every parameter, its fp32 main parameter and its Adam moments."""
    for chunk in trainee.chunks:
        chunk.zero_grad_buffer()
    trainee.optimizer.step()  # creates the moments
    for named in named_parameters(trainee.modules):
        key = f"{named.values_of} {named.place}"
        numel = named.parameter.numel()
        values = {kind: random(f"{kind} {key}", numel, scale) for kind, scale in _SCALES.items()}
        values["exp_avg_sq"].abs_()
        named.parameter.copy_(values["param"].view_as(named.parameter))
        optimizer, start, end = _state(trainee, named.parameter)
        if optimizer is None:
            continue
        states = optimizer._get_main_param_and_optimizer_states(named.parameter)
        for kind, whole in values.items():
            states[kind].copy_(whole[start:end])
    for name, buffer in named_buffers(trainee.modules):
        buffer.copy_(random(name, buffer.numel(), 0.1).view_as(buffer))
    for group in trainee.optimizer.param_groups:
        if "step" in group:
            group["step"] = SAVED_STEP


def digests(trainee: Trainee) -> dict[str, dict[str, Any]]:
    """A digest of each parameter, of its fp32 main parameter and of its moments, and what else
    its updates depend on, by global name and place."""
    found: dict[str, dict[str, Any]] = {}
    for named in named_parameters(trainee.modules):
        record = {"weight": _digest(named.parameter.detach())}
        optimizer, start, end = _state(trainee, named.parameter)
        shards = {}
        if optimizer is not None:
            shards = optimizer._get_main_param_and_optimizer_states(named.parameter)
            group, _ = optimizer.model_param_group_index_map[named.parameter]
            record |= _hyperparameters(optimizer.optimizer.param_groups[group])
        for kind in _SCALES:
            whole = torch.zeros(named.parameter.numel(), dtype=torch.int32)
            if optimizer is not None:
                whole[start:end] = shards[kind].detach().view(torch.int32)
            # Each element is in one shard, so that the sum of the shards' bits is the whole.
            dist.all_reduce(whole, group=_sharing_ranks(is_expert=named.is_expert))
            record[kind] = _digest(whole)
        found[f"{named.name} {named.place}"] = record
    for name, buffer in named_buffers(trainee.modules):
        found[name] = {"buffer": _digest(buffer)}
    return found


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """What the param group adds to an update."""
    names = ("step", "lr", "weight_decay", "wd_mult", "lr_mult", "betas", "eps")
    return {name: group[name] for name in names if name in group}


def _sharing_ranks(*, is_expert: bool) -> Any:
    if is_expert and parallel_state.get_expert_model_parallel_world_size() > 1:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()[:16]
