"""What the rank files of one (tp, ep) family hold, under names that no pipeline layout changes.

This is the reading direction, and it trusts nothing: layers are counted against the layout that
the arguments tell, buffer sizes against the stored ones, storage offsets against the computed
ones. Values are compared by whoever can read files, from the ``samples``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..container.extents import Extent, Piece
from ..container.pickling import as_mapping
from ..container.torch_file import TorchFile
from ..errors import COPY_MISSING, FROM_MEGATRON, ONE_SAVE, CheckpointError, LayoutError, show
from ..megatron.arguments import SavedArguments, read_arguments
from ..megatron.buffers import RankBuffers, rank_buffers
from ..megatron.naming import Section
from ..megatron.optimizer_chain import (
    OptimizerKind,
    OptimizerPart,
    chained_optimizers,
    has_optimizer,
)
from ..megatron.parameters import Item, have_experts
from ..megatron.pipeline import PipelineLayout
from ..megatron.ranks import RankId
from ..megatron.rules import Rules, candidates
from . import flat_states
from .chunks import ChunkContents, read_chunks
from .flat_states import FlatState, Unexplained
from .optimizer_entries import OPTIMIZER, OptimizerEntry, read_entries, routed_parts
from .plain_states import PlainState, read_plain_states

_CHECKPOINT_VERSION = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class RankFiles:
    """The decoded files of one rank folder."""

    rank: RankId
    model: TorchFile
    """``model_optim_rng.pt``."""
    optimizer: TorchFile | None
    """``distrib_optim.pt``, if there is one."""

    @property
    def iteration(self) -> int | None:
        """Of training, as the rank file tells; None if it does not."""
        found = (as_mapping(self.model.root) or {}).get("iteration")
        return found if type(found) is int else None

    @property
    def files(self) -> tuple[TorchFile, ...]:
        """Those that are there."""
        return (self.model,) if self.optimizer is None else (self.model, self.optimizer)


@dataclass(frozen=True, slots=True, eq=False)
class RankInventory:
    """One rank's files, understood."""

    files: RankFiles
    root: Mapping[Any, Any]
    """Top level of ``model_optim_rng.pt``."""
    contents: tuple[ChunkContents, ...]
    """The chunk of each virtual stage."""
    parts: tuple[OptimizerPart, ...]
    """The optimizers chained on this rank; empty for weights only."""
    entries: tuple[OptimizerEntry, ...]
    """The entry of each in ``model_optim_rng.pt``."""
    buffers: RankBuffers | None
    """Flat buffers; None without the distributed optimizer."""
    shares_storages: bool
    """Weights are views of the flat buffers."""
    held: tuple[bool, ...]
    """For each optimizer, whether ``distrib_optim.pt`` of this folder holds its state."""
    buffer_keys: Mapping[str, Any]

    @property
    def parameters(self) -> list[tuple[Item, ...]]:
        """Those of each virtual stage."""
        return [content.parameters for content in self.contents]


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """The ranks of one (tp, ep) and the logical model they hold together.

    Where only some ranks were read, ``layers`` and ``sections`` hold only theirs.
    """

    arguments: SavedArguments
    rules: Rules
    layout: PipelineLayout
    kind: OptimizerKind
    ranks: Mapping[int, RankInventory]
    """By pipeline rank."""
    layers: Mapping[int, tuple[Item, ...]]
    """Items of each decoder layer, by global number."""
    sections: Mapping[Section, tuple[Item, ...]]
    states: Mapping[str, FlatState | PlainState]
    """Optimizer state by global name."""

    @property
    def any_rank(self) -> RankInventory:
        """One of the ranks, for what is alike in all."""
        return next(iter(self.ranks.values()))

    @property
    def shares_storages(self) -> bool:
        """Weights are views of flat buffers."""
        return any(rank.shares_storages for rank in self.ranks.values())

    def holds_state(self, *, is_expert: bool) -> bool:
        """Whether the optimizer files of this family hold the state of the dense or the expert
        parameters. Only one family of those with the same parameters does."""
        return any(
            is_held
            for rank in self.ranks.values()
            for part, is_held in zip(rank.parts, rank.held, strict=True)
            if part.is_expert == is_expert
        )

    @property
    def has_expert_part(self) -> bool:
        """Some rank has an optimizer for expert buffers."""
        return any(part.is_expert for rank in self.ranks.values() for part in rank.parts)

    def chains_expert_part(self, parameters: Sequence[Sequence[Item]]) -> bool:
        """Whether a rank with these parameters of each virtual stage has an optimizer for expert
        buffers: by newer rules every rank has, if any has."""
        everywhere = self.rules.keeps_all_groups and self.has_expert_part
        return everywhere or have_experts(parameters, self.arguments, self.rules)

    def ranks_for(self, layout: PipelineLayout, pp_rank: int) -> list[RankInventory]:
        """The ranks, for making one of another layout: the same folder, those that hold what it
        needs, then the others; so what comes first does not depend on which others were read."""
        needed = self.layout.sources_of(layout, pp_rank)
        return [self.ranks[p] for p in dict.fromkeys((pp_rank, *needed, *self.ranks))]

    def items(self) -> Iterator[Item]:
        """All items that were read."""
        for layer in self.layers.values():
            yield from layer
        for section in self.sections.values():
            yield from section


@dataclass(frozen=True, slots=True)
class Sample:
    """A parameter's weight and its fp32 main parameter: the first must be the second, rounded."""

    name: str
    dtype: str
    weight: tuple[Piece, ...]
    main: tuple[Piece, ...]

    @property
    def main_path(self) -> str:
        """The file that holds the main parameter."""
        return next((piece.path for piece in self.main if isinstance(piece, Extent)), "")


def read_family(files: Mapping[int, RankFiles], only: Rules | None = None) -> Iterator[Family]:
    """The inventory of a family, under each set of rules that explains its files, likeliest first.

    Args:
        files: the decoded files of some or all ranks of the family, by pipeline rank.
        only: the rules to try, where they are known.

    Raises:
        CheckpointError: when iterated, if no rules explain the files.
    """
    first = next(iter(files.values()))
    where = first.model.path
    arguments = read_arguments(_root(first), where)
    for rank_files in files.values():
        _check_arguments(rank_files, arguments)
    failures: list[CheckpointError | Unexplained] = []
    is_explained = False
    for rules in candidates(arguments.names) if only is None else (only,):
        try:
            family = _read_family(files, arguments, rules)
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
        cure="frozen parameters, unknown buffers and rewritten files cannot be converted "
        "exactly: convert a checkpoint that Megatron itself saved, without them",
    )


def _root(files: RankFiles) -> Mapping[Any, Any]:
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


def layout_of(files: RankFiles, rules: Rules) -> PipelineLayout:
    """The layout that a rank's own arguments tell.

    Raises:
        LayoutError: they tell an impossible one.
    """
    arguments = read_arguments(_root(files), files.model.path)
    return arguments.place(arguments.placement, rules)


def _read_family(files: Mapping[int, RankFiles], arguments: SavedArguments, rules: Rules) -> Family:
    layout = layout_of(next(iter(files.values())), rules)
    kinds = {pp_rank: _optimizer_kind(of, arguments) for pp_rank, of in files.items()}
    kind = next(
        (own for own in kinds.values() if own is not OptimizerKind.NONE), OptimizerKind.NONE
    )
    ranks: dict[int, RankInventory] = {}
    layers: dict[int, list[Item]] = {}
    sections: dict[Section, list[Item]] = {}
    found: dict[str, FlatState | PlainState] = {}
    for pp_rank, rank_files in files.items():
        own_kind = kinds[pp_rank]
        rank, rank_states = _read_rank(rank_files, pp_rank, layout, arguments, rules, own_kind)
        if own_kind is not kind and has_optimizer(rank.parameters, rules):
            raise CheckpointError.of(
                rank_files.model.path, f"its siblings hold {kind.value}, it does not", cure=ONE_SAVE
            )
        ranks[pp_rank] = rank
        found |= rank_states
        for item in (item for content in rank.contents for item in content.items):
            if item.layer is not None:
                layers.setdefault(item.layer, []).append(item)
            else:
                sections.setdefault(item.section, []).append(item)
    family = Family(
        arguments=arguments,
        rules=rules,
        layout=layout,
        kind=kind,
        ranks=ranks,
        layers={layer: tuple(items) for layer, items in layers.items()},
        sections={section: tuple(items) for section, items in sections.items()},
        states=found,
    )
    _check_parts(family)
    return family


def _check_arguments(files: RankFiles, first: SavedArguments) -> None:
    """All ranks of a run have the same arguments, as far as they matter here."""
    where = files.model.path
    own = replace(read_arguments(_root(files), where), names=first.names)
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


def _check_parts(family: Family) -> None:
    """Every rank must chain the optimizers, and have the file, that the rules expect."""
    for rank in family.ranks.values():
        where = rank.files.model.path
        has_part = any(part.is_expert for part in rank.parts)
        is_expected = family.chains_expert_part(rank.parameters)
        if family.kind is OptimizerKind.DISTRIBUTED and has_part != is_expected:
            raise Unexplained(f"an expert optimizer is {'' if has_part else 'not '}there ({where})")
        # Families share the state of experts only where those have fewer tensor-parallel ranks.
        has_own_experts = has_part and family.arguments.etp_size == family.arguments.tp_size
        needs_file = family.kind is OptimizerKind.DISTRIBUTED and (
            has_own_experts
            or any(family.holds_state(is_expert=part.is_expert) for part in rank.parts)
        )
        if needs_file and rank.files.optimizer is None:
            raise CheckpointError.of(
                where, "distrib_optim.pt beside it is missing", cure=COPY_MISSING
            )


def _optimizer_kind(files: RankFiles, arguments: SavedArguments) -> OptimizerKind:
    if OPTIMIZER in _root(files):
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


def _read_rank(
    files: RankFiles,
    pp_rank: int,
    layout: PipelineLayout,
    arguments: SavedArguments,
    rules: Rules,
    kind: OptimizerKind,
) -> tuple[RankInventory, Mapping[str, FlatState | PlainState]]:
    root = _root(files)
    where = files.model.path
    contents = read_chunks(root, layout, pp_rank, where)
    overlaps = arguments.overlaps_param_gather_with_step
    parts: tuple[OptimizerPart, ...] = ()
    entries: tuple[OptimizerEntry, ...] = ()
    if kind is not OptimizerKind.NONE:
        entries = read_entries(root[OPTIMIZER], where)
        parts = _parts(entries, contents, arguments, rules, where)
    buffers: RankBuffers | None = None
    shares = False
    if arguments.uses_distributed_optimizer:
        buffers = rank_buffers(
            [(content.chunk, content.parameters) for content in contents],
            arguments,
            rules,
            overlaps_param_gather_with_step=overlaps,
        )
        try:
            shares = flat_states.are_views_of_buffers(contents, buffers)
        except Unexplained:
            if kind is OptimizerKind.DISTRIBUTED:
                raise
    found: Mapping[str, FlatState | PlainState] = {}
    held = tuple(False for _ in parts)
    keys: Mapping[str, Any] = {}
    if kind is OptimizerKind.PLAIN:
        found = read_plain_states(entries, contents, parts, arguments, rules, where)
    elif kind is OptimizerKind.DISTRIBUTED and buffers is not None and files.optimizer is not None:
        flat = flat_states.read_flat_states(
            files.optimizer.root, contents, parts, buffers, files.optimizer.path
        )
        found, keys, held = flat.by_name, flat.buffer_keys, flat.held
    return (
        RankInventory(files, root, contents, parts, entries, buffers, shares, held, keys),
        found,
    )


def _parts(
    entries: Sequence[OptimizerEntry],
    contents: Sequence[ChunkContents],
    arguments: SavedArguments,
    rules: Rules,
    where: str,
) -> tuple[OptimizerPart, ...]:
    """The optimizers of a rank, from the number and the groups of their entries."""
    has_experts = have_experts((content.parameters for content in contents), arguments, rules)
    overlaps = arguments.overlaps_param_gather_with_step
    computed = [
        chained_optimizers(
            len(contents), has_expert_part=has_part, overlaps_param_gather_with_step=overlaps
        )
        for has_part in (has_experts, True)
    ]
    for parts in (routed_parts(entries, len(contents)), *computed):
        if len(parts) == len(entries):
            return parts
    raise Unexplained(
        f"{len(entries)} optimizers in the file, {len(computed[0])} computed ({where})"
    )


def samples(family: Family) -> Iterator[Sample]:
    """For each parameter with an fp32 main parameter, what must agree."""
    for item in family.items():
        state = family.states.get(item.name)
        main = None if state is None else state.main_content()
        if main is not None and item.tensor is not None:
            yield Sample(item.name, item.tensor.dtype, item.tensor.content(), main)
