"""What changed between Megatron versions, as data: one row per change, each in force or not.

No checkpoint stores the version that wrote it, and users run commits between releases. So each
row names an argument that appeared with the change: its presence in the saved arguments is the
first guess. Where the files of the source prove a guess wrong, the other value is tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Rules:
    """The behaviour of one version; the fields are the names of the rows of ``CHANGES``."""

    aligns_parameters: bool
    """Each parameter starts at a multiple of 64 elements of its buffer."""
    pads_shared_embedding: bool
    """A shared embedding is padded to the bucket divisor where the data-parallel size does not
    divide its place. Before, Megatron failed to build such a buffer."""
    closes_bucket_cleanly: bool
    """A shared embedding always starts at its bucket's start, and no padding counts in the bucket
    before."""
    counts_cp_in_default_bucket: bool
    """The default bucket size grows with DP x CP, before with DP alone."""
    pads_for_all_instances: bool
    """Bucket ends are padded for the data-parallel ranks of all optimizer instances, before for
    those of one."""
    pads_for_one_instance: bool
    """They are padded for those of one again."""
    separates_experts_by_tp: bool
    """Experts have buffers of their own also when only their tensor-parallel size differs."""
    keeps_all_groups: bool
    """Every rank has the param groups of all ranks, hence also the expert optimizer; before, a
    rank had those of its own parameters, and loading matched them by position."""
    mtp_may_stand_alone: bool
    """MTP layers may have another stage than the loss, and where their number was told, even 0, the
    final norm is on the chunk of the last decoder layer, not on the last one."""
    marks_mtp_embedding: bool
    """The MTP copy of the embedding counts as an embedding: for the decoupled learning rate, and as
    no matrix for Muon and its like."""
    keeps_mamba_from_muon: bool
    """The input projection of Mamba layers is no matrix for Muon."""


@dataclass(frozen=True, slots=True)
class Change:
    """One row: since when, and by which sign."""

    rule: str
    since: str
    """Megatron-Core version."""
    sign: str
    """An argument that appeared within days of the change."""
    source: str
    """Where Megatron does it."""
    is_of_buffers: bool = False
    """It changes nothing but where parameters lie in flat buffers."""
    is_of_instances: bool = False
    """It changes nothing where there is one optimizer instance."""


CHANGES = (
    Change(
        "aligns_parameters", "0.8", "deterministic_mode",
        "param_and_grad_buffer.py: _pad_start_of_param_if_needed",
        is_of_buffers=True,
    ),
    Change(
        "pads_shared_embedding", "0.9", "align_param_gather",
        "param_and_grad_buffer.py: param_start_index % self.data_parallel_world_size != 0",
        is_of_buffers=True,
    ),
    Change(
        "closes_bucket_cleanly", "0.13", "symmetric_ar_type",
        "param_and_grad_buffer.py: _update_bucket_metadata(param_start_index)",
        is_of_buffers=True,
    ),
    Change(
        "counts_cp_in_default_bucket", "0.12", "ddp_num_buckets",
        "training.py, get_model: get_data_parallel_world_size(with_context_parallel=True)",
        is_of_buffers=True,
    ),
    Change(
        "pads_for_all_instances", "0.18", "null_tokenizer_eod_id",
        "training.py: get_data_parallel_world_size(with_context_parallel=True) for the layout",
        is_of_buffers=True, is_of_instances=True,
    ),
    Change(
        "pads_for_one_instance", "0.19", "gtp_weight_remat_size",
        "training.py, wrap_model_chunks_with_ddp: intra_dp_cp_group",
        is_of_buffers=True, is_of_instances=True,
    ),
    Change(
        "separates_experts_by_tp", "0.19", "gtp_weight_remat_size",
        "tensor_parallel/layers.py: use_expert_pgs",
    ),
    Change(
        "keeps_all_groups", "0.14", "embedding_init_method_std",
        "optimizer/__init__.py: gathered_params_key",
    ),
    Change(
        "mtp_may_stand_alone", "0.16", "mtp_standalone",
        "transformer_block.py: has_final_layernorm_in_this_stage",
    ),
    Change(
        "marks_mtp_embedding", "0.18", "use_layer_wise_param_layout",
        "language_module.py: is_embedding_or_output_parameter with mtp_process",
    ),
    Change(
        "keeps_mamba_from_muon", "0.20", "muon_use_syrk", "mamba_mixer.py: use_muon"
    ),
)  # fmt: skip


def _guess(argument_names: Collection[str]) -> dict[str, bool]:
    """The rules in force as the signs say."""
    return {change.rule: change.sign in argument_names for change in CHANGES}


def candidates(
    argument_names: Collection[str], *, has_buffers: bool = True, has_instances: bool = True
) -> Iterator[Rules]:
    """The rules to try, the likeliest first: as the signs say, then with more and more doubt; about
    flat buffers, and several optimizer instances, only where there are any."""
    guess = _guess(argument_names)
    open_rules = [
        change.rule
        for change in CHANGES
        if (has_buffers or not change.is_of_buffers)
        and (has_instances or not change.is_of_instances)
    ]
    for doubted in range(len(open_rules) + 1):
        for rows in itertools.combinations(open_rules, doubted):
            yield Rules(**{rule: now != (rule in rows) for rule, now in guess.items()})


def placing(argument_names: Collection[str]) -> Iterator[Rules]:
    """The rules to try where nothing but the placement of layers matters, the likeliest first."""
    rules = Rules(**_guess(argument_names))
    yield rules
    yield replace(rules, mtp_may_stand_alone=not rules.mtp_may_stand_alone)


def doubted(rules: Rules, argument_names: Collection[str]) -> list[str]:
    """The rules that are not in force, or not out of it, as the signs say."""
    guess = _guess(argument_names)
    return [rule for rule, is_told in guess.items() if getattr(rules, rule) != is_told]


def era(rules: Rules) -> str:
    """The versions of Megatron-Core whose rules these are, in words."""
    known = [change for change in CHANGES if getattr(rules, change.rule)]
    unknown = [change for change in CHANGES if not getattr(rules, change.rule)]
    since = max((change.since for change in known), key=_in_numbers, default=None)
    before = min((change.since for change in unknown), key=_in_numbers, default=None)
    if since is None:
        return f"Megatron-Core before {before}"
    if before is None:
        return f"Megatron-Core {since} or later"
    if _in_numbers(before) <= _in_numbers(since):
        return f"Megatron-Core with changes of {since}, but without one of {before}"
    return f"Megatron-Core {since} or later, before {before}"


def _in_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
