"""What is given in place of a Megatron checkpoint: other formats and programs, known by names."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..errors import FROM_MEGATRON, problem
from ..megatron.ranks import is_rank_file

_WITH_MEGATRON = "load it with Megatron and save it with --ckpt-format torch"


@dataclass(frozen=True, slots=True)
class Foreign:
    """A kind of folder that is none of rank folders."""

    signs: tuple[str, ...]
    """Patterns of what lies in it, each of which tells it."""
    what: str
    cure: str

    def sign_in(self, folder: Path) -> str | None:
        """What tells that a folder is of this kind."""
        with contextlib.suppress(OSError):
            for sign in self.signs:
                for path in folder.glob(sign):
                    return str(path.relative_to(folder))
        return None


DISTRIBUTED = Foreign(
    ("metadata.json", "common.pt", ".metadata", "*.distcp"),
    "a distributed checkpoint (torch_dist, torch_dcp or fsdp_dtensor)",
    "Megatron reshards those by itself when it loads them: no conversion is needed",
)
_KINDS = (
    DISTRIBUTED,
    Foreign(
        ("weights/metadata.json", "weights/.metadata", "weights/*.distcp", "context/io.json"),
        "a checkpoint of NeMo 2, whose weights/ is a distributed one (torch_dist)",
        "load it with NeMo, or import it with Megatron-Bridge: both reshard it by themselves",
    ),
    Foreign(
        ("*/common.pt", "*/.metadata", "*/*.distcp"),
        "a folder above a distributed checkpoint (torch_dist, torch_dcp or fsdp_dtensor)",
        DISTRIBUTED.cure,
    ),
    Foreign(
        ("iter_*_local.pt",),
        "the folder of a local, non-persistent checkpoint (--non-persistent-ckpt-type local)",
        _WITH_MEGATRON,
    ),
    Foreign(
        ("*.nemo", "model_weights.ckpt", "*/model_weights.ckpt", "mp_rank_*/*.ckpt",
         "tp_rank_*_pp_rank_*"),
        "a checkpoint of NeMo 1",
        "convert it with the scripts of NeMo",
    ),
    Foreign(
        ("global_step*", "*_optim_states.pt", "*_model_states.pt", "zero_to_fp32.py", "latest"),
        "a checkpoint of DeepSpeed",
        "convert it with the tools of DeepSpeed (universal checkpoints)",
    ),
    Foreign(
        ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "config.json"),
        "a Hugging Face model",
        "to import one use Megatron-Bridge",
    ),
)  # fmt: skip


def why_foreign(path: Path) -> str | None:
    """The refusal of a folder that is of another kind; None if nothing tells one."""
    for kind in _KINDS:
        sign = kind.sign_in(path)
        if sign is not None:
            return problem(
                path,
                f"this is {kind.what}",
                expected="a Megatron-LM training checkpoint (--ckpt-format torch)",
                found=sign,
                cure=kind.cure,
            )
    return None


def why_no_ranks(path: Path, names: Collection[str]) -> str:
    """The refusal of a folder without rank folders."""
    named = [name for name in names if name.startswith(("iter_", "release"))]
    iterations = [name for name in named if (path / name).is_dir()]
    if any(map(is_rank_file, names)):
        what = "this is one rank folder"
        cure = f"give its parent, {path.absolute().parent}"
    elif iterations:
        what = "this is a checkpoint's root, and no tracker file names its iteration"
        cure = f"give one of its iteration folders, such as {max(iterations)}"
    elif (foreign := why_foreign(path)) is not None:
        return foreign
    else:
        what, cure = "it holds no rank folders", FROM_MEGATRON
    return problem(
        path,
        what,
        expected="folders named mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT_PPP_EEE",
        found=", ".join(list(names)[:5]) or "nothing",
        cure=cure,
    )


def why_no_folder(path: Path) -> str:
    """The refusal of a file that is given in place of a folder."""
    above = path.absolute().parent
    folder = above.parent if is_rank_file(path.name) else above
    return problem(
        path, "this is a file", expected="an iteration folder", cure=f"give the folder, {folder}"
    )
