"""The same logical state under every layout: what a training run is about to save is overwritten by
values that depend on nothing but global names (``tests.training.values``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..training.values import global_name, named_buffers, named_parameters, random

_SQUARES = ("exp_avg_sq", "moment2_buffer")
_SCALES = {"main": 0.05, **dict.fromkeys(_SQUARES, 1e-6)}
_OTHER_SCALE = 1e-3
_SHARED = "embedding.word_embeddings.weight"


@dataclass
class Filling:
    """Overwrites states before they are saved."""

    save: Callable[..., Any]
    """Megatron's ``save_checkpoint``."""
    shares_unused: bool
    """Tied weights that no forward uses get the embedding's values, too."""
    has_unused: bool = False
    """There was such a weight."""

    def __call__(self, iteration: int, model: Any, optimizer: Any, *args: Any, **named: Any) -> Any:
        """In place of ``save_checkpoint``."""
        self._fill(model if isinstance(model, list) else [model], optimizer)
        return self.save(iteration, model, optimizer, *args, **named)

    @torch.no_grad()
    def _fill(self, chunks: list[Any], optimizer: Any) -> None:
        """Set every parameter, its main parameter and its states, and every buffer."""
        modules = [_bare(chunk) for chunk in chunks]
        parts = list(_parts(optimizer))
        for module in modules:
            for named in named_parameters([module]):
                key = f"{self._key(module, named.name)} {named.place}"
                main = random(f"main {key}", named.parameter.numel(), _SCALES["main"])
                named.parameter.copy_(main.view_as(named.parameter))
                for kind, state, shard in _states(parts, named.parameter):
                    # Some of SOAP's are larger than the parameter.
                    numel = max(named.parameter.numel(), state.numel())
                    values = random(f"{kind} {key}", numel, _SCALES.get(kind, _OTHER_SCALE))
                    if kind in _SQUARES:
                        values.abs_()
                    state.copy_(values[shard][: state.numel()].view(state.shape))
        for name, buffer in named_buffers(modules):
            buffer.copy_(random(name, buffer.numel(), 0.1).view_as(buffer))

    def _key(self, module: Any, name: str) -> str:
        """Training keeps the copies of a tied embedding equal. Beside an embedding (that of MTP
        layers) the output layer's own tensor is not used, and is no copy."""
        is_tied = getattr(module, "share_embeddings_and_output_weights", False)
        if name != "output_layer.weight" or not is_tied:
            return name
        is_unused = hasattr(module, "embedding")
        self.has_unused |= is_unused
        return _SHARED if self.shares_unused or not is_unused else name


def freeze(model: type[torch.nn.Module], pattern: str) -> None:
    """Freeze the parameters whose global names a regular expression finds, whenever a model is
    built: before it is wrapped for data parallelism, as users do."""
    build = model.__init__

    def build_and_freeze(self: Any, *args: Any, **named: Any) -> None:
        build(self, *args, **named)
        for name, parameter in self.named_parameters():
            if re.search(pattern, global_name(self, name)):
                parameter.requires_grad_(False)

    model.__init__ = build_and_freeze  # type: ignore[method-assign]


def _bare(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _parts(optimizer: Any) -> Iterator[Any]:
    """The optimizers of a chain; a layer-wise one is a chain and may be an element of one."""
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is None:
        yield optimizer
    for part in chained or ():
        yield from _parts(part)


def _states(
    parts: list[Any], parameter: torch.nn.Parameter
) -> Iterator[tuple[str, torch.Tensor, slice]]:
    """The main parameter and the states that this rank holds, with the part of the parameter that
    they are of."""
    for part in parts:
        if hasattr(part, "model_param_group_index_map"):  # distributed
            if parameter not in part.model_param_group_index_map:
                continue
            group, place = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][place]
            found = part._get_model_param_range_map(parameter)["param"]
            shard = slice(found.start, found.end)
        else:
            main, shard = _main_parameter(part, parameter), slice(None)
            groups = part.optimizer.param_groups
            if not any(main is other for group in groups for other in group["params"]):
                continue  # of another part, or of another rank
        yield "main", main, shard
        for kind, state in part.optimizer.state.get(main, {}).items():
            if isinstance(state, torch.Tensor) and state.dim():  # the step may be a tensor
                yield kind, state, shard


def _main_parameter(part: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The parameter itself, where it is in fp32."""
    halves = getattr(part, "float16_groups", ())
    for models, mains in zip(halves, getattr(part, "fp32_from_float16_groups", ()), strict=True):
        for model, main in zip(models, mains, strict=True):
            if model is parameter:
                found: torch.Tensor = main
                return found
    return parameter
