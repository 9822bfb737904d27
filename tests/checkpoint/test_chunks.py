"""Model chunks as read from real files: every key in its place, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.checkpoint.chunks import ChunkContents, read_chunks
from pp_to_vpp.checkpoint.family import RankFiles
from pp_to_vpp.container.extents import Zeros
from pp_to_vpp.container.pickling import Global, Instance, Storage, as_mapping, ordered_dict
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron.naming import Section, all_chunk_keys, chunk_keys

from ..compare import load
from ..edit import float_tensor
from ..families import SIDES, families, family
from ..pairs import DEEPSEEK, DENSE, FORK, names

Keys = dict[str, Any]


def files_of(name: str, side: str) -> list[tuple[RankFiles, tuple[ChunkContents, ...]]]:
    """Each rank's files with its chunks."""
    return [(r.files, r.contents) for of in families(name, side) for r in of.ranks.values()]


def real_key(content: ChunkContents, item: Any) -> str:
    """The key of an item in its file, from the global number of its layer."""
    if item.layer is None:
        return str(item.rest)
    return f"{content.stack}.layers.{item.layer - content.chunk.layers.start}{item.rest}"


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_every_key_has_its_place(name: str, side: str) -> None:
    """In the order that torch finds, and with torch's own opinion of what a tensor is."""
    for files, contents in files_of(name, side):
        root = load(Path(files.model.path))
        chunks = [root[key] for key in root if key.startswith("model")]
        for chunk, content in zip(chunks, contents, strict=True):
            assert [real_key(content, item) for item in content.items] == list(chunk)
            for item in content.items:
                value = chunk[real_key(content, item)]
                assert (item.tensor is not None) == isinstance(value, torch.Tensor)
                assert item.tensor is not None or not item.is_parameter
            assert content.parameters == tuple(i for i in content.items if i.is_trained)
            modules = content.modules
            assert modules is not None
            assert len(modules) == len(chunk._metadata)
            paths = [
                m.rest
                if m.layer is None
                else f"{content.stack}.layers.{m.layer - content.chunk.layers.start}{m.rest}"
                for m in modules
            ]
            assert paths == list(chunk._metadata)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_sections_are_where_the_layout_puts_them(name: str, side: str) -> None:
    for _, contents in files_of(name, side):
        for content in contents:
            found = [item.section for item in content.items]
            assert found == sorted(found), "in the order of registration"
            assert set(found) - {Section.LAYERS} == set(content.chunk.sections)
            layers = [item.layer for item in content.items if item.layer is not None]
            assert set(layers) == set(content.chunk.layers) - content.chunk.noop_layers
            for item in content.items:
                assert (item.section is Section.LAYERS) == (item.layer is not None)


@pytest.mark.parametrize("name", names())
def test_names_are_those_of_the_whole_model(name: str) -> None:
    """Unique in a family, and the same on both sides: no layout changes them."""
    for source, truth in zip(families(name, "source"), families(name, "truth"), strict=True):
        sides = [[item.name for item in of.items()] for of in (source, truth)]
        assert len(set(sides[0])) == len(sides[0])
        assert set(sides[0]) == set(sides[1])


@pytest.mark.parametrize("name", names())
def test_modules_stand_behind_the_same_section_on_both_sides(name: str) -> None:
    """Those of layers and sections, at least: containers stand where their chunk begins."""

    def placed(side: str) -> set[tuple[object, ...]]:
        return {
            (m.section, m.after, m.layer, m.rest)
            for _, contents in files_of(name, side)
            for content in contents
            for m in content.modules or ()
            if m.section is not None
        }

    assert placed("source") == placed("truth")


@given(st.integers(1, 12), st.randoms())
def test_chunks_are_told_by_their_keys(count: int, random: Any) -> None:
    numbered = [f"model{stage}" for stage in range(count)]
    others = ["args", "modeling", "model_x", "modelx1", "optimizer", 7, "model-1", "model00000"]
    random.shuffle(others)
    assert chunk_keys(dict.fromkeys([*others[:4], *numbered, *others[4:]])) == tuple(numbered)
    assert chunk_keys(dict.fromkeys(["args", "model", *others])) == ("model",)
    assert chunk_keys(dict.fromkeys(others)) == ()
    copied = [f"ema_{key}" for key in numbered]
    root = dict.fromkeys([*copied, *others[:4], *numbered, *others[4:]])
    assert (chunk_keys(root), chunk_keys(root, "ema_model")) == (tuple(numbered), tuple(copied))
    assert all_chunk_keys(root) == (*numbered, *copied)
    assert chunk_keys(dict.fromkeys(["ema_model", "model"]), "ema_model") == ("ema_model",)


def chunk_with(edit: Callable[[Keys], Keys | None], name: str, pp_rank: int) -> dict[str, Any]:
    """A real rank file, with one of its chunks' keys edited."""
    root = dict(family(name, "source").ranks[pp_rank].root)
    keys = dict(as_mapping(root["model"]) or {})
    changed = edit(keys)
    root["model"] = ordered_dict(keys if changed is None else changed)
    return root


def read(root: dict[str, Any], name: str, pp_rank: int) -> tuple[ChunkContents, ...]:
    return read_chunks(root, family(name, "source").layout, pp_rank, "file")


def moved_to(key: str, place: int) -> Callable[[Keys], Keys]:
    def edit(keys: Keys) -> Keys:
        found = [one for one in keys if one != key]
        found.insert(place, key)
        return {one: keys[one] for one in found}

    return edit


def put(key: str, place: int, value: object = None) -> Callable[[Keys], Keys]:
    def edit(keys: Keys) -> Keys:
        return moved_to(key, place)(
            {**keys, key: float_tensor(bytes(4)) if value is None else value}
        )

    return edit


def without(part: str) -> Callable[[Keys], Keys]:
    return lambda keys: {key: value for key, value in keys.items() if part not in key}


_WEIGHT = "decoder.layers.1.mlp.linear_fc1.weight"

REFUSED: dict[str, tuple[Callable[[Keys], Keys | None], int, str]] = {
    "layer too many": (put("decoder.layers.4.x.weight", 40), 0, "expected 4 layers, found 5"),
    "layer missing": (without("layers.2."), 0, "expected 4 layers, found 3"),
    "no layers": (without("layers."), 0, "expected 4 layers, found none"),
    "no embedding": (without("embedding"), 0, "puts embedding here, but no key does"),
    "no head": (without("output_layer"), 1, "puts head here, but no key does"),
    "unknown key in the middle": (put("odd.weight", 30), 0, "no rule says .* key 'odd.weight'"),
    "rotary buffer": (put("rotary_pos_emb.inv_freq", 0), 1, "no rule .*'rotary_pos_emb.inv_freq'"),
    "head on the first rank": (put("output_layer.weight", 68), 0, "'output_layer.weight'"),
    "embedding on the last": (put("embedding.x.weight", 0), 1, "'embedding.x.weight'"),
    "mtp without mtp": (put("mtp.layers.0.x.weight", 66), 1, "'mtp.layers.0.x.weight'"),
    "embedding behind the layers": (
        moved_to("embedding.word_embeddings.weight", 60), 0, "stands after keys of layers",
    ),
    "layer behind the head": (moved_to(_WEIGHT, 67), 1, "stands after keys of head"),
    "two stacks": (put("encoder.layers.0.x.weight", 20), 0, "encoder and decoder layers"),
    "no tensor": (put(_WEIGHT, 9, "text"), 0, "layers.1.mlp.linear_fc1.weight is no plain tensor"),
    "number for a name": (lambda keys: {**keys, 7: 1}, 0, "is no state dict"),  # type: ignore[dict-item]
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused(case: str) -> None:
    edit, pp_rank, reason = REFUSED[case]
    with pytest.raises(CheckpointError, match=reason):
        read(chunk_with(edit, DENSE, pp_rank), DENSE, pp_rank)


def test_a_transposed_weight_must_fill_its_storage() -> None:
    of = family(DENSE, "source")
    (item,) = (i for i in of.items() if i.name == _WEIGHT)
    storage, offset, shape, stride, *rest = item.value.arguments
    turned = Instance(item.value.factory, (storage, offset, shape[::-1], stride[::-1], *rest))
    with pytest.raises(CheckpointError, match=rf"{_WEIGHT} is not contiguous, .* found strides \("):
        read(chunk_with(put(_WEIGHT, 9, turned), DENSE, 0), DENSE, 0)
    own = Storage(storage.type, "cpu", item.weight.numel, (Zeros(2 * item.weight.numel),))
    turned = Instance(item.value.factory, (own, 0, shape[::-1], stride[::-1], *rest))
    found = read(chunk_with(put(_WEIGHT, 9, turned), DENSE, 0), DENSE, 0)
    (weight,) = (i.weight for content in found for i in content.items if i.name == _WEIGHT)
    assert weight.has_own_storage
    assert not weight.is_contiguous


def test_a_tensor_out_of_its_storage_is_refused() -> None:
    of = family(DENSE, "source")
    (item,) = (i for i in of.items() if i.name == _WEIGHT)
    storage, _, *rest = item.value.arguments
    out = Instance(item.value.factory, (storage, storage.numel, *rest))
    with pytest.raises(CheckpointError, match=rf"file \(model\), {_WEIGHT}: a tensor of elements"):
        read(chunk_with(put(_WEIGHT, 9, out), DENSE, 0), DENSE, 0)


@pytest.mark.parametrize(
    ("key", "place", "pp_rank", "section"),
    [
        ("rotary.inv_freq", 0, 0, Section.EMBEDDING),
        ("quite.new.weight", 2, 0, Section.EMBEDDING),
        ("quite.new.weight", 68, 1, Section.HEAD),
        ("decoder.final_norm.weight", 65, 1, Section.FINAL_NORM),
    ],
)
def test_unknown_names_belong_to_the_front_or_the_end(
    key: str, place: int, pp_rank: int, section: Section
) -> None:
    (content,) = read(chunk_with(put(key, place), DENSE, pp_rank), DENSE, pp_rank)
    (item,) = (item for item in content.items if item.name == key)
    assert item.section is section


def test_models_may_have_no_final_norm() -> None:
    (content,) = read(chunk_with(without("final_layernorm"), DENSE, 1), DENSE, 1)
    assert Section.FINAL_NORM not in {item.section for item in content.items}


def test_the_chunks_must_be_those_of_the_layout() -> None:
    of = family(DENSE, "source")
    root = dict(of.ranks[0].root)
    chunk = root.pop("model")
    for keys in ((), ("model0",), ("model0", "model1"), ("model1",)):
        with pytest.raises(CheckpointError, match=r"model chunks are not those.*expected model,"):
            read({**root, **dict.fromkeys(keys, chunk)}, DENSE, 0)
    truth = family(DENSE, "truth")
    with pytest.raises(CheckpointError, match="expected model0, model1, found model;"):
        read_chunks({**root, "model": chunk}, truth.layout, 0, "file")


@pytest.mark.parametrize("node", [None, 3, [1], Instance(Global("a", "b"), ())])
def test_a_chunk_is_a_state_dict(node: object) -> None:
    root = {**family(DENSE, "source").ranks[0].root, "model": node}
    with pytest.raises(CheckpointError, match="is no state dict"):
        read(root, DENSE, 0)


def test_metadata_may_be_missing() -> None:
    """As in chunks that somebody rebuilt as plain dicts."""
    keys = as_mapping(family(DENSE, "source").ranks[0].root["model"])
    (content,) = read({"model": keys}, DENSE, 0)
    assert content.modules is None
    assert len(content.items) == len(keys or ())


def test_the_mtp_copy_of_the_embedding_is_another_tensor() -> None:
    of = family(DEEPSEEK, "truth")
    (one,), (copy,) = of.sections[Section.EMBEDDING], of.sections[Section.MTP_EMBEDDING]
    assert one.rest == copy.rest
    assert one.name != copy.name


@pytest.mark.parametrize(("name", "own", "other"), [(DENSE, 0, 1), (FORK, 1, 3), (DEEPSEEK, 1, 0)])
def test_the_file_of_another_pipeline_rank_is_named(name: str, own: int, other: int) -> None:
    """Where layers or sections differ, which are called alike on all ranks."""
    of = family(name, "source")
    root = as_mapping(of.ranks[other].files.model.root)
    assert root is not None
    line = f"expected those of pipeline rank {own}, found those of {other}; folders were copied"
    with pytest.raises(CheckpointError, match=line):
        read(dict(root), name, own)
