"""Models and optimizers as megatron/training/training.py builds them (``get_model`` and
``get_megatron_optimizer``), from Megatron-Core alone, for every version of it that installs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from megatron.core import optimizer, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from .arguments import STEPS, training_arguments
from .rules import known

if TYPE_CHECKING:
    from argparse import Namespace

    from .spec import Run


def initialize(run: Run) -> Namespace:
    """As ``initialize_megatron``; the process group exists already."""
    args = training_arguments(run, torch.distributed.get_rank())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=run.tp,
        pipeline_model_parallel_size=run.pp,
        virtual_pipeline_model_parallel_size=run.vpp if run.vpp > 1 else None,
        context_parallel_size=run.cp,
        expert_model_parallel_size=run.ep,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    init_num_microbatches_calculator(
        args.rank, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )
    return args


@dataclass
class Trainee:
    """All that is saved in a checkpoint."""

    args: Namespace
    config: Any
    chunks: list[Any]
    """Model chunks of this rank, wrapped for data parallelism."""
    optimizer: Any
    scheduler: Any

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The bare model chunks, without wrappers."""
        return [chunk.module.module for chunk in self.chunks]


def build(args: Namespace) -> Trainee:
    """The chunks of this rank with their optimizer."""
    config = _config(args)
    vp_size = args.virtual_pipeline_model_parallel_size
    modules = [_chunk(args, config, stage) for stage in range(vp_size or 1)]
    for module in modules:
        for parameter in module.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    ddp_config = _ddp_config(args, sum(p.nelement() for m in modules for p in m.parameters()))
    chunks = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=Float16Module(config, module),
            disable_bucketing=index > 0 or args.overlap_param_gather_with_optimizer_step,
        )
        for index, module in enumerate(modules)
    ]
    chain = _optimizer(args, chunks)
    return Trainee(args, config, chunks, chain, _scheduler(args, chain))


def _fields(kind: type[Any], args: Namespace) -> dict[str, Any]:
    """The arguments that are fields of a configuration: how Megatron fills most of them."""
    return {
        f.name: getattr(args, f.name) for f in dataclasses.fields(kind) if hasattr(args, f.name)
    }


def _config(args: Namespace) -> Any:
    """As ``core_transformer_config_from_args``."""
    kind = MLATransformerConfig if args.multi_latent_attention else TransformerConfig
    values = _fields(kind, args)
    # Only Transformer Engine's attention runs with CP. Modules are the same without it; what CP
    # decides is who shares a buffer, and that the process groups say.
    values["context_parallel_size"] = 1
    values["persist_layer_norm"] = False
    values["deallocate_pipeline_outputs"] = True
    values["pipeline_dtype"] = args.params_dtype
    values["batch_p2p_comm"] = not args.overlap_p2p_comm
    values["num_moe_experts"] = args.num_experts
    values["num_layers_in_first_pipeline_stage"] = args.decoder_first_pipeline_num_layers
    values["num_layers_in_last_pipeline_stage"] = args.decoder_last_pipeline_num_layers
    values["bias_activation_fusion"] = False
    if args.swiglu:
        values |= {"activation_func": F.silu, "gated_linear_unit": True}
    if values.get("rope_type", "") is None:
        del values["rope_type"]
    config = kind(**values)
    # torch's norms refuse it; modules are the same without.
    config.sequence_parallel = False
    return config


def _chunk(args: Namespace, config: Any, stage: int) -> Any:
    """One model chunk: ``gpt_builder`` under ``get_model``."""
    vp_size = args.virtual_pipeline_model_parallel_size
    if vp_size is not None:
        # Where layers are counted, 0.12 and 0.13 ask for this; later versions for vp_stage.
        parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    ends = {
        "pre_process": pp_rank == 0 and stage == 0,
        "post_process": pp_rank == args.pipeline_model_parallel_size - 1
        and stage == (vp_size or 1) - 1,
    }
    options = {"use_transformer_engine": False, "vp_stage": stage if vp_size else None}
    if args.is_hybrid_model:
        from .hybrid import hybrid_chunk  # which earlier versions have not

        return hybrid_chunk(args, config, **ends, vp_stage=options["vp_stage"])
    layer = get_gpt_layer_local_spec(
        num_experts=args.num_experts,
        moe_grouped_gemm=False,
        qk_layernorm=args.qk_layernorm,
        multi_latent_attention=args.multi_latent_attention,
        normalization=args.normalization,
    )
    block = layer
    if args.num_experts:
        taken = known(get_gpt_decoder_block_spec, **options, normalization=args.normalization)
        block = get_gpt_decoder_block_spec(config, **taken)
    mtp = None
    if args.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, layer, **known(get_gpt_mtp_block_spec, **options))
    module = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        **ends,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        mtp_block_spec=mtp,
        **known(GPTModel.__init__, vp_stage=options["vp_stage"]),
    )
    module.model_type = args.model_type
    if vp_size is not None:
        module.vp_stage = stage
    return module


def _ddp_config(args: Namespace, num_parameters: int) -> Any:
    """Buckets exist only if gradient reduction is overlapped; their default size grows with DP."""
    values = _fields(DistributedDataParallelConfig, args)
    values["grad_reduce_in_fp32"] = args.accumulate_allreduce_grads_in_fp32
    values["bucket_size"] = args.ddp_bucket_size
    if args.ddp_num_buckets is not None:
        values["bucket_size"] = num_parameters // args.ddp_num_buckets
    config = DistributedDataParallelConfig(**values)
    if config.bucket_size is None:
        shards = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        config.bucket_size = max(40_000_000, 1_000_000 * shards)
    if not config.overlap_grad_reduce:
        config.bucket_size = None
    return config


def _optimizer(args: Namespace, chunks: list[Any]) -> Any:
    config = OptimizerConfig(**_fields(OptimizerConfig, args))
    make: Any = get_megatron_optimizer
    options = _group_options(args, config)
    if "muon" in args.optimizer:
        from megatron.core.optimizer.muon import get_megatron_muon_optimizer  # since 0.16

        make = get_megatron_muon_optimizer
        options["layer_wise_distributed_optimizer"] = args.optimizer.startswith("dist_")
    return make(config, chunks, **known(make, **options))


def _group_options(args: Namespace, config: Any) -> dict[str, Any]:
    """What decides the param groups besides the configuration."""
    options: dict[str, Any] = {
        # 0.14 and 0.15
        "default_skip_embedding_weight_decay": (
            getattr(args, "embedding_init_method_std", None) is not None
        )
    }
    # before 0.16 the rule for biases and norms was built in
    standard = getattr(optimizer, "get_standard_config_overrides", None)
    if standard is not None:
        options["config_overrides"] = standard(config=config)
    return options


def param_groups(trainee: Trainee) -> list[dict[str, Any]]:
    """As Megatron makes them of the chunks, before the optimizer takes its shards of them."""
    config = OptimizerConfig(**_fields(OptimizerConfig, trainee.args))
    divide = optimizer._get_param_groups
    options = known(
        divide,
        **_group_options(trainee.args, config),
        config=config,
        no_weight_decay_cond=None,
        scale_lr_cond=None,
        lr_mult=1.0,
        lr=config.lr,
        min_lr=config.min_lr,
        decoupled_lr=config.decoupled_lr,
        decoupled_min_lr=config.decoupled_min_lr,
    )
    groups: list[dict[str, Any]] = divide(trainee.chunks, **options)
    return groups


def _scheduler(args: Namespace, chain: Any) -> Any:
    """As ``get_optimizer_param_scheduler``: its state counts samples."""
    batch = args.global_batch_size
    return OptimizerParamScheduler(
        chain,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=batch,
        lr_decay_steps=STEPS * batch,
        lr_decay_style="cosine",
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=STEPS * batch,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )
