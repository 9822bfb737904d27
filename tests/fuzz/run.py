"""Mutated real files against the whole program: ``python -m tests.fuzz.run --minutes 60``.

Whatever a file holds, the program ends in time, within its memory, with one of its own exit
statuses and without a traceback. Where a mutation does no harm, the target must verify on its own,
its model chunks must hold the very tensors of the source, and what stands beside them (entries,
arguments, kinds of param groups) must be the source's.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from pp_to_vpp.container import pickling
from pp_to_vpp.container.pickling import as_mapping
from pp_to_vpp.container.tensors import as_tensor
from pp_to_vpp.container.torch_file import TorchFile
from pp_to_vpp.errors import ConversionError
from pp_to_vpp.megatron.arguments import FOLLOWING_PLACEMENT
from pp_to_vpp.megatron.naming import all_chunk_keys
from pp_to_vpp.megatron.ranks import MODEL_FILE
from pp_to_vpp.source import files
from tests.fuzz import forked
from tests.fuzz.mutate import mutated
from tests.pairs import (
    BUCKETS,
    DENSE,
    EMPTY_OLD,
    ETP,
    FROZEN,
    FROZEN_PLAIN,
    HYBRID_MOE,
    LAYER_WISE,
    LION,
    MOE,
    PLAIN,
    pair,
)
from tests.runs import Run

PAIRS = {
    BUCKETS: 8, DENSE: 1, PLAIN: 1, MOE: 1, LION: 1, ETP: 1, EMPTY_OLD: 1, LAYER_WISE: 1,
    HYBRID_MOE: 1, FROZEN: 1, FROZEN_PLAIN: 1,
}  # fmt: skip
"""The checkpoints that are mutated, and how often."""
_ALLOWED = (0, 2, 3, 4, 5, 6)
_SECONDS = 20
_MEGABYTES = 2500
_WITH_POOL = 20
"""Every so many inputs real worker processes take part."""
_WRONG = 99
"""Status of a child whose target is not what it should be."""
_MAX_ERRORS = 100_000
"""Characters: more is no refusal for people."""
_MAX_SAVED = 200
_EXCHANGED = 0.03
"""How many inputs are files of another folder, or of the same one of another save."""
_FAILURES = Path(tempfile.gettempdir()) / "pp_to_vpp_fuzz_failures"


@dataclass
class Result:
    """What a series of inputs came to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """Number of inputs."""
        return sum(self.outcomes.values())

    def add(self, other: Result) -> None:
        """Count another series in."""
        self.outcomes += other.outcomes
        self.failures += other.failures

    def __str__(self) -> str:
        counts = ", ".join(f"{name}: {count}" for name, count in sorted(self.outcomes.items()))
        return f"{self.tried} inputs ({counts}), {len(self.failures)} failures"


class Bench:
    """Copies of the real checkpoints, one file of which is replaced at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = folder / "target" / "iter_0000001"
        self._decoded: dict[Path, TorchFile] = {}
        self._words: dict[Path, bytes] = {}
        """What the checkpoints held before they were mutated."""

    def source(self, name: str) -> Path:
        """The copy of a checkpoint."""
        path = self.folder / name / "iter_0000001"
        if not path.exists():
            shutil.copytree(pair(name).source, path)
            self._decoded |= {file: files.read_torch_file(file) for file in path.glob("*/*.pt")}
            self._words[path] = optimizer_words(path)
            gc.collect()
            gc.freeze()  # children share these pages
        return path

    def try_file(self, name: str, file: str, content: bytes, workers: int = 1) -> Run:
        """Convert a checkpoint with other content in one of its files."""
        source = self.source(name)
        path = source / file
        path.write_bytes(content)
        try:
            return forked.run(
                lambda: self._convert(source, path, workers),
                self.folder,
                seconds=_SECONDS,
                megabytes=_MEGABYTES,
            )
        finally:
            shutil.copyfile(pair(name).source / file, path)
            shutil.rmtree(self.target.parent, ignore_errors=True)

    def _convert(self, source: Path, changed: Path, workers: int) -> int:
        """Convert and, if that works, prove it; in the child, which decodes only what changed."""
        del self._decoded[changed]
        read = files.read_torch_file
        files.read_torch_file = lambda path: self._decoded.get(path) or read(path)
        folders = ("--load-iteration-dir", source, "--save-iteration-dir", self.target)
        depth = "none" if workers == 1 else "structure"
        wanted = ("--target-virtual-pipeline-model-parallel-size", "2", "--verify", depth)
        status = forked.program(*folders, *wanted, workers=workers)
        if status != 0:
            return status
        status = forked.program(*folders)  # what a conversion with verification would have said
        if status:
            return status
        is_right = tensors(source) == tensors(self.target)
        if (words := optimizer_words(source)) == self._words[source]:  # else padding may be lost
            is_right &= words == optimizer_words(self.target)
        return 0 if is_right and not lost_beside(source, self.target) else _WRONG


def tensors(iteration: Path) -> Counter[tuple[str, tuple[int, ...], str]]:
    """Every tensor of the chunks and their averages, by dtype, shape and bytes, wherever it is."""
    found: Counter[tuple[str, tuple[int, ...], str]] = Counter()
    for path in sorted(iteration.glob("*/model_optim_rng.pt")):
        data = path.read_bytes()
        root = as_mapping(files.read_torch_file(path).root) or {}
        for key in all_chunk_keys(root):
            for value in (as_mapping(root[key]) or {}).values():
                tensor = as_tensor(value)
                if tensor is None:
                    continue
                start, length = tensor.extent.offset, tensor.extent.length
                digest = hashlib.sha256(data[start : start + length])
                found[tensor.dtype, tensor.shape, digest.hexdigest()] += 1
    return found


def optimizer_words(iteration: Path) -> bytes:
    """A digest of all 32-bit words in the optimizer's own files that are not zero, in order of
    size: whatever moves, none comes, goes or changes."""
    found = [np.zeros(0, np.uint32)]
    for path in sorted(iteration.glob("*/*.pt")):
        if path.name == MODEL_FILE:
            continue
        data = np.fromfile(path, np.uint8)
        for record in files.read_torch_file(path).records.values():
            if record.name.startswith("data/"):
                end = record.offset + record.length // 4 * 4
                found.append(data[record.offset : end].view(np.uint32))
    words = np.concatenate(found)
    return hashlib.sha256(np.sort(words[words != 0]).tobytes()).digest()


def lost_beside(source: Path, target: Path) -> list[str]:
    """What stands beside the tensors and is not the source's, told without any rule: entries of
    each rank, its arguments, and the kinds of param groups that all ranks have together."""
    found = []
    kinds: tuple[set[str], set[str]] = (set(), set())
    for path in sorted(source.glob("*/model_optim_rng.pt")):
        folder = path.parent.name
        ours, theirs = (
            as_mapping(files.read_torch_file(side / folder / path.name).root) or {}
            for side in (source, target)
        )
        for root, own in zip((ours, theirs), kinds, strict=True):
            own |= {_frozen(_without_counts(group)) for group in _groups_of(root)}
        left, right = _beside(ours), _beside(theirs)
        found += [
            f"{folder}: {name}"
            for name in {*left, *right}
            if name.removeprefix("args.") not in FOLLOWING_PLACEMENT
            and _frozen(left.get(name)) != _frozen(right.get(name))
        ]
    return found + [f"param group {kind}" for kind in kinds[0] ^ kinds[1]]


def _beside(root: dict[Any, Any]) -> dict[str, Any]:
    moved = {*all_chunk_keys(root), "args", "optimizer"}
    entries = {str(key): value for key, value in root.items() if key not in moved}
    return entries | {f"args.{name}": value for name, value in root["args"].state.items()}


def _groups_of(root: dict[Any, Any]) -> list[dict[str, Any]]:
    node = root.get("optimizer", [])
    entries = node if isinstance(node, list) else [node]
    inner = [entry.get("optimizer", entry) for entry in entries]
    return [group for entry in inner for group in entry.get("param_groups", ())]


def _without_counts(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("step", "params")}


def _frozen(value: Any) -> str:
    return hashlib.sha256(pickling.dump(value)[0]).hexdigest()


def outcome(run: Run) -> tuple[str, bool]:
    """A word for what happened, and whether that may be."""
    if run.status == forked.LATE:
        return "late", False
    if "Traceback" in run.errors:
        return "traceback", False
    if run.status == _WRONG:
        return "wrong target", False
    if run.status not in _ALLOWED:
        return f"status {run.status}", False
    lines = [line for line in run.errors.splitlines() if line.startswith("pp_to_vpp: error: ")]
    if run.status != 0 and not lines:
        return "refused without a word", False
    if len(run.errors) > _MAX_ERRORS:
        return "endless refusal", False
    return f"status {run.status}", True


def files_of(name: str) -> list[str]:
    """The files of a checkpoint, relative to its folder."""
    source = pair(name).source
    return sorted(str(path.relative_to(source)) for path in source.glob("*/*.pt"))


def make_input(seed: int, index: int) -> tuple[str, str, bytes]:
    """Checkpoint, file and mutated content of an input."""
    random = Random(f"{seed}/{index}")
    (name,) = random.choices(list(PAIRS), list(PAIRS.values()))
    file = random.choice(files_of(name))
    if random.random() < _EXCHANGED:
        side = random.choice((pair(name).source, pair(name).truth))
        others = sorted(side.glob(f"*/{Path(file).name}"))
        return name, file, random.choice(others).read_bytes()
    return name, file, mutated((pair(name).source / file).read_bytes(), random)


def fuzz(
    seed: int,
    failures: Path,
    *,
    first: int = 0,
    step: int = 1,
    seconds: float = math.inf,
    inputs: float = math.inf,
    tell: Callable[[str], object] = lambda _: None,
) -> Result:
    """Try inputs first, first + step, ... until time or number is reached; failures are saved."""
    result = Result()
    began = told = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pp_to_vpp_fuzz_", dir=_fast_folder()) as folder:
        bench = Bench(Path(folder))
        index = first
        while time.monotonic() - began < seconds and result.tried < inputs:
            name, file, content = make_input(seed, index)
            workers = 1 if index % _WITH_POOL else 2
            run = bench.try_file(name, file, content, workers)
            word, is_fine = outcome(run)
            result.outcomes[word] += 1
            if not is_fine:
                path = failures / _file_name(name, file, seed, index)
                if len(result.failures) < _MAX_SAVED:
                    _save(path, content, f"{word}\n{run.errors[-5000:]}")
                result.failures.append(f"{word}: {path}")
                tell(result.failures[-1])
            if time.monotonic() - told > 60:
                told = time.monotonic()
                tell(f"{result}, {(told - began) / 60:.1f} minutes")
            index += step
    return result


def _save(path: Path, content: bytes, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.with_suffix(".txt").write_text(text)


def _fast_folder() -> str | None:
    """A folder in memory, where there is one with room."""
    memory = "/dev/shm"
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30:
        return memory
    return None


def _file_name(name: str, file: str, seed: int, index: int) -> str:
    """Tells all that a replay must know."""
    return f"{seed}-{index}~{name}~{file.replace('/', '~')}"


def replay(path: Path) -> Run:
    """Try a saved input again."""
    _, name, rank, file = path.name.split("~")
    with tempfile.TemporaryDirectory(prefix="pp_to_vpp_fuzz_", dir=_fast_folder()) as folder:
        return Bench(Path(folder)).try_file(name, f"{rank}/{file}", path.read_bytes())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _job(seed: int, failures: Path, first: int, step: int, seconds: float) -> Result:
    return fuzz(seed, failures, first=first, step=step, seconds=seconds, tell=_say)


def main() -> int:
    """The command line; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=None, help="of the inputs [default: the time]")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--failures", type=Path, default=_FAILURES, metavar="DIR")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="try a saved input again")
    given = parser.parse_args()
    if given.replay is not None:
        try:
            run = replay(given.replay)
        except ConversionError as error:
            parser.error(str(error))
        _say(f"{run.errors}{outcome(run)[0]}")
        return 0 if outcome(run)[1] else 1
    seed = int(time.time()) if given.seed is None else given.seed
    failures = given.failures.absolute()
    total = Result()
    began = time.monotonic()
    jobs = [(seed, failures, n, given.workers, given.minutes * 60) for n in range(given.workers)]
    if given.workers == 1:
        total.add(_job(*jobs[0]))
    else:
        with ProcessPoolExecutor(given.workers) as pool:
            for part in pool.map(_job, *zip(*jobs, strict=True)):
                total.add(part)
    _say(f"seed {seed}: {total}, {(time.monotonic() - began) / 60:.1f} minutes")
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
