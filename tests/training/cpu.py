"""What makes Megatron-Core run on a CPU with the gloo backend. Nothing of it is edited; calls that
need a GPU are replaced, each for the reason given. To be installed before Megatron is imported."""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from unittest.mock import MagicMock

import torch
import torch._dynamo.trace_rules
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from . import mamba


class _CudaMeansCpu(TorchFunctionMode):
    """Megatron spells device="cuda" in many places; tensors made so are made on the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if str(named.get("device")).startswith("cuda"):
            named["device"] = "cpu"
        if func is torch.Tensor.type and len(args) == 1 and not named:
            # Optimizers sort parameters by the names of such types.
            return str(func(*args)).replace("torch.", "torch.cuda.")
        return func(*args, **named)


class _Stream:
    """A CUDA stream or event: on a CPU everything is done in order, so nothing waits."""

    def __init__(self, *_: object, **__: object) -> None:
        self.device = torch.device("cpu")

    def _nothing(self, *_: object) -> _Stream:
        return self

    wait_stream = wait_event = record = record_event = wait = synchronize = _nothing


class FusedAdam(torch.optim.Optimizer):
    """Adam with the state layout of Transformer Engine's: ``step`` is in the param groups, and a
    group without parameters has none. torch's keeps it elsewhere, which Megatron's legacy loading
    cannot read."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        **_: object,
    ) -> None:
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas}
        super().__init__(params, {**defaults, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """One update."""
        assert closure is None
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        average = state["exp_avg"] / (1 - beta1 ** group["step"])
        spread = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
        change = average / spread + group["weight_decay"] * parameter
        parameter.add_(change, alpha=-group["lr"])


def install() -> None:
    """Replace what needs a GPU in torch, for the rest of the process."""
    # Optimizers ask for this table of torch's functions, which must not find the replacements.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    _CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]
    _replace_devices()
    _replace_random_numbers()
    _keep_sent_tensors()
    _list_split_sizes()
    _gather_any_sizes()
    _allow_triton()
    _allow_override()
    mamba.install()
    # Kernels are compiled when first called, by a compiler that a test machine may not have.
    torch.compile = lambda model=None, **_: model or (lambda function: function)  # type: ignore[assignment]
    # Only this submodule: were Transformer Engine importable, Megatron would want its layers.
    optimizers = types.ModuleType("transformer_engine.pytorch.optimizers")
    optimizers.FusedAdam, optimizers.FusedSGD = FusedAdam, torch.optim.SGD  # type: ignore[attr-defined]
    sys.modules[optimizers.__name__] = optimizers


def _replace_devices() -> None:
    cuda: Any = torch.cuda
    # Given as device=..., which may well be "cpu".
    cuda.current_device = lambda: "cpu"
    cuda.set_device = cuda.synchronize = lambda *_: None
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.stream = lambda *_: contextlib.nullcontext()
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    tensor.record_stream = lambda *_: None
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_: self


def _replace_random_numbers() -> None:
    """A generator of its own stands for the GPU's, so that Megatron's tracker has what to track."""
    cuda: Any = torch.cuda
    generator = torch.Generator()
    cuda.default_generators = {"cpu": generator}
    cuda.manual_seed = generator.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: generator.get_state()
    cuda._lazy_call = lambda callback, **_: callback()


def _keep_sent_tensors() -> None:
    """Megatron frees an output right after ``isend``. CUDA streams make that safe; gloo sends in
    the background, so it
    gets a copy that outlives the sending."""
    send = dist.isend
    in_flight: collections.deque[object] = collections.deque(maxlen=256)

    def send_a_copy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        copy = tensor.detach().clone()
        work = send(copy, *args, **kwargs)
        in_flight.append((work, copy))
        return work

    # Batches of sends are recognised by the name in the second module.
    dist.isend = dist.distributed_c10d.isend = send_a_copy


def _list_split_sizes() -> None:
    """Megatron brings split sizes from the GPU as arrays; those that are on the CPU already stay
    tensors, which the collective does not take."""
    exchange = dist.all_to_all_single

    def exchange_with_lists(output: Any, given: Any, *sizes: Any, **options: Any) -> Any:
        def listed(value: Any) -> Any:
            return value.tolist() if isinstance(value, torch.Tensor) else value

        named = {name: listed(value) for name, value in options.items()}
        return exchange(output, given, *map(listed, sizes), **named)

    dist.all_to_all_single = exchange_with_lists  # type: ignore[assignment]


def _gather_any_sizes() -> None:
    """The layer-wise optimizer gathers tensors of several sizes, as NCCL can; gloo sends each."""

    def gather(outputs: list[torch.Tensor], given: torch.Tensor, group: Any = None) -> None:
        outputs[dist.get_rank(group)].copy_(given)
        for rank, output in enumerate(outputs):
            dist.broadcast(output, group=group, group_src=rank)

    dist.all_gather = gather  # type: ignore[assignment]


def _allow_triton() -> None:
    """Kernels are defined when their modules are imported, and none is called here."""
    if importlib.util.find_spec("triton") is None:
        for name in ("triton", "triton.language"):
            stub = MagicMock(name=name)
            stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
            stub.__version__ = "3.5"
            sys.modules[name] = stub


def _allow_override() -> None:
    """emerging-optimizers marks methods with it, which Python 3.12 brought; nothing reads them."""
    if not hasattr(typing, "override"):
        typing.override = lambda method: method  # type: ignore[attr-defined]


def patch_megatron() -> None:
    """Replace what needs Transformer Engine in Megatron, after it is imported."""
    _patch_quantization()
    latent = module_if_there("megatron.core.transformer.multi_latent_attention")
    for name in ("TELinear", "TEColumnParallelLinear", "TELayerNormColumnParallelLinear"):
        # Asked for in isinstance(), which takes nothing that stands for "not installed".
        if latent and not isinstance(getattr(latent, name, type), type):
            setattr(latent, name, type(name, (), {}))
    experts = module_if_there("megatron.core.transformer.moe.moe_utils")
    if experts and not hasattr(experts, "te_general_gemm"):
        experts.te_general_gemm = None
    _patch_attention()


def module_if_there(name: str) -> Any:
    """A module that some versions have; ``None`` in others."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def _patch_quantization() -> None:
    """0.12 refuses even if no parameter is in fp8."""
    fp8 = module_if_there("megatron.core.fp8_utils")
    quantize = getattr(fp8, "_quantize_param_shard_impl", None)
    if fp8 and quantize:
        fp8._quantize_param_shard_impl = lambda params, *rest: params and quantize(params, *rest)


def _patch_attention() -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    attention: Any = DotProductAttention
    create = attention.__init__
    known = inspect.signature(create).parameters

    def create_for_latent_attention(self: Any, *args: Any, **kwargs: Any) -> None:
        """Without parameters, so that the widths of its heads do not matter to a checkpoint."""
        widths = ("k_channels", "v_channels")
        given = {n: v for n, v in kwargs.items() if n in known and n not in widths}
        create(self, *args, **given)

    attention.__init__ = create_for_latent_attention
