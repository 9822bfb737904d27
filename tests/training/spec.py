"""What to run: a model and how it is spread over processes. Plain data; needs neither torch nor
Megatron."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """A tiny model; the sizes that are not fields are fixed in ``arguments``."""

    kind: str = "dense"
    """"dense" (GPT), "moe" (Mixtral-like), "deepseek" (latent attention, leading dense layers,
    shared experts, expert bias) or "hybrid" (Mamba, attention, MLP, experts by a pattern)."""
    layers: int = 8
    hidden: int = 64
    ffn: int = 128
    tied: bool = True
    """Input embedding and output layer share their weight."""
    leading_dense: int = 1
    """Layers without experts at the start of a DeepSeek-like model."""
    expert_bias: bool = True
    """The router of a DeepSeek-like model scores by sigmoid, with a bias (V3), else by softmax."""
    mtp_layers: int = 0
    """Multi-token prediction."""


@dataclass(frozen=True)
class Run:
    """A model under one parallel layout, as ``pretrain_gpt.py`` would be launched with."""

    model: Model = dataclasses.field(default_factory=Model)
    pp: int = 2
    vpp: int = 1
    layout: str | None = None
    """pipeline_model_parallel_layout; its virtual size must be ``vpp``."""
    pattern: str | None = None
    """hybrid_layer_pattern of a hybrid model, likewise."""
    tp: int = 1
    ep: int = 1
    etp: int | None = None
    """Expert tensor parallel size; ``tp`` unless given."""
    cp: int = 1
    dp: int = 1
    first_layers: int | None = None
    last_layers: int | None = None
    """decoder_first_pipeline_num_layers and decoder_last_pipeline_num_layers."""
    account_for_embedding: bool = False
    account_for_loss: bool = False
    """account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split."""
    bucket_size: int | None = None
    """ddp_bucket_size; buckets exist only when gradient reduction is overlapped, so it is."""
    num_buckets: int | None = None
    """ddp_num_buckets, likewise."""
    overlap_step: bool = False
    """overlap_param_gather_with_optimizer_step."""
    optimizer: str = "adam"
    """"adam" (distributed), "muon" (plain) or "dist_muon" (layer-wise)."""
    decoupled_lr: float | None = None
    """Learning rate of embedding and output layer."""
    decays_qk_norms: bool = False
    """apply_wd_to_qk_layernorm."""
    embedding_std: float | None = None
    """embedding_init_method_std."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def target_options(self) -> list[str]:
        """Options of ``pp_to_vpp`` that ask for this run's pipeline layout."""
        if self.layout is not None:
            options = ["--target-pipeline-model-parallel-layout", self.layout]
        elif self.pattern is not None:
            options = ["--target-hybrid-layer-pattern", self.pattern]
        else:
            options = ["--target-virtual-pipeline-model-parallel-size", str(self.vpp)]
        options += ["--target-pipeline-model-parallel-size", str(self.pp)]
        if self.overlap_step:
            options.append("--target-overlap-param-gather-with-optimizer-step")
        return options

    def to_json(self) -> dict[str, Any]:
        """Plain values for another process."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Run:
        """The inverse of ``to_json``."""
        return cls(**{**values, "model": Model(**values["model"])})
