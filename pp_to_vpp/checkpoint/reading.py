"""A family read from its files, by each set of rules that explains them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..container.pickling import as_mapping
from ..container.tensors import TensorRef
from ..errors import (
    AS_SAVED,
    COPY_MISSING,
    FROM_MEGATRON,
    ONE_SAVE,
    CheckpointError,
    LayoutError,
    located,
    show,
)
from ..megatron.arguments import SavedArguments, read_arguments
from ..megatron.buffers import buffers_of
from ..megatron.megatron import Megatron
from ..megatron.naming import Section
from ..megatron.optimizer_chain import (
    ChainedOptimizer,
    OptimizerKind,
    chain_in_rank_order,
    chain_of,
    has_expert_optimizer,
    has_optimizer,
    share_of,
)
from ..megatron.param_groups import STEP
from ..megatron.parameters import Item, Parameters
from ..megatron.ranks import layer_wise_file
from ..megatron.rules import Rules, candidates
from .chunks import ChunkContents, read_chunks
from .family import Family, RankFiles, SourceOptimizer, SourceRank
from .flat_states import FlatState, RankStates, Unexplained, are_views_of_buffers, read_flat_states
from .layer_wise_states import read_layer_wise_states, told_trained
from .optimizer_entries import OPTIMIZER, OptimizerEntry, first_groups, read_entries, routed_chain
from .plain_states import PlainState, read_plain_states
from .trained import Agreement, answers, marked, told_groups, without_trained

_CHECKPOINT_VERSION = 3.0


def read_family(
    files: Mapping[int, RankFiles],
    agree: Callable[[TensorRef, TensorRef, Sequence[str]], bool],
    only: Rules | None = None,
    frozen: Collection[str] | None = None,
) -> Iterator[Family]:
    """The inventory of a family, under each set of rules that explains its files, likeliest first;
    last those in which main parameters tell what the rules do not.

    Args:
        files: the decoded files of some or all ranks of the family, by pipeline rank.
        agree: compares weights with main parameters, where nothing else tells which are trained,
            given the ways in which they may follow.
        only: the rules to try, where they are known.
        frozen: names of the parameters that are not trained, where they are known.

    Raises:
        CheckpointError: when iterated, if no rules explain the files.
    """
    first = next(iter(files.values()))
    where = first.model.path
    arguments = read_arguments(rank_root(first), where)
    for rank_files in files.values():
        _check_arguments(rank_files, arguments)

    def may_follow(weight: TensorRef, main: TensorRef) -> bool:
        return agree(weight, main, arguments.ways)

    failures: list[CheckpointError | Unexplained] = []
    is_explained = False
    kinds = {_optimizer_kind(of, arguments) for of in files.values()}
    is_plain = OptimizerKind.PLAIN in kinds
    has_buffers = not (is_plain or OptimizerKind.LAYER_WISE in kinds)
    has_instances = arguments.optimizer_instances > 1
    doubted = candidates(arguments.names, has_buffers=has_buffers, has_instances=has_instances)
    tried = list(doubted) if only is None else [only]
    ways = itertools.product((False, True) if is_plain else (False,), tried)
    for is_told, rules in ways:
        try:
            reading = _Reading(Megatron(arguments, rules), may_follow, is_told, frozen)
            with located(f"{where}, or a file of its family"):  # who reads a file knows it better
                family = _read_family(files, reading)
        except (CheckpointError, Unexplained) as failure:
            failures.append(failure)
        except LayoutError as error:
            failures.append(CheckpointError(*(f"{where}: {line}" for line in error.problems)))
        else:
            is_explained = True
            yield family
    if is_explained:
        return
    if isinstance(failures[0], CheckpointError):
        raise failures[0]
    mismatches = dict.fromkeys(str(failure) for failure in failures)
    raise CheckpointError.of(
        where,
        "no known layout of Megatron's buffers explains this family of ranks "
        f"({'; or '.join(list(mismatches)[:3])}; {len(failures)} ways tried)",
        cure="unknown buffers and rewritten files cannot be converted exactly: convert a "
        "checkpoint that Megatron itself saved, without them",
    )


def rank_root(files: RankFiles) -> Mapping[Any, Any]:
    """The top level of a rank file.

    Raises:
        CheckpointError: it is none of a version that can be converted.
    """
    root = as_mapping(files.model.root)
    if root is None:
        raise CheckpointError.of(
            files.model.path,
            "it is no dictionary",
            found=show(files.model.root),
            cure=FROM_MEGATRON,
        )
    version = root.get("checkpoint_version")
    if version != _CHECKPOINT_VERSION or not isinstance(version, float):
        raise CheckpointError.of(
            files.model.path,
            "unsupported checkpoint version",
            expected=_CHECKPOINT_VERSION,
            found=show(version),
            cure="load and save it once with Megatron-Core 0.8 or later",
        )
    return root


def megatron_of(files: RankFiles, rules: Rules) -> Megatron:
    """The run that a rank's own arguments tell."""
    return Megatron(read_arguments(rank_root(files), files.model.path), rules)


@dataclass(frozen=True, slots=True)
class _Reading:
    """How a family is read."""

    megatron: Megatron
    agree: Agreement
    is_told: bool
    """The main parameters of an optimizer that is not distributed are asked which parameters are
    trained and in which groups, instead of the rules."""
    frozen: Collection[str] | None
    """Names of the parameters that are not trained; None where the files are asked."""


def _read_family(files: Mapping[int, RankFiles], reading: _Reading) -> Family:
    megatron = reading.megatron
    kinds = {pp_rank: _optimizer_kind(of, megatron.arguments) for pp_rank, of in files.items()}
    kind = next(
        (own for own in kinds.values() if own is not OptimizerKind.NONE), OptimizerKind.NONE
    )
    ranks: dict[int, SourceRank] = {}
    layers: dict[int, list[Item]] = {}
    sections: dict[Section, list[Item]] = {}
    states: dict[str, FlatState | PlainState] = {}
    for pp_rank, rank_files in files.items():
        contents = _contents(rank_files, pp_rank, kinds[pp_rank], kind, reading)
        rank, rank_states = _read_rank(rank_files, pp_rank, contents, kinds[pp_rank], reading)
        if kinds[pp_rank] is not kind and has_optimizer(rank.parameters, megatron):
            raise CheckpointError.of(
                rank_files.model.path, f"its siblings hold {kind.value}, it does not", cure=ONE_SAVE
            )
        ranks[pp_rank] = rank
        states |= rank_states
        for item in (item for content in rank.contents for item in content.all_items):
            if item.layer is not None:
                layers.setdefault(item.layer, []).append(item)
            else:
                sections.setdefault(item.section, []).append(item)
    family = Family(
        megatron=megatron,
        kind=kind,
        ranks=ranks,
        layers={layer: tuple(items) for layer, items in layers.items()},
        sections={section: tuple(items) for section, items in sections.items()},
        states=states,
    )
    _check_stacks(family)
    if kind is OptimizerKind.DISTRIBUTED:
        _check_optimizers(family)
    _check_states(family)
    return family


def _check_arguments(files: RankFiles, first: SavedArguments) -> None:
    """All ranks of a run have the same arguments, as far as they matter here."""
    where = files.model.path
    own = replace(read_arguments(rank_root(files), where), names=first.names)
    if own != first:
        names = [field.name for field in fields(own)]
        odd = next(name for name in names if getattr(own, name) != getattr(first, name))
        raise CheckpointError.of(
            where,
            f"its arguments are not those of its siblings ({odd})",
            expected=getattr(first, odd),
            found=getattr(own, odd),
            cure=ONE_SAVE,
        )


def _check_stacks(family: Family) -> None:
    """The layers of all ranks stand in the same stack."""
    for rank in family.ranks.values():
        for content in rank.contents:
            if content.stack not in (None, family.stack):
                raise CheckpointError.of(
                    rank.files.model.path,
                    "its layers are not called as those of its siblings",
                    expected=f"{family.stack}.layers",
                    found=f"{content.stack}.layers",
                    cure=ONE_SAVE,
                )


def _check_optimizers(family: Family) -> None:
    """Every rank must chain the optimizers, and have the file, that the rules expect."""
    arguments, others_have = family.megatron.arguments, family.has_expert_optimizer
    for rank in family.ranks.values():
        where = rank.files.model.path
        has_experts = any(own.kind.is_expert for own in rank.optimizers)
        if has_experts != has_expert_optimizer(
            rank.parameters, family.megatron, others_have=others_have
        ):
            there = "there" if has_experts else "not there"
            raise Unexplained(f"an expert optimizer is {there} ({where})")
        # Families share the state of experts only where those have fewer tensor-parallel ranks
        # (FORMAT 1.3).
        needs_file = (has_experts and arguments.etp_size == arguments.tp_size) or any(
            family.holds_state(is_expert=own.kind.is_expert) for own in rank.optimizers
        )
        if needs_file and rank.files.optimizer is None:
            raise CheckpointError.of(
                where, "distrib_optim.pt beside it is missing", cure=COPY_MISSING
            )
        for own in rank.optimizers:
            is_wanted = family.holds_state(is_expert=own.kind.is_expert)
            has_buffers = rank.buffers is not None and rank.buffers.of(own.kind)
            if is_wanted and has_buffers and not own.holds_state:
                kind = "expert" if own.kind.is_expert else "dense"
                raise CheckpointError.of(
                    where,
                    f"distrib_optim.pt beside it has no {kind} optimizer state, its siblings' have",
                    cure=ONE_SAVE,
                )


def _check_states(family: Family) -> None:
    """All states that one kind of optimizer keeps have the same entries: else some were lost."""
    for kind, item, state in family.kept_states():
        first, expected = family.state_entries[kind]
        if set(state.entries) != set(expected):
            paths = [tensor.extent.path for tensor in state.tensors.values()]
            raise CheckpointError.of(
                paths[0] if paths else family.any_rank.files.model.path,
                f"the entries of {item.name}'s optimizer state are not those of {first}'s",
                expected=", ".join(map(show, expected)) or "none",
                found=", ".join(map(show, state.entries)) or "none",
                cure=AS_SAVED,
            )


def _optimizer_kind(files: RankFiles, arguments: SavedArguments) -> OptimizerKind:
    if files.layer_wise:
        if files.optimizer is not None:
            raise CheckpointError.of(
                files.optimizer.path,
                f"it lies beside {layer_wise_file(min(files.layer_wise.own))}, and no optimizer "
                "has files of both kinds",
                cure=ONE_SAVE,
            )
        return OptimizerKind.LAYER_WISE
    if OPTIMIZER in rank_root(files):
        if arguments.uses_layer_wise_optimizer:
            raise CheckpointError.of(
                files.model.path,
                f"beside it {layer_wise_file(files.id.ep_rank or 0)} is missing",
                expected="the files of a layer-wise optimizer, as its arguments tell",
                cure=COPY_MISSING,
            )
        if arguments.uses_distributed_optimizer:
            return OptimizerKind.DISTRIBUTED
        return OptimizerKind.PLAIN
    if files.optimizer is not None:
        raise CheckpointError.of(
            files.model.path,
            "it has no 'optimizer' entry although distrib_optim.pt is there",
            cure="use files of one save; to convert weights only, remove distrib_optim.pt",
        )
    return OptimizerKind.NONE


def _contents(
    files: RankFiles, pp_rank: int, own: OptimizerKind, kind: OptimizerKind, reading: _Reading
) -> tuple[ChunkContents, ...]:
    """The chunks of a rank, with what is known of frozen parameters.

    Args:
        files: of the rank.
        pp_rank: which.
        own: kind of its optimizer.
        kind: that of its siblings.
        reading: how it is read.
    """
    megatron, where = reading.megatron, files.model.path
    contents = read_chunks(rank_root(files), megatron.layout, pp_rank, where)
    if reading.frozen is not None:
        names = reading.frozen
        parameters = (item for content in contents for item in content.parameters)
        return marked(contents, {item for item in parameters if item.name in names})
    if own is not kind and not megatron.rules.keeps_all_groups:
        return without_trained(contents, megatron)
    return contents


def _read_rank(
    files: RankFiles,
    pp_rank: int,
    contents: tuple[ChunkContents, ...],
    kind: OptimizerKind,
    reading: _Reading,
) -> tuple[SourceRank, Mapping[str, FlatState | PlainState]]:
    """A rank's files, understood, and the optimizer states in them."""
    megatron = reading.megatron
    if kind is OptimizerKind.LAYER_WISE:
        return _trained_layer_wise(files, contents, reading)
    if kind is OptimizerKind.PLAIN:
        return _with_plain(files, contents, megatron, reading.agree if reading.is_told else None)
    if not megatron.arguments.uses_distributed_optimizer:
        return SourceRank(files, rank_root(files), contents, ()), {}
    found: list[tuple[SourceRank, Mapping[str, FlatState]]] = []
    failures: list[Unexplained] = []
    at_hand = [file.root for file in (files.optimizer, files.dense) if file is not None]
    roots = None if kind is OptimizerKind.NONE else at_hand
    is_known = reading.frozen is not None
    for answer in (contents,) if is_known else answers(contents, roots, megatron, reading.agree):
        try:
            found.append(_with_buffers(files, pp_rank, answer, megatron, kind))
        except Unexplained as failure:
            failures.append(failure)
        if found and (answer is contents or kind is OptimizerKind.NONE):
            break  # nothing is frozen, or nothing tells
    if len(found) > 1:
        raise Unexplained("more than one way to tell frozen parameters from trained ones")
    if not found and kind is OptimizerKind.NONE:
        buffers = buffers_of([content.items for content in contents], pp_rank, megatron)
        return SourceRank(files, rank_root(files), contents, (), buffers), {}
    if not found:
        raise failures[0]
    return found[0]


def _with_plain(
    files: RankFiles,
    contents: tuple[ChunkContents, ...],
    megatron: Megatron,
    agree: Agreement | None,
) -> tuple[SourceRank, Mapping[str, PlainState]]:
    root, where = rank_root(files), files.model.path
    entries = read_entries(root[OPTIMIZER], where)
    chain = _chain(entries, [content.parameters for content in contents], megatron, where)
    if agree is not None:
        contents = told_groups(contents, entries, chain, megatron, agree)
    parameters = [content.parameters for content in contents]
    first = first_groups(chain, entries)
    if chain_in_rank_order(chain, first, lambda: [parameters], megatron) != chain:
        raise Unexplained(f"its optimizers stand in another order than computed ({where})")
    share = share_of(parameters, chain, megatron)
    states = read_plain_states(entries, chain, share, where)
    optimizers = (
        SourceOptimizer(*own, holds_state=False) for own in zip(chain, entries, share, strict=True)
    )
    return SourceRank(files, root, contents, tuple(optimizers)), states


def _with_buffers(
    files: RankFiles,
    pp_rank: int,
    contents: tuple[ChunkContents, ...],
    megatron: Megatron,
    kind: OptimizerKind,
) -> tuple[SourceRank, Mapping[str, FlatState]]:
    root, where = rank_root(files), files.model.path
    parameters = [content.parameters for content in contents]
    buffers = buffers_of([content.items for content in contents], pp_rank, megatron)
    shares = are_views_of_buffers(contents, buffers)
    if kind is OptimizerKind.NONE:
        return SourceRank(files, root, contents, (), buffers, shares), {}
    entries = read_entries(root[OPTIMIZER], where)
    chain = _chain(entries, parameters, megatron, where)
    share = share_of(parameters, chain, megatron)
    for entry, items in zip(entries, share, strict=True):
        has_step = any(STEP in group for group in entry.groups)
        if has_step and not items and megatron.rules.keeps_all_groups:
            raise Unexplained("an optimizer has counted steps, but no parameter is found for it")
    flat = RankStates({}, tuple(False for _ in chain))
    if files.dense is not None:  # of the same layout, and not for this folder to convert
        read_flat_states(files.dense.root, contents, chain, buffers, files.dense.path)
    if files.optimizer is not None:
        flat = read_flat_states(
            files.optimizer.root, contents, chain, buffers, files.optimizer.path
        )
    optimizers = tuple(map(SourceOptimizer, chain, entries, share, flat.held))
    return SourceRank(files, root, contents, optimizers, buffers, shares), flat.by_name


def _trained_layer_wise(
    files: RankFiles, contents: tuple[ChunkContents, ...], reading: _Reading
) -> tuple[SourceRank, Mapping[str, PlainState]]:
    """A rank with a layer-wise optimizer; where not all parameters are in its files, those that
    are not are frozen."""
    megatron = reading.megatron
    try:
        return _with_layer_wise(files, contents, megatron)
    except Unexplained as failure:
        if reading.frozen is not None:
            raise
        items = [content.parameters for content in contents]
        ep_rank = files.id.ep_rank or 0
        try:
            trained = told_trained(files.layer_wise, items, ep_rank, megatron, reading.agree)
            frozen = {item for own in items for item in own} - trained
            return _with_layer_wise(files, marked(contents, frozen), megatron)
        except Unexplained as other:
            raise Unexplained(f"{failure}; if some are frozen, {other}") from None


def _with_layer_wise(
    files: RankFiles, contents: tuple[ChunkContents, ...], megatron: Megatron
) -> tuple[SourceRank, Mapping[str, PlainState]]:
    root = rank_root(files)
    parameters = [content.parameters for content in contents]
    repeated = (root[OPTIMIZER], files.model.path) if OPTIMIZER in root else None
    found = read_layer_wise_states(
        files.layer_wise, repeated, parameters, files.id.ep_rank or 0, megatron
    )
    optimizers = [
        SourceOptimizer(kind, entry, items, holds_state=True)
        for entries, share in found.parts
        for kind, entry, items in zip(found.chain, entries, share, strict=True)
    ]
    count = len(files.layer_wise.own) * len(found.chain)
    again = zip(optimizers, found.repeated, strict=False)
    rank = SourceRank(
        files,
        root,
        contents,
        tuple(optimizers[:count]),
        others=tuple(optimizers[count:]),
        repeated=tuple(replace(own, entry=entry) for own, entry in again),
        copies=found.copies,
        elsewhere=found.elsewhere,
    )
    return rank, found.by_name


def _chain(
    entries: Sequence[OptimizerEntry], parameters: Parameters, megatron: Megatron, where: str
) -> tuple[ChainedOptimizer, ...]:
    """The optimizers of a rank, from the number and the groups of their entries."""
    own = has_expert_optimizer(parameters, megatron, others_have=False)
    computed = [
        chain_of(parameters, megatron, has_experts=has_experts) for has_experts in (own, True)
    ]
    for chain in (routed_chain(entries, len(parameters)), *computed):
        if len(chain) == len(entries):
            return chain
    raise Unexplained(
        f"{len(entries)} optimizers in the file, {len(computed[0])} computed ({where})"
    )
