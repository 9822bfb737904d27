"""What stands beside the tensors: explained and converted, or refused by its name.

Each kind was met in public reports or code; each case is made from a real pair, both sides alike,
so that what is right is known.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from pp_to_vpp.checkpoint.family import SourceRank
from pp_to_vpp.container.extents import Literal
from pp_to_vpp.container.pickling import Global, Instance, Storage, as_mapping, ordered_dict
from pp_to_vpp.container.tensors import FLOAT_STORAGE, as_tensor, flat_tensor, unwrap_tensor
from pp_to_vpp.megatron.naming import AVERAGE, chunk_keys
from pp_to_vpp.megatron.parameters import Item
from pp_to_vpp.source.files import read_torch_file

from .compare import differences, load
from .edit import copy_of, flip_byte, float_tensor, rewrite, rewrite_all, set_arguments
from .families import families
from .pairs import (
    DEEPSEEK,
    DENSE,
    EMPTY,
    HYBRID,
    HYBRID_MOE,
    LAYER_WISE,
    MOE,
    NOOP,
    ODD,
    PLAIN,
    pair,
)
from .runs import Program

Edit = Callable[[dict[str, Any]], Any]


def both_sides(name: str, folder: Path, *edits: Edit) -> tuple[Path, Path]:
    """Source and truth of a pair after the same edits of all rank files."""
    case = pair(name)
    sides = copy_of(case.source, folder / "source"), copy_of(case.truth, folder / "truth")
    for side in sides:
        for edit in edits:
            rewrite_all(side, edit)
    return sides


def converts_both_ways(program: Program, source: Path, truth: Path, folder: Path) -> None:
    """With full verification, to the other side's tensors, keys and groups."""
    there, back = folder / "there" / source.name, folder / "back" / source.name
    run = program.convert(source, there, (), "--verify", "full")
    assert run.status == 0, run.errors
    assert differences(there, truth, source) == []
    run = program.convert(
        there, back, ["--target-virtual-pipeline-model-parallel-size", "1"], "--verify", "full"
    )
    assert run.status == 0, run.errors
    assert differences(back, source, source) == []


def entry(key: str, value: Any) -> Edit:
    return lambda root: root.update({key: value})


def groups_of(root: dict[str, Any]) -> list[dict[str, Any]]:
    """The param groups of the first optimizer."""
    node = root["optimizer"]
    found: list[dict[str, Any]] = (node[0] if isinstance(node, list) else node)["optimizer"][
        "param_groups"
    ]
    return found


# -- top level ----------------------------------------------------------------------------------


def test_plain_values_alike_in_all_files_are_copied(program: Program, tmp_path: Path) -> None:
    value = {"name": "run 7", "list": [1, 2.5, None, (True, "x")]}
    sides = both_sides(DENSE, tmp_path, entry("my_notes", value))
    converts_both_ways(program, *sides, tmp_path)
    run = program.convert(sides[0], tmp_path / "x" / "iter_0000001")
    assert "note: entry 'my_notes' is unknown, alike in all files, and copied" in run.output


def test_plain_values_of_single_files_are_refused(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    rewrite(source / "mp_rank_00_001" / "model_optim_rng.pt", entry("my_notes", 3))
    run = program.convert(source, tmp_path / "x" / "iter_0000001")
    program.refuses(4, run, "mp_rank_00_001/model_optim_rng.pt: its entry 'my_notes' is not that")


def test_arguments_that_number_the_ranks_may_differ(program: Program, tmp_path: Path) -> None:
    """Those of launchers, beside Megatron's own rank and local_rank."""
    source = copy_of(pair(DENSE).source, tmp_path)

    def number(count: int, root: dict[str, Any]) -> None:
        root["args"].state.update(node_rank=count, global_rank=8 * count)

    for count, path in enumerate(sorted(source.glob("*/model_optim_rng.pt"))):
        rewrite(path, partial(number, count))
    target = tmp_path / "x" / "iter_0000001"
    run = program.convert(source, target, (), "--verify", "full")
    assert run.status == 0, run.errors
    assert differences(target, pair(DENSE).truth, source) == []


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("layer_scales", {"decoder.layers.0.mlp": 1.0}, "unknown entry 'layer_scales'"),
        ("by_layer", {"module.decoder.layers.1.x": 2}, "unknown entry 'by_layer'"),
        ("something", Instance(Global("somewhere", "State"), ()), "unknown entry 'something'"),
        ("modelopt_state", {"mode": 1}, "'modelopt_state': the state of a model that ModelOpt"),
        ("modelopt_state_0", {"mode": 1}, "nothing proves which parameters such a model has"),
        ("ema_models", ordered_dict({"x": Instance(Global("a", "B"), ())}), "entry 'ema_models'"),
        (7, 1, "unknown entry 7"),
    ],
)
def test_what_could_move_with_layers_is_refused(
    key: Any, value: Any, reason: str, program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    rewrite_all(source, entry(key, value))
    program.refuses(4, program.convert(source, tmp_path / "x" / "iter_0000001"), reason)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["state.pt", "ema.safetensors"])
def test_unknown_files_with_state_are_refused(name: str, program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    path = source / "mp_rank_00_001" / name
    path.write_bytes(b"x")
    run = program.convert(source, tmp_path / "x" / "iter_0000001")
    program.refuses(4, run, f"{name}: an unknown file in a rank folder")


# -- moving averages ----------------------------------------------------------------------------


def with_average(name: str, folder: Path) -> tuple[Path, Path]:
    """Source and truth of a pair with a moving average of the weights, as MindSpeed saves one: in
    fp32, with values that follow from global names alone."""
    sides = both_sides(name, folder)
    for side, place in zip(("source", "truth"), sides, strict=True):
        for rank in (rank for of in families(name, side) for rank in of.ranks.values()):
            path = place / rank.files.id.folder / "model_optim_rng.pt"
            rewrite(path, partial(add_average, rank))
            if rank.files.optimizer is not None:
                rewrite(path.with_name("distrib_optim.pt"), add_average_state)
    return sides


_LAST = "num_floating_point_operations_so_far"


def add_average(rank: SourceRank, root: dict[str, Any]) -> None:
    for key, content in zip(chunk_keys(root), rank.contents, strict=True):
        chunk = as_mapping(root[key])
        assert chunk is not None
        values = map(average_of, content.items)
        root[f"ema_{key}"] = ordered_dict(dict(zip(chunk, values, strict=True)), root[key].state)
    root[_LAST] = root.pop(_LAST)


def average_of(item: Item) -> Any:
    if item.tensor is None:
        return item.value
    data = Random(item.name).randbytes(4 * item.tensor.numel)
    storage = Storage(FLOAT_STORAGE, "cpu", item.tensor.numel, (Literal(data),))
    return item.tensor.moved(storage, 0)


def add_average_state(root: Any) -> None:
    """Behind the number of elements, in every buffer."""
    for entry_ in filter(None, root if isinstance(root, list) else [root]):
        for buffer in (value for key, value in entry_.items() if type(key) is int):
            for states in buffer.values():
                tensor = as_tensor(states["exp_avg"])
                assert tensor is not None
                storage = Storage(FLOAT_STORAGE, "cpu", tensor.numel, (tensor.extent,))
                states["ema_params"] = flat_tensor(storage)


@pytest.mark.parametrize("name", [DENSE, DEEPSEEK, MOE, PLAIN, LAYER_WISE])
def test_a_moving_average_moves_with_the_weights(
    name: str, program: Program, tmp_path: Path
) -> None:
    source, truth = with_average(name, tmp_path)
    converts_both_ways(program, source, truth, tmp_path)
    (path, *_) = sorted((tmp_path / "there" / source.name).glob("*/model_optim_rng.pt"))
    root = load(path)
    assert list(root)[-3:] == ["ema_model0", "ema_model1", _LAST]
    values = [value for value in root["ema_model1"].values() if isinstance(value, torch.Tensor)]
    assert values
    assert all(value.untyped_storage().nbytes() == 4 * value.numel() for value in values)


def test_chunks_without_parameters_have_a_moving_average(program: Program, tmp_path: Path) -> None:
    source, truth = with_average(EMPTY, tmp_path)
    target = tmp_path / "x" / source.name
    assert program.convert(source, target, pair(EMPTY).options, "--verify", "full").status == 0
    assert differences(target, truth, source) == []


def test_a_moving_average_may_lack_the_versions_of_modules(
    program: Program, tmp_path: Path
) -> None:
    """A dict that was filled by hand; it stays as it is."""
    sides = with_average(DENSE, tmp_path)
    for side in sides:
        rewrite_all(side, drop_versions)
    converts_both_ways(program, *sides, tmp_path)
    for path in (tmp_path / "there" / sides[0].name).glob("*/model_optim_rng.pt"):
        root = load(path)
        for stage in range(2):
            assert hasattr(root[f"model{stage}"], "_metadata")
            assert not hasattr(root[f"ema_model{stage}"], "_metadata")


def drop_versions(root: dict[str, Any]) -> None:
    for key in chunk_keys(root, AVERAGE):
        root[key] = replace(root[key], state=None)


@pytest.mark.parametrize("depth", ["structure", "full"])
def test_a_moving_average_is_verified(depth: str, program: Program, tmp_path: Path) -> None:
    source, _ = with_average(DENSE, tmp_path)
    target = tmp_path / "x" / source.name
    assert program.convert(source, target).status == 0
    path = target / "mp_rank_00_001" / "model_optim_rng.pt"
    root = as_mapping(read_torch_file(path).root)
    assert root is not None
    tensor = as_tensor(
        (as_mapping(root["ema_model1"]) or {})["decoder.layers.1.mlp.linear_fc2.weight"]
    )
    assert tensor is not None
    flip_byte(path, tensor.extent.offset)
    run = program("--load-iteration-dir", source, "--save-iteration-dir", target, "--verify", depth)
    name = "decoder.layers.7.mlp.linear_fc2.weight (ema_model)"
    program.refuses(6, run, f"model_optim_rng.pt: {name} differs from its source")
    assert len(re.findall("differs from its source", run.errors)) == 1


def average_edit(edit: Callable[[dict[str, Any]], Any]) -> Edit:
    def apply(root: dict[str, Any]) -> None:
        chunk = as_mapping(root["ema_model"])
        assert chunk is not None
        edit(chunk)

    return apply


_FC2 = "decoder.layers.1.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (average_edit(lambda c: c.pop(_FC2)), "expected decoder.layers.1.mlp.linear_fc2.weight"),
        (average_edit(lambda c: c.update({_FC2: c.pop(_FC2)})), "found decoder.layers.1.mlp.linea"),
        (average_edit(lambda c: c.update({_FC2: None})), "linear_fc2.weight (ema_model) no tensor"),
        (
            average_edit(lambda c: c.update({_FC2: float_tensor(bytes(8))})),
            "weight (ema_model) (2,",
        ),
        (average_edit(lambda c: c.clear()), "its layers are not those its arguments tell"),
        (entry("ema_model", 3), "a model chunk is no state dict"),
        (lambda r: r.update(ema_model0=r.pop("ema_model")), "expected ema_model, found ema_model0"),
        (lambda r: r.update(ema_model=r["model"]), "two objects of the checkpoint share its bytes"),
    ],
)
def test_a_moving_average_is_like_the_weights(
    edit: Edit, reason: str, program: Program, tmp_path: Path
) -> None:
    source, _ = with_average(DENSE, tmp_path)
    rewrite_all(source, edit)
    program.refuses(4, program.convert(source, tmp_path / "x" / "iter_0000001"), reason)


@pytest.mark.parametrize("ranks", [(), ("--pipeline-ranks-to-process", "0")])
def test_all_folders_have_a_moving_average_or_none(
    ranks: tuple[str, ...], program: Program, tmp_path: Path
) -> None:
    source, _ = with_average(MOE, tmp_path)
    path = source / "mp_rank_00_001_001" / "model_optim_rng.pt"
    rewrite(path, lambda root: root.__delitem__("ema_model"))
    run = program.convert(source, tmp_path / "x" / "iter_0000001", (), *ranks)
    program.refuses(4, run, "its moving average of the weights is not that of")


# -- one save -----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["mp_rank_00_001_000", "mp_rank_00_000_001"])
@pytest.mark.parametrize("ranks", [(), ("--pipeline-ranks-to-process", "0")])
@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (entry("iteration", 2), "its iteration is not that of"),
        (lambda r: r["args"].state.update(consumed_train_samples=9), "its args.consumed_train_sa"),
        (lambda r: r["args"].state.update(lr=9.0), "its args.lr is not that of"),
    ],
)
def test_folders_of_two_saves_are_refused(
    folder: str, ranks: tuple[str, ...], edit: Edit, what: str, program: Program, tmp_path: Path
) -> None:
    """All folders are read, also those that a partial run does not need."""
    source = copy_of(pair(MOE).source, tmp_path)
    rewrite(source / folder / "model_optim_rng.pt", edit)
    run = program.convert(source, tmp_path / "x" / "iter_0000001", (), *ranks)
    program.refuses(4, run, f"{folder}/model_optim_rng.pt: {what}", "expected", "found")


def test_optimizer_steps_agree_over_all_folders(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)

    def train(root: dict[str, Any]) -> None:
        for group in groups_of(root):
            group["step"] = 77

    rewrite(source / "mp_rank_00_001" / "model_optim_rng.pt", train)
    run = program.convert(source, tmp_path / "x" / "iter_0000001")
    program.refuses(4, run, "its optimizer steps is not that of the checkpoint's first rank")


# -- param groups -------------------------------------------------------------------------------


def third_group(root: dict[str, Any]) -> None:
    """What --lr-multiplier and the like make: some matrices in a group of their own."""
    for entry_ in root["optimizer"] if isinstance(root["optimizer"], list) else [root["optimizer"]]:
        groups = entry_["optimizer"]["param_groups"]
        groups.append({**groups[0], "lr_mult": 0.25, "max_lr": 2.5e-4})


def swapped(root: dict[str, Any]) -> None:
    """What taking weight decay off the embedding too makes of the first rank's order."""
    groups_of(root).reverse()


@pytest.mark.parametrize("edit", [third_group, swapped])
def test_groups_of_the_runs_own_rules_are_kept_or_refused(
    edit: Edit, program: Program, tmp_path: Path
) -> None:
    """From 0.14 loading matches them by what they say; before by position: weight decay would be
    swapped for the rest of the training."""
    sides = both_sides(DENSE, tmp_path, edit)
    converts_both_ways(program, *sides, tmp_path)
    old = copy_of(pair(ODD).source, tmp_path / "old")
    rewrite_all(old, edit)
    run = program.convert(old, tmp_path / "x" / "iter_0000001")
    program.refuses(4, run, "its param groups (wd_mult", "are not those that Megatron's rules make")


def test_groups_of_one_kind_are_alike_on_all_ranks(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(ODD).source, tmp_path)

    def slower(root: dict[str, Any]) -> None:
        for group in groups_of(root):
            group["max_lr"] = 1e-6

    rewrite(source / "mp_rank_00_001" / "model_optim_rng.pt", slower)
    run = program.convert(source, tmp_path / "x" / "iter_0000001")
    program.refuses(4, run, "are not those that Megatron's rules make of its parameters")


# -- right data is not called wrong --------------------------------------------------------------


def test_ties_rounded_up_are_a_way_too(program: Program, tmp_path: Path) -> None:
    """MindSpeed's --reuse-fp32-param; one tie in a record is enough to tell."""
    sides = both_sides(DENSE, tmp_path)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    for side, place in zip(sides, _places(name), strict=True):
        _make_tie(side, *place)
    run = program.convert(sides[0], tmp_path / "there" / sides[0].name, (), "--verify", "full")
    assert run.status == 0, run.errors
    assert "16-bit weights are their main parameters rounded half up" in run.output
    assert differences(tmp_path / "there" / sides[0].name, sides[1], sides[0]) == []


def _places(name: str) -> tuple[tuple[str, Any, Any], tuple[str, Any, Any]]:
    """Rank folder, weight and main parameter of a name in source and truth."""
    from .families import families

    found = []
    for side in ("source", "truth"):
        of = families(DENSE, side)[0]
        item = next(item for item in of.items() if item.name == name)
        main = of.states[name].main
        assert item.tensor is not None
        assert main is not None
        folder = Path(item.tensor.extent.path).parent.name
        found.append((folder, item.tensor.extent, main.extent))
    return found[0], found[1]


def _make_tie(side: Path, folder: str, weight: Any, main: Any) -> None:
    """The first element becomes one that lies between two 16-bit ones, and its weight the upper."""
    for name, extent, value in (
        ("model_optim_rng.pt", weight, (0x3F81).to_bytes(2, "little")),
        ("distrib_optim.pt", main, (0x3F808000).to_bytes(4, "little")),
    ):
        path = side / folder / name
        data = bytearray(path.read_bytes())
        data[extent.offset : extent.offset + len(value)] = value
        path.write_bytes(data)
        rewrite(path, lambda root: root)  # with true checksums again


def test_weights_that_qk_clip_scales_are_exempt_by_name(program: Program, tmp_path: Path) -> None:
    sides = both_sides(DENSE, tmp_path)
    for name, is_exempt in (
        ("decoder.layers.1.self_attention.linear_qkv.weight", True),
        ("decoder.layers.1.mlp.linear_fc2.weight", False),
    ):
        folder, weight, _ = _places(name)[0]
        path = sides[0] / folder / "model_optim_rng.pt"
        data = bytearray(path.read_bytes())
        data[weight.offset] ^= 1
        path.write_bytes(data)
        rewrite(path, lambda root: root)
        set_arguments(sides[0], qk_clip=False)
        target = tmp_path / name
        program.refuses(4, program.convert(sides[0], target / "iter_0000001"), "not their main par")
        set_arguments(sides[0], qk_clip=True)
        run = program.convert(sides[0], target / "iter_0000001", (), "--verify", "full")
        if is_exempt:
            assert run.status == 0, run.errors
            assert "but for those that --qk-clip scales" in run.output
        else:
            program.refuses(4, run, f"{name} first")


OBJECTS = {
    "defaultdict": Instance(
        Global("collections", "defaultdict"), (Global("builtins", "list"),), entries={"a": [1]}
    ),
    "deque": Instance(Global("collections", "deque"), (), appended=[1, 2, 3]),
    "set": Instance(Global("builtins", "set"), ([1, 2],)),
    "nested enum": Instance(Global("builtins", "getattr"), (Global("a.b", "Outer"), "Inner")),
    "member of a nested enum": Instance(
        Instance(Global("builtins", "getattr"), (Global("a.b", "Outer"), "Inner")), (1,)
    ),
    "state": Instance(Global("a.b", "Thing"), (), by_new=True, state={"x": (1, None)}),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_no_object_in_a_file_stops_full_verification(
    name: str, program: Program, tmp_path: Path
) -> None:
    def add(root: dict[str, Any]) -> None:
        root["args"].state["an_object"] = OBJECTS[name]

    source = copy_of(pair(DENSE).source, tmp_path)
    rewrite_all(source, add)
    target = tmp_path / "x" / "iter_0000001"
    run = program.convert(source, target, (), "--verify", "full")
    assert run.status == 0, run.errors
    path = target / "mp_rank_00_000" / "model_optim_rng.pt"
    rewrite(path, lambda root: root["args"].state.update(an_object=[OBJECTS[name]]))
    run = program(
        "--load-iteration-dir", source, "--save-iteration-dir", target, "--verify", "full"
    )
    program.refuses(6, run, "args.an_object differs from its source")


# -- other writers ------------------------------------------------------------------------------


def as_npu(root: dict[str, Any]) -> None:
    """As torch_npu pickles the weights of a model on its devices."""
    for key in [key for key in root if str(key).startswith("model")]:
        chunk = as_mapping(root[key])
        assert chunk is not None
        for name, value in chunk.items():
            if unwrap_tensor(value) is not None:
                rebuild = Global("torch_npu.utils.storage", "_rebuild_npu_tensor")
                chunk[name] = Instance(rebuild, (*value.arguments, 2))


def as_parameters(root: dict[str, Any]) -> None:
    """Weights that are torch.nn.Parameter objects."""
    for key in [key for key in root if str(key).startswith("model")]:
        chunk = as_mapping(root[key])
        assert chunk is not None
        for name, value in chunk.items():
            if unwrap_tensor(value) is not None:
                rebuild = Global("torch._utils", "_rebuild_parameter")
                chunk[name] = Instance(rebuild, (value, True, ordered_dict({})))


def plain_tensors(root: dict[str, Any]) -> None:
    """The same tensors again without what the other writers put around them."""
    for key in [key for key in root if str(key).startswith("model")]:
        chunk = as_mapping(root[key])
        assert chunk is not None
        for name, value in chunk.items():
            if isinstance(value, Instance) and "_rebuild_npu_tensor" in str(value.factory):
                assert value.arguments[-1] == 2
                plain = Global("torch._utils", "_rebuild_tensor_v2")
                chunk[name] = Instance(plain, value.arguments[:-1])
            elif isinstance(value, Instance) and "_rebuild_parameter" in str(value.factory):
                chunk[name] = value.arguments[0]


@pytest.mark.parametrize("edit", [as_npu, as_parameters])
@pytest.mark.parametrize("name", [DENSE, PLAIN])
def test_tensors_of_other_writers_keep_what_is_around_them(
    edit: Edit, name: str, program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(name).source, tmp_path)
    rewrite_all(source, edit)
    target = tmp_path / "x" / "iter_0000001"
    run = program.convert(source, target, (), "--verify", "full")
    assert run.status == 0, run.errors
    rewrite_all(target, plain_tensors)
    assert differences(target, pair(name).truth, pair(name).source) == []


# -- refusals that name the thing ---------------------------------------------------------------


def renamed(old: str, new: str) -> Edit:
    def apply(root: dict[str, Any]) -> None:
        chunk = as_mapping(root["model"])
        assert chunk is not None
        items = [(key.replace(old, new), value) for key, value in chunk.items()]
        chunk.clear()
        chunk.update(items)

    return apply


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (renamed("decoder.", "language_model.decoder."), "stand under language_model., as in mu"),
        (renamed("decoder.", "module.decoder."), "stand under module., as in multimodal or wrap"),
        (renamed(".mlp.linear_fc1.", ".mixer.in_proj."), "a hybrid (Mamba) layer"),
        (lambda r: r["args"].state.update(schedules_method="dualpipev"), "args.schedules_method"),
        (lambda r: r["args"].state.update(use_dualpipev=True), "a V-shaped schedule"),
        (
            lambda r: r["args"].state.update(patch_primus_pipeline=True, pp_algorithm="v-half"),
            "args.pp_algorithm is 'v-half': a V-shaped schedule",
        ),
        (
            lambda r: r["model"].entries.update(
                {"decoder.layers.0.mlp.linear_fc1.weight": Instance(Global("te", "Float8"), ())}
            ),
            "no plain tensor, found an object of te.Float8",
        ),
    ],
)
def test_what_is_refused_is_named(
    edit: Edit, reason: str, program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    rewrite_all(source, edit)
    run = program.convert(source, tmp_path / "x" / "iter_0000001")
    program.refuses(4, run, reason)
    assert "Instance" not in run.errors


def test_layers_called_otherwise_than_the_siblings_are_refused(
    program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    rewrite(source / "mp_rank_00_001" / "model_optim_rng.pt", renamed("decoder.", "encoder."))
    run = program.convert(source, tmp_path / "x" / "iter_0000001")
    program.refuses(
        4, run, "not called as those of its siblings, expected decoder.layers, found encoder.layers"
    )


def test_torchs_legacy_format_is_named(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    path = source / "mp_rank_00_000" / "model_optim_rng.pt"
    torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    run = program.convert(source, tmp_path / "x" / "iter_0000001")
    program.refuses(4, run, "model_optim_rng.pt: it is in torch's legacy format", "save it once")


def test_a_source_whose_placement_is_impossible_is_named_as_such(
    program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    set_arguments(source, num_layers=7)
    run = program.convert(source, tmp_path / "x" / "iter_0000001")
    program.refuses(4, run, "the source's own arguments tell no possible placement", "7 layers do")


@pytest.mark.parametrize("value", ["4,4", [4, 4]])
@pytest.mark.parametrize("name", ["num_layer_list", "decoder_pipeline_manual_split_list"])
def test_lists_of_forks_tell_the_layers_of_a_source(
    name: str, value: Any, program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    set_arguments(source, **{name: value})
    target = tmp_path / "x" / "iter_0000001"
    assert program.convert(source, target, (), "--verify", "full").status == 0
    set_arguments(source, **{name: None})
    assert differences(target, pair(DENSE).truth, source) == []
    set_arguments(source, **{name: "3,5"})
    run = program.convert(source, tmp_path / "y" / "iter_0000001")
    program.refuses(4, run, "its layers are not those its arguments tell")


def test_torch_that_is_missing_is_a_refusal(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pp_to_vpp.verification import torch_loading

    def missing() -> None:
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(torch_loading, "load_torch", missing)
    run = program.convert(
        pair(DENSE).source, tmp_path / "x" / "iter_0000001", (), "--verify", "full"
    )
    program.refuses(2, run, "it opens files with torch, which cannot be imported", "--verify stru")


# -- layers without parameters -----------------------------------------------------------------


def set_of(*members: Any) -> Instance:
    """A set, as pickled."""
    return Instance(Global("__builtin__", "set"), ([*members],))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (set_of(2, 3, 5, 7), "layer 7 has keys, but args.noop_layers names it as one without"),
        (set_of(2, 3), "its layers are not those its arguments tell, expected 4 layers, found 3"),
        (set_of(2, 5), "expected 4 layers, 2 without keys, found 2"),
        (set_of(2, 3, 5, 8), "args.noop_layers names layer 8 of 8"),
        (set_of(2, 3, "5"), "args.noop_layers is no set of layer numbers"),
        (set_of(2, 3, -1), "args.noop_layers is no set of layer numbers"),
        ([2, 3, 5], "args.noop_layers is no set of layer numbers"),
        (None, "its layers are not those its arguments tell"),
    ],
)
def test_layers_without_parameters_are_those_named(
    value: Any, reason: str, program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(NOOP).source, tmp_path)
    set_arguments(source, noop_layers=value)
    program.refuses(4, program.convert(source, tmp_path / "x" / "iter_0000001"), reason)


def test_layers_without_parameters_are_shown_and_drop_a_list(
    program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(NOOP).source, tmp_path)
    set_arguments(source, num_layer_list="1,7")
    run = program.convert(source, tmp_path / "x" / "iter_0000001", pair(NOOP).options)
    assert run.status == 0
    lines = run.output.splitlines()
    assert "    pp0  E 0-1 (2-3)    pp0  E 0-1    4<1 (5)<1" in lines
    assert "    pp1  4 (5) 6-7 L    pp1  (2-3)<0  6-7 L" in lines


# -- hybrids ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("*MM-M*M-", "layer 0 has the mixer of a Mamba layer, but its letter in args.hybrid_layer"),
        ("MMM-M*M-", "layer 1 lacks the mixer of a Mamba layer, but its letter"),
        ("M*M-M*M", "7 layers where args.num_layers tells 8"),
        ("M*M-M*M-/*", "1 MTP layers where args.mtp_num_layers tells 0"),
    ],
)
def test_a_pattern_is_held_to_the_layers(
    pattern: str, reason: str, program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(HYBRID).source, tmp_path)
    set_arguments(source, hybrid_layer_pattern=pattern)
    program.refuses(4, program.convert(source, tmp_path / "x" / "iter_0000001"), reason)


def test_a_hybrid_without_its_pattern_is_told_by_its_keys(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(HYBRID).source, tmp_path)
    set_arguments(source, hybrid_layer_pattern=None)
    run = program.convert(source, tmp_path / "x" / "iter_0000001")
    program.refuses(4, run, "a hybrid (Mamba) layer, and no pattern", "--hybrid-layer-pattern of")


@pytest.mark.parametrize(
    "values",
    [
        {"hybrid_layer_pattern": "M-||M-M*|M-"},
        {"hybrid_layer_pattern": "M*||M-M*|M-/*", "mtp_num_layers": 1},
    ],
)
def test_a_target_that_tells_other_layers_is_found(
    values: dict[str, Any], program: Program, tmp_path: Path
) -> None:
    """None of whose keys need differ."""
    case, target = pair(HYBRID), tmp_path / "x" / "iter_0000001"
    assert program.convert(case.source, target, case.options).status == 0
    (target / "pp_to_vpp.json").unlink()
    set_arguments(target, **values)
    run = program("--load-iteration-dir", case.source, "--save-iteration-dir", target)
    program.refuses(6, run, "args.hybrid_layer_pattern tells other layers than its source's")


def test_a_hybrids_pattern_is_the_flag_to_launch_with(program: Program, tmp_path: Path) -> None:
    case = pair(HYBRID_MOE)
    run = program.convert(case.source, tmp_path / "x" / "iter_0000001", case.options)
    assert run.status == 0
    assert "launch Megatron with: --hybrid-layer-pattern 'M*|ME|-|/*E'\n" in run.output


# -- one target, one conversion -----------------------------------------------------------------


def convert_rank(program: Program, source: Path, target: Path, rank: int, *more: str) -> Any:
    options = ["--target-virtual-pipeline-model-parallel-size", "2"]
    return program.convert(source, target, options, "--pipeline-ranks-to-process", str(rank), *more)


def test_runs_of_two_sources_make_no_checkpoint(program: Program, tmp_path: Path) -> None:
    """Told by the records' checksums: neither by paths nor by times."""
    source, copied = pair(MOE).source, copy_of(pair(MOE).source, tmp_path)
    target = tmp_path / "t" / "iter_0000001"
    assert convert_rank(program, source, target, 0).status == 0
    assert not json.loads((target / "pp_to_vpp.json").read_text()).get("verified")

    def train(root: Any) -> None:
        for states in (s for e in (root if isinstance(root, list) else [root]) if e for s in [e]):
            first = next(iter(states[0].values()))
            first["exp_avg"], first["exp_avg_sq"] = first["exp_avg_sq"], first["exp_avg"]

    other = copy_of(pair(MOE).source, tmp_path / "other")
    rewrite(other / "mp_rank_00_000_000" / "distrib_optim.pt", train)
    refused = convert_rank(program, other, target, 1)
    program.refuses(2, refused, "pp_to_vpp.json: another conversion writes", "source.fingerprint")
    assert convert_rank(program, copied, target, 1).status == 0, "a copy is the same source"
    found = json.loads((target / "pp_to_vpp.json").read_text())
    assert found["verified"] == "structure"
    assert found["source"]["iteration"] == 1
    run = program(
        "--load-iteration-dir", other, "--save-iteration-dir", target, "--verify", "structure"
    )
    program.refuses(6, run, "pp_to_vpp.json: another conversion", "fingerprint")


def test_a_run_that_published_nothing_leaves_the_target_free(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pp_to_vpp.errors import CopyError
    from pp_to_vpp.run import target_folder

    def full(*_: Any) -> None:
        raise CopyError.of("here", "too little free space", cure="free some")

    target = tmp_path / "t" / "iter_0000001"
    with monkeypatch.context() as patch:
        patch.setattr(target_folder, "check_space", full)
        assert program.convert(pair(DENSE).source, target).status == 5
    assert not (target / "pp_to_vpp.json").exists()
    other = ["--target-virtual-pipeline-model-parallel-size", "4"]
    assert program.convert(pair(DENSE).source, target, other).status == 0
    shutil.rmtree(target / "mp_rank_00_000")
    run = program.convert(pair(DENSE).source, target, (), "--resume")
    program.refuses(2, run, "another conversion", "virtual pipeline size 4")
    assert program.convert(pair(DENSE).source, target, other, "--resume").status == 0


def test_refusals_write_their_report(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    rewrite(source / "mp_rank_00_001" / "model_optim_rng.pt", entry("iteration", 2))
    report = tmp_path / "report.json"
    run = program.convert(source, tmp_path / "x" / "iter_0000001", (), "--report", report)
    assert run.status == 4
    found = json.loads(report.read_text())
    assert (found["kind"], found["status"]) == ("refusal", 4)
    assert found["problems"] == [
        line.removeprefix("pp_to_vpp: error: ")
        for line in run.errors.splitlines()
        if line.startswith("pp_to_vpp: error: ")
    ]


# -- param groups that were lost ------------------------------------------------------------------


def _groups(root: Any) -> list[list[Any]]:
    node = root["optimizer"]
    entries = node if isinstance(node, list) else [node]
    return [entry.get("optimizer", entry)["param_groups"] for entry in entries]


@pytest.mark.parametrize("change", ["first", "last", "all", "key"])
@pytest.mark.parametrize("name", [DENSE, MOE, HYBRID_MOE])
def test_a_rank_that_lost_a_group_is_refused(
    name: str, change: str, program: Program, tmp_path: Path
) -> None:
    """From 0.14 on every rank has the groups of all, of parameters that it does not hold too."""

    def lose(root: Any) -> None:
        groups = _groups(root)[-1]
        if change == "key":
            node = root["optimizer"]
            (node[-1] if isinstance(node, list) else node)["optimizer"].pop("param_groups")
        elif change == "all":
            groups.clear()
        else:
            groups.pop(0 if change == "first" else -1)

    case, target = pair(name), tmp_path / "iter_0000001"
    source = copy_of(case.source, tmp_path)
    first = sorted(source.glob("*/model_optim_rng.pt"))[0]
    rewrite(first, lose)
    run = program.convert(source, target, case.options)
    program.refuses(4, run, f"{first}: it lacks a param group that others have (")
    assert "GroupKey" not in run.errors
    assert program.convert(case.source, target, case.options).status == 0
    written = sorted(target.glob("*/model_optim_rng.pt"))[-1]
    rewrite(written, lose)
    run = program("--load-iteration-dir", case.source, "--save-iteration-dir", target)
    program.refuses(6, run, f"{written}: it lacks the source's param group for ")
