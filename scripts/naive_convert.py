#!/usr/bin/env python3
"""The obvious converter, to compare with: torch.load a family of rank files, rename, slice, save.

Right for the checkpoints that benchmark.py makes, and for no others: evenly placed layers, whose
buffers have no holes. It holds one family of ranks in memory.
"""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from benchmarking.arguments import register_enums

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_STATES = ("param", "exp_avg", "exp_avg_sq")
_KEY = (torch.bfloat16, torch.float32)
_PADDING = 128

Named = dict[str, Any]


def _is_parameter(name: str, value: Any) -> bool:
    return value is not None and not name.endswith("expert_bias")


def _is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def _with_layer(name: str, shift: int) -> str:
    return _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + shift}.", name)


def _buffer_names(chunk: Named, *, of_experts: bool) -> list[str]:
    """The parameters of a flat buffer in the order of their bytes."""
    names = [name for name, value in chunk.items() if _is_parameter(name, value)]
    return [name for name in reversed(names) if _is_expert(name) == of_experts]


def _load_family(folders: list[Path]) -> tuple[list[Any], list[Any], Named, dict[str, Named]]:
    """Both files of each rank, then weights and optimizer states of all by global name."""
    models, optimizers = [], []
    weights: Named = {}
    states: dict[str, Named] = {name: {} for name in _STATES}
    for stage, folder in enumerate(folders):
        model = torch.load(folder / "model_optim_rng.pt", weights_only=False)
        optimizer = torch.load(folder / "distrib_optim.pt", weights_only=False)
        shift = stage * model["args"].num_layers // len(folders)
        for part, entry in enumerate(optimizer):
            position = 0
            for name in _buffer_names(model["model"], of_experts=bool(part)) if entry else ():
                end = position + model["model"][name].numel()
                for state in _STATES:
                    flat = entry[0][_KEY][state]
                    states[state][_with_layer(name, shift)] = flat[position:end]
                position = end
        weights |= {_with_layer(name, shift): value for name, value in model.pop("model").items()}
        models.append(model)
        optimizers.append(optimizer)
    return models, optimizers, weights, states


def _chunk(weights: Named, layers: range, *, is_first: bool, is_last: bool) -> Named:
    """A chunk's state dict by local names, its parameters in flat buffers as Megatron has them."""
    chosen = {}
    for name, value in weights.items():
        match = _LAYER.match(name)
        at_end = is_first if name.startswith("embedding.") else is_last
        if int(match[1]) in layers if match else at_end:
            chosen[name] = value
    chunk = OrderedDict((_with_layer(name, -layers.start), v) for name, v in chosen.items())
    for of_experts in (False, True):
        names = _buffer_names(chunk, of_experts=of_experts)
        size = sum(chunk[name].numel() for name in names)
        buffer = torch.zeros(-(-size // _PADDING) * _PADDING, dtype=torch.bfloat16)
        position = 0
        for name in names:
            view = buffer[position : position + chunk[name].numel()].view(chunk[name].shape)
            position += view.numel()
            chunk[name] = view.copy_(chunk[name])
    return chunk


def _optimizer(chunks: list[Named], starts: list[int], states: dict[str, Named], old: Any) -> Any:
    """The new root of distrib_optim.pt."""
    made: list[Any] = []
    for part, entry in enumerate(old):
        if entry is None:
            made.append(None)
            continue
        buffers: dict[Any, Any] = {"buckets_coalesced": True}
        for chunk, start in zip(chunks, starts, strict=True):
            names = [_with_layer(n, start) for n in _buffer_names(chunk, of_experts=bool(part))]
            if names:
                flat = {s: torch.cat([states[s][name] for name in names]) for s in _STATES}
                numel = flat["param"].numel()
                buffers[len(buffers) - 1] = {_KEY: {**flat, "numel_unpadded": numel}}
        made.append(buffers)
    return made


def _convert_family(folders: list[Path], target: Path, vp_size: int) -> None:
    models, optimizers, weights, states = _load_family(folders)
    num_layers = models[0]["args"].num_layers
    count = num_layers // (len(folders) * vp_size)
    for stage, folder in enumerate(folders):
        starts = [(v * len(folders) + stage) * count for v in range(vp_size)]
        chunks = [
            _chunk(
                weights,
                range(start, start + count),
                is_first=start == 0,
                is_last=start + count == num_layers,
            )
            for start in starts
        ]
        root: Named = {}
        for key, value in models[stage].items():
            if key == "optimizer":  # the model stands before it
                root |= {f"model{v}": chunk for v, chunk in enumerate(chunks)}
            root[key] = value
        args = root["args"]
        args.virtual_pipeline_model_parallel_size = vp_size
        args.num_layers_per_virtual_pipeline_stage = count
        args.overlap_p2p_comm = args.align_param_gather = True
        (target / folder.name).mkdir(parents=True)
        torch.save(root, target / folder.name / "model_optim_rng.pt")
        optimizer = _optimizer(chunks, starts, states, optimizers[stage])
        torch.save(optimizer, target / folder.name / "distrib_optim.pt")


def convert(source: Path, target: Path, vp_size: int) -> None:
    """Convert one family of ranks after the other."""
    families: dict[str, list[Path]] = {}
    for folder in sorted(source.iterdir()):
        families.setdefault(folder.name.rpartition("_")[2], []).append(folder)
    for folders in families.values():
        _convert_family(folders, target, vp_size)


def differences(left: Any, right: Any, where: str) -> list[str]:
    """Where two loaded files differ in structure, values or bytes of tensors."""
    if isinstance(left, argparse.Namespace):
        left, right = vars(left), vars(right)
    if isinstance(left, torch.Tensor):
        return [] if left.dtype == right.dtype and torch.equal(left, right) else [where]
    if isinstance(left, (dict, list, tuple)) and type(left) is type(right):
        if len(left) != len(right) or (isinstance(left, dict) and list(left) != list(right)):
            return [f"{where}: other keys"]
        keys = left if isinstance(left, dict) else range(len(left))
        return [
            text for key in keys for text in differences(left[key], right[key], f"{where}.{key}")
        ]
    return [] if str(left) == str(right) else [f"{where}: {left} and {right}"]


def compare(left: Path, right: Path) -> list[str]:
    """Where two checkpoints differ."""
    found = []
    for path in sorted(left.glob("*/*.pt")):
        name = path.relative_to(left)
        one, other = (torch.load(p, weights_only=False) for p in (path, right / name))
        found += differences(one, other, str(name))
    return found


def main() -> None:
    """Convert, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--vp-size", type=int, default=2)
    parser.add_argument("--compare", action="store_true", help="compare the two instead")
    given = parser.parse_args()
    register_enums()
    if not given.compare:
        convert(given.source, given.target, given.vp_size)
        return
    found = compare(given.source, given.target)
    if found:
        raise SystemExit("\n".join(found[:20]))
    print("equal")


if __name__ == "__main__":
    main()
