"""The acceptance test of the tool that this project makes anew, with this project's program.

Microsoft's fork of Megatron-LM (microsoft/ltp-megatron-lm, branch limou/vpp_converter) has it as
``tests/unit_tests/test_convert_checkpoint.py``: eight processes of torchrun save a model, the first
one starts the converter, and all load what it wrote with two virtual stages and compare every
value. Run it before a release, with a work tree of that branch as ``ltp-limou`` in a folder::

    MEGATRON_TREES=that/folder python -m tests.seed_acceptance

The test is read from the work tree. What needs a GPU or Transformer Engine is replaced.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import types
from pathlib import Path

PROCESSES = 8
TREE = "ltp-limou"
_TEST = "tests/unit_tests/test_convert_checkpoint.py"
_PASSED = "this process has passed"
_REPLACED = (
    # Transformer Engine's layers, and its norms in bf16.
    ('"transformer_engine"\n', '"local"\n'),
    ('args.normalization = "RMSNorm"', 'args.normalization = "LayerNorm"'),
    # The fork's own converter.
    ('"&& python {}/../../tools/checkpoint/pp_to_vpp/main.py ".format(CURDIR)', "_CONVERTER"),
    ('"export PYTHONPATH={} ".format(os.path.join(CURDIR, "../.."))', '"true "'),
)


def _passes(tree: Path, folder: Path) -> None:
    """Be one of the processes."""
    import tests

    from .training import cpu

    cpu.install()
    import torch

    torch.cuda.device_count = lambda: PROCESSES
    create = torch.nn.LayerNorm.__init__

    def create_in_bf16(self: torch.nn.LayerNorm, *args: object, **named: object) -> None:
        create(self, *args, **{"dtype": torch.bfloat16, **named})  # type: ignore[arg-type]

    torch.nn.LayerNorm.__init__ = create_in_bf16  # type: ignore[method-assign]
    sys.path.insert(0, str(tree))
    tests.__path__.append(str(tree / "tests"))
    cpu.patch_megatron()
    text = (tree / _TEST).read_text()
    for old, new in _REPLACED:
        assert old in text, f"{_TEST} has another text than it had: {old}"
        text = text.replace(old, new)
    test = types.ModuleType("test_convert_checkpoint")
    test.__dict__["__file__"] = str(tree / _TEST)
    test.__dict__["_CONVERTER"] = f"&& {shlex.join([sys.executable, '-m', 'pp_to_vpp'])} "
    exec(compile(text, str(tree / _TEST), "exec"), test.__dict__)
    torch.distributed.init_process_group("gloo")
    test._test_convert_pp_to_vpp_internal(folder)
    sys.stdout.write(f"{_PASSED}\n")
    sys.stdout.flush()
    torch.distributed.barrier()


def main() -> int:
    """Run all, and tell how many have passed; 0 if all have."""
    trees = os.environ.get("MEGATRON_TREES")
    if trees is None or not (Path(trees) / TREE / _TEST).exists():
        sys.stdout.write(f"skipped: MEGATRON_TREES names no folder with {TREE}/{_TEST}\n")
        return 0
    tree = (Path(trees) / TREE).resolve()
    if "RANK" in os.environ:
        _passes(tree, Path(sys.argv[1]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             str(PROCESSES), "-m", "tests.seed_acceptance", folder],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], check=False,
            env={"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1", **os.environ},
        )  # fmt: skip
    passed = done.stdout.count(_PASSED)
    sys.stdout.write(f"{passed} of {PROCESSES} processes have passed\n")
    return 0 if passed == PROCESSES else 1


if __name__ == "__main__":
    sys.exit(main())
