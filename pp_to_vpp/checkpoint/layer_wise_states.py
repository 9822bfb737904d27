"""The states of a layer-wise optimizer: a file for each data-parallel rank, with whole parameters.

Each holds what ``model_optim_rng.pt`` holds of an optimizer that is not distributed
(layer_wise_optimizer.py ``save_state_dict_to_file``, 0.16 and later). The files of one pipeline
rank, and with them the states of its dense parameters, lie in the folders of all expert ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..container.pickling import is_same
from ..container.tensors import TensorRef, unwrap_tensor
from ..container.torch_file import TorchFile
from ..errors import COPY_MISSING, NOT_CONVERTED, ONE_SAVE, CheckpointError, located
from ..megatron import layer_wise
from ..megatron.megatron import Megatron
from ..megatron.optimizer_chain import ChainedOptimizer, Share, in_rank_order
from ..megatron.param_groups import keys_of_groups
from ..megatron.parameters import GroupKey, Item, Parameters
from ..megatron.ranks import layer_wise_file
from .flat_states import Unexplained
from .optimizer_entries import MAINS, STATE, OptimizerEntry, read_entries, routed_chain
from .plain_states import PlainState, read_plain_states
from .trained import Agreement, may_be_main, only_alignment


@dataclass(frozen=True, slots=True, eq=False)
class LayerWiseFiles:
    """The files of a pipeline rank, by data-parallel rank."""

    own: Mapping[int, TorchFile] = field(default_factory=dict)
    """Those in the rank's own folder."""
    others: Mapping[int, TorchFile] | None = None
    """Those in the folders of other expert ranks, without the states of experts; None where only
    one folder was read."""

    def __bool__(self) -> bool:
        return bool(self.own)


@dataclass(frozen=True, slots=True, eq=False)
class LayerWiseStates:
    """What the files of a pipeline rank hold."""

    chain: tuple[ChainedOptimizer, ...]
    """The optimizers of every data-parallel rank."""
    parts: tuple[tuple[tuple[OptimizerEntry, ...], Share], ...]
    """Entries and parameters of each file that was read, the folder's own first."""
    by_name: Mapping[str, PlainState]
    repeated: tuple[OptimizerEntry, ...]
    """What ``model_optim_rng.pt`` repeats of the folder's first file; () if it does not."""
    copies: Mapping[str, PlainState]
    """The states in it."""
    elsewhere: frozenset[str]
    """Parameters whose states are in files that were not read."""


def without_experts(file: TorchFile) -> TorchFile:
    """A file with what its folder's siblings want of it: the states of dense parameters.

    Raises:
        CheckpointError: it holds what no known optimizer saves.
    """
    entries = []
    for entry in read_entries(file.root, file.path):
        experts = [key.is_expert for key in keys_of_groups(entry.groups)]
        numbers = {
            number
            for group, is_expert in zip(entry.groups, experts, strict=True)
            for number in (group.get("params") or () if is_expert else ())
            if isinstance(number, int)
        }
        states, mains = entry.inner.get(STATE), entry.node.get(MAINS)
        if isinstance(states, dict) and isinstance(mains, list) and len(mains) == len(experts):
            kept = {number: state for number, state in states.items() if number not in numbers}
            left = [
                [None] * len(own) if is_expert and isinstance(own, list) else own
                for own, is_expert in zip(mains, experts, strict=True)
            ]
            entries.append(entry.replaced({STATE: kept}, {MAINS: left}))
        else:  # as it is: reading it will say what is wrong
            entries.append(entry.node)
    return replace(file, root=entries, records={}, small={})


def read_layer_wise_states(
    files: LayerWiseFiles,
    repeated: tuple[Any, str] | None,
    parameters: Parameters,
    ep_rank: int,
    megatron: Megatron,
) -> LayerWiseStates:
    """The states in the files of a pipeline rank.

    Args:
        files: those that were read.
        repeated: what ``model_optim_rng.pt`` repeats of the folder's first file, and its path.
        parameters: of the rank.
        ep_rank: expert rank of the folder.
        megatron: the run.

    Raises:
        CheckpointError: the run's states are lost, or files are missing, strange or unlike.
        Unexplained: groups or shapes are not those of the parameters.
    """
    first = next(iter(files.own.values())).path
    _check_run(megatron, first)
    own = layer_wise.file_ranks(ep_rank, megatron)
    _check_files(files, own, megatron, first)
    read = {
        dp_rank: (read_entries(file.root, file.path), file.path)
        for dp_rank, file in (*sorted(files.own.items()), *sorted((files.others or {}).items()))
    }
    entries, _ = read[ep_rank]
    chain, groups = routed_chain(entries, len(parameters)), _group_keys(entries)
    if not chain:
        raise Unexplained(f"no optimizer takes matrices ({first})")
    for optimizer, keys in zip(chain, groups, strict=True):
        if in_rank_order(keys, optimizer, lambda: [parameters], megatron) != keys:
            raise Unexplained(f"param groups stand in another order than computed ({first})")
    dealt = layer_wise.shares(parameters, zip(chain, groups, strict=True), megatron)
    by_name: dict[str, PlainState] = {}
    for dp_rank, (found, path) in read.items():
        if (routed_chain(found, len(parameters)), _group_keys(found)) != (chain, groups):
            raise CheckpointError.of(
                path, f"its optimizers are not those of {first}", cure=ONE_SAVE
            )
        try:
            by_name |= read_plain_states(
                found, chain, dealt[dp_rank], path, leaves_experts=dp_rank not in own
            )
        except Unexplained as failure:
            raise Unexplained(f"{failure} ({path})") from None
    copies: Mapping[str, PlainState] = {}
    copy: tuple[OptimizerEntry, ...] = ()
    if repeated is not None:
        copy = read_entries(*repeated)
        _check_copy(copy, entries, repeated[1])
        copies = read_plain_states(copy, chain, dealt[ep_rank], repeated[1])
        if any(not state.is_like(by_name[name]) for name, state in copies.items()):
            raise _unlike_copy(repeated[1])
    names = {item.name for items in parameters for item in items}
    return LayerWiseStates(
        chain,
        tuple((found, dealt[dp_rank]) for dp_rank, (found, _) in read.items()),
        by_name,
        copy,
        copies,
        frozenset(names - by_name.keys()),
    )


def told_trained(
    files: LayerWiseFiles,
    parameters: Parameters,
    ep_rank: int,
    megatron: Megatron,
    agree: Agreement,
) -> set[Item]:
    """The parameters of a rank that are trained, as main parameters tell: those of all files, put
    back into the order in which they were dealt out, stand in the order of the parameters. Only
    16-bit ones have any.

    Args:
        files: those of all data-parallel ranks.
        parameters: of the rank, trained or frozen.
        ep_rank: expert rank of the folder.
        megatron: the run.
        agree: compares bytes.

    Raises:
        Unexplained: there is no way to find them there, or more than one.
        CheckpointError: a file has what no known optimizer saves.
    """
    arguments = megatron.arguments
    everywhere = {**files.own, **(files.others or {})}
    if set(everywhere) != set(range(arguments.dp_size)):
        raise Unexplained("only all layer-wise files together tell which parameters are trained")
    read = {dp: read_entries(file.root, file.path) for dp, file in everywhere.items()}
    entries = read[ep_rank]
    chain = routed_chain(entries, len(parameters))
    if not chain:
        raise Unexplained("no optimizer takes matrices")
    groups = zip(chain, _group_keys(entries), strict=True)
    queue = list(layer_wise.in_order(parameters, groups, megatron))
    mains = {dp: list(_mains(found, everywhere[dp].path)) for dp, found in read.items()}
    if arguments.dp_size > 1:
        queue.sort(key=lambda known: known[2].weight.numel)
        for own in mains.values():
            own.sort(key=lambda known: known[2].numel)
    trained: set[Item] = set()
    for is_expert in (False, True):
        ranks = layer_wise.file_ranks(ep_rank, megatron) if is_expert else range(len(mains))
        dealt = [[known for known in mains[dp] if known[1].is_expert == is_expert] for dp in ranks]
        places = {item: (place, key) for place, key, item in queue if key.is_expert == is_expert}

        def fits(item: Item, main: tuple[int, GroupKey, TensorRef], places: Any = places) -> bool:
            return places[item] == main[:2] and may_be_main(agree, item, main[2])

        trained.update(only_alignment(layer_wise.gathered(dealt), list(places), fits))
    return trained


def _mains(
    entries: Sequence[OptimizerEntry], where: str
) -> Iterator[tuple[int, GroupKey, TensorRef]]:
    """The main parameters in a file, with the place of their optimizer and their group."""
    for place, entry in enumerate(entries):
        nodes = entry.node.get(MAINS)
        lists = nodes if isinstance(nodes, list) else []
        for key, own in zip(keys_of_groups(entry.groups), lists, strict=False):
            for node in own if isinstance(own, list) else ():
                with located(where):
                    main = unwrap_tensor(node)
                if main is not None:  # those of another rank's experts are left out
                    yield place, key, main


def _group_keys(entries: Sequence[OptimizerEntry]) -> list[list[GroupKey]]:
    return [keys_of_groups(entry.groups) for entry in entries]


def _check_copy(
    copy: Sequence[OptimizerEntry], entries: Sequence[OptimizerEntry], where: str
) -> None:
    """The entry of ``model_optim_rng.pt`` has the groups of the file that it repeats."""
    if len(copy) != len(entries) or not all(
        is_same(one.groups, other.groups) for one, other in zip(copy, entries, strict=True)
    ):
        raise _unlike_copy(where)


def _unlike_copy(where: str) -> CheckpointError:
    what = "its optimizer entry does not repeat the layer-wise file beside it"
    return CheckpointError.of(where, what, cure=ONE_SAVE)


def _check_run(megatron: Megatron, where: str) -> None:
    """Refuse the runs whose files do not hold all states, or are not known."""
    arguments = megatron.arguments
    if arguments.cp_size > 1:
        raise CheckpointError.of(
            where,
            f"a layer-wise optimizer saved with context_parallel_size {arguments.cp_size}: its "
            "context-parallel ranks overwrote each other's files",
            cure="states are lost: take a checkpoint that was saved with 1",
        )
    if arguments.etp_size != arguments.tp_size or arguments.dp_size % arguments.ep_size:
        raise CheckpointError.of(
            where,
            "a layer-wise optimizer whose experts have a tensor-parallel size of their own",
            expected=f"expert_tensor_parallel_size {arguments.tp_size}",
            found=arguments.etp_size,
            cure=NOT_CONVERTED,
        )


def _check_files(files: LayerWiseFiles, own: range, megatron: Megatron, where: str) -> None:
    """One file for each data-parallel rank, in the folder of its expert rank."""
    everywhere = range(megatron.arguments.dp_size)
    found = {*files.own, *(files.others or ())}
    if set(files.own) == set(own) and (files.others is None or found == set(everywhere)):
        return
    wanted = own if set(files.own) != set(own) else everywhere
    odd = min(set(files.own if wanted is own else found) ^ set(wanted))
    raise CheckpointError.of(
        where,
        f"beside it {layer_wise_file(odd)} is {'missing' if odd in wanted else 'one too many'}",
        expected=f"one for each of {len(everywhere)} data-parallel ranks, in turn over the folders "
        "of the expert ranks",
        cure=COPY_MISSING,
    )
