"""The training arguments of a run, as ``parse_args`` and ``validate_args`` leave them.

``megatron.training``, which has the command line, is not on PyPI. Names and values here are those
that the ``pretrain_gpt.py`` of each version saved for such a run; only arguments that decide the
model, its layout or the optimizer are kept.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import __version__
from megatron.core.enums import ModelType
from megatron.core.transformer.enums import AttnBackend

if TYPE_CHECKING:
    from .spec import Model, Run

_SINCE = {
    "pipeline_model_parallel_layout": (0, 13),
    "symmetric_ar_type": (0, 13),
    "use_megatron_fsdp": (0, 14),
    "rope_type": (0, 14),
    "embedding_init_method_std": (0, 14),
    "mtp_standalone": (0, 16),
    "apply_wd_to_qk_layernorm": (0, 16),
    "hybrid_context_parallel": (0, 16),
    "hybrid_layer_pattern": (0, 17),
}
_UNTIL = {"use_custom_fsdp": (0, 13)}
"""First and last releases whose saved arguments have the name; the others always do."""

SEQUENCE_LENGTH = 16
VOCABULARY = 96
HEADS = 4
EXPERTS = 4
STEPS = 200
"""Of the learning rate's decay. So many that it hardly falls in a few dozens: where --no-load-optim
begins it anew, what is lost shows, not another rate."""


def training_arguments(run: Run, rank: int = 0) -> Namespace:
    """The ``args`` of one rank.

    Raises:
        NotImplementedError: this version knows no layout strings.
    """
    values = {
        **_parallel(run),
        **_placement(run),
        **_model(run.model),
        **_training(run),
        "rank": rank,
        "local_rank": rank,
        "world_size": run.world_size,
    }
    version = tuple(int(number) for number in __version__.split(".")[:2])
    known = {
        name: value
        for name, value in values.items()
        if _SINCE.get(name, version) <= version <= _UNTIL.get(name, version)
    }
    if run.layout is not None and "pipeline_model_parallel_layout" not in known:
        raise NotImplementedError(f"Megatron-Core {__version__} has no layout strings")
    return Namespace(**known)


def _parallel(run: Run) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": run.tp,
        "pipeline_model_parallel_size": run.pp,
        "context_parallel_size": run.cp,
        "expert_model_parallel_size": run.ep,
        "expert_tensor_parallel_size": run.etp or run.tp,
        "data_parallel_size": run.dp,
        "num_distributed_optimizer_instances": 1,
        # Megatron wants it for experts with tensor parallelism.
        "sequence_parallel": run.tp > 1 and run.ep > 1,
        "hybrid_context_parallel": False,
        "moe_extended_tp": False,
    }


def _placement(run: Run) -> dict[str, Any]:
    """Arguments that differ between PP and VPP, and those that place layers."""
    is_virtual = run.vpp > 1
    uneven = run.first_layers is not None or run.last_layers is not None
    slots = run.model.layers + run.account_for_embedding + run.account_for_loss
    by_flag = is_virtual and run.layout is None and run.pattern is None
    return {
        "virtual_pipeline_model_parallel_size": run.vpp if is_virtual else None,
        "num_layers_per_virtual_pipeline_stage": (
            slots // (run.pp * run.vpp) if by_flag and not uneven else None
        ),
        "num_virtual_stages_per_pipeline_rank": run.vpp if by_flag and uneven else None,
        "pipeline_model_parallel_layout": run.layout,
        "hybrid_layer_pattern": run.pattern,
        "microbatch_group_size_per_vp_stage": None,
        "overlap_p2p_comm": is_virtual,
        "align_param_gather": is_virtual,
        "overlap_param_gather_with_optimizer_step": run.overlap_step,
        "decoder_first_pipeline_num_layers": run.first_layers,
        "decoder_last_pipeline_num_layers": run.last_layers,
        "account_for_embedding_in_pipeline_split": run.account_for_embedding,
        "account_for_loss_in_pipeline_split": run.account_for_loss,
        "mtp_standalone": False,
    }


def _model(model: Model) -> dict[str, Any]:
    is_moe = model.kind in ("moe", "deepseek", "hybrid")
    values = {
        "model_type": ModelType.encoder_or_decoder,
        "attention_backend": AttnBackend.auto,
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "fp16": False,
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": HEADS,
        "kv_channels": model.hidden // HEADS,
        "seq_length": SEQUENCE_LENGTH,
        "max_position_embeddings": SEQUENCE_LENGTH,
        "padded_vocab_size": VOCABULARY,
        "untie_embeddings_and_output_weights": not model.tied,
        "position_embedding_type": "rope" if is_moe else "learned_absolute",
        "add_position_embedding": True,
        "normalization": "RMSNorm" if is_moe else "LayerNorm",
        "add_bias_linear": not is_moe,
        "swiglu": is_moe,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "mtp_num_layers": model.mtp_layers or None,
        "num_experts": EXPERTS if is_moe else None,
        "multi_latent_attention": model.kind == "deepseek",
        "qk_layernorm": model.kind == "deepseek",
        "rope_type": None,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "deterministic_mode": False,
        "fp8_param_gather": False,
        "is_hybrid_model": False,
        "use_legacy_models": False,
    }
    if is_moe:
        values |= {
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.01,
            "moe_token_dispatcher_type": "alltoall",
            "moe_grouped_gemm": False,
        }
    if model.kind == "hybrid":
        values |= {
            "is_hybrid_model": True,
            "mamba_state_dim": 8,
            "mamba_head_dim": 16,
            "mamba_num_groups": 2,
        }
    if model.kind == "deepseek":
        moe_layers = model.layers - model.leading_dense
        values |= {
            "rope_type": "rope",
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_head_dim": 16,
            "qk_pos_emb_head_dim": 8,
            "v_head_dim": 16,
            "moe_layer_freq": [0] * model.leading_dense + [1] * moe_layers,
            "moe_ffn_hidden_size": 48,
            "moe_shared_expert_intermediate_size": 48,
            "moe_router_score_function": "sigmoid" if model.expert_bias else "softmax",
            "moe_router_enable_expert_bias": model.expert_bias,
            "moe_router_bias_update_rate": 1e-3,
        }
    return values


def _training(run: Run) -> dict[str, Any]:
    return {
        "optimizer": run.optimizer,
        "lr": 1e-2,
        "min_lr": 1e-3,
        "decoupled_lr": run.decoupled_lr,
        "decoupled_min_lr": run.decoupled_lr,
        "apply_wd_to_qk_layernorm": run.decays_qk_norms,
        "embedding_init_method_std": run.embedding_std,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_eps": 1e-8,
        "clip_grad": 0.0,
        "seed": 1234,
        "micro_batch_size": 1,
        "global_batch_size": 4 * run.dp,
        "train_iters": STEPS,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "ckpt_format": "torch",
        "use_distributed_optimizer": run.optimizer == "adam",
        "accumulate_allreduce_grads_in_fp32": True,
        "overlap_grad_reduce": (
            run.bucket_size is not None or run.num_buckets is not None or run.overlap_step
        ),
        "overlap_param_gather": run.overlap_step,
        "ddp_bucket_size": run.bucket_size,
        "ddp_num_buckets": run.num_buckets,
        "ddp_pad_buckets_for_high_nccl_busbw": False,
        "use_torch_fsdp2": False,
        "use_custom_fsdp": False,
        "use_megatron_fsdp": False,
        "symmetric_ar_type": None,
    }
