"""Verification sees every change: bytes, names, sizes, layers; in the target and in the source."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pp_to_vpp.checkpoint.family import Family
from pp_to_vpp.container import archive
from pp_to_vpp.container.pickling import as_mapping

from ..compare import differences
from ..edit import copy_of, flip_byte, float_tensor, rewrite, set_arguments
from ..examples import FACTOR
from ..families import families
from ..pairs import DENSE, LAYER_WISE, LAYER_WISE_WIDE, MOE, PLAIN, SOAP, pair
from ..runs import Program

_NAMES = [MOE, PLAIN, SOAP, LAYER_WISE]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A converted checkpoint of each kind, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            from pp_to_vpp import cli

            case = pair(name)
            made[name] = tmp_path_factory.mktemp(name) / "iter_0000001"
            given = ["--load-iteration-dir", case.source, "--save-iteration-dir", made[name]]
            assert cli.main([*map(str, given), *case.options]) == 0
        return made[name]

    return make


def verify(program: Program, source: Path, target: Path, depth: str = "full") -> Any:
    """Verify an existing pair of folders."""
    return program(
        "--load-iteration-dir", source, "--save-iteration-dir", target, "--verify", depth
    )


@pytest.mark.parametrize("depth", ["structure", "full"])
@pytest.mark.parametrize("name", _NAMES)
def test_a_right_target_passes(
    name: str, depth: str, program: Program, converted: Callable[[str], Path]
) -> None:
    run = verify(program, pair(name).source, converted(name), depth)
    assert run.status == 0, run.errors
    assert f"verified ({depth})" in run.output


@pytest.mark.parametrize("name", _NAMES)
def test_full_verification_while_converting(name: str, program: Program, tmp_path: Path) -> None:
    case = pair(name)
    target = tmp_path / "iter_0000001"
    run = program.convert(case.source, target, case.options, "--verify", "full")
    assert run.status == 0, run.errors
    assert "verified: full" in run.output
    assert differences(target, case.truth, case.source) == []
    folder = sorted(target.glob("mp_rank_*"))[-1]
    shutil.rmtree(folder)  # what is kept is read from both sides, what is missing is copied
    run = program.convert(case.source, target, case.options, "--verify", "full", "--resume")
    assert run.status == 0, run.errors
    assert differences(target, case.truth, case.source) == []


def tensor_bytes(path: Path) -> list[tuple[int, int]]:
    """Offset and length of the tensor records of a file."""
    with path.open("rb") as file:
        _, records = archive.read_records(file)
    return [(r.offset, r.length) for r in records.values() if r.name.startswith("data/")]


@pytest.mark.parametrize("name", _NAMES)
def test_one_flipped_byte_anywhere_is_found(
    name: str, program: Program, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """In tensors, and in what stands around them: headers, padding, the directory."""
    target = copy_of(converted(name), tmp_path)
    chooser = random.Random(name)
    paths = sorted(target.glob("*/*.pt"))
    for _ in range(12 * FACTOR):
        path = chooser.choice(paths)
        offset, length = chooser.choice([*tensor_bytes(path), (0, path.stat().st_size)])
        if length == 0:
            continue
        place = offset + chooser.randrange(length)
        flip_byte(path, place)
        run = verify(program, pair(name).source, target)
        assert run.status == 6, (path, place, run)
        assert str(path) in run.errors
        flip_byte(path, place)
    assert verify(program, pair(name).source, target).status == 0


def chunk(root: dict[str, Any], key: str) -> dict[str, Any]:
    found = as_mapping(root[key])
    assert found is not None
    return found


def swap(root: dict[str, Any]) -> None:
    """Two weights of one size under each other's names."""
    keys = chunk(root, "model0"), chunk(root, "model1")
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    keys[0][name], keys[1][name] = keys[1][name], keys[0][name]


def drop(root: dict[str, Any]) -> None:
    found = chunk(root, "model1")
    for key in [key for key in found if key.startswith("decoder.layers.1.")]:
        del found[key]


def rename(root: dict[str, Any]) -> None:
    found = chunk(root, "model0")
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    items = [(key + "x" if key == name else key, value) for key, value in found.items()]
    found.clear()
    found.update(items)


def other_iteration(root: dict[str, Any]) -> None:
    root["iteration"] = 7


def no_step(root: dict[str, Any]) -> None:
    del root["optimizer"][0]["optimizer"]["param_groups"][1]["step"]


def lost_entry(root: dict[str, Any]) -> None:
    del root["rng_state"]


def shift(root: list[Any]) -> None:
    """A buffer moved by 64 elements, its size kept."""
    from pp_to_vpp.container.extents import Zeros
    from pp_to_vpp.container.pickling import Storage
    from pp_to_vpp.container.tensors import as_tensor

    ((_, states),) = root[0][0].items()
    tensor = as_tensor(states["param"])
    assert tensor is not None
    extent = tensor.storage.extent
    content = (Zeros(256), extent.cut(0, extent.length - 256))
    states["param"] = tensor.moved(Storage(tensor.storage.type, "cpu", tensor.numel, content), 0)


def wrong_size(root: list[Any]) -> None:
    ((_, states),) = root[0][0].items()
    numel = states["numel_unpadded"] + 64
    for name in ("param", "exp_avg", "exp_avg_sq"):
        states[name] = float_tensor(bytes(4 * numel))
    states["numel_unpadded"] = numel


_MODEL = {
    "two parameters swapped": (swap, "linear_proj.weight"),
    "a layer dropped": (drop, "its layers are not those"),
    "a parameter renamed": (rename, "is missing"),
    "another iteration": (other_iteration, "entry 'iteration' differs"),
    "a step count lost": (no_step, "different step counts"),
    "an entry lost": (lost_entry, "its entries are"),
}
_OPTIMIZER = {
    "a buffer shifted by 64": (shift, ""),
    "a buffer of another size": (wrong_size, "elements found"),
}


@pytest.mark.parametrize("depth", ["structure", "full"])
@pytest.mark.parametrize("name", [*_MODEL, *_OPTIMIZER])
def test_mutations_are_found(
    name: str, depth: str, program: Program, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    target = copy_of(converted(MOE), tmp_path)
    edit, reason = (_MODEL | _OPTIMIZER)[name]
    file = "model_optim_rng.pt" if name in _MODEL else "distrib_optim.pt"
    path = target / "mp_rank_00_000_000" / file
    rewrite(path, edit)
    run = verify(program, pair(MOE).source, target, depth)
    assert run.status == 6, run
    assert "mp_rank_00_000_000" in run.errors
    assert reason in run.errors


def test_lost_files_and_folders_are_found(
    program: Program, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    source = pair(MOE).source
    target = copy_of(converted(MOE), tmp_path)
    (target / "mp_rank_00_001_001" / "distrib_optim.pt").unlink()
    run = verify(program, source, target, "structure")
    assert run.status == 6
    assert "distrib_optim.pt beside it is missing" in run.errors
    shutil.rmtree(target / "mp_rank_00_001_001")
    assert verify(program, source, target, "structure").status == 6


@pytest.mark.parametrize("depth", ["structure", "full"])
def test_files_that_are_kept_as_they_are_are_held_to_their_source(
    depth: str, program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    name = "mp_rank_00_001/train_dataloader_dprank000.pt"
    (source / name).write_bytes(bytes(range(256)))
    target = tmp_path / "target" / "iter_0000001"
    assert program.convert(source, target, (), "--verify", depth).status == 0
    assert verify(program, source, target, depth).status == 0
    flip_byte(target / name, 255)
    run = verify(program, source, target, depth)
    assert run.status == 6
    assert "train_dataloader_dprank000.pt differs from its source" in run.errors
    (target / name).unlink()
    assert "its other files are []" in verify(program, source, target, depth).errors


def test_arguments_that_tell_another_layout_are_found(
    program: Program, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    target = copy_of(converted(MOE), tmp_path)
    set_arguments(target, virtual_pipeline_model_parallel_size=4)
    run = verify(program, pair(MOE).source, target, "structure")
    assert run.status == 6
    assert "pp_to_vpp.json: another conversion writes, or wrote, this target (layout)" in run.errors
    (target / "pp_to_vpp.json").unlink()
    run = verify(program, pair(MOE).source, target, "structure")
    assert run.status == 6
    assert "its model chunks are not those its arguments tell" in run.errors


@pytest.mark.parametrize("file", ["distrib_optim.pt", "model_optim_rng.pt"])
def test_a_damaged_source_is_reported_instead_of_copied(
    file: str, program: Program, tmp_path: Path
) -> None:
    """A byte in the middle, where no sample looks: path, record and parameter are named."""
    source = copy_of(pair(DENSE).source, tmp_path)
    path = source / "mp_rank_00_001" / file
    offset, length = max(tensor_bytes(path), key=lambda record: record[1])
    flip_byte(path, offset + length // 8 * 4 + 3)  # in the upper half of an fp32 element
    target = tmp_path / "target" / "iter_0000001"
    run = program.convert(source, target, (), "--verify", "full")
    program.refuses(4, run, str(path), "record 'data/0' is damaged", "parameter decoder.layers.")
    assert not target.exists()
    # of all files, where only one rank is wanted
    run = program.convert(
        source, target, (), "--verify", "full", "--pipeline-ranks-to-process", "0"
    )
    program.refuses(4, run, str(path), "record 'data/0' is damaged")
    # without full verification it is copied, but its checksum still tells
    assert program.convert(source, target).status == 0
    assert verify(program, source, target).status == 4
    clean = verify(program, pair(DENSE).source, target)
    assert clean.status == 6
    assert "is damaged" in clean.errors or "differs from its source" in clean.errors


def test_moments_are_held_to_their_records_too(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    path = source / "mp_rank_00_000" / "distrib_optim.pt"
    offset, length = tensor_bytes(path)[2]
    flip_byte(path, offset + length // 2)
    run = program.convert(source, tmp_path / "x", (), "--verify", "full")
    program.refuses(4, run, "record 'data/2' is damaged", "[exp_avg_sq]")


def state_in(name: str, path: Path) -> tuple[int, str]:
    """A place in the last state of a matrix in a file, and what that is called."""
    of = next(of for of in families(name, "source") if str(path) in source_paths(of))
    kind, tensor = next(
        (kind, tensor)
        for kind, tensor in reversed(of.manifest().items())
        if tensor.extent.path == str(path) and len(tensor.shape) == 2
    )
    return tensor.extent.offset + tensor.extent.length // 2, str(kind)


def source_paths(of: Family) -> set[str]:
    return {tensor.extent.path for tensor in of.manifest().values()}


def test_damaged_layer_wise_states_are_named(program: Program, tmp_path: Path) -> None:
    """In the source, while converting, and in the target; also where another folder needs them."""
    file = Path("mp_rank_00_001_001", "layer_wise_optimizer_3.pt")
    offset, state = state_in(LAYER_WISE_WIDE, pair(LAYER_WISE_WIDE).source / file)
    source = copy_of(pair(LAYER_WISE_WIDE).source, tmp_path)
    flip_byte(source / file, offset)
    for ranks in ("0", "1"):
        part = tmp_path / ranks / "iter_0000001"
        more = ("--verify", "full", "--pipeline-ranks-to-process", ranks)
        run = program.convert(source, part, (), *more)
        program.refuses(4, run, str(source / file), "is damaged", state)
        assert len([*part.glob("mp_rank_*")]) < 2, "the folder that needs it has no name"
    target = tmp_path / "target" / "iter_0000001"
    assert program.convert(source, target).status == 0, "nothing but its checksum tells"
    program.refuses(6, verify(program, pair(LAYER_WISE_WIDE).source, target), state)


def swap_moments(entries: list[Any]) -> None:
    """Of two parameters of one size: nothing but the source tells."""
    state = entries[0]["optimizer"]["state"]
    state[3], state[4] = state[4], state[3]


def other_step(entries: list[Any]) -> None:
    entries[1]["optimizer"]["param_groups"][1]["step"] = 7


@pytest.mark.parametrize("depth", ["structure", "full"])
@pytest.mark.parametrize(
    ("edit", "file", "reasons"),
    [
        (swap_moments, "layer_wise_optimizer_0.pt", ("[momentum_buffer]", "differ")),
        (swap_moments, "model_optim_rng.pt", ("[momentum_buffer] is not as in the layer-wise",)),
        (other_step, "model_optim_rng.pt", ("does not repeat the layer-wise file",)),
    ],
)
def test_mutations_of_layer_wise_states_are_found(
    edit: Callable[[list[Any]], None],
    file: str,
    reasons: tuple[str, ...],
    depth: str,
    program: Program,
    converted: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    target = copy_of(converted(LAYER_WISE), tmp_path)
    is_model = file == "model_optim_rng.pt"
    rewrite(
        target / "mp_rank_00_000_000" / file,
        (lambda root: edit(root["optimizer"])) if is_model else edit,
    )
    run = verify(program, pair(LAYER_WISE).source, target, depth)
    assert run.status == 6, run
    for reason in reasons:
        assert reason in run.errors


def first_state(root: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = root["optimizer"][0]["optimizer"]["state"][0]
    return state


def other_count(root: dict[str, Any]) -> None:
    first_state(root)["step"] = 2


def other_strides(root: dict[str, Any]) -> None:
    """The same bytes, as the transposed matrix."""
    state = first_state(root)
    storage, offset, shape, stride, *rest = state["Q_L"].arguments
    arguments = (storage, offset, shape, tuple(reversed(stride)), *rest)
    state["Q_L"] = replace(state["Q_L"], arguments=arguments)


@pytest.mark.parametrize("depth", ["structure", "full"])
@pytest.mark.parametrize(
    ("edit", "reason"), [(other_count, "optimizer state differs"), (other_strides, "[Q_L] is")]
)
def test_mutations_of_states_of_other_shapes_are_found(
    edit: Callable[[dict[str, Any]], None],
    reason: str,
    depth: str,
    program: Program,
    converted: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    target = copy_of(converted(SOAP), tmp_path)
    rewrite(target / "mp_rank_00_000" / "model_optim_rng.pt", edit)
    run = verify(program, pair(SOAP).source, target, depth)
    assert run.status == 6, run
    assert reason in run.errors


def test_a_lost_layer_wise_file_is_found(
    program: Program, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    target = copy_of(converted(LAYER_WISE), tmp_path)
    (target / "mp_rank_00_001_001" / "layer_wise_optimizer_1.pt").unlink()
    run = verify(program, pair(LAYER_WISE).source, target, "structure")
    assert run.status == 6
    assert "layer_wise_optimizer_1.pt is missing" in run.errors
