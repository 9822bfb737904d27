"""The files of a layer-wise Muon in Megatron's structure, as 0.16 writes them: whole parameters,
dealt out to the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pp_to_vpp.megatron.layer_wise import deal

from .model import Entry, Kind

_GROUPS = (
    {"is_expert_parallel": False, "wd_mult": 1.0, "momentum_beta": 0.95},
    {"is_expert_parallel": True, "wd_mult": 1.0, "momentum_beta": 0.95},
    {"is_expert_parallel": False, "wd_mult": 1.0, "betas": (0.9, 0.95), "eps": 1e-08},
    {"is_expert_parallel": False, "wd_mult": 0.0, "betas": (0.9, 0.95), "eps": 1e-08},
)
"""Matrices, those of experts, embeddings and output layer, vectors."""
_CHAIN = ((0, 1), (2, 3))
"""The groups of each optimizer."""
_STATES = (("momentum_buffer",), ("exp_avg", "exp_avg_sq"))


def _group_of(entry: Entry, *, is_mtp_stage: bool) -> int:
    if entry.kind is Kind.EXPERT:
        return 1
    if len(entry.shape) == 1:
        return 3
    has_rows = entry.name == "output_layer.weight" or (
        entry.name.startswith("embedding.") and not is_mtp_stage
    )
    return 2 if has_rows else 0


def dealt(
    entries: Iterable[Entry], ranks: int, expert_ranks: int, *, is_mtp_stage: bool
) -> list[list[list[Entry]]]:
    """The parameters of each data-parallel rank by param group."""
    groups: list[list[Entry]] = [[] for _ in _GROUPS]
    for entry in entries:
        if entry.kind in (Kind.DENSE, Kind.EXPERT):
            groups[_group_of(entry, is_mtp_stage=is_mtp_stage)].append(entry)
    queue = [(index, entry) for index, group in enumerate(groups) for entry in group]
    sizes = [(entry.numel, entry.kind is Kind.EXPERT) for _, entry in queue]
    found = []
    for kept in deal(sizes, ranks, expert_ranks):
        own: list[list[Entry]] = [[] for _ in _GROUPS]
        for index, entry in (queue[number] for number in kept):
            own[index].append(entry)
        found.append(own)
    return found


def file_root(groups: Sequence[Sequence[Entry]]) -> tuple[list[Any], list[tuple[str, Entry]]]:
    """The content of a file, and what its tensors are, in order: state and parameter."""
    root = []
    tensors: list[tuple[str, Entry]] = []
    for numbers, words in zip(_CHAIN, _STATES, strict=True):
        own = [groups[number] for number in numbers]
        states: dict[int, dict[str, Any]] = {}
        for entry in (entry for group in own for entry in group):
            states[len(states)] = {word: torch.empty(entry.shape) for word in words}
            tensors += ((word, entry) for word in words)
        param_groups, count = [], 0
        for number, group in zip(numbers, own, strict=True):
            step = {"step": 10} if "betas" in _GROUPS[number] and group else {}
            params = list(range(count, count + len(group)))
            common = {"default_config": True, "lr_mult": 1.0, "max_lr": 0.001, "min_lr": 0.0001}
            param_groups.append({**common, **_GROUPS[number], **step, "params": params})
            count += len(group)
        mains = [[torch.empty(entry.shape) for entry in group] for group in own]
        tensors += (("param", entry) for group in own for entry in group)
        inner = {"state": states, "param_groups": param_groups}
        root.append({"optimizer": inner, "fp32_from_fp16_params": mains})
    return root, tensors
