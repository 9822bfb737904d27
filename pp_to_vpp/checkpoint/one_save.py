"""What all rank folders of one save tell alike, and what each may tell for itself.

A folder that was left behind by an older save, or copied from another, is found by what it says of
itself: iteration, consumed samples, sizes, options, optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..container.pickling import digest, is_same
from ..errors import ONE_SAVE, problem, show
from ..megatron.arguments import namespace_values
from ..megatron.naming import AVERAGE, chunk_keys
from ..megatron.param_groups import STEP
from .family import RankFiles
from .optimizer_entries import OPTIMIZER, read_entries
from .reading import rank_root
from .top_level import unknown_values

_OF_ONE_RANK = "rank"
"""What the names of arguments end in that differ from rank to rank (checkpointing.py saves the
namespace of the saving rank): rank, local_rank, and node_rank and their like of launchers."""
_MAX_RANK = 1 << 31
_COUNTS = ("iteration", "num_floating_point_operations_so_far")


def told(root: Mapping[Any, Any], where: str) -> Mapping[str, object]:
    """The numbers and flags that a rank file shares with those of the same save, by its top level.

    Strings and objects among the arguments are left out: paths may differ from host to host.

    Raises:
        CheckpointError: the file has no arguments, or entries that nobody knows.
    """
    found: dict[str, object] = {name: root[name] for name in _COUNTS if name in root}
    found["moving average of the weights"] = bool(chunk_keys(root, AVERAGE))
    for name, value in namespace_values(root.get("args"), where).items():
        is_told = isinstance(value, (bool, int, float, type(None)))
        if is_told and not name.endswith(_OF_ONE_RANK):
            found[f"args.{name}"] = value
    for key, value in unknown_values(root, where).items():
        found[f"entry {key!r}"] = digest(value)
    if OPTIMIZER in root:
        steps = {show(step) for step in _steps(root[OPTIMIZER], where)}
        found["optimizer steps"] = ", ".join(sorted(steps)) or None
    return found


def saver(files: RankFiles) -> int | None:
    """The process that saved a rank folder, by its arguments; None if they do not tell.

    Raises:
        CheckpointError: the file has no arguments, or is no rank file.
    """
    found = namespace_values(rank_root(files).get("args"), files.model.path).get(_OF_ONE_RANK)
    return found if type(found) is int and 0 <= found < _MAX_RANK else None


def _steps(node: Any, where: str) -> Iterator[Any]:
    for entry in read_entries(node, where):
        for group in entry.groups:
            if isinstance(group.get(STEP), (int, float)):
                yield group[STEP]


def differences(files: RankFiles, expected: Mapping[str, object]) -> list[str]:
    """What a rank tells otherwise than the checkpoint's first one (see ``told``), as problems.

    Raises:
        CheckpointError: the file has no arguments, or is no rank file.
    """
    found = told(rank_root(files), files.model.path)
    steps = "optimizer steps"  # a rank without parameters of its own counts none
    if found.get(steps) is None or expected.get(steps) is None:
        found = {name: value for name, value in found.items() if name != steps}
        expected = {name: value for name, value in expected.items() if name != steps}
    odd = [
        name
        for name in dict.fromkeys((*expected, *found))
        if name not in found or name not in expected or not is_same(found[name], expected[name])
    ]
    return [
        problem(
            files.model.path,
            f"its {name} is not that of the checkpoint's first rank: folders of two saves lie here",
            expected=show(expected.get(name)),
            found=show(found.get(name)),
            cure=ONE_SAVE,
        )
        for name in odd[:3]
    ]
