"""Hybrid models (Mamba, attention, MLP and experts by a pattern), of Megatron-Core 0.18 and later:
its stack and layers, with its own linear layers and norms where it takes Transformer Engine's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

if TYPE_CHECKING:
    from argparse import Namespace


def hybrid_chunk(args: Namespace, config: Any, **stage: Any) -> Any:
    """One model chunk: ``hybrid_builder``."""
    hybrid_block.TENorm = WrappedTorchNorm
    return HybridModel(
        config=config,
        hybrid_stack_spec=_stack_spec(args.num_experts),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        hybrid_layer_pattern=args.hybrid_layer_pattern,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        **stage,
    )


def _stack_spec(num_experts: int) -> ModuleSpec:
    """As ``hybrid_stack_spec``, with norms of their own before the linear layers."""
    mamba = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinear,
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    moe = get_moe_module_spec(use_te=False, num_experts=num_experts, moe_grouped_gemm=False)

    def feed_forward(layer: type, spec: Any) -> ModuleSpec:
        parts = {"pre_mlp_layernorm": WrappedTorchNorm, "mlp_bda": get_bias_dropout_add}
        return ModuleSpec(layer, submodules=TransformerLayerSubmodules(mlp=spec, **parts))

    return ModuleSpec(
        hybrid_block.HybridStack,
        submodules=hybrid_block.HybridStackSubmodules(
            mamba_layer=ModuleSpec(
                MambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=WrappedTorchNorm,
                    mixer=ModuleSpec(MambaMixer, submodules=mamba),
                    mamba_bda=get_bias_dropout_add,
                ),
            ),
            attention_layer=ModuleSpec(
                TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=WrappedTorchNorm,
                    self_attention=ModuleSpec(
                        SelfAttention,
                        params={"attn_mask_type": AttnMaskType.causal},
                        submodules=attention,
                    ),
                    self_attn_bda=get_bias_dropout_add,
                ),
            ),
            mlp_layer=feed_forward(MLPLayer, partial(MLP.as_mlp_submodule, submodules=mlp)),
            moe_layer=feed_forward(MoETransformerLayer, moe),
        ),
    )
