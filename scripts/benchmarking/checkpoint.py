"""Checkpoints in Megatron's structure, of any size, made with little memory.

``torch.save`` lays out each file from tensors without data: one storage for each flat buffer of
16-bit weights, flat fp32 tensors in ``distrib_optim.pt``. The bytes are filled in afterwards, block
by block, with their CRC-32; or left out, which makes sparse files of any apparent size.
"""

from __future__ import annotations

import collections
import itertools
import os
import random
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import layer_wise
from .arguments import register_enums, saved_arguments
from .model import (
    ADAM_BYTES,
    ALIGNMENT,
    DEEPSEEK_V3,
    LAYER_WISE_BYTES,
    Entry,
    Kind,
    Model,
    Stage,
    buffer_places,
    even_stages,
    model_of_size,
)

ITERATION = "iter_0000010"
PP_SIZE, EP_SIZE = 4, 2
V3_PP_SIZE, V3_EP_SIZE = 16, 64
V3_SOURCE_LAYOUT = "Et*3|(tttt|)*14ttmL"
V3_TARGET_LAYOUT = "Et*3|(tt|)*29m|L"
_RNG_BYTES = 5056
_BLOCK_ITEMS = 1_000_003
"""Elements of random data, repeated; no multiple of it is a layer, so no two layers are alike."""
_CRC_OFFSET, _ENTRY_BYTES = 16, 46


@dataclass(frozen=True, slots=True)
class Plan:
    """A checkpoint to be made."""

    model: Model
    stages: tuple[Stage, ...]
    ep_size: int
    is_layer_wise: bool
    """With a layer-wise Muon instead of the distributed Adam."""
    changes: dict[str, Any]
    """Arguments that differ from those in ``arguments.json``."""

    @property
    def has_experts(self) -> list[bool]:
        """Whether each stage has layers with experts."""
        dense = self.model.dense_layers
        return [stage.has_mtp or stage.layers.stop > dense for stage in self.stages]


def _plan(
    model: Model, stages: list[Stage], ep_size: int, layout: str | None, *, is_layer_wise: bool
) -> Plan:
    changes = {
        "pipeline_model_parallel_size": len(stages),
        "transformer_pipeline_model_parallel_size": len(stages),
        "pipeline_model_parallel_layout": layout,
        "expert_model_parallel_size": ep_size,
        "data_parallel_size": ep_size,
        "world_size": len(stages) * ep_size,
        "num_layers": model.layers,
        "encoder_num_layers": model.layers,
        "mtp_num_layers": model.mtp_layers or None,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_experts": model.experts,
        "moe_layer_freq": [int(layer >= model.dense_layers) for layer in range(model.layers)],
        "padded_vocab_size": model.vocabulary,
        "use_cpu_initialization": False,
        "overlap_grad_reduce": not is_layer_wise,
        "overlap_param_gather": not is_layer_wise,
        "use_distributed_optimizer": not is_layer_wise,
        "optimizer": "dist_muon" if is_layer_wise else "adam",
        "distributed_backend": "nccl",
        "iteration": 10,
    }
    return Plan(model, tuple(stages), ep_size, is_layer_wise, changes)


@dataclass(frozen=True, slots=True)
class _Content:
    """What a storage holds: one of the filler's streams, from some element on."""

    stream: str
    start: int = 0


class _Filler:
    """Endless streams of bytes; weights are the fp32 main parameters, rounded."""

    def __init__(self) -> None:
        mains = torch.from_numpy(np.random.default_rng(1).standard_normal(_BLOCK_ITEMS, "f4") / 50)
        blocks = {
            "weight": mains.to(torch.bfloat16).view(torch.int16),
            "param": mains,
            "exp_avg": mains * 0.1,
            "momentum_buffer": mains * 0.3,
            "exp_avg_sq": mains * mains,
            "bytes": mains.view(torch.uint8),
        }
        self._blocks = {
            name: (block.element_size(), memoryview(block.numpy().tobytes()))
            for name, block in blocks.items()
        }

    def stream(self, content: _Content, length: int) -> Iterator[memoryview]:
        """``length`` bytes in pieces."""
        width, block = self._blocks[content.stream]
        position = content.start * width % len(block)
        while length:
            piece = block[position : position + length]
            yield piece
            length -= len(piece)
            position = 0


def _start(stage: int, ep_rank: int, kind: Kind) -> int:
    """Where in the streams a buffer begins; dense ones are alike on all expert ranks."""
    return (stage * 131 + (ep_rank * 2 + 1) * (kind is Kind.EXPERT)) * 8191


def _model_state(
    entries: list[Entry], stage: int, ep_rank: int, *, is_layer_wise: bool
) -> tuple[dict[str, Any], list[_Content]]:
    """A chunk's state dict over flat buffers, or over a storage for each weight; and what the
    storages hold, in order of first use."""
    buffers, places = {}, {}
    for kind in (Kind.DENSE, Kind.EXPERT):
        places[kind], end = buffer_places(entries, kind)
        buffers[kind] = torch.empty(-(-end // ALIGNMENT) * ALIGNMENT, dtype=torch.bfloat16)
    state: dict[str, Any] = collections.OrderedDict()
    contents: list[_Content] = []
    used: set[Kind] = set()
    for entry in entries:
        if entry.kind is Kind.EXTRA:
            state[entry.name] = None
            continue
        if entry.kind is Kind.BIAS:
            state[entry.name] = torch.empty(entry.shape)
            contents.append(_Content("param"))
            continue
        if is_layer_wise:
            state[entry.name] = torch.empty(entry.shape, dtype=torch.bfloat16)
            start = _start(stage, ep_rank, entry.kind) + places[entry.kind][entry.name]
            contents.append(_Content("weight", start))
            continue
        strides = [entry.shape[1], 1] if len(entry.shape) == 2 else [1]
        start = places[entry.kind][entry.name]
        state[entry.name] = torch.as_strided(buffers[entry.kind], entry.shape, strides, start)
        if entry.kind not in used:
            used.add(entry.kind)
            contents.append(_Content("weight", _start(stage, ep_rank, entry.kind)))
    modules = {"": None}
    for name in state:
        parts = name.split(".")[:-1]
        modules |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    versions = collections.OrderedDict((name, {"version": 1}) for name in modules)
    vars(state)["_metadata"] = versions  # as Module.state_dict() sets it
    return state, contents


def _param_group(*, is_expert: bool, has_decay: bool) -> dict[str, Any]:
    return {
        "is_expert_parallel": is_expert, "default_config": True,
        "wd_mult": float(has_decay), "lr_mult": 1.0, "is_decoupled_lr": False,
        "max_lr": 0.001, "min_lr": 0.0001, "lr": 0.001, "bias_correction": True,
        "betas": (0.9, 0.95), "eps": 1e-08, "weight_decay": 0.1 * has_decay, "step": 10,
    }  # fmt: skip


def _distributed_entries(entries: Sequence[Entry]) -> list[Any]:
    """What ``model_optim_rng.pt`` holds of the distributed optimizers: one without a parameter has
    its groups, and has counted no step."""
    kinds = ((False, True), (False, False)), ((True, True),)
    groups = [[_param_group(is_expert=e, has_decay=d) for e, d in part] for part in kinds]
    for kind, own in zip((Kind.DENSE, Kind.EXPERT), groups, strict=True):
        if all(entry.kind is not kind for entry in entries):
            for group in own:
                del group["step"]
    return [{"optimizer": {"param_groups": own}} for own in groups]


def _layer_wise_files(
    plan: Plan, entries: list[Entry], stage: int, ep_rank: int
) -> tuple[list[Any], list[_Content]]:
    """The root of the folder's one layer-wise file, and what its storages hold."""
    is_mtp = plan.stages[stage].has_mtp and not plan.stages[stage].has_embedding
    groups = layer_wise.dealt(entries, plan.ep_size, plan.ep_size, is_mtp_stage=is_mtp)[ep_rank]
    root, tensors = layer_wise.file_root(groups)
    places = {kind: buffer_places(entries, kind)[0] for kind in (Kind.DENSE, Kind.EXPERT)}
    contents = [
        _Content(word, _start(stage, ep_rank, entry.kind) + places[entry.kind][entry.name])
        for word, entry in tensors
    ]
    return root, contents


def _rest(stage: int, ep_rank: int) -> dict[str, Any]:
    """What follows model and optimizer in ``model_optim_rng.pt``."""
    seed = 100 * stage + ep_rank
    trackers = ("data-parallel-rng", "model-parallel-rng", "expert-parallel-rng")
    return {
        "opt_param_scheduler": {
            "max_lr": 0.001, "lr_warmup_steps": 80, "num_steps": 80, "lr_decay_style": "cosine",
            "lr_decay_steps": 8000, "min_lr": 0.0001, "start_wd": 0.1, "end_wd": 0.1,
            "wd_incr_style": "constant", "wd_incr_steps": 80,
        },
        "rng_state": [
            {
                "random_rng_state": random.Random(seed).getstate(),
                "np_rng_state": np.random.RandomState(seed).get_state(),
                "torch_rng_state": torch.empty(_RNG_BYTES, dtype=torch.uint8),
                "cuda_rng_state": torch.empty(_RNG_BYTES, dtype=torch.uint8),
                "rng_tracker_states": {
                    name: torch.empty(_RNG_BYTES, dtype=torch.uint8) for name in trackers
                },
            }
        ],
        "num_floating_point_operations_so_far": 7669432320.0,
    }  # fmt: skip


def _optimizer_state(
    entries: list[Entry], stage: int, ep_rank: int
) -> tuple[list[Any], list[_Content]]:
    """The root of ``distrib_optim.pt``: dense state on the first expert rank only."""
    root: list[Any] = []
    contents: list[_Content] = []
    for kind in (Kind.DENSE, Kind.EXPERT):
        if kind is Kind.DENSE and ep_rank:
            root.append(None)
            continue
        _, numel = buffer_places(entries, kind)
        part: dict[Any, Any] = {"buckets_coalesced": True}
        if numel:
            names = ("param", "exp_avg", "exp_avg_sq")
            tensors: dict[str, Any] = {name: torch.empty(numel) for name in names}
            part[0] = {(torch.bfloat16, torch.float32): {**tensors, "numel_unpadded": numel}}
            contents += [_Content(name, _start(stage, ep_rank, kind)) for name in names]
        root.append(part)
    return root, contents


def _write(path: Path, root: Any, contents: list[_Content], filler: _Filler | None) -> None:
    """Save a graph of tensors without data, then fill in their bytes, unless it is to be sparse."""
    with torch.serialization.skip_data(materialize_fake_tensors=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(root, path)
    if filler is None:
        return
    with path.open("r+b") as file:
        with zipfile.ZipFile(file) as archive:
            records, directory = archive.infolist(), archive.start_dir
        position = directory
        for record in records:
            key = record.filename.partition("/data/")[2]
            if key:
                stream = filler.stream(contents[int(key)], record.file_size)
                crc32 = struct.pack("<L", _fill(file, record, stream))
                file.seek(4, os.SEEK_CUR)  # past the signature of the data descriptor
                file.write(crc32)
                file.seek(position + _CRC_OFFSET)
                file.write(crc32)
            position += _ENTRY_BYTES + len(record.filename) + len(record.extra)
        file.flush()
        os.fsync(file.fileno())


def _fill(file: BinaryIO, record: zipfile.ZipInfo, stream: Iterator[memoryview]) -> int:
    """Write a record's bytes after its local header; their CRC-32."""
    file.seek(record.header_offset + 26)
    name_length, extra_length = struct.unpack("<2H", file.read(4))
    file.seek(name_length + extra_length, os.SEEK_CUR)
    crc32 = 0
    for piece in stream:
        file.write(piece)
        crc32 = zlib.crc32(piece, crc32)
    return crc32


def _make_rank(plan: Plan, folder: Path, stage: int, ep_rank: int, filler: _Filler | None) -> None:
    folder.mkdir()
    entries = list(plan.model.entries(plan.stages[stage], plan.ep_size))
    rank = {"rank": stage * plan.ep_size + ep_rank, "local_rank": ep_rank % 8}
    args = saved_arguments(plan.changes | rank)
    with FakeTensorMode():
        state, contents = _model_state(entries, stage, ep_rank, is_layer_wise=plan.is_layer_wise)
        if plan.is_layer_wise:
            name = f"layer_wise_optimizer_{ep_rank}.pt"
            optimizer, held = _layer_wise_files(plan, entries, stage, ep_rank)
            entry, repeated = optimizer, held
        else:
            name = "distrib_optim.pt"
            optimizer, held = _optimizer_state(entries, stage, ep_rank)
            entry, repeated = _distributed_entries(entries), []
        root = {"args": args, "checkpoint_version": 3.0, "iteration": 10, "model": state}
        root |= {"optimizer": entry, **_rest(stage, ep_rank)}
        random_states = [_Content("bytes", stage * 977 + ep_rank * 101 + k) for k in range(5)]
        contents = [*contents, *repeated, *random_states]
        _write(folder / "model_optim_rng.pt", root, contents, filler)
        _write(folder / name, optimizer, held, filler)


def _folder(iteration: Path, stage: int, ep_rank: int) -> Path:
    return iteration / f"mp_rank_00_{stage:03d}_{ep_rank:03d}"


def make(root: Path, size: int, *, is_layer_wise: bool = False) -> None:
    """Make a checkpoint of about ``size`` bytes, PP 4 and EP 2, in ``root / ITERATION``."""
    register_enums()
    model = model_of_size(size, EP_SIZE, LAYER_WISE_BYTES if is_layer_wise else ADAM_BYTES)
    stages = even_stages(model, PP_SIZE)
    plan = _plan(model, stages, EP_SIZE, None, is_layer_wise=is_layer_wise)
    filler = _Filler()
    (root / ITERATION).mkdir(parents=True)
    for stage in range(PP_SIZE):
        for ep_rank in range(EP_SIZE):
            _make_rank(plan, _folder(root / ITERATION, stage, ep_rank), stage, ep_rank, filler)


def make_deepseek_v3(root: Path, *, is_layer_wise: bool = False) -> None:
    """Make all 1,024 rank folders of a DeepSeek-V3 as sparse files, in ``root / ITERATION``."""
    register_enums()
    bounds = [0, *range(3, 60, 4), 61]
    stages = [
        Stage(range(low, high), has_embedding=low == 0, has_head=high == 61, has_mtp=high == 61)
        for low, high in itertools.pairwise(bounds)
    ]
    plan = _plan(DEEPSEEK_V3, stages, V3_EP_SIZE, V3_SOURCE_LAYOUT, is_layer_wise=is_layer_wise)
    iteration = root / ITERATION
    iteration.mkdir(parents=True)
    for stage in range(V3_PP_SIZE):
        for ep_rank in range(V3_EP_SIZE):
            _make_rank(plan, _folder(iteration, stage, ep_rank), stage, ep_rank, None)


if __name__ == "__main__":
    # In a process of its own: the one that measures must not share torch's memory with others.
    wanted, where, optimizer = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if wanted == "deepseek-v3":
        make_deepseek_v3(where, is_layer_wise=optimizer == "layer-wise")
    else:
        make(where, int(wanted), is_layer_wise=optimizer == "layer-wise")
