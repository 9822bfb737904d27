"""Proof that rank folders hold what their source holds, by code that knows no plan or mapping.

Each side's files are read back and every tensor is named globally on its own side; then names,
shapes and bytes are compared. ``structure`` samples bytes, ``full`` compares all of them by digest,
holds source records to their CRC-32, every 16-bit weight to its main parameter, and opens each file
with ``torch.load`` itself.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.family import Family, RankFiles, layout_of, read_family, samples
from ..checkpoint.optimizer_entries import OPTIMIZER
from ..container import archive, pickling, torch_file
from ..container.extents import Extent, Piece
from ..container.torch_file import FileFormatError, TorchFile
from ..errors import ConversionError, VerificationError, problem, show
from ..megatron.arguments import namespace_values
from ..megatron.naming import chunk_keys
from ..megatron.optimizer_chain import OptimizerKind, has_optimizer, items_by_group
from ..megatron.param_groups import STEP, key_of_group
from ..megatron.parameters import Item
from ..megatron.pipeline import PipelineLayout
from ..megatron.ranks import RankId
from ..megatron.rules import Rules
from ..options import Depth
from ..source.files import SampleReader, other_files, read_rank, read_source_rank
from ..source.proof import check_samples, proven_family
from . import torch_loading
from .digests import Digests, _chunks, _ranges, _unlike_their_mains, digest_rank

_UNLIKE_MAIN = "{} is not its main parameter rounded to 16 bits"
_CURE = "do not train from it: remove the folder and convert again"
_MAY_DIFFER = frozenset(
    (
        "virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank", "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
        "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
        "decoder_first_pipeline_num_layers_split", "decoder_last_pipeline_num_layers_split",
        "overlap_p2p_comm", "align_param_gather", "overlap_param_gather_with_optimizer_step",
    )
)  # fmt: skip
"""Arguments that say where layers are, or that Megatron derives from that."""
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Side:
    """Where the ranks of one family lie."""

    directory: str
    ranks: Mapping[int, RankId]

    def read(self, pp_ranks: Iterable[int]) -> dict[int, RankFiles]:
        """Decode the files of some ranks."""
        return {p: read_source_rank(self.directory, self.ranks[p]) for p in pp_ranks}


@dataclass(frozen=True, slots=True)
class VerifyJob:
    """A target rank folder to be held to its source."""

    source: Side
    rules: Rules
    """Of the version that wrote the source."""
    directory: str
    """The target's iteration folder."""
    rank: RankId
    layout: PipelineLayout
    """The layout that all folders of the target must tell."""
    folder: str | None = None
    """Name of the rank folder while it is a temporary one."""
    digests: Mapping[str, bytes] | None = None
    """Those of the source (see ``digest_rank``), to compare every byte; None to sample."""


def told_layout(job: tuple[str, RankId, Rules]) -> PipelineLayout:
    """The layout that the arguments of a rank folder tell.

    Args:
        job: iteration folder, rank, and the rules of the version that wrote the source.

    Raises:
        VerificationError: the folder cannot be read, or tells an impossible layout.
    """
    directory, rank, rules = job
    try:
        return layout_of(read_rank(directory, rank), rules)
    except ConversionError as error:
        raise VerificationError(*error.problems) from None


def prepare(depth: Depth) -> None:
    """Load what workers will need, before they are forked: they then share one copy of it."""
    if depth is Depth.FULL:
        torch_loading.load_torch()


def rules_of(side: Side) -> Rules:
    """The rules that explain a family, its bytes included.

    Raises:
        CheckpointError: none do.
    """
    return proven_family(side.read(side.ranks))[0].rules


def verify_folder(job: VerifyJob) -> int:
    """Verify one target rank folder; the bytes of its records.

    Raises:
        VerificationError: it differs from its source or is damaged, with a line for each problem.
        CheckpointError: the source cannot be read.
    """
    try:
        target = read_rank(job.directory, job.rank, job.folder)
        found = next(read_family({job.rank.pp_rank: target}, only=job.rules))
        way, differing = check_samples(samples(found))
    except ConversionError as error:
        raise VerificationError(*error.problems) from None
    differences = [] if way is not None else [_UNLIKE_MAIN.format(differing[0].name)]
    source = _source_of(job, found)
    digests = None if job.digests is None else digest_rank(target)
    differences += [*_compare_layout(job, found), *_compare_rest(source, found, job.rank.pp_rank)]
    differences += _compare_items(source, found, job, digests)
    differences += _compare_others(job)
    located = [(target.model.path, text) for text in differences]
    if digests is not None:
        located += digests.damaged
        located += (
            (sample.main_path, _UNLIKE_MAIN.format(sample.name))
            for sample in _unlike_their_mains(samples(found))
        )
        for file in target.files:
            located += ((file.path, text) for text in _compare_framing(file))
            located += ((file.path, text) for text in torch_loading.differences(file, _head))
    if located:
        lines = [problem(path, text, cure=_CURE) for path, text in located[:_SHOWN]]
        if len(located) > _SHOWN:
            lines.append(f"{target.model.path}: {len(located) - _SHOWN} more differences")
        raise VerificationError(*lines)
    return sum(record.length for file in target.files for record in file.records.values())


def _source_of(job: VerifyJob, target: Family) -> Family:
    """The source ranks that hold what a target rank must hold, and the same rank."""
    pp_rank = job.rank.pp_rank
    (own,) = job.source.read([pp_rank]).values()
    layout = layout_of(own, job.rules)
    needed = {*layout.sources_of(target.layout, pp_rank)} - {pp_rank}
    files = {pp_rank: own, **job.source.read(needed)}
    return next(read_family(dict(sorted(files.items())), only=job.rules))


def _compare_layout(job: VerifyJob, found: Family) -> Iterator[str]:
    if found.layout != job.layout:
        yield f"its arguments tell another layout ({found.layout}) than the target's ({job.layout})"


def _compare_items(
    source: Family, target: Family, job: VerifyJob, digests: Digests | None
) -> Iterator[str]:
    """Differences between a target rank's tensors and those of the same names in the source."""
    chunks = target.layout.rank_chunks(job.rank.pp_rank)
    layers = {layer for chunk in chunks for layer in chunk.layers}
    sections = {section for chunk in chunks for section in chunk.sections}
    wanted = {
        item.name: item
        for item in source.items()
        if (item.layer in layers if item.layer is not None else item.section in sections)
    }
    found = {item.name: item for item in target.items()}
    yield from (f"{name} is missing" for name in wanted if name not in found)
    yield from (f"{name} does not belong here" for name in found if name not in wanted)
    with SampleReader() as reader:
        for name in (name for name in wanted if name in found):
            yield from _compare_item(wanted[name], found[name])
            ours = dict(_ranges(found[name], target))
            theirs = dict(_ranges(wanted[name], source))
            if ours.keys() != theirs.keys():
                yield f"{name} has states {sorted(ours)}, its source {sorted(theirs)}"
                continue
            for label, pieces in ours.items():
                if digests is not None and job.digests is not None:
                    is_same = digests.by_label[label] == job.digests.get(label)
                else:
                    is_same = _ends(reader, pieces) == _ends(reader, theirs[label])
                if not is_same:
                    yield f"{label} differs from its source"


def _compare_item(wanted: Item, found: Item) -> Iterator[str]:
    if wanted.tensor is None or found.tensor is None:
        if not _is_same(wanted.value, found.value):
            yield f"{wanted.name} differs from its source"
        return
    ours, theirs = found.tensor, wanted.tensor
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        yield f"{wanted.name} is {ours.dtype} {ours.shape}, not {theirs.dtype} {theirs.shape}"


def _is_same(one: Any, other: Any) -> bool:
    if type(one) is type(other) and isinstance(one, (str, int, type(None))):
        return bool(one == other)
    return _frozen(one) == _frozen(other)


def _frozen(value: Any) -> bytes | None:
    """A value as bytes, for comparison; the contents of its storages are not part of them."""
    try:
        return pickling.dump(value)[0]
    except pickle.PicklingError:
        return None


def _ends(reader: SampleReader, pieces: tuple[Piece, ...]) -> bytes:
    return reader.ends(pieces, 1) if pieces else b""


def _head(pieces: tuple[Piece, ...], length: int) -> bytes:
    """The first bytes of a range of a file."""
    piece = pieces[0]
    if not isinstance(piece, Extent):
        raise TypeError("tensors in a file are extents")
    with SampleReader() as reader:
        return reader.read(piece.path, piece.offset, length)


def _compare_rest(source: Family, target: Family, pp_rank: int) -> Iterator[str]:
    """Differences in everything that is no tensor of the model: it comes from the same folder."""
    ours, theirs = target.ranks[pp_rank].root, source.ranks[pp_rank].root
    moved = {*chunk_keys(ours), *chunk_keys(theirs), "args", OPTIMIZER}
    left, right = ([key for key in root if key not in moved] for root in (ours, theirs))
    if left != right:
        yield f"its entries are {', '.join(map(str, left))}, not {', '.join(map(str, right))}"
        return
    is_expected = source.kind is not OptimizerKind.NONE and has_optimizer(
        target.ranks[pp_rank].parameters, target.rules
    )
    if (OPTIMIZER in ours) != is_expected:
        yield f"its entry {OPTIMIZER!r} is {'missing' if is_expected else 'one too many'}"
    for key in left:
        if not _is_same(ours[key], theirs[key]):
            yield f"entry {show(key)} differs from its source"
    mine, yours = (namespace_values(root["args"], "args") for root in (ours, theirs))
    for name in {*mine, *yours} - _MAY_DIFFER:
        if name not in mine or name not in yours or not _is_same(mine[name], yours[name]):
            yield f"args.{name} differs from its source"
    yield from _check_groups(target, pp_rank)


def _compare_others(job: VerifyJob) -> Iterator[str]:
    """Differences in the files that are copied as they are."""
    ours, _ = other_files(job.directory, job.rank, job.folder)
    theirs, _ = other_files(job.source.directory, job.rank)
    names = [name for name, _ in ours]
    if names != [name for name, _ in theirs]:
        yield f"its other files are {names}, not those of its source"
        return
    with SampleReader() as reader:
        for (name, found), (_, wanted) in zip(ours, theirs, strict=True):
            if job.digests is None:
                is_same = found.length == wanted.length and (
                    _ends(reader, (found,)) == _ends(reader, (wanted,))
                )
            else:
                is_same = _digest(found) == _digest(wanted)
            if not is_same:
                yield f"{name} differs from its source"


def _digest(extent: Extent) -> bytes:
    found = hashlib.sha256()
    for data in _chunks(extent):
        found.update(data)
    return found.digest()


def _compare_framing(file: TorchFile) -> Iterator[str]:
    """The bytes around the records, which no checksum covers: torch leaves no choice there."""
    try:
        layout, crc32s = torch_file.archive_of(file)
    except FileFormatError as error:
        yield str(error)
        return
    size = os.stat(file.path).st_size
    if layout.length != size:
        yield f"it has {size} bytes, not the {layout.length} of its records"
        return
    with SampleReader() as reader:
        for offset, data in archive.frame(layout, crc32s):
            if reader.read(file.path, offset, len(data)) != data:
                yield f"it is damaged at or after byte {offset}, between its records"
                return


def _check_groups(target: Family, pp_rank: int) -> Iterator[str]:
    """Every parameter needs a param group of its kind, and all groups one step count."""
    rank = target.ranks[pp_rank]
    steps: dict[bool | None, set[str]] = {}
    for part, entry in zip(rank.parts, rank.entries, strict=True):
        groups = entry.groups
        by_key = items_by_group(rank.parameters, part, target.arguments, target.rules)
        known = {key_of_group(group) for group in groups}
        if any("default_config" not in group for group in groups):
            yield from (f"no param group for {key}" for key in by_key if key not in known)
        if by_key:
            found = {show(group.get(STEP)) for group in groups if key_of_group(group) in by_key}
            steps.setdefault(part.takes_matrices, set()).update(found)
    for counts in steps.values():
        if len(counts) > 1:
            yield f"its param groups have different step counts: {', '.join(sorted(counts))}"
