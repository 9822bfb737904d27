"""Megatron's rules one by one: what its own code makes of made-up parameters and placements.

Only its names are followed here, which changed from version to version; every number that is
answered was computed by the installed Megatron-Core.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

if TYPE_CHECKING:
    from .spec import Run

Case = dict[str, Any]


def known(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those options that this version's function takes."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in parameters}


def buffers(_: Run, cases: Sequence[Case]) -> list[Any]:
    """The flat buffers of model chunks: ``DistributedDataParallel`` over real parameters."""
    dist.destroy_process_group()
    answers: list[Any] = [None] * len(cases)

    def world(index: int) -> tuple[int, int]:
        return cases[index]["ranks"], cases[index]["expert_size"]

    for (ranks, expert_size), indices in itertools.groupby(
        sorted(range(len(cases)), key=world), world
    ):
        with _world_without_peers(ranks, expert_size):
            for index in indices:
                answers[index] = _answer(_buffers_of_chunk, cases[index])
    return answers


def saved_states(_: Run, cases: Sequence[Case]) -> list[Any]:
    """The main parameters in the optimizer file of a run on one rank, as runs of equal cells: each
    parameter is full of its number, from 1."""
    parallel_state.initialize_model_parallel()
    return [_answer(_saved_cells, case) for case in cases]


def layers(_: Run, cases: Sequence[Case]) -> list[Any]:
    """Number and offset of the decoder layers of each chunk, in order of execution."""
    return [_answer(_layers_of_chunks, case) for case in cases]


def layouts(_: Run, cases: Sequence[Case]) -> list[Any]:
    """What layout strings mean: the kinds of layers of each stage."""
    return [_answer(_stages_of_layout, case) for case in cases]


def _answer(question: Callable[[Case], Any], case: Case) -> Any:
    """The answer, or the error in its place, as text."""
    try:
        return question(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def _world_without_peers(ranks: int, expert_size: int) -> Iterator[None]:
    """Rank 0 of a world whose other ranks are not there, by torch's own backend for that: layouts
    ask for the sizes of groups, and nothing is sent."""
    create: Any = dist.new_group

    def create_without_peers(*args: Any, **options: Any) -> Any:
        return create(*args, **{**options, "backend": "fake"})

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    dist.new_group = create_without_peers
    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_size)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.new_group = create
        dist.destroy_process_group()


def _config(**options: Any) -> Any:
    """Of a model that is not built."""
    return TransformerConfig(num_attention_heads=1, hidden_size=8, **options)


def _chunk(case: Case) -> Any:
    """A module with the parameters of a case, wrapped for data parallelism as in ``get_model``."""
    module = torch.nn.Module()
    for index, (numel, dtype, is_expert, is_shared) in enumerate(case["parameters"]):
        values = torch.full((numel,), index + 1.0, dtype=getattr(torch, dtype))
        parameter: Any = torch.nn.Parameter(values)
        parameter.allreduce = not is_expert
        if is_shared:
            parameter.shared_embedding = True
        module.register_parameter(f"p{index}", parameter)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=case["bucket_size"] is not None,
        use_distributed_optimizer=True,
        bucket_size=case["bucket_size"],
    )
    if case["pads"]:
        if not hasattr(ddp_config, "pad_buckets_for_high_nccl_busbw"):
            raise NotImplementedError("no padding for bandwidth")
        ddp_config.pad_buckets_for_high_nccl_busbw = True
    groups: dict[str, Any] = {}
    if "data_parallel_group" in inspect.signature(DistributedDataParallel.__init__).parameters:
        # Arguments until 0.7, asked of ``parallel_state`` since.
        groups = {
            "data_parallel_group": parallel_state.get_data_parallel_group(
                with_context_parallel=True
            ),
            "expert_data_parallel_group": parallel_state.get_data_modulo_expert_parallel_group(),
        }
    return DistributedDataParallel(
        config=_config(num_layers=1), ddp_config=ddp_config, module=module, **groups
    )


def _buffers_of_chunk(case: Case) -> list[Any]:
    chunk = _chunk(case)
    numbers = {id(parameter): i for i, parameter in enumerate(chunk.module.parameters())}
    found = []
    for is_expert, held in ((False, chunk.buffers), (True, chunk.expert_parallel_buffers)):
        for buffer in held:
            places = {
                numbers[id(parameter)]: place for parameter, place in buffer.param_index_map.items()
            }
            found.append(
                {
                    "is_expert": is_expert,
                    "dtype": str(buffer.param_dtype).removeprefix("torch."),
                    "numel": buffer.numel,
                    "starts": {number: places[number][0] for number in sorted(places)},
                    "bucket_of": {number: places[number][2] for number in sorted(places)},
                    "buckets": [
                        (bucket.offset, bucket.grad_data.numel(), bucket.numel_unpadded)
                        for bucket in buffer.buckets
                    ],
                }
            )
    return found


def _saved_cells(case: Case) -> list[Any]:
    # Imported here, for before 0.8 there is none without Apex.
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    chunk = _chunk(case)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-3, weight_decay=0.0, bf16=True, params_dtype=torch.bfloat16,
        clip_grad=0.0, use_distributed_optimizer=True,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(config, [chunk])
    chunk.zero_grad_buffer()
    optimizer.step()  # creates the moments; without gradients and decay, parameters stay
    found = []
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(one, "is_stub_optimizer", False):
            continue  # without parameters
        state = one.get_parameter_state_dp_zero()
        for index in sorted(key for key in state if isinstance(key, int)):
            ((dtypes, tensors),) = state[index].items()
            cells = tensors["param"].tolist()
            found.append(
                {
                    "dtype": str(dtypes[0]).removeprefix("torch."),
                    "numel_unpadded": tensors["numel_unpadded"],
                    "runs": [(int(n), len(list(run))) for n, run in itertools.groupby(cells)],
                }
            )
    return found


_FIELDS = {
    "first_layers": ("num_layers_in_first_pipeline_stage", "first_pipeline_num_layers"),
    "last_layers": ("num_layers_in_last_pipeline_stage", "last_pipeline_num_layers"),
    "account_for_embedding": ("account_for_embedding_in_pipeline_split",),
    "account_for_loss": ("account_for_loss_in_pipeline_split",),
    "layout": ("pipeline_model_parallel_layout",),
}
"""Fields of the configuration, with their older names."""


def _placed(case: Case) -> Any:
    """The configuration of a placement."""
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    values: dict[str, Any] = {}
    for option, names in _FIELDS.items():
        if case[option]:
            name = next((name for name in names if name in fields), None)
            if name is None:
                raise NotImplementedError(f"no {option}")
            values[name] = case[option]
    return _config(
        num_layers=case["num_layers"],
        pipeline_model_parallel_size=case["pp_size"],
        virtual_pipeline_model_parallel_size=case["vp_size"] if case["vp_size"] > 1 else None,
        pipeline_dtype=torch.bfloat16,
        **values,
    )


@contextmanager
def _standing_at(pp_size: int, vp_size: int, pp_rank: int, vp_stage: int) -> Iterator[None]:
    """What is asked of ``parallel_state``, set as Megatron's own tests do."""
    parallel_state.set_pipeline_model_parallel_world_size(pp_size)
    parallel_state.set_pipeline_model_parallel_rank(pp_rank)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(vp_size if vp_size > 1 else None)
    parallel_state.set_virtual_pipeline_model_parallel_rank(vp_stage if vp_size > 1 else None)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def _layers_of_chunks(case: Case) -> list[Any]:
    # Imported here, for before 0.8 there are none without Transformer Engine.
    from megatron.core.transformer import transformer_block, transformer_layer

    pp_size, vp_size = case["pp_size"], case["vp_size"]
    with _standing_at(pp_size, vp_size, 0, 0):
        config = _placed(case)
    found = []
    for vp_stage, pp_rank in itertools.product(range(vp_size), range(pp_size)):
        with _standing_at(pp_size, vp_size, pp_rank, vp_stage):
            stage = {"vp_stage": vp_stage if vp_size > 1 else None}
            count = transformer_block.get_num_layers_to_build
            offset: Any = getattr(transformer_layer, "get_transformer_layer_offset", None)
            found.append(
                (
                    count(config, **known(count, **stage)),
                    offset and offset(config, **known(offset, **stage)),
                )
            )
    return found


_LETTERS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}


def _stages_of_layout(case: Case) -> dict[str, Any]:
    """Parsed alone, and checked against a model; both may fail."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    text, pp_size = case["text"], case["pp_size"]

    def letters(stage: Any) -> str:
        return "".join(_LETTERS[kind.name] for kind in stage)

    def parse(_: Case) -> list[str]:
        return [letters(stage) for stage in PipelineParallelLayerLayout.parse_str_to_list(text)]

    def check(_: Case) -> list[str]:
        layout = PipelineParallelLayerLayout(text, pp_size)
        validate = layout.validate_layer_layout
        validate(
            **known(validate, num_layers=case["num_layers"], mtp_num_layers=case["mtp_layers"])
        )
        by_rank = layout.layout
        return [letters(rank[stage]) for stage in range(len(by_rank[0])) for rank in by_rank]

    return {"parsed": _answer(parse, case), "checked": _answer(check, case)}


class _Group:
    """A process group, as far as its size and a rank in it count."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def layer_wise(_: Run, cases: Sequence[Case]) -> list[Any]:
    """The parameters of each group that each data-parallel rank keeps under the layer-wise
    optimizer, by their numbers."""
    return [_answer(_kept, case) for case in cases]


def _kept(case: Case) -> list[Any]:
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    kept = []
    for dp_rank in range(case["ranks"]):
        shards = LayerWiseDistributedOptimizer.__new__(LayerWiseDistributedOptimizer)
        shards.pg_collection = SimpleNamespace(
            dp_cp=_Group(case["ranks"], dp_rank),
            expt_dp=_Group(case["ranks"] // case["experts"], dp_rank // case["experts"]),
        )
        numbers = itertools.count()
        groups = [
            {"is_expert_parallel": is_expert, "params": [_numbered(numbers, n) for n in numels]}
            for is_expert, numels in case["groups"]
        ]
        shards.shard_params([SimpleNamespace(param_groups=groups)])
        kept.append([[parameter.number for parameter in group["params"]] for group in groups])
    return kept


def _numbered(numbers: Iterator[int], numel: int) -> Any:
    parameter = torch.empty(numel, device="meta")
    parameter.number = next(numbers)  # type: ignore[attr-defined]
    return parameter


def version(_: Run) -> str:
    """Which Megatron-Core this is."""
    # A work tree has no other metadata. After "+" stands a commit of any repository this runs in.
    return str(megatron.core.__version__).partition("+")[0]


ACTIONS: dict[str, Callable[..., Any]] = {
    action.__name__: action
    for action in (buffers, saved_states, layers, layouts, layer_wise, version)
}
