"""Copies of the word embedding: made for a run that has them, and held to the embedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pp_to_vpp.checkpoint.copies import with_copies_of
from pp_to_vpp.checkpoint.family import Family, TensorName
from pp_to_vpp.container.tensors import TensorRef
from pp_to_vpp.errors import CheckpointError
from pp_to_vpp.megatron import naming
from pp_to_vpp.megatron.forms import LayoutString
from pp_to_vpp.megatron.naming import Section
from pp_to_vpp.megatron.placement import Placement
from pp_to_vpp.options import Depth
from pp_to_vpp.target.request import notes

from ..compare import differences
from ..edit import copy_of, flip_byte
from ..families import family
from ..inline import run
from ..pairs import TIED_MTP, pair
from ..runs import Program

WEIGHT, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


def tensors_of(of: Family, parameter: str) -> dict[str, TensorRef]:
    """Weight and states of a parameter."""
    return {name.kind: tensor for name, tensor in of.manifest().items() if name[0] == parameter}


def bytes_of(of: Family, parameter: str) -> dict[str, bytes]:
    """Their bytes."""
    found: dict[str, bytes] = {}
    for kind, tensor in tensors_of(of, parameter).items():
        extent = tensor.extent
        with Path(extent.path).open("rb") as file:
            file.seek(extent.offset)
            found[kind] = file.read(extent.length)
    return found


def placement(side: str) -> Placement:
    """That of one side of the pair."""
    return family(TIED_MTP, side).megatron.arguments.placement


@pytest.mark.parametrize("depth", list(Depth))
def test_a_tied_weight_is_made_of_the_embedding(depth: Depth, tmp_path: Path) -> None:
    """Beside MTP layers the source has one that no forward uses."""
    case, target = pair(TIED_MTP), tmp_path / "iter_0000002"
    assert bytes_of(family(TIED_MTP, "source"), WEIGHT) != bytes_of(
        family(TIED_MTP, "source"), EMBEDDING
    )
    run(case.source, target, placement("truth"), depth)
    assert differences(target, case.truth, case.source) == []


def test_one_rank_alone_is_made_of_the_ranks_that_it_needs(
    program: Program, tmp_path: Path
) -> None:
    case, target = pair(TIED_MTP), tmp_path / "iter_0000002"
    for pp_rank in ("2", "1", "0"):
        one = ("--pipeline-ranks-to-process", pp_rank)
        assert program.convert(case.source, target, case.options, *one).status == 0
    assert differences(target, case.truth, case.source) == []


def test_what_no_forward_uses_keeps_its_value(tmp_path: Path) -> None:
    case, back = pair(TIED_MTP), tmp_path / "iter_0000002"
    run(case.truth, back, placement("source"), Depth.FULL)
    found = differences(back, case.source, case.truth)
    assert found
    assert all(text.startswith("mp_rank_00_002") for text in found)
    assert bytes_of(family(TIED_MTP, "truth"), WEIGHT) == bytes_of(
        family(TIED_MTP, "truth"), EMBEDDING
    )
    there = tmp_path / "there" / "iter_0000002"
    run(back, there, placement("truth"), Depth.FULL)
    assert differences(there, case.truth, case.truth) == []


def test_both_ways_are_told() -> None:
    source, truth = (family(TIED_MTP, side).megatron for side in ("source", "truth"))
    (made,), (kept,) = notes(source, truth), notes(truth, source)
    assert "is made of the word embedding" in made
    assert "keeps its value" in kept
    assert notes(source, source) == []


@pytest.mark.parametrize("kind", ["", "exp_avg", "main parameter"])
def test_a_changed_byte_of_a_copy_is_found(kind: str, program: Program, tmp_path: Path) -> None:
    case = pair(TIED_MTP)
    target = copy_of(case.truth, tmp_path)
    extent = tensors_of(family(TIED_MTP, "truth"), WEIGHT)[kind].extent
    flip_byte(target / extent.path[len(str(case.truth)) + 1 :], extent.offset + extent.length // 2)
    verified = program(
        "--load-iteration-dir", case.source, "--save-iteration-dir", target, "--verify", "full"
    )
    program.refuses(6, verified, f"{TensorName(WEIGHT, kind)} differs from its source")


def without(of: Family, names: set[str], layout: str, *, pp_size: int) -> Family:
    """A family of a run that has no such items."""
    arguments = replace(
        of.megatron.arguments, placement=Placement(1, LayoutString(layout)), pp_size=pp_size
    )
    sections = {
        section: tuple(item for item in items if item.name not in names)
        for section, items in of.sections.items()
    }
    return replace(of, megatron=replace(of.megatron, arguments=arguments), sections=sections)


def test_copies_are_made_where_there_are_none() -> None:
    """As from one pipeline rank, whose head has no weight and whose MTP layers no embedding."""
    of = family(TIED_MTP, "truth")
    mtp = naming.global_name(Section.MTP_EMBEDDING, EMBEDDING)
    bare = without(of, {WEIGHT, mtp}, "EttmL", pp_size=1)
    assert bare.megatron.embedding_copies == frozenset()
    found = with_copies_of(bare, of.megatron)
    assert found.made == {WEIGHT, mtp}
    for section, items in of.sections.items():
        assert [item.name for item in found.sections[section]] == [item.name for item in items]
    embedding = tensors_of(of, EMBEDDING)
    for name in (WEIGHT, mtp):
        for kind, tensor in tensors_of(found, name).items():
            assert (tensor.extent, tensor.form) == (embedding[kind].extent, embedding[kind].form)
            assert tensor.storage is not embedding[kind].storage, "written, they would be one"
    assert with_copies_of(of, of.megatron).made == frozenset()


def test_a_copy_that_is_trained_in_another_way_is_refused() -> None:
    """By older rules the MTP layers' copy has no decoupled learning rate."""
    of = family(TIED_MTP, "truth")
    mtp = naming.global_name(Section.MTP_EMBEDDING, EMBEDDING)
    bare = without(of, {mtp}, "Ettm||L", pp_size=3)
    for is_marked in (True, False):
        rules = replace(of.megatron.rules, marks_mtp_embedding=is_marked)
        arguments = replace(bare.megatron.arguments, decoupled_lr=True)
        own = replace(bare, megatron=replace(bare.megatron, rules=rules, arguments=arguments))
        if is_marked:
            assert with_copies_of(own, of.megatron).made == {mtp}
            continue
        with pytest.raises(CheckpointError, match="not trained as the embedding"):
            with_copies_of(own, of.megatron)
