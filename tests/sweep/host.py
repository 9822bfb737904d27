"""The process that imports a work tree of Megatron-LM, and forks the ranks of its training runs.

``pretrain_gpt.py`` runs as it is launched: it reads the command line, builds the model, the
optimizer and the scheduler, and saves. Only its loop of training is another: steps without
gradients, which make the optimizer's states. What they hold, ``fill`` overwrites in any case.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..training import cpu
from ..training.launch import answering, run_world, serve

LIMIT = 120.0
"""Seconds for one run."""
KNOWN_FLAGS = (
    "--ckpt-format=torch",  # older versions have no other
    "--transformer-impl=local",
    "--use-cpu-initialization",
    "--distributed-backend=gloo",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm",
    "--use-mcore-models",
)
"""Given to versions that know them."""


class _OptionsError(Exception):
    """Not an error: ends a run when its command line is known."""


def _host(tree: Path, answers: Any) -> None:
    sys.dont_write_bytecode = True  # trees are only read
    sys.path.insert(0, str(tree))
    os.environ["PYTORCH_JIT"] = "0"
    torch.set_num_threads(1)  # also because threads do not survive a fork
    cpu.install()
    _replace_devices()
    _stub_packages()
    training = importlib.import_module("megatron.training.training")
    # A work tree beside an installed Megatron-Core must be what runs.
    assert Path(str(training.__file__)).is_relative_to(tree), training.__file__
    _patch_megatron()
    _patch_training(training)
    serve(lambda job: _ACTIONS[job["action"]](tree, **job["given"]), answers)


def _options(tree: Path) -> dict[str, Any]:
    """The options that the tree's command line knows, with their choices."""

    def parse(parser: argparse.ArgumentParser, *_: object) -> Any:
        raise _OptionsError(
            {
                o: [str(choice) for choice in a.choices or ()]
                for o, a in parser._option_string_actions.items()
            }
        )

    def do() -> Any:
        argparse.ArgumentParser.parse_args = parse  # type: ignore[assignment,method-assign]
        argparse.ArgumentParser.parse_known_args = parse  # type: ignore[assignment,method-assign]
        try:
            _pretrain(tree, [])
        except _OptionsError as found:
            return found.args[0]
        raise RuntimeError("the script did not ask for its command line")

    return run_world(1, do, LIMIT)


def _train(
    tree: Path, world_size: int, flags: list[str], frozen: str | None, shares_unused: bool
) -> dict[str, Any]:
    """One training run, which saves where its flags say; each rank tells whether it has a tied
    weight that no forward uses."""

    def do() -> bool:
        from megatron.core.models.gpt import GPTModel

        from .fill import Filling, freeze

        training = sys.modules["megatron.training.training"]
        filling = Filling(training.save_checkpoint, shares_unused)
        training.save_checkpoint = filling  # type: ignore[attr-defined]
        if frozen is not None:
            freeze(GPTModel, frozen)
        _give_known_flags()
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
        _pretrain(tree, [*KNOWN_FLAGS, *flags])
        return filling.has_unused

    return run_world(world_size, do, LIMIT)


_ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {"options": _options, "train": _train}


def _pretrain(tree: Path, flags: list[str]) -> None:
    script = str(tree / "pretrain_gpt.py")
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def _give_known_flags() -> None:
    """Leave out those of ``KNOWN_FLAGS`` that a version does not know."""
    parse = argparse.ArgumentParser.parse_args

    def parse_known(parser: argparse.ArgumentParser, *_: object) -> Any:
        known = parser._option_string_actions
        lacking = {flag for flag in KNOWN_FLAGS if flag.partition("=")[0] not in known}
        return parse(parser, [flag for flag in sys.argv[1:] if flag not in lacking])

    argparse.ArgumentParser.parse_args = parse_known  # type: ignore[assignment,method-assign]


def _replace_devices() -> None:
    """What only whole training runs ask a GPU for."""
    cuda: Any = torch.cuda
    nothing = lambda *_, **__: None  # noqa: E731
    cuda.is_available = lambda: True
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="none"
    )
    cuda.empty_cache = cuda.init = cuda._lazy_init = cuda.reset_peak_memory_stats = nothing
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *_: 0
    cuda.memory_reserved = cuda.max_memory_reserved = lambda *_: 0
    cuda.set_stream = cuda.nvtx.range_push = cuda.nvtx.range_pop = nothing
    cuda.set_rng_state = cuda.random.set_rng_state = nothing
    for name, dtype in {
        "Float": torch.float32,
        "Half": torch.half,
        "BFloat16": torch.bfloat16,
        "Int": torch.int32,
        "Long": torch.int64,
        "Byte": torch.uint8,
    }.items():
        setattr(cuda, f"{name}Tensor", _legacy_type(dtype))


def _legacy_type(dtype: torch.dtype) -> type:
    """``torch.cuda.FloatTensor`` and its like."""

    class Kind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, torch.Tensor) and value.dtype == dtype

        def __call__(cls, values: Any) -> Any:
            return torch.as_tensor(values, dtype=dtype)

    return Kind("LegacyTensor", (), {})


def _stub_packages() -> None:
    """What old versions import for no more than a version number."""
    if importlib.util.find_spec("pkg_resources") is None:
        import packaging.version  # noqa: F401

        resources = types.ModuleType("pkg_resources")
        resources.packaging = sys.modules["packaging"]  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = resources
    # Built by make, which a run without data does not need.
    for name in ("helpers", "helpers_cpp"):
        sys.modules[f"megatron.core.datasets.{name}"] = types.ModuleType(name)


def _patch_megatron() -> None:
    cpu.patch_megatron()
    initialize: Any = importlib.import_module("megatron.training.initialize")
    # Fused kernels and the data sets' helpers, which are compiled into the tree.
    initialize._compile_dependencies = lambda *_, **__: None
    initialize._warmup_jit_function = lambda *_, **__: None  # refuses odd sizes
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    # They refuse to compute so, and are not asked to; their parameters are the same.
    _build_as_if(DotProductAttention, "__init__", context_parallel_size=1)
    norms = cpu.module_if_there("megatron.core.transformer.torch_norm")
    if norms is None:  # before 0.10
        norms = importlib.import_module("megatron.core.transformer.torch_layer_norm")
        _build_as_if(norms.WrappedTorchLayerNorm, "__init__", sequence_parallel=False)
    else:
        _build_as_if(norms.WrappedTorchNorm, "__new__", sequence_parallel=False)


def _build_as_if(kind: Any, method: str, **values: Any) -> None:
    """Have a module built with another value in its configuration."""
    build = getattr(kind, method)

    def build_as_if(self: Any, config: Any, *args: Any, **named: Any) -> Any:
        other = copy.copy(config)
        for name, value in values.items():
            setattr(other, name, value)
        return build(self, other, *args, **named)

    setattr(kind, method, build_as_if)


def _patch_training(training: Any) -> None:
    training.train = _steps_without_gradients(training)
    training.build_train_valid_test_data_iterators = _without_data(training)


def _without_data(training: Any) -> Callable[..., Any]:
    def build(*_: object, **__: object) -> tuple[None, None, None]:
        args = training.get_args()
        args.do_train, args.do_valid, args.do_test = True, False, False
        return None, None, None

    return build


def _steps_without_gradients(training: Any) -> Callable[..., Any]:
    def train(
        _: Any, model: list[Any], optimizer: Any, scheduler: Any, *__: Any, **___: Any
    ) -> tuple[int, float]:
        args = training.get_args()
        for _step in range(args.train_iters):
            for chunk in model:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            optimizer.step()
            scheduler.step(increment=args.global_batch_size)
            args.consumed_train_samples += args.global_batch_size
        return args.train_iters, 0.0

    return train


if __name__ == "__main__":
    _host(Path(sys.argv[1]).resolve(), answering())
