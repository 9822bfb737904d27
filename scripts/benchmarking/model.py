"""Models to be benchmarked: which tensors each pipeline stage holds, in Megatron's order.

The names are those of a Mixture-of-Experts model with latent attention (DeepSeek-V3), as Megatron
0.16 saves them. Every parameter has a multiple of 64 elements, so that buffers have no holes.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

ALIGNMENT = 128
"""Elements: buffers are padded to a multiple of it."""
_WEIGHT_BYTES = 2
ADAM_BYTES, LAYER_WISE_BYTES = 12, 16
"""Of the state of a parameter: three fp32 values; two, which a layer-wise optimizer with as many
data-parallel as expert ranks saves twice."""


class Kind(enum.Enum):
    """What an entry of a model's state dict is."""

    DENSE = "dense parameter"
    EXPERT = "expert parameter"
    BIAS = "fp32 buffer"
    EXTRA = "extra state, None"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a state dict."""

    name: str
    shape: tuple[int, ...] = ()
    kind: Kind = Kind.DENSE

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Stage:
    """What a model chunk holds."""

    layers: range
    has_embedding: bool = False
    has_head: bool = False
    has_mtp: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a model; the words are Megatron's."""

    layers: int
    dense_layers: int
    """The first so many layers have no experts."""
    experts: int
    hidden: int
    heads: int
    q_rank: int
    kv_rank: int
    head_width: int
    rope_width: int
    ffn: int
    moe_ffn: int
    vocabulary: int
    mtp_layers: int = 0

    def entries(self, stage: Stage, ep_size: int) -> Iterator[Entry]:
        """The state dict of a chunk on one of ``ep_size`` expert-parallel ranks."""
        if stage.has_embedding or stage.has_mtp:
            yield Entry("embedding.word_embeddings.weight", (self.vocabulary, self.hidden))
        for local, layer in enumerate(stage.layers):
            yield from self._layer(f"decoder.layers.{local}", layer, ep_size)
        if self.layers - 1 in stage.layers:
            yield Entry("decoder.final_layernorm.weight", (self.hidden,))
        if stage.has_mtp:
            yield from self._mtp(ep_size)
        if stage.has_head:
            yield from _linear("output_layer", self.vocabulary, self.hidden)

    def _mtp(self, ep_size: int) -> Iterator[Entry]:
        prefix = "mtp.layers.0"
        yield Entry(f"{prefix}.enorm.weight", (self.hidden,))
        yield Entry(f"{prefix}.hnorm.weight", (self.hidden,))
        yield from _linear(f"{prefix}.eh_proj", self.hidden, 2 * self.hidden)
        yield from self._layer(f"{prefix}.transformer_layer", self.layers, ep_size)
        yield Entry(f"{prefix}.final_layernorm.weight", (self.hidden,))

    def _layer(self, prefix: str, layer: int, ep_size: int) -> Iterator[Entry]:
        yield Entry(f"{prefix}.input_layernorm.weight", (self.hidden,))
        yield from self._attention(f"{prefix}.self_attention")
        yield Entry(f"{prefix}.pre_mlp_layernorm.weight", (self.hidden,))
        if layer < self.dense_layers:
            yield from _mlp(f"{prefix}.mlp", self.hidden, self.ffn, Kind.DENSE)
            return
        yield Entry(f"{prefix}.mlp.router.weight", (self.experts, self.hidden))
        yield Entry(f"{prefix}.mlp.router.expert_bias", (self.experts,), Kind.BIAS)
        for expert in range(self.experts // ep_size):
            name = f"{prefix}.mlp.experts.local_experts.{expert}"
            yield from _mlp(name, self.hidden, self.moe_ffn, Kind.EXPERT)
        yield from _mlp(f"{prefix}.mlp.shared_experts", self.hidden, self.moe_ffn, Kind.DENSE)

    def _attention(self, prefix: str) -> Iterator[Entry]:
        q_width = self.heads * (self.head_width + self.rope_width)
        yield from _linear(f"{prefix}.linear_proj", self.hidden, self.heads * self.head_width)
        yield from _linear(f"{prefix}.linear_q_down_proj", self.q_rank, self.hidden)
        yield from _linear(f"{prefix}.linear_q_up_proj", q_width, self.q_rank)
        yield from _linear(
            f"{prefix}.linear_kv_down_proj", self.kv_rank + self.rope_width, self.hidden
        )
        yield from _linear(
            f"{prefix}.linear_kv_up_proj", 2 * self.heads * self.head_width, self.kv_rank
        )
        yield Entry(f"{prefix}.q_layernorm.weight", (self.q_rank,))
        yield Entry(f"{prefix}.kv_layernorm.weight", (self.kv_rank,))

    def stored_bytes(self, ep_size: int, state_bytes: int = ADAM_BYTES) -> int:
        """Bytes of a checkpoint without MTP: weights, dense ones for each expert rank, and state
        of each parameter."""
        whole = Stage(range(self.layers), has_embedding=True, has_head=True)
        total = 0
        for entry in self.entries(whole, 1):
            if entry.kind is Kind.DENSE:
                total += entry.numel * (_WEIGHT_BYTES * ep_size + state_bytes)
            elif entry.kind is Kind.EXPERT:
                total += entry.numel * (_WEIGHT_BYTES + state_bytes)
        return total


def _linear(prefix: str, rows: int, columns: int, kind: Kind = Kind.DENSE) -> Iterator[Entry]:
    yield Entry(f"{prefix}.weight", (rows, columns), kind)
    yield Entry(f"{prefix}._extra_state", kind=Kind.EXTRA)


def _mlp(prefix: str, hidden: int, ffn: int, kind: Kind) -> Iterator[Entry]:
    yield from _linear(f"{prefix}.linear_fc1", 2 * ffn, hidden, kind)
    yield from _linear(f"{prefix}.linear_fc2", hidden, ffn, kind)


def even_stages(model: Model, pp_size: int) -> list[Stage]:
    """The stages of plain pipeline parallelism with equally many layers."""
    count = model.layers // pp_size
    return [
        Stage(range(p * count, (p + 1) * count), has_embedding=p == 0, has_head=p == pp_size - 1)
        for p in range(pp_size)
    ]


def buffer_places(entries: Sequence[Entry], kind: Kind) -> tuple[dict[str, int], int]:
    """Where each parameter of a kind starts in its flat buffer, in reverse order, and the end."""
    places, position = {}, 0
    for entry in reversed(entries):
        if entry.kind is kind:
            places[entry.name] = position
            position += entry.numel
    return places, position


TINY = Model(
    layers=8, dense_layers=1, experts=4, hidden=64, heads=4, q_rank=64, kv_rank=64,
    head_width=16, rope_width=16, ffn=256, moe_ffn=64, vocabulary=512,
)  # fmt: skip
"""Some 10 MB."""

DEEPSEEK_V3 = Model(
    layers=61, dense_layers=3, experts=256, hidden=7168, heads=128, q_rank=1536, kv_rank=512,
    head_width=128, rope_width=64, ffn=18432, moe_ffn=2048, vocabulary=129280, mtp_layers=1,
)  # fmt: skip


def _of_width(hidden: int) -> Model:
    return Model(
        layers=16, dense_layers=1, experts=32, hidden=hidden, heads=hidden // 64,
        q_rank=hidden // 2, kv_rank=hidden // 4, head_width=64, rope_width=64,
        ffn=4 * hidden, moe_ffn=hidden // 8, vocabulary=8 * hidden,
    )  # fmt: skip


def model_of_size(size: int, ep_size: int, state_bytes: int = ADAM_BYTES) -> Model:
    """A model of 16 layers and 32 experts whose checkpoint has about ``size`` bytes."""
    if size < _of_width(256).stored_bytes(ep_size, state_bytes):
        return TINY
    hidden = 256
    while _of_width(hidden + 256).stored_bytes(ep_size, state_bytes) <= size:
        hidden += 256
    model = _of_width(hidden)
    for field, step in (("moe_ffn", 8), ("vocabulary", ALIGNMENT)):
        wider = model
        while wider.stored_bytes(ep_size, state_bytes) <= size:
            model = wider
            wider = replace(model, **{field: getattr(model, field) + step})
    return model
