"""Folders of other programs and formats are named, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.source.survey import take_survey

from ..edit import copy_of
from ..pairs import DENSE, pair


def make(folder: Path, *names: str) -> Path:
    """Files, and folders where a name ends in a slash."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["metadata.json"], r"this is a distributed checkpoint .*found metadata.json; Megatron re"),
        (["__0_0.distcp"], r"this is a distributed checkpoint .*no conversion is needed"),
        (["weights/metadata.json", "context/model.yaml"], r"a checkpoint of NeMo 2, .*Bridge"),
        (["context/io.json"], r"this is a checkpoint of NeMo 2"),
        (["dist/common.pt"], r"a folder above a distributed checkpoint .*found dist/common.pt;"),
        (["iter_0000010_0_local.pt"], r"of a local, non-persistent checkpoint .*format torch$"),
        (["model.nemo"], r"this is a checkpoint of NeMo 1, .*the scripts of NeMo"),
        (["tp_rank_00_pp_rank_000/model_weights.ckpt"], "this is a checkpoint of NeMo 1"),
        (["mp_rank_00/step=7-last.ckpt"], "this is a checkpoint of NeMo 1"),
        (["mp_rank_00_000/model_weights.ckpt"], "this is a checkpoint of NeMo 1"),
        (["latest", "global_step10/"], r"checkpoint of DeepSpeed, .*found global_step10;"),
        (["mp_rank_00_model_states.pt"], r"a checkpoint of DeepSpeed, .*universal checkpoints"),
        (["model-00001-of-00002.safetensors"], r"this is a Hugging Face model, .*Megatron-Bridge$"),
        (["config.json", "pytorch_model.bin"], "this is a Hugging Face model"),
        (["model_optim_rng.pt"], r"this is one rank folder, .*; give its parent, /.*"),
        (["distrib_optim.pt"], "this is one rank folder"),
        (["iter_0000007/", "iter_0000009_0_local.pt"], "root, and .* as iter_0000007$"),
        (["notes"], r"it holds no rank folders, .*found notes; use an iteration folder"),
    ],
)  # fmt: skip
def test_what_is_no_iteration_folder_is_known_by_name(
    names: list[str], line: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=line):
        take_survey(str(make(tmp_path, *names)))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = make(tmp_path, "iter_0000001/mp_rank_00_000/model_optim_rng.pt") / "iter_0000001"
    with pytest.raises(CheckpointError, match=rf"this is a file, .*; give the folder, {path}$"):
        take_survey(str(path / "mp_rank_00_000" / "model_optim_rng.pt"))


@pytest.mark.parametrize("name", ["metadata.json", "common.pt", ".metadata", "__0_1.distcp"])
def test_two_formats_in_one_folder_are_refused(name: str, tmp_path: Path) -> None:
    source = make(copy_of(pair(DENSE).source, tmp_path), name)
    line = f"beside the rank folders, and Megatron would load that one, .*found {name}; move one"
    with pytest.raises(CheckpointError, match=line):
        take_survey(str(source))
