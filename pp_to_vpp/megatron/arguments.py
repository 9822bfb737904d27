"""The training arguments that Megatron saves in each rank file: read, typed, and patched.

Only those that decide a layout are read. Names and defaults are those of
megatron/training/arguments.py, 0.6 to 0.19; an argument that a version did not know has the
meaning that the version had.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..container.pickling import Global, Instance
from ..errors import (
    AS_SAVED,
    FROM_MEGATRON,
    NOT_CONVERTED,
    ONE_SAVE,
    WITH_A_PATTERN,
    CheckpointError,
    problem,
    show,
)
from . import rounding
from .forms import Ends, Even, Form, HybridPattern, LayoutString, Listed, Order
from .naming import chunk_keys
from .placement import LISTS, PLACEMENT_ARGUMENTS, Placement
from .processes import Processes

_NAMESPACES = (Global("argparse", "Namespace"), Global("types", "SimpleNamespace"))
"""The second is that of --yaml-cfg, of Primus and of the unit tests of Megatron and its forks."""
_SETS = (Global("builtins", "set"), Global("__builtin__", "set"))
_PP_SIZE, _DP_SIZE = "pipeline_model_parallel_size", "data_parallel_size"
_VP_SIZE = "virtual_pipeline_model_parallel_size"
_OVERLAPS = "overlap_param_gather_with_optimizer_step"
_NUMBERS_RIGHT = "rope_type"
"""Came within days of the cure of wrong numbers of layers (FORMAT 4.3)."""
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1 << 16


@dataclass(frozen=True, slots=True)
class SavedArguments:
    """What the layout of a checkpoint depends on."""

    names: frozenset[str]
    """All argument names: they tell what the version that saved them knew."""
    num_layers: int
    mtp_num_layers: int | None
    """None and 0 both mean none; but with 0 the final norm is where it is with some."""
    noop_layers: frozenset[int]
    """Numbers of layers without parameters, from 0 (MindSpeed)."""
    ties_embeddings: bool
    """Input embedding and output layer share their weight."""
    tp_size: int
    pp_size: int
    ep_size: int
    etp_size: int
    """expert_tensor_parallel_size; equals ``tp_size`` where versions before 0.10 had no choice."""
    cp_size: int
    dp_size: int
    """Without context parallelism."""
    maps_pp_inside: bool
    """use_tp_pp_dp_mapping: pipeline ranks lie inside the data-parallel ones."""
    optimizer_instances: int
    """num_distributed_optimizer_instances."""
    random_by_dp_rank: bool
    """data_parallel_random_init: a rank file has the random states of all data-parallel ranks."""
    placement: Placement
    uses_distributed_optimizer: bool
    uses_layer_wise_optimizer: bool
    """As far as they tell: a name that begins with ``dist_``, or from 0.18 a flag of its own."""
    overlaps_grad_reduce: bool
    overlaps_param_gather_with_step: bool
    """overlap_param_gather_with_optimizer_step."""
    ddp_bucket_size: int | None
    ddp_num_buckets: int | None
    pads_buckets: bool
    """ddp_pad_buckets_for_high_nccl_busbw."""
    decoupled_lr: bool
    skips_embedding_weight_decay: bool
    """0.14 and 0.15 do when embedding_init_method_std is given."""
    decays_qk_norms: bool
    """apply_wd_to_qk_layernorm (0.16)."""
    clips_qk: bool
    """qk_clip: the weights that it scales are not their main parameters rounded."""
    main_params_dtype: str
    """With the precision-aware optimizer; "" without."""
    last_kind_is_its_own: bool
    """The last decoder layer is not as layers are that follow from no number: dense among experts,
    heterogeneous, or of a variant of attention (FORMAT 3.4)."""
    misnumbers_kinds: bool
    """The kinds of layers follow from their numbers, which the version gets wrong where virtual
    stages have ``decoder_last_pipeline_num_layers`` alone (0.11 to 0.13; FORMAT 4.3)."""

    @property
    def ways(self) -> tuple[str, ...]:
        """How weights may follow from what the optimizer keeps of their main parameters."""
        more = {"float32": (rounding.REMAINDERS,), "float16": (rounding.HALVES,)}
        return (*rounding.WAYS, *more.get(self.main_params_dtype, ()))

    @property
    def dense_replicas(self) -> int:
        """Ranks that have the same dense parameters: DP x CP."""
        return self.dp_size * self.cp_size

    @property
    def expert_replicas(self) -> int:
        """Ranks that have the same experts: the expert data-parallel size."""
        return self.tp_size * self.cp_size * self.dp_size // (self.etp_size * self.ep_size)

    @property
    def processes(self) -> Processes:
        """How the processes of the run are numbered."""
        return Processes(
            tp_size=self.tp_size,
            cp_size=self.cp_size,
            dp_size=self.dp_size,
            ep_size=self.ep_size,
            etp_size=self.etp_size,
            maps_pp_inside=self.maps_pp_inside,
        )

    @property
    def sizes(self) -> Mapping[str, int]:
        """The arguments that tell how many ranks there are, the first two by themselves
        (arguments.py ``validate_args``, 0.7 to 0.19)."""
        world = self.tp_size * self.cp_size * self.dp_size * self.pp_size
        return {
            _PP_SIZE: self.pp_size,
            _DP_SIZE: self.dp_size,
            "transformer_pipeline_model_parallel_size": self.pp_size,
            **dict.fromkeys(("world_size", "inprocess_active_world_size"), world),
        }


class _Reader:
    """Takes typed values out of the saved namespace and gathers what is wrong with them."""

    def __init__(self, values: Mapping[Any, Any], where: str) -> None:
        self.values = values
        self.where = where
        self.problems: list[str] = []

    def take(self, name: str, is_right: Callable[[Any], bool], kind: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if is_right(value):
            return value
        cure = AS_SAVED
        self.problems.append(
            problem(
                self.where, f"args.{name} is no {kind}", expected=kind, found=show(value), cure=cure
            )
        )
        return default

    def size(self, name: str, default: int = 1, low: int = 1, high: int = _MAX_SIZE) -> int:
        kind = f"integer of {low} to {high}"
        value: int = self.take(name, lambda v: type(v) is int and low <= v <= high, kind, default)
        return value

    def optional(self, name: str, low: int = 0, high: int = 1 << 62) -> int | None:
        return None if self.values.get(name) is None else self.size(name, low, low, high)

    def flag(self, name: str) -> bool:
        value: bool = self.take(name, lambda v: type(v) is bool, "truth value", default=False)
        return value

    def text(self, name: str) -> str | None:
        value: str | None = self.take(name, lambda v: isinstance(v, str), "string", default=None)
        return value

    def dtype(self, name: str) -> str:
        def is_right(value: Any) -> bool:
            return isinstance(value, Global) and value.module == "torch"

        value: Global = self.take(name, is_right, "dtype", default=Global("torch", "float32"))
        return value.name

    def counts(self, name: str) -> tuple[int, ...] | None:
        """A list of layer counts, or a string of it; other types have other meanings."""
        value = self.values.get(name)
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,5}(,[0-9]{1,5}){1,999}", value):
            return tuple(map(int, value.split(",")))
        if isinstance(value, list) and value and all(type(n) is int and n >= 0 for n in value):
            return tuple(value)
        return None

    def numbers(self, name: str) -> frozenset[int]:
        """A set of layer numbers."""

        def is_right(value: Any) -> bool:
            if not isinstance(value, Instance) or value.factory not in _SETS:
                return False
            members = value.arguments[0] if value.arguments else []
            return isinstance(members, list) and all(
                type(n) is int and 0 <= n < _MAX_LAYERS for n in members
            )

        value = self.take(name, is_right, "set of layer numbers", default=None)
        return frozenset(value.arguments[0] if value is not None and value.arguments else ())

    def split(self, name: str) -> tuple[int, ...] | None:
        def is_right(value: Any) -> bool:
            return isinstance(value, list) and all(
                type(n) is int and 0 < n < 1 << 16 for n in value
            )

        value = self.take(name, is_right, "list of layer counts", default=None)
        return None if not value else tuple(value)


def namespace_values(node: object, where: str) -> dict[Any, Any]:
    """The attributes of the saved ``args``.

    Raises:
        CheckpointError: it is no ``argparse.Namespace``.
    """
    if (
        isinstance(node, Instance)
        and node.factory in _NAMESPACES
        and isinstance(node.state, dict)
        and all(isinstance(name, str) for name in node.state)
    ):
        return node.state
    raise CheckpointError.of(
        where,
        "no training arguments",
        expected="'args', a namespace",
        found=show(node),
        cure=FROM_MEGATRON,
    )


_UNSUPPORTED: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    # argument, is it on?, what it means
    ("use_legacy_models", bool, "a legacy model: convert it to Megatron-Core first"),
    ("use_custom_fsdp", bool, "Megatron-FSDP: it shards parameters in another format"),
    ("use_megatron_fsdp", bool, "Megatron-FSDP: it shards parameters in another format"),
    ("use_torch_fsdp2", bool, "FSDP2: it shards parameters in another format"),
    ("standalone_embedding_stage", bool, "a standalone embedding stage, which VPP cannot have"),
    ("fp8_param_gather", bool, "weights stored natively in fp8"),
    ("fp4_param", bool, "weights stored natively in fp4"),
    ("fp4_param_gather", bool, "weights stored natively in fp4"),
    ("optimizer", lambda v: not isinstance(v, str), "no name of an optimizer"),
    ("moe_extended_tp", bool, "experts split over TP x EP (--moe-extended-tp)"),
    ("gtp_weight_remat_size", lambda v: type(v) is int and v > 1, "weight shards over GTP ranks"),
    ("expert_gtp_weight_remat_size", lambda v: type(v) is int and v > 1, "weight shards over GTP"),
)

_OLD_HYBRIDS = ("is_hybrid_model", "hybrid_override_pattern")
"""Set up to 0.16, which has no hybrid_layer_pattern."""


_V_ALGORITHMS = ("zbv-formatted", "v-half", "v-min")
_V_SWITCHES: Mapping[str, tuple[str, object]] = {
    "schedules_method": ("schedules_method", None),
    "schedule_method": ("schedule_method", "vanilla"),
    "use_dualpipev": ("use_dualpipev", False),
    "pp_algorithm": ("patch_primus_pipeline", False),
    "zero_bubble_v_schedule": ("patch_zero_bubble", False),
    "enable_1f1b_v": ("patch_zero_bubble", False),
}
"""Arguments that ask for a V-shaped schedule: what switches it off, and to which value."""
_V_STAGES = 2


def _v_schedules(values: Mapping[Any, Any]) -> list[str]:
    """The arguments that ask for a V-shaped schedule of a fork, where the last chunks are on the
    first ranks (MindSpeed, DCU Megatron, FlagScale, Primus)."""
    is_zero_bubble = bool(values.get("patch_zero_bubble") and values.get("enable_zero_bubble"))
    asked = {
        "schedules_method": values.get("schedules_method") == "dualpipev",
        "schedule_method": values.get("schedule_method") == "dualpipev",
        "use_dualpipev": bool(values.get("use_dualpipev")),
        "pp_algorithm": bool(values.get("patch_primus_pipeline"))
        and values.get("pp_algorithm") in _V_ALGORITHMS,
        "zero_bubble_v_schedule": is_zero_bubble and bool(values.get("zero_bubble_v_schedule")),
        "enable_1f1b_v": is_zero_bubble and bool(values.get("enable_1f1b_v")),
    }
    return [name for name, is_asked in asked.items() if is_asked]


def _odd_v_schedule(values: Mapping[Any, Any]) -> str | None:
    """What a V-shaped schedule cannot be converted with."""
    if not values.get("untie_embeddings_and_output_weights"):
        return "tied embeddings, of which both copies are on one rank"
    if values.get("mtp_num_layers"):
        return "multi-token prediction, whose second embedding is not kept like the first"
    if values.get(_VP_SIZE) not in (None, _V_STAGES):
        return f"args.{_VP_SIZE} {show(values[_VP_SIZE])} instead of {_V_STAGES}"
    return None


def _unsupported(values: Mapping[Any, Any], where: str) -> list[str]:
    """What the arguments tell that cannot be converted."""
    odd = _odd_v_schedule(values)
    schedules = () if odd is None else _v_schedules(values)
    rows = [*_UNSUPPORTED]
    rows += ((name, bool, f"a V-shaped schedule with {odd}") for name in schedules)
    problems = [
        problem(where, f"args.{name} is {show(values[name])}: {meaning}", cure=NOT_CONVERTED)
        for name, is_on, meaning in rows
        if values.get(name) is not None and is_on(values[name])
    ]
    if values.get("hybrid_layer_pattern") is None:
        problems += [
            problem(
                where,
                f"args.{name} is {show(values[name])}: a hybrid (Mamba) model without "
                "args.hybrid_layer_pattern, which Megatron up to 0.16 cannot run with virtual "
                "stages",
                cure=WITH_A_PATTERN,
            )
            for name in _OLD_HYBRIDS
            if values.get(name)
        ]
    return problems


def _placement(read: _Reader, *, default_vp_size: int) -> Placement:
    """The placement of a run's chunks."""
    if _v_schedules(read.values):  # dualpipev leaves the size away (FORMAT 4.9)
        return Placement(_V_STAGES, _form(read, _V_STAGES), Order.V_SHAPED)
    given = 1 if _VP_SIZE in read.values else default_vp_size
    vp_size = read.size(_VP_SIZE, default=given)
    return Placement(vp_size, _form(read, vp_size))


def _form(read: _Reader, vp_size: int) -> Form:
    """The one form that the run used."""
    text = read.text("pipeline_model_parallel_layout")
    ends = Ends(
        first=read.optional("decoder_first_pipeline_num_layers", high=_MAX_LAYERS),
        last=read.optional("decoder_last_pipeline_num_layers", high=_MAX_LAYERS),
        first_split=read.split("decoder_first_pipeline_num_layers_split"),
        last_split=read.split("decoder_last_pipeline_num_layers_split"),
    )
    even = Even(
        counts_embedding=read.flag("account_for_embedding_in_pipeline_split"),
        counts_loss=read.flag("account_for_loss_in_pipeline_split"),
    )
    pattern = read.text("hybrid_layer_pattern")
    if pattern is not None:
        return HybridPattern(pattern, ends)
    for name in LISTS:
        counts = read.counts(name)
        # MindSpeed-LLM drops its list where there are layers without parameters (FORMAT 4.6).
        is_dropped = name == "num_layer_list" and read.values.get("noop_layers") is not None
        if counts is not None and not is_dropped:
            return Listed(counts, name)
    if text is not None:
        return LayoutString(text)
    if ends == Ends():
        return even
    if even != Even():
        read.problems.append(
            problem(
                read.where,
                "args tell account_for_*_in_pipeline_split together with "
                "decoder_first/last_pipeline_num_layers; Megatron takes one of the two",
                cure=AS_SAVED,
            )
        )
    return ends.with_splits(vp_size)


def _is_last_of_its_own(values: Mapping[Any, Any]) -> bool:
    """See ``SavedArguments.last_kind_is_its_own``."""
    others = ("heterogeneous_layers_config_path", "experimental_attention_variant")
    if any(values.get(name) is not None for name in others):
        return True
    pattern, count = _moe_pattern(values), values.get("num_layers")
    if isinstance(pattern, list):
        return pattern[-1:] == [0]
    return type(count) is int and (count - 1) % pattern != 0


def _moe_pattern(values: Mapping[Any, Any]) -> int | list[Any]:
    """Every how many layers one has experts, or a list that says it of each; 1 without experts."""
    pattern: Any = values.get("moe_layer_freq") if values.get("num_experts") else None
    if isinstance(pattern, list):
        return pattern
    return pattern if isinstance(pattern, int) and pattern > 0 else 1


def _has_kinds(values: Mapping[Any, Any]) -> bool:
    """Whether layers are of several kinds, by their numbers."""
    if values.get("heterogeneous_layers_config_path") is not None:
        return True
    pattern = _moe_pattern(values)
    if isinstance(pattern, list):
        return any(kind != pattern[0] for kind in pattern)
    return pattern > 1


def _is_layer_wise(optimizer: Any) -> bool:
    """Whether a name of an optimizer, if it is one, is that of a layer-wise one."""
    return isinstance(optimizer, str) and optimizer.startswith("dist_")


def read_arguments(root: Mapping[Any, Any], where: str) -> SavedArguments:
    """The typed arguments of a rank file, given its top level.

    The number of virtual stages is that of the model chunks where the arguments do not name it.

    Raises:
        CheckpointError: arguments of a wrong type or of absurd size, or of runs that cannot be
            converted.
    """
    values = namespace_values(root.get("args"), where)
    read = _Reader(values, where)
    tp_size = read.size("tensor_model_parallel_size")
    arguments = SavedArguments(
        names=frozenset(values),
        num_layers=read.size("num_layers", high=_MAX_LAYERS),
        mtp_num_layers=read.optional("mtp_num_layers", high=_MAX_LAYERS),
        noop_layers=read.numbers("noop_layers"),
        ties_embeddings=not read.flag("untie_embeddings_and_output_weights"),
        tp_size=tp_size,
        pp_size=read.size(_PP_SIZE),
        ep_size=read.size("expert_model_parallel_size"),
        etp_size=read.size("expert_tensor_parallel_size", tp_size),
        cp_size=read.size("context_parallel_size"),
        dp_size=read.size(_DP_SIZE),
        maps_pp_inside=read.flag("use_tp_pp_dp_mapping"),
        optimizer_instances=read.size("num_distributed_optimizer_instances"),
        random_by_dp_rank=read.flag("data_parallel_random_init"),
        placement=_placement(read, default_vp_size=max(1, len(chunk_keys(root)))),
        uses_distributed_optimizer=read.flag("use_distributed_optimizer"),
        uses_layer_wise_optimizer=_is_layer_wise(values.get("optimizer"))
        or read.flag("use_layer_wise_distributed_optimizer"),
        overlaps_grad_reduce=read.flag("overlap_grad_reduce"),
        overlaps_param_gather_with_step=read.flag(_OVERLAPS),
        ddp_bucket_size=read.optional("ddp_bucket_size"),
        ddp_num_buckets=read.optional("ddp_num_buckets", low=1),
        pads_buckets=read.flag("ddp_pad_buckets_for_high_nccl_busbw"),
        decoupled_lr=values.get("decoupled_lr") is not None,
        skips_embedding_weight_decay=(  # 0.16 dropped it and brought the other (FORMAT 6.2)
            values.get("embedding_init_method_std") is not None
            and "apply_wd_to_qk_layernorm" not in values
        ),
        decays_qk_norms=read.flag("apply_wd_to_qk_layernorm"),
        clips_qk=read.flag("qk_clip"),
        main_params_dtype=read.dtype("main_params_dtype")
        if read.flag("use_precision_aware_optimizer")
        else "",
        last_kind_is_its_own=_is_last_of_its_own(values),
        misnumbers_kinds=_has_kinds(values) and _NUMBERS_RIGHT not in values,
    )
    problems = _unsupported(values, where) or read.problems
    if values.get("optimizer") == "sgd" and arguments.uses_distributed_optimizer:
        problems.append(
            problem(
                where,
                "args.optimizer is 'sgd' with the distributed optimizer, which takes Adam alone",
                cure=ONE_SAVE,
            )
        )
    if arguments.misnumbers_kinds and arguments.placement.has_last_stage_alone:
        problems.append(
            problem(
                where,
                "virtual stages with args.decoder_last_pipeline_num_layers alone, and layers of "
                "several kinds by their numbers, which Megatron 0.11 to 0.13 counts wrongly then: "
                "no other layout has the same kinds at the same places",
                cure=NOT_CONVERTED,
            )
        )
    if values.get("num_experts") and arguments.tp_size % arguments.etp_size:
        problems.append(
            problem(
                where,
                f"expert_tensor_parallel_size {arguments.etp_size} does not divide "
                f"tensor_model_parallel_size {arguments.tp_size}",
                cure="Megatron writes several expert ranks into one folder then, so experts are "
                "lost already: save once with an expert size that divides the other",
            )
        )
    if problems:
        raise CheckpointError(*problems)
    return arguments


FOLLOWING_PLACEMENT = PLACEMENT_ARGUMENTS.union(
    ("overlap_p2p_comm", "align_param_gather", _OVERLAPS),
    (name for name, _ in _V_SWITCHES.values()),
)
"""Arguments that say where layers are, that Megatron derives from that, or that are asked for."""


def following(source: SavedArguments, target: SavedArguments) -> frozenset[str]:
    """The arguments that follow from what a target is asked for."""
    own, others = source.sizes, target.sizes
    return FOLLOWING_PLACEMENT.union(() if own == others else (*own, "rank"))


_ALWAYS_TOLD = frozenset(
    (
        "decoder_first_pipeline_num_layers_split", "decoder_last_pipeline_num_layers_split",
        "pipeline_model_parallel_layout",
    )
)  # fmt: skip


def patch_arguments(
    node: Instance,
    source: SavedArguments,
    target: SavedArguments,
    pp_ranks: tuple[int, int] = (0, 0),
) -> Instance:
    """The saved ``args`` as the run with the target's placement and sizes would have saved them.

    Attributes keep their order, and only those that the version knows are set; except for the
    fork's splits and layout strings, without which the target could not be told from an even one.
    They are appended to the arguments of versions without them, and taken away again.
    The pipeline ranks are those of the file and of the target's.
    """
    changes = dict(target.placement.arguments(source.num_layers, target.pp_size))
    own, is_interleaved = source.placement, target.placement.is_interleaved
    if own.order is Order.V_SHAPED or own.is_interleaved != is_interleaved:
        # validate_args forces both off without interleaving; both are on by default with it
        # (FORMAT 2.3).
        changes["overlap_p2p_comm"] = changes["align_param_gather"] = is_interleaved
    changes[_OVERLAPS] = target.overlaps_param_gather_with_step
    values = dict(namespace_values(node, "args"))
    changes |= (_V_SWITCHES[name] for name in _v_schedules(values))
    appended = itertools.takewhile(
        lambda name: name in _ALWAYS_TOLD and changes.get(name) is None, reversed(list(values))
    )
    for name in appended:
        del values[name]
    for name, value in changes.items():
        if name in values or (name in _ALWAYS_TOLD and value is not None):
            values[name] = value
    if source.sizes != target.sizes:
        values |= _sizes_of(values, source, target, pp_ranks)
    return _with_values(node, values)


def _sizes_of(
    values: Mapping[Any, Any],
    source: SavedArguments,
    target: SavedArguments,
    pp_ranks: tuple[int, int],
) -> dict[str, int]:
    """The arguments that tell numbers of ranks, and the rank, where the rules make the source's:
    nothing that loads the file asks for any but the first (FORMAT 7.1)."""
    own, others = source.sizes, target.sizes
    found = {name: others[name] for name, value in own.items() if values.get(name) == value}
    found |= {name: others[name] for name in (_PP_SIZE, _DP_SIZE) if own[name] != others[name]}
    rank, (before, after) = values.get("rank"), pp_ranks
    stride = source.processes.stride
    if type(rank) is int and rank // stride == before:
        found["rank"] = rank - stride * before + target.processes.stride * after
    return found


def with_no_save_optim(node: Instance) -> Instance:
    """The saved ``args`` of a run with ``--no-save-optim``, where they know it."""
    values = namespace_values(node, "args")
    is_known = "no_save_optim" in values
    return _with_values(node, {**values, "no_save_optim": True}) if is_known else node


def _with_values(node: Instance, values: Mapping[Any, Any]) -> Instance:
    return Instance(node.factory, node.arguments, node.by_new, state=values)
