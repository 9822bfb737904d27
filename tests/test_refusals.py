"""What cannot be converted exactly is refused by name, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pp_to_vpp.container.pickling import Global, Instance, as_mapping
from pp_to_vpp.source.files import read_torch_file

from .edit import copy_of, float_tensor, rewrite, rewrite_all, set_arguments
from .pairs import DENSE, ETP, LAYER_WISE, LAYER_WISE_ODD, MOE, PLAIN, pair
from .runs import Program

Edit = Callable[[Path], None]


def arguments(**values: Any) -> Edit:
    """Saved arguments that tell of something else."""
    return lambda source: set_arguments(source, **values)


def model(edit: Callable[[dict[str, Any]], Any]) -> Edit:
    """A change to the model chunk of every rank."""

    def apply(source: Path) -> None:
        def change(root: dict[str, Any]) -> None:
            chunk = as_mapping(root["model"])
            assert chunk is not None
            edit(chunk)

        rewrite_all(source, change)

    return apply


def top(edit: Callable[[dict[str, Any]], Any]) -> Edit:
    """A change to the top level of every rank's model file."""
    return lambda source: rewrite_all(source, edit)


def optimizer(edit: Callable[[Any], Any]) -> Edit:
    """A change to every optimizer file."""
    return lambda source: rewrite_all(source, edit, "distrib_optim.pt")


def one_rank(name: str, edit: Callable[[Any], Any], rank: str = "mp_rank_00_001") -> Edit:
    """A change to one file."""
    return lambda source: rewrite(source / rank / name, edit)


def drop_a_layer(chunk: dict[str, Any]) -> None:
    for key in [key for key in chunk if key.startswith("decoder.layers.3.")]:
        del chunk[key]


def swap_keys(chunk: dict[str, Any]) -> None:
    """Two parameters of one size under each other's names: only their values can tell."""
    one, two = (f"decoder.layers.{i}.mlp.linear_fc1.weight" for i in (0, 1))
    chunk[one], chunk[two] = chunk[two], chunk[one]


def shift(root: dict[Any, Any]) -> None:
    """A buffer one element longer than any rule computes."""
    ((_, states),) = root[0].items()
    numel = states["numel_unpadded"] + 1
    for name in ("param", "exp_avg", "exp_avg_sq"):
        states[name] = float_tensor(bytes(4 * numel))
    states["numel_unpadded"] = numel


def other_values(root: dict[Any, Any]) -> None:
    ((_, states),) = root[0].items()
    states["param"] = float_tensor(bytes(4 * states["numel_unpadded"]))


def native_fp8(chunk: dict[str, Any]) -> None:
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    chunk[name] = Instance(Global("transformer_engine.pytorch", "_make_float8"), (1, 2))


def legacy(root: dict[str, Any]) -> None:
    root["model"] = {"language_model": {"encoder": {}}}


def encoder_decoder(chunk: dict[str, Any]) -> None:
    chunk["encoder.layers.0.weight"] = float_tensor(bytes(4))


def unknown_key(chunk: dict[str, Any]) -> None:
    items = list(chunk.items())
    chunk.clear()
    for index, (key, value) in enumerate(items):
        chunk[key] = value
        if index == 20:
            chunk["somewhere.else.weight"] = float_tensor(bytes(4))


def without(name: str) -> Callable[[dict[str, Any]], None]:
    """A change that takes an entry away."""

    def edit(root: dict[str, Any]) -> None:
        del root[name]

    return edit


CASES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "legacy model": (arguments(use_legacy_models=True), ("args.use_legacy_models", "legacy")),
    "legacy structure": (top(legacy), ("it has encoder|its layers|no rule|is no state dict",)),
    "hybrid": (arguments(hybrid_override_pattern="M-M*"), ("Mamba",)),
    "custom fsdp": (arguments(use_custom_fsdp=True), ("FSDP",)),
    "torch fsdp2": (arguments(use_torch_fsdp2=True), ("FSDP2",)),
    "megatron fsdp": (arguments(use_megatron_fsdp=True), ("FSDP",)),
    "layer-wise files": (
        arguments(optimizer="dist_muon"),
        ("layer_wise_optimizer_0.pt is missing",),
    ),
    "distributed sgd": (arguments(optimizer="sgd"), ("'sgd' with the distributed optimizer",)),
    "experts split more than tensors": (
        arguments(num_experts=4, expert_tensor_parallel_size=2),
        ("expert_tensor_parallel_size 2 does not divide tensor_model_parallel_size 1",),
    ),
    "layer-wise": (
        arguments(use_layer_wise_distributed_optimizer=True),
        ("layer_wise_optimizer_0.pt is missing", "copy what is missing"),
    ),
    "standalone embedding": (arguments(standalone_embedding_stage=True), ("standalone",)),
    "extended tp": (arguments(moe_extended_tp=True), ("--moe-extended-tp",)),
    "fp8 gather": (arguments(fp8_param_gather=True), ("fp8",)),
    "native fp8": (model(native_fp8), ("is no plain tensor", "fp8-param-gather")),
    "encoder-decoder": (model(encoder_decoder), ("encoder and decoder layers",)),
    "absurd layers": (arguments(num_layers=10**9), ("args.num_layers is no integer",)),
    "text for a number": (arguments(num_layers="8"), ("args.num_layers is no integer", "'8'")),
    "old version": (top(lambda r: r.update(checkpoint_version=2.0)), ("checkpoint version",)),
    "no arguments": (top(without("args")), ("no training arguments",)),
    "no model": (top(without("model")), ("its model chunks are not",)),
    "a list": (top(lambda _: []), ("is no dictionary|no training arguments",)),
    "missing layer": (model(drop_a_layer), ("expected 4 layers", "found 3")),
    "unknown key": (model(unknown_key), ("no rule says which chunk key 'somewhere.else.weight'",)),
    "swapped parameters": (model(swap_keys), ("no known layout", "linear_fc1.weight")),
    "unknown buffer size": (optimizer(shift), ("no known layout", "elements found")),
    "other values": (optimizer(other_values), ("not their main parameters rounded",)),
    "unknown optimizer key": (
        optimizer(lambda root: root.update({"param_layout": {}})),
        ("unknown optimizer entry 'param_layout'",),
    ),
    "unknown key of an optimizer": (
        top(lambda root: root["optimizer"].update({"ema": [1, 2]})),
        ("unknown optimizer entry 'ema'",),
    ),
    "unknown key of a torch optimizer": (
        top(lambda root: root["optimizer"]["optimizer"].update({"ema": [1, 2]})),
        ("unknown optimizer entry 'ema'",),
    ),
    "different steps": (
        top(lambda root: root["optimizer"]["optimizer"]["param_groups"][1].update(step=9)),
        ("param groups have different step counts: 1, 9",),
    ),
    "unknown state": (
        optimizer(lambda r: next(iter(r[0].values())).update(extra=3)),
        ("state 'extra' is unknown",),
    ),
    "0.6 buckets": (
        optimizer(
            lambda r: (r.clear(), r.update(per_bucket_numel=[], per_bucket_numel_unpadded=[]))[0]
        ),
        ("stored per bucket, as Megatron 0.6",),
    ),
    "bare dtype key": (
        optimizer(lambda r: r.update({0: {Global("torch", "float32"): {}}})),
        ("no (parameter dtype, gradient dtype)", "ckpt-convert-update-legacy-dist-opt-format"),
    ),
    "optimizer without entry": (top(without("optimizer")), ("no 'optimizer' entry",)),
    "one rank without optimizer": (
        one_rank("model_optim_rng.pt", without("optimizer")),
        ("its siblings hold|no 'optimizer' entry",),
    ),
    "groups that are none": (
        top(lambda r: r["optimizer"]["optimizer"].update(param_groups="x")),
        ("unknown optimizer entry 'param_groups'",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, program: Program, tmp_path: Path) -> None:
    edit, reasons = CASES[name]
    source = copy_of(pair(DENSE).source, tmp_path)
    edit(source)
    target = tmp_path / "target" / "iter_0000001"
    run = program.convert(source, target)
    program.refuses(4, run)
    for reason in reasons:
        assert any(part in run.errors for part in reason.split("|")), run.errors
    assert not target.parent.exists(), "nothing is left that looks finished"


def layer_wise(dp_rank: int, edit: Callable[[list[Any]], Any]) -> Edit:
    """A change to the file of a data-parallel rank on the last stage."""
    return lambda source: rewrite(layer_wise_file(source, dp_rank), edit)


def layer_wise_file(source: Path, dp_rank: int) -> Path:
    (path,) = source.glob(f"mp_rank_00_001*/layer_wise_optimizer_{dp_rank}.pt")
    return path


def exchanged(source: Path) -> None:
    one, two = (layer_wise_file(source, dp_rank) for dp_rank in (0, 1))
    content = one.read_bytes()
    shutil.copyfile(two, one)
    two.write_bytes(content)


def states(entries: list[Any]) -> dict[int, dict[str, Any]]:
    """Those of matrices, by number."""
    found: dict[int, dict[str, Any]] = entries[0]["optimizer"]["state"]
    return found


def remove(entries: list[Any]) -> None:
    del states(entries)[2]


def number_twice(entries: list[Any]) -> None:
    numbers = entries[0]["optimizer"]["param_groups"][0]["params"]
    numbers[1] = numbers[0]


LAYER_WISE_CASES: dict[str, tuple[str, Edit, tuple[str, ...]]] = {
    "a file missing": (
        LAYER_WISE,
        lambda source: layer_wise_file(source, 1).unlink(),
        ("layer_wise_optimizer_1.pt is missing", "copy what is missing"),
    ),
    "two files exchanged": (
        LAYER_WISE_ODD, exchanged,
        ("no known layout", "layer_wise_optimizer_0.pt|layer_wise_optimizer_1.pt"),
    ),
    "files of two expert ranks exchanged": (
        LAYER_WISE, exchanged,
        ("no known layout", "layer_wise_optimizer_0.pt|layer_wise_optimizer_1.pt"),
    ),
    "a state removed": (
        LAYER_WISE_ODD, layer_wise(1, remove),
        ("optimizer state are not those of", "found none"),
    ),
    "all states removed": (
        LAYER_WISE_ODD, layer_wise(1, lambda e: states(e).clear()),
        ("optimizer state are not those of",),
    ),
    "a state twice": (
        LAYER_WISE_ODD, layer_wise(1, lambda e: states(e).update({90: states(e)[2]})),
        ("state 90 belongs to no parameter",),
    ),
    "a number twice": (
        LAYER_WISE_ODD, layer_wise(1, number_twice), ("0 is not the number of one parameter",),
    ),
    "an unknown state": (
        LAYER_WISE_ODD, layer_wise(1, lambda e: states(e)[2].update(ema=3)),
        ("optimizer state are not those of", "'momentum_buffer', 'ema'"),
    ),
    "an unknown key": (
        LAYER_WISE_ODD, layer_wise(1, lambda e: e[0].update(ema=3)),
        ("unknown optimizer entry 'ema'",),
    ),
    "an optimizer too many": (
        LAYER_WISE_ODD, layer_wise(1, lambda e: e.append(e[0])),
        ("its optimizers are not those of",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYER_WISE_CASES)
def test_odd_layer_wise_files_are_refused(case: str, program: Program, tmp_path: Path) -> None:
    """Where all lie in one folder, and where each has the folder of its expert rank."""
    name, edit, reasons = LAYER_WISE_CASES[case]
    source = copy_of(pair(name).source, tmp_path)
    edit(source)
    target = tmp_path / "target" / "iter_0000001"
    run = program.convert(source, target)
    program.refuses(4, run, "mp_rank_00_001")
    for reason in reasons:
        assert any(part in run.errors for part in reason.split("|")), run.errors
    assert not target.parent.exists(), "nothing is left that looks finished"


def test_a_chain_of_other_optimizers_is_refused(program: Program, tmp_path: Path) -> None:
    """Of which no group tells which parameters it takes."""

    def chain(root: dict[str, Any]) -> None:
        def share(odd: int) -> dict[str, Any]:
            entry = root["optimizer"]
            inner = entry["optimizer"]
            groups = [{**g, "params": g["params"][odd::2]} for g in inner["param_groups"]]
            numbers = {number for group in groups for number in group["params"]}
            states = {n: state for n, state in inner["state"].items() if n in numbers}
            mains = [found[odd::2] for found in entry["fp32_from_fp16_params"]]
            torch_part = {"state": states, "param_groups": groups}
            return {"optimizer": torch_part, "fp32_from_fp16_params": mains}

        root["optimizer"] = [share(0), share(1)]

    source = copy_of(pair(PLAIN).source, tmp_path)
    rewrite_all(source, chain)
    run = program.convert(source, tmp_path / "target")
    program.refuses(4, run, "no known layout", "param group 0 does not have")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("distrib_optim.pt", "distrib_optim.pt beside it is missing"),
        ("model_optim_rng.pt", "model_optim_rng.pt: cannot be read (No such file"),
    ],
)
def test_missing_files_are_named(name: str, reason: str, program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    (source / "mp_rank_00_001" / name).unlink()
    program.refuses(4, program.convert(source, tmp_path / "x"), reason)


def test_a_missing_dense_optimizer_is_noticed(program: Program, tmp_path: Path) -> None:
    """All files of a dense model gone: no rank can tell by itself."""
    source = copy_of(pair(DENSE).source, tmp_path)
    for path in source.glob("*/distrib_optim.pt"):
        path.unlink()
    program.refuses(4, program.convert(source, tmp_path / "x"), "holds the dense optimizer state")


def test_folders_with_and_without_an_expert_rank_are_refused(
    program: Program, tmp_path: Path
) -> None:
    """Of two saves in one place."""
    source = copy_of(pair(MOE).source, tmp_path)
    shutil.copytree(pair(DENSE).source / "mp_rank_00_000", source / "mp_rank_00_000")
    run = program.convert(source, tmp_path / "x")
    program.refuses(4, run, "its folder names do not fit", "expert_model_parallel_size")


def test_folders_of_two_saves_are_refused(program: Program, tmp_path: Path) -> None:
    """Weights of one iteration, optimizer of another."""
    source = copy_of(pair(DENSE).source, tmp_path)

    def train(root: dict[Any, Any]) -> None:
        ((_, states),) = root[0].items()
        states["param"], states["exp_avg"] = states["exp_avg"], states["param"]

    rewrite(source / "mp_rank_00_001" / "distrib_optim.pt", train)
    run = program.convert(source, tmp_path / "x")
    program.refuses(4, run, "mp_rank_00_001", "not their main parameters rounded")


@pytest.mark.parametrize("name", ["layer_wise_optimizer_x.pt", "optim.pt", "model_rng.pt"])
def test_files_of_other_formats_are_refused(name: str, program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    (source / "mp_rank_00_000" / name).write_bytes(b"x")
    program.refuses(4, program.convert(source, tmp_path / "x"), name)


def test_links_out_of_the_checkpoint_are_refused(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    rank = source / "mp_rank_00_001"
    shutil.move(rank, tmp_path / "elsewhere")
    rank.symlink_to(tmp_path / "elsewhere")
    program.refuses(4, program.convert(source, tmp_path / "x"), "link out of the checkpoint")


def test_the_iteration_folder_itself_may_be_a_link(program: Program, tmp_path: Path) -> None:
    link = tmp_path / "linked"
    link.symlink_to(pair(DENSE).source)
    assert program.convert(link, tmp_path / "iter_0000001").status == 0


def test_devices_and_pipes_do_not_hang_the_program(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    path = source / "mp_rank_00_001" / "model_optim_rng.pt"
    path.unlink()
    os.mkfifo(path)
    program.refuses(4, program.convert(source, tmp_path / "x"), "no regular file")


def test_unreadable_files_are_named(program: Program, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    source = copy_of(pair(DENSE).source, tmp_path)
    path = source / "mp_rank_00_001" / "model_optim_rng.pt"
    path.chmod(0)
    program.refuses(4, program.convert(source, tmp_path / "x"), "cannot be read (Permission")


def test_state_that_one_rank_lacks_is_named(program: Program, tmp_path: Path) -> None:
    """A file that holds nothing, as those of families do whose state another one has."""
    source = copy_of(pair(ETP).source, tmp_path)
    holders = [path for path in sorted(source.glob("*/distrib_optim.pt")) if state_in(path)]
    rewrite(holders[-1], lambda root: [None for _ in root])
    run = program.convert(source, tmp_path / "x" / "iter_0000001")
    program.refuses(4, run, f"{holders[-1].parent.name}/model_optim_rng.pt: distrib_optim.pt besi")


def buffers_in(root: Any) -> Iterator[dict[Any, Any]]:
    """What an optimizer file holds of each flat buffer, by dtypes."""
    for entry in root if isinstance(root, list) else [root]:
        yield from (value for value in (entry or {}).values() if isinstance(value, dict))


def lose_second_moments(root: Any) -> None:
    for states in (states for buffer in buffers_in(root) for states in buffer.values()):
        del states["exp_avg_sq"]


def other_gradients(root: Any) -> None:
    for buffer in buffers_in(root):
        ((dtype, _),) = buffer
        buffer[dtype, Global("torch", "bfloat16")] = buffer.popitem()[1]


@pytest.mark.parametrize(
    ("edit", "found"),
    [(lose_second_moments, "'exp_avg', 'numel_unpadded'"), (other_gradients, "torch.bfloat16")],
)
def test_buffers_of_other_entries_are_refused(
    edit: Edit, found: str, program: Program, tmp_path: Path
) -> None:
    """Whatever the target: no buffer of this one would have parameters of two ranks."""
    source = copy_of(pair(DENSE).source, tmp_path)
    rewrite(source / "mp_rank_00_001" / "distrib_optim.pt", edit)
    run = program.convert(source, tmp_path / "x" / "iter_0000001")
    program.refuses(4, run, "mp_rank_00_001", "optimizer state are not those of", found)


def test_families_of_other_entries_are_refused(program: Program, tmp_path: Path) -> None:
    source = copy_of(pair(MOE).source, tmp_path)
    for path in source.glob("*_001/distrib_optim.pt"):
        rewrite(path, lose_second_moments)
    run = program.convert(source, tmp_path / "x" / "iter_0000001")
    program.refuses(
        4, run, "mp_rank_00_000_001: its optimizer states have other entries than those of mp_rank"
    )


def state_in(path: Path) -> bool:
    """Whether an optimizer file holds the state of every optimizer."""
    root = read_torch_file(path).root
    return isinstance(root, list) and None not in root
