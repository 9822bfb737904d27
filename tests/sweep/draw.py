"""One random combination of Megatron-LM's flags: two training runs that differ in nothing but their
pipeline layout. What a version does not know, as its own command line tells, is not drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")
_RANKS = 8
"""Most processes of a run."""
BASE = (
    *("--seq-length", "16", "--max-position-embeddings", "16", "--micro-batch-size", "1"),
    *("--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-iters", "100", "--clip-grad", "0"),
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--eval-iters", "0"),
    *("--eval-interval", "1000", "--save-interval", "1000"),
)
"""Flags of every run."""
_DISTRIBUTED = ["--use-distributed-optimizer"]
_EXPERTS = (
    *("--moe-router-topk", "2", "--moe-router-load-balancing-type", "aux_loss"),
    *("--moe-aux-loss-coeff", "1e-2", "--moe-token-dispatcher-type", "alltoall"),
)
_LATENT = (
    *("--kv-lora-rank", "16", "--qk-head-dim", "8", "--qk-pos-emb-head-dim", "8"),
    *("--v-head-dim", "16"),
)
_SHORT = {
    "--global-batch-size": "batch",
    "--hidden-size": "hidden",
    "--ffn-hidden-size": "ffn",
    "--num-attention-heads": "heads",
    "--kv-channels": "of",
    "--num-layers": "layers",
    "--vocab-size": "vocabulary",
    "--make-vocab-size-divisible-by": "by",
    "--untie-embeddings-and-output-weights": "untied",
    "--num-experts": "experts",
    "--position-embedding-type": "positions",
    "--multi-latent-attention": "MLA",
    "--train-iters": "steps",
    "--pipeline-model-parallel-size": "PP",
    "--tensor-model-parallel-size": "TP",
    "--expert-model-parallel-size": "EP",
    "--expert-tensor-parallel-size": "ETP",
    "--context-parallel-size": "CP",
    "--num-layers-per-virtual-pipeline-stage": "layers per virtual stage",
    "--num-virtual-stages-per-pipeline-rank": "V",
    "--pipeline-model-parallel-layout": "",
}


@dataclass(frozen=True)
class Side:
    """What one of the two runs adds."""

    flags: tuple[str, ...]
    options: tuple[str, ...]
    """Those of the program that ask for this layout."""


@dataclass(frozen=True)
class Draw:
    """Two runs that save the same state."""

    world_size: int
    flags: tuple[str, ...]
    sides: tuple[Side, Side]
    frozen: str | None
    """A regular expression of the global names of parameters that do not train."""

    @property
    def is_tied(self) -> bool:
        """The output layer's weight is the embedding's."""
        return "--untie-embeddings-and-output-weights" not in self.flags

    def in_short(self) -> str:
        """The flags, for a table."""
        common = _in_short(self.flags)
        if self.frozen is not None:
            common += f", frozen `{self.frozen}`"
        there, back = (_in_short(side.flags) or "plain" for side in self.sides)
        return f"{self.world_size} ranks, {common}: {there} <-> {back}"


def _in_short(flags: Sequence[str]) -> str:
    text = " ".join(_SHORT.get(flag, flag.removeprefix("--")) for flag in flags)
    for constant in (_EXPERTS, _LATENT):
        text = text.replace(" ".join(flag.removeprefix("--") for flag in constant) + " ", "")
    return text.strip()


class Choices:
    """Random choices among what a version knows."""

    def __init__(self, seed: str, options: Mapping[str, Sequence[str]]) -> None:
        self._random = random.Random(seed)
        self._options = options

    def one(self, *among: _T) -> _T:
        """One of these, each as likely."""
        return self._random.choice(among)

    def happens(self, chance: float) -> bool:
        """Does it."""
        return self._random.random() < chance

    def knows(self, option: str, choice: str | None = None) -> bool:
        """Does this version, the option and its choice."""
        return option in self._options and (choice is None or choice in self._options[option])

    def maybe(self, chance: float, *flags: str) -> list[str]:
        """These flags, if the version knows them and it happens."""
        return list(flags) if self.happens(chance) and self.knows(flags[0]) else []


@dataclass(frozen=True)
class _Sizes:
    pp: int
    tp: int
    dp: int
    cp: int
    ep: int

    @property
    def world_size(self) -> int:
        return self.pp * self.tp * self.dp * self.cp

    @property
    def flags(self) -> list[str]:
        flags = ["--pipeline-model-parallel-size", str(self.pp)]
        for option, size in {
            "--tensor-model-parallel-size": self.tp,
            "--context-parallel-size": self.cp,
            "--expert-model-parallel-size": self.ep,
        }.items():
            flags += [option, str(size)] if size > 1 else []
        return [*flags, "--global-batch-size", str(self.pp * self.dp)]


def draw(c: Choices, *, has_emerging: bool) -> Draw:
    """Two runs of one version."""
    kind = c.one("dense", "dense", "moe", "moe", "deepseek")
    if not c.knows("--multi-latent-attention"):
        kind = c.one("dense", "moe")
    optimizer = _optimizer(c, has_emerging=has_emerging)
    sizes = _sizes(c, kind, has_cp="--optimizer" not in optimizer)
    mtp = c.one(0, 1, 1, 2) if c.happens(0.25) and c.knows("--mtp-num-layers") else None
    layers, placement, sides = _placement(c, sizes.pp, mtp or 0)
    flags = [*sizes.flags, "--num-layers", str(layers), *placement]
    flags += ["--mtp-num-layers", str(mtp)] if mtp is not None else []
    flags += _model(c, kind, layers, sizes) + optimizer + _precision(c, optimizer)
    flags += _distributed(c, sizes) if optimizer == _DISTRIBUTED else []
    flags += [*_others(c, sizes), "--train-iters", c.one("1", "2", "3")]
    if "--overlap-param-gather" in flags and c.happens(0.3):
        sides = (sides[0], _overlapping(c, sides[1]))
    patterns = ("layernorm", r"layers\.[12]\.", "mlp", "embedding", "linear_qkv", "self_attention")
    frozen = c.one(*patterns, r"experts\.", "router") if c.happens(0.12) else None
    return Draw(sizes.world_size, tuple(flags), sides, frozen)


def _sizes(c: Choices, kind: str, *, has_cp: bool) -> _Sizes:
    pp = c.one(2, 2, 2, 3, 3, 4, 4, 5, 6)
    room = _RANKS // pp
    tp = c.one(1, 1, 2) if room >= 2 else 1
    room //= tp
    cp = 2 if has_cp and room >= 2 and c.happens(0.12) else 1
    dp = c.one(*range(1, room // cp + 1))
    ep = c.one(*(size for size in (1, 2, 4) if dp * cp % size == 0)) if kind != "dense" else 1
    return _Sizes(pp, tp, dp, cp, ep)


_Placed = tuple[int, list[str], tuple[Side, Side]]
"""A number of layers, common flags, and the two layouts."""


def _placement(c: Choices, pp: int, mtp: int) -> _Placed:
    forms: list[Callable[[Choices, int, int], _Placed]] = [_even, _even, _virtual_both]
    forms += [_accounted] * c.knows("--account-for-embedding-in-pipeline-split")
    forms += [_ends] * (pp > 2 and c.knows("--num-virtual-stages-per-pipeline-rank"))
    forms += [_strings] * 3 * c.knows("--pipeline-model-parallel-layout")
    return c.one(*forms)(c, pp, mtp)


_PLAIN = Side((), ("--target-virtual-pipeline-model-parallel-size", "1"))


def _virtual(c: Choices, stages: int, layers_of_each: int | None) -> Side:
    flags = ("--num-virtual-stages-per-pipeline-rank", str(stages))
    if layers_of_each is not None and (c.happens(0.5) or not c.knows(flags[0])):
        flags = ("--num-layers-per-virtual-pipeline-stage", str(layers_of_each))
    return Side(flags, ("--target-virtual-pipeline-model-parallel-size", str(stages)))


def _even(c: Choices, pp: int, _: int) -> _Placed:
    stages, each = c.one(2, 2, 3, 4), c.one(1, 2) if pp < 4 else 1
    return pp * stages * each, [], (_PLAIN, _virtual(c, stages, each))


def _virtual_both(c: Choices, pp: int, _: int) -> _Placed:
    one, other, each = c.one((2, 4, 4), (2, 3, 6), (2, 6, 6))
    return pp * each, [], (_virtual(c, one, each // one), _virtual(c, other, each // other))


def _accounted(c: Choices, pp: int, _: int) -> _Placed:
    ends = ["--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"]
    flags = c.one(ends, ends[:1], ends[1:])
    stages, each = c.one(2, 3), 2 if pp < 4 else 1
    layers = pp * stages * each - len(flags)
    return layers, flags, (_PLAIN, _virtual(c, stages, each))


def _ends(c: Choices, pp: int, _: int) -> _Placed:
    stages = c.one(2, 2, 3)
    first, last, each = (stages * c.one(*counts) for counts in ((1, 2), (1, 2), (1,)))
    flags = {
        "--decoder-first-pipeline-num-layers": first,
        "--decoder-last-pipeline-num-layers": last,
    }
    if c.happens(0.4):
        del flags[c.one(*flags)]
    layers = sum(flags.values()) + each * (pp - len(flags))
    given = [word for flag, count in flags.items() for word in (flag, str(count))]
    return layers, given, (_PLAIN, _virtual(c, stages, None))


def _strings(c: Choices, pp: int, mtp: int) -> _Placed:
    """From an even layout to a string, or from a string to a string; some stages are empty."""
    if c.happens(0.4):
        layers = pp * c.one(1, 2)
        return layers, [], (_PLAIN, _string(c, layers, pp, c.one(2, 2, 3), mtp))
    layers, stages = c.one(5, 6, 7, 9), c.one(1, 1, 2, 3)
    one = other = _string(c, layers, pp, stages, mtp)
    while one == other:
        other = _string(c, layers, pp, c.one(2, 3), mtp)
    return layers, [], (one, other)


def _string(c: Choices, layers: int, pp: int, stages_of_each: int, mtp: int) -> Side:
    stages = pp * stages_of_each
    # MTP layers follow all layers, in the last virtual stage of a rank that is not the first.
    place = c.one(stages - 1, c.one(*range(stages - pp + 1, stages))) if mtp else stages - 1
    places = sorted(c.one(*range(place + c.one(0, 1)) or [0]) for _ in range(layers))
    texts = ["t" * places.count(stage) for stage in range(stages)]
    texts[place] += "m" * mtp
    text = "E" + "|".join(texts) + "L"
    option = "pipeline-model-parallel-layout"
    return Side((f"--{option}", text), (f"--target-{option}", text))


def _overlapping(c: Choices, side: Side) -> Side:
    flag = "overlap-param-gather-with-optimizer-step"
    if side.flags and c.knows(f"--{flag}"):
        return Side((*side.flags, f"--{flag}"), (*side.options, f"--target-{flag}"))
    return side


def _model(c: Choices, kind: str, layers: int, sizes: _Sizes) -> list[str]:
    shape = c.one(
        "64 128 4 16", "32 64 4 8", "40 88 4 10", "48 104 6 10", "24 56 2 12", "36 70 2 18"
    ).split()
    if kind == "deepseek":
        shape = c.one("64 128 4 16", "40 88 4 16").split()
    names = ("--hidden-size", "--ffn-hidden-size", "--num-attention-heads", "--kv-channels")
    flags = [word for pair in zip(names, shape, strict=True) for word in pair]
    size, multiple = c.one(("95", "16"), ("252", "1"), ("300", "7"), ("513", "2"))
    flags += ["--vocab-size", size, "--make-vocab-size-divisible-by", multiple]
    flags += c.maybe(0.5, "--untie-embeddings-and-output-weights")
    if kind == "dense":
        flags += _dense(c)
        sequence_parallel = c.happens(0.5)
    else:
        flags += _experts(c, layers, sizes)
        sequence_parallel = True  # which Megatron wants of experts
    flags += ["--sequence-parallel"] if sizes.tp > 1 and sequence_parallel else []
    if kind == "deepseek":
        return flags + _latent(c)
    flags += c.maybe(0.3, "--group-query-attention", "--num-query-groups", "2")
    flags += c.maybe(0.2, "--qk-layernorm") + c.maybe(0.2, "--add-qkv-bias")
    return flags + c.maybe(0.1, "--softmax-type", "learnable")


def _dense(c: Choices) -> list[str]:
    flags = c.one([], ["--normalization", "RMSNorm"])
    flags = flags + c.one([], ["--swiglu"]) + c.one([], ["--disable-bias-linear"])
    positions = [
        p for p in ("learned_absolute", "rope", "none") if c.knows("--position-embedding-type", p)
    ]
    return [*flags, "--position-embedding-type", c.one(*positions)]


def _experts(c: Choices, layers: int, sizes: _Sizes) -> list[str]:
    flags = ["--num-experts", c.one("4", "8"), *_EXPERTS, "--position-embedding-type", "rope"]
    flags += c.one(["--swiglu"], ["--swiglu"], []) + c.one(["--normalization", "RMSNorm"], [])
    if sizes.tp > 1 and sizes.ep == 1:
        flags += c.maybe(0.4, "--expert-tensor-parallel-size", "1")
    # Megatron has no biases in experts that are split.
    has_bias = (sizes.tp == 1 or "--expert-tensor-parallel-size" in flags) and c.happens(0.15)
    flags += [] if has_bias else ["--disable-bias-linear"]
    if c.knows("--moe-layer-freq") and c.happens(0.5):
        dense = c.one(1, 2, 3) % layers
        kinds = c.one(
            [0] * dense + [1] * (layers - dense),
            [1] * dense + [0] * (layers - dense),
            [i % 2 for i in range(layers)],
        )
        flags += ["--moe-layer-freq", str(kinds).replace(" ", "")] if any(kinds) else []
    flags += c.maybe(0.3, "--moe-shared-expert-intermediate-size", "40")
    if c.knows("--moe-router-enable-expert-bias") and c.happens(0.4):
        flags += ["--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"]
    return flags


def _latent(c: Choices) -> list[str]:
    given = ["--multi-latent-attention", *_LATENT, *c.one([], ["--q-lora-rank", "24"])]
    given += ["--rope-type", "rope"] if c.knows("--rope-type") else []
    return given + c.one([], ["--qk-layernorm"])


def _optimizer(c: Choices, *, has_emerging: bool) -> list[str]:
    emerging = [
        name
        for name in ("muon", "dist_muon", "adaptive_muon", "soap", "lion")
        if has_emerging and c.knows("--optimizer", name)
    ]
    if emerging and c.happens(0.35):
        flags = ["--optimizer", c.one(*emerging)]
        if flags[1] != "dist_muon" and c.knows("--optimizer", "soap"):
            flags += c.maybe(0.4, *_DISTRIBUTED)  # layer-wise, then
        if "dist_muon" in flags or _DISTRIBUTED[0] in flags:
            flags += c.maybe(0.8, "--no-use-layer-wise-param-layout")
        return flags + c.maybe(0.2, "--muon-scalar-optimizer", "lion")
    if c.happens(0.3):
        return c.one([], [], ["--optimizer", "sgd"], ["--optimizer", "sgd", "--sgd-momentum", "0"])
    return _DISTRIBUTED


def _distributed(c: Choices, sizes: _Sizes) -> list[str]:
    flags = []
    if c.happens(0.5):
        flags += ["--overlap-grad-reduce", *c.one([], ["--overlap-param-gather"])]
        flags += c.maybe(0.5, "--ddp-bucket-size", c.one("1000", "5000", "20000"))
        if "--ddp-bucket-size" not in flags:
            flags += c.maybe(0.5, "--ddp-num-buckets", c.one("2", "5"))
    flags += c.maybe(0.15, "--grad-reduce-in-bf16")
    flags += c.maybe(0.15, "--ddp-pad-buckets-for-high-nccl-busbw")
    flags += c.maybe(0.1, "--ddp-average-in-collective")
    shards = sizes.dp * sizes.cp // sizes.ep
    if shards > 1:
        size = next(size for size in (2, 3, shards) if shards % size == 0)
        flags += c.maybe(0.3, "--num-distributed-optimizer-instances", str(size))
    return flags


def _precision(c: Choices, optimizer: Sequence[str]) -> list[str]:
    is_plain = "--optimizer" not in optimizer or "sgd" in optimizer
    if not c.happens(0.35 if is_plain else 0.1):
        return ["--bf16"]
    scales = (
        ["--loss-scale", "128"],
        ["--initial-loss-scale", "1024"],
        ["--initial-loss-scale", "256", "--hysteresis", "1"],
    )
    return c.one([], ["--fp16", *c.one(*scales)])


def _others(c: Choices, sizes: _Sizes) -> list[str]:
    flags = c.maybe(0.2, "--decoupled-lr", "2e-3")
    flags += c.maybe(0.5, "--decoupled-min-lr", "1e-4") if flags else []
    growing = ["--start-weight-decay", "0.01", "--end-weight-decay", "0.1"]
    decays = (
        ["--weight-decay", "0"],
        ["--weight-decay", "0.1"],
        [*growing, "--weight-decay-incr-style", "linear"],
    )
    flags += c.one(*decays) if c.happens(0.3) else []
    flags += c.maybe(0.1, "--no-save-rng") + c.maybe(0.07, "--no-save-optim")
    if sizes.cp == 1:
        flags += c.maybe(0.1, "--use-tp-pp-dp-mapping")
    flags += c.maybe(0.1, "--data-parallel-random-init")
    flags += c.maybe(0.1, "--apply-wd-to-qk-layernorm")
    return flags + c.maybe(0.1, "--embedding-init-method-std", "0.01")
