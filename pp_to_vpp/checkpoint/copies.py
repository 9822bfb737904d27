"""The copies of the word embedding, as another run has them.

They begin equal, and their gradients are summed before each step, so a copy has the weight, the
main parameter and the states of the embedding (language_module.py
``setup_embeddings_and_output_layer``, finalize_model_grads.py, 0.6 to 0.19). A copy that the source
does not have is made of the embedding's bytes, and one that the target does not have is dropped if
it is equal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from ..container.pickling import is_same
from ..container.tensors import TensorRef, as_tensor, duplicated, unwrap_tensor
from ..errors import CheckpointError
from ..megatron import naming
from ..megatron.megatron import Megatron
from ..megatron.naming import Section
from ..megatron.optimizer_chain import OptimizerKind
from ..megatron.param_groups import key_of_item
from ..megatron.parameters import Item, is_layer_matrix
from .family import Family, TensorName
from .flat_states import FlatState
from .plain_states import MAIN, PlainState


def with_copies_of(family: Family, target: Megatron) -> Family:
    """The family with the copies that a run has, and no others, where the embedding was read.

    Raises:
        CheckpointError: a copy is not trained as the embedding is.
    """
    sections, states, made = dict(family.sections), dict(family.states), set[str]()
    embedding = sections.get(Section.EMBEDDING, ())
    for section in family.megatron.dropped_for(target):
        dropped = {item.name for item in _seconds(family, section)}
        own = sections.get(section, ())
        sections[section] = tuple(item for item in own if item.name not in dropped)
        states = {name: state for name, state in states.items() if name not in dropped}
    for section in family.megatron.made_for(target):
        copies = list(_copies(section, sections.get(section, ()), embedding))
        for original, copy in copies:
            _check_alike(original, copy, family)
            states.pop(copy.name, None)
            if original.name in states:
                states[copy.name] = _duplicate(states[original.name])
        sections[section] = _with([copy for _, copy in copies], sections.get(section, ()))
        made |= {copy.name for _, copy in copies}
    return replace(family, sections=sections, states=states, made=frozenset(made))


def tensors_of_copies(
    family: Family, sections: Collection[Section]
) -> Iterator[tuple[TensorName, TensorRef | None, TensorRef | None]]:
    """The tensors of the copies in some sections beside those of the embedding, where both were
    read; None for one that is missing, or that is not like the other but for bytes."""
    originals = {
        (item.model, item.rest): item for item in family.sections.get(Section.EMBEDDING, ())
    }
    for copy in (item for section in sections for item in _seconds(family, section)):
        is_output = naming.is_output_weight(copy.rest)
        rest = naming.WORD_EMBEDDING if is_output else copy.rest
        original = originals.get((copy.model, rest))
        if original is None and originals:
            yield TensorName(copy.name, ""), copy.tensor, None
        if original is None:
            continue
        both = [family.manifest([item]) for item in (copy, original)]
        ours, theirs = ({name.kind: tensor for name, tensor in of.items()} for of in both)
        are_alike = is_same(*(list(family.values(item)) for item in (copy, original)))
        for kind in dict.fromkeys((*ours, *theirs)):
            one, other = ours.get(kind), theirs.get(kind)
            is_like = one is not None and other is not None and one.form == other.form
            yield TensorName(copy.name, kind), one, other if is_like and are_alike else None


def _seconds(family: Family, section: Section) -> Iterator[Item]:
    """The items of a section that are copies: of the whole embedding beside MTP layers."""
    for item in family.sections.get(section, ()):
        if section is Section.MTP_EMBEDDING or naming.is_output_weight(item.rest):
            yield item


def _copies(
    section: Section, there: Sequence[Item], embedding: Sequence[Item]
) -> Iterator[tuple[Item, Item]]:
    """What is copied, and its copy in a section; of a weight that is there and never used only the
    bytes are others."""
    unused = {item.model: item for item in there if naming.is_output_weight(item.rest)}
    for item in embedding:
        rest = item.rest
        if section is Section.HEAD:
            if not naming.is_word_embedding(rest):
                continue
            rest = naming.OUTPUT_WEIGHT
        name = naming.name_in(item.model, naming.global_name(section, rest))
        copy = unused.get(item.model) or replace(item, section=section, name=name, rest=rest)
        value = duplicated(item.value)
        yield item, replace(copy, value=value, tensor=as_tensor(value))


def _with(copies: Sequence[Item], there: Sequence[Item]) -> tuple[Item, ...]:
    """The items of a section with copies: before the rest of the output layer."""
    items: list[Item] = []
    waiting = list(copies)
    for item in there:
        if naming.is_of_output_layer(item.rest):
            items += (copy for copy in waiting if copy.model == item.model)
            waiting = [copy for copy in waiting if copy.model != item.model]
        if not naming.is_output_weight(item.rest):
            items.append(item)
    return (*items, *waiting)


def _check_alike(original: Item, copy: Item, family: Family) -> None:
    """A copy stays one if both are trained alike.

    Raises:
        CheckpointError: they are not.
    """
    megatron = family.megatron
    is_alike = original.is_trained == copy.is_trained
    if is_alike and original.is_trained and family.kind is not OptimizerKind.NONE:
        keys = {key_of_item(item, megatron) for item in (original, copy)}
        matrices = {is_layer_matrix(item, megatron) for item in (original, copy)}
        is_alike = len(keys) == 1 and (len(matrices) == 1 or not family.routes_matrices)
    if not is_alike:
        raise CheckpointError.of(
            family.any_rank.files.model.path,
            f"the target has {copy.name}, a copy of the word embedding that is not trained as the "
            "embedding is: its optimizer state follows from nothing",
            cure="ask for a layout with the copies that the source has",
        )


def _duplicate(state: FlatState | PlainState) -> FlatState | PlainState:
    """A state with storages of its own."""
    if isinstance(state, FlatState):
        return state
    entry = state.entry and {name: duplicated(part) for name, part in state.entry.items()}
    main = duplicated(state.main_node)
    values = {**(entry or {}), MAIN: main}
    tensors = {name: unwrap_tensor(values[name]) for name in state.tensors}
    return PlainState(entry, main, {name: t for name, t in tensors.items() if t is not None})
