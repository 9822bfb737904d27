"""Is a converted iteration folder what Megatron itself saved for the same logical state?

Compared with the truth: rank folders and files; model chunks with the order of their keys, dtypes,
shapes, every byte, and ``_metadata``; all of ``distrib_optim.pt``; the optimizer's param groups;
arguments that the pipeline layout decides. Compared with the source: everything else, since
another run draws other random numbers. Storages and the bytes of pickles are not compared.
"""

from __future__ import annotations

import functools
import io
import pickle
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODEL_FILE, OPTIMIZER_FILE = "model_optim_rng.pt", "distrib_optim.pt"
_LAYOUT_ARGUMENTS = (
    "virtual_pipeline_model_parallel_size",
    "pipeline_model_parallel_layout",
    "hybrid_layer_pattern",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "decoder_first_pipeline_num_layers_split",
    "decoder_last_pipeline_num_layers_split",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "overlap_p2p_comm",
    "align_param_gather",
    "overlap_param_gather_with_optimizer_step",
)
_CHUNK_ARGUMENTS = (
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
)
"""Three ways to ask for virtual stages, of which a run gives one."""
_IMPORTABLE = frozenset(
    [
        "_codecs",
        "_io",
        "argparse",
        "builtins",
        "collections",
        "copyreg",
        "numpy",
        "pathlib",
        "signal",
        "torch",
        "types",
    ]
)


def differences(converted: Path, truth: Path, source: Path) -> list[str]:
    """What differs, in words; nothing if the checkpoints are equal.

    Args:
        converted: the iteration folder in question.
        truth: an iteration folder of the same state and layout.
        source: the iteration folder that ``converted`` was made of.
    """
    found = list(_compare_names(_rank_folders(converted), _rank_folders(truth), "rank folders"))
    for rank in _rank_folders(truth):
        if (converted / rank).is_dir():
            found += _compare_ranks(converted / rank, truth / rank, source / rank)
    return found


def differences_of_sizes(converted: Path, truth: Path, source: Path) -> list[str]:
    """The same where source and target have other numbers of pipeline or data-parallel ranks: all
    is compared with the truth, but for what no file tells: random states must be those of some
    folder of the source."""
    found = list(_compare_names(_rank_folders(converted), _rank_folders(truth), "rank folders"))
    known = [load(source / rank / MODEL_FILE).get("rng_state") for rank in _rank_folders(source)]
    for rank in (rank for rank in _rank_folders(truth) if (converted / rank).is_dir()):
        sides = converted / rank, truth / rank
        names = [sorted(path.name for path in folder.glob("*.pt")) for folder in sides]
        found += _compare_names(names[0], names[1], f"files of {rank}")
        for name in (name for name in names[0] if name in names[1]):
            both = [load(folder / name) for folder in sides]
            if name == MODEL_FILE:
                own, _ = (root.pop("rng_state", None) for root in both)
                if all(list(_compare(own, other, "")) for other in known):
                    found.append(f"{rank}: random states of no folder of the source")
                for root in both:
                    root["args"] = _known_arguments(root["args"])
                for key in (key for key in both[0] if key.startswith("model") and key in both[1]):
                    one, other = (list(getattr(r[key], "_metadata", {}).items()) for r in both)
                    found += _compare(one, other, f"{rank}/{key}._metadata")
            found += _compare(both[0], both[1], f"{rank}/{name}")
    return found


def _known_arguments(args: Any) -> dict[str, Any]:
    """Those that files tell: not where in a node a rank was, nor paths of its harness."""
    unknown = ("local_rank", "save", "load", "tensorboard_dir")
    return {name: value for name, value in vars(args).items() if name not in unknown}


def load(path: Path) -> Any:
    """A whole ``.pt`` file; objects of classes that are not importable become ``StandIn``."""
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_TOLERANT)


class StandIn:
    """An object of a class that this environment does not have: equal if made of equal parts."""

    def __new__(cls, *arguments: Any) -> StandIn:
        self = super().__new__(cls)
        self.__dict__["parts"] = [arguments]
        return self

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["parts"].append(state)

    def __eq__(self, other: object) -> bool:
        return type(self).__name__ == type(other).__name__ and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class _TolerantUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in _IMPORTABLE:
            return super().find_class(module, name)
        return _stand_in(f"{module}.{name}")


@functools.cache  # a class may be a part of an object: the same in each file
def _stand_in(name: str) -> type[StandIn]:
    return type(name, (StandIn,), {})


_TOLERANT = types.SimpleNamespace(
    Unpickler=_TolerantUnpickler, load=pickle.load, __name__="tolerant pickle"
)


def _rank_folders(iteration: Path) -> list[str]:
    return sorted(path.name for path in iteration.glob("mp_rank_*"))


def _compare_names(got: list[str], want: list[str], what: str) -> Iterator[str]:
    if got != want:
        extra = [name for name in got if name not in want]
        missing = [name for name in want if name not in got]
        yield (
            f"{what}: {extra} too many, {missing} missing"
            if extra or missing
            else (f"{what}: order {got[:4]} instead of {want[:4]}")
        )


def _compare_ranks(got: Path, want: Path, source: Path) -> Iterator[str]:
    names = [sorted(path.name for path in folder.glob("*.pt")) for folder in (got, want)]
    yield from _compare_names(names[0], names[1], f"files of {got.name}")
    if MODEL_FILE in names[0]:
        yield from _compare_model_files(
            load(got / MODEL_FILE), load(want / MODEL_FILE), load(source / MODEL_FILE), got.name
        )
    for name in names[0]:
        if name != MODEL_FILE and name in names[1]:
            yield from _compare(load(got / name), load(want / name), f"{got.name}/{name}")


def _compare_model_files(
    got: dict[str, Any], want: dict[str, Any], source: dict[str, Any], where: str
) -> Iterator[str]:
    yield from _compare_names(list(got), list(want), f"{where}: entries")
    for key in got.keys() & want.keys():
        if key == "args":
            yield from _compare_arguments(
                vars(got[key]), vars(want[key]), vars(source[key]), f"{where}/{key}"
            )
        elif key.startswith(("model", "ema_model")):
            yield from _compare(got[key], want[key], f"{where}/{key}")
            yield from _compare(
                list(getattr(got[key], "_metadata", {}).items()),
                list(getattr(want[key], "_metadata", {}).items()),
                f"{where}/{key}._metadata",
            )
        elif key == "optimizer":
            yield from _compare(got[key], want[key], f"{where}/{key}")
        else:
            yield from _compare(got[key], source[key], f"{where}/{key} against the source")


def _compare_arguments(
    got: dict[str, Any], want: dict[str, Any], source: dict[str, Any], where: str
) -> Iterator[str]:
    for name in _LAYOUT_ARGUMENTS:
        yield from _compare(got.get(name), want.get(name), f"{where}.{name}")
    given, wanted = (
        sum(side.get(name) is not None for name in _CHUNK_ARGUMENTS) for side in (got, want)
    )
    yield from _compare(given, wanted, f"{where}: arguments that ask for virtual stages")
    yield from _compare_names(list(got), list(source), f"{where} against the source")
    for name in source.keys() & got.keys() - {*_LAYOUT_ARGUMENTS, *_CHUNK_ARGUMENTS}:
        yield from _compare(got[name], source[name], f"{where}.{name} against the source")


def _compare(got: Any, want: Any, where: str) -> Iterator[str]:
    """Compare values of any kind, and what is in them."""
    if type(got).__name__ != type(want).__name__:
        yield f"{where}: {type(got).__name__} instead of {type(want).__name__}"
    elif isinstance(got, torch.Tensor):
        yield from _compare_tensors(got, want, where)
    elif isinstance(got, Mapping):
        yield from _compare_names(list(got), list(want), f"{where}: keys")
        for key in got:
            if key in want:
                yield from _compare(got[key], want[key], f"{where}/{key}")
    elif isinstance(got, (list, tuple)):
        if len(got) != len(want):
            yield f"{where}: {len(got)} items instead of {len(want)}"
        for index, (one, other) in enumerate(zip(got, want, strict=False)):
            yield from _compare(one, other, f"{where}[{index}]")
    elif not _are_equal(got, want):
        yield f"{where}: {got!r:.100} instead of {want!r:.100}"


def _are_equal(got: Any, want: Any) -> bool:
    if isinstance(got, io.BytesIO):
        return bool(got.getvalue() == want.getvalue())
    if isinstance(got, np.ndarray):
        return bool(got.dtype == want.dtype and np.array_equal(got, want))
    return bool(got == want)


def _compare_tensors(got: torch.Tensor, want: torch.Tensor, where: str) -> Iterator[str]:
    if got.dtype != want.dtype or got.shape != want.shape:
        yield f"{where}: {got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
        return
    one, other = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (got, want))
    if not torch.equal(one, other):
        yield f"{where}: {int((one != other).sum())} of {one.numel()} bytes differ"
