"""Proof that rank folders hold what their source holds, by code that knows no plan.

Each side's files are read back and every tensor is named globally on its own side; then names,
shapes and bytes are compared. ``structure`` samples bytes, ``full`` compares all of them, holds
records to their CRC-32, every 16-bit weight to its main parameter, and opens each file with
``torch.load`` itself.

What this shares with the writer are Megatron's rules: placement, buffers, groups, chain. They were
proved on the source's bytes; an error in them that shows in the target's layout alone (buckets, a
shared embedding on another rank) would be repeated here. Megatron's own files cover that, in tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.copies import with_copies_of
from ..checkpoint.family import Family, RankFiles, SourceRank, TensorName
from ..checkpoint.optimizer_entries import OPTIMIZER
from ..checkpoint.reading import megatron_of
from ..checkpoint.top_level import for_data_parallel
from ..container.crc32 import Checksums
from ..container.extents import Extent
from ..container.pickling import is_same
from ..errors import (
    CheckpointError,
    ConversionError,
    CopyError,
    UsageError,
    VerificationError,
    is_refusal,
    problem,
    show,
)
from ..megatron import rounding
from ..megatron.arguments import following, namespace_values
from ..megatron.forms import HybridPattern
from ..megatron.megatron import Megatron
from ..megatron.naming import all_chunk_keys
from ..megatron.optimizer_chain import OptimizerKind, has_optimizer
from ..megatron.param_groups import are_sorted, keys_of_groups, steps
from ..megatron.ranks import RankId
from ..megatron.rules import Rules
from ..options import Depth
from ..source.files import FamilyFolders, RangeReader, check_links, other_files, read_rank
from ..source.proof import known_family, likeliest_family, unlike_copies, unlike_embeddings
from ..source.proven import ProvenFamily
from . import framing, torch_loading
from .in_full import UNLIKE_MAIN, Pair, SourceJob, read_in_full

_CURE = "do not train from it: remove the folder and convert again"
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Proof:
    """What the target folders of one family are held to."""

    source: FamilyFolders
    run: Megatron
    """That wrote the source."""
    frozen: frozenset[str]
    """Names of the parameters that the run does not train."""
    target: Megatron
    """The run that all folders of the target must tell."""
    depth: Depth
    no_save_optim: bool = False
    """The target has no optimizer state."""

    @classmethod
    def of(
        cls, source: ProvenFamily, target: Megatron, depth: Depth, *, no_save_optim: bool
    ) -> Proof:
        """That of a family that was proved."""
        run, frozen = source.source, source.frozen
        return cls(source.folders, run, frozen, target, depth, no_save_optim)

    def source_job(self, found: Mapping[Extent, int]) -> SourceJob:
        """The source to be held to the CRC-32 of its records, given those of what was read."""
        return SourceJob(self.source, self.run.rules, self.frozen, found)


@dataclass(frozen=True, slots=True)
class VerifyJob:
    """A target rank folder to be held to its source."""

    proof: Proof
    directory: str
    """The target's iteration folder."""
    rank: RankId
    folder: str | None = None
    """Name of the rank folder while it is a temporary one."""
    known: Mapping[Extent, int] | None = None
    """CRC-32 of what copying has read of the source, which full verification then does not read."""
    is_opened: bool = True
    """Torch opens its files, too, in full verification; else ``open_folders`` does."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verifying a rank folder has shown."""

    problems: tuple[str, ...]
    """Lines to be printed; none if it holds what it must."""
    length: int
    """Bytes of its records."""
    source: Mapping[Extent, int]
    """CRC-32 of the source's ranges that were read in full."""

    def check(self) -> None:
        """Raises:
        VerificationError: there are problems.
        """
        if self.problems:
            raise VerificationError(*self.problems)


def told_run(job: tuple[str, RankId, Rules]) -> Megatron:
    """The run that the arguments of a rank folder tell.

    Args:
        job: iteration folder, rank, and the rules of the version that wrote the source.

    Raises:
        VerificationError: the folder lacks what it must have, or tells an impossible layout.
        CopyError: the system refuses to read it.
    """
    directory, rank, rules = job
    try:
        check_links([Path(directory) / rank.folder])
        found = megatron_of(read_rank(directory, rank), rules)
        _ = found.layout  # which may be impossible
        return found
    except ConversionError as error:
        kind = CopyError if is_refusal(error) else VerificationError
        raise kind(*error.problems) from None


def prepare(depth: Depth) -> None:
    """Load what workers will need, before they are forked: they then share one copy of it.

    Raises:
        UsageError: torch is needed, and not there.
    """
    rounding.load()
    if depth is Depth.FULL:
        try:
            torch_loading.load_torch()
        except ImportError as error:
            raise UsageError.of(
                "--verify full",
                f"it opens files with torch, which cannot be imported ({error})",
                cure="install torch (a CPU build will do), or use --verify structure",
            ) from None


def verify_folder(job: VerifyJob) -> Verdict:
    """Verify one target rank folder; one that lacks something or cannot be understood has that as a
    problem.

    Raises:
        CheckpointError: the source cannot be read.
        CopyError: the system refuses to read the target.
    """
    place = str(Path(job.directory) / (job.folder or job.rank.folder))
    try:
        return _verdict(job)
    except CheckpointError as error:
        if not error.problems[0].startswith(place):
            raise
        if is_refusal(error):
            raise CopyError(*error.problems) from None
        return Verdict(error.problems, 0, {})


def _verdict(job: VerifyJob) -> Verdict:
    """Raises:
    CheckpointError: the source or the target cannot be read.
    """
    proof, pp_rank = job.proof, job.rank.pp_rank or 0
    files = read_rank(job.directory, job.rank, job.folder)
    try:
        target, way, samples = likeliest_family({pp_rank: files}, proof.run.rules, proof.frozen)
    except ConversionError as error:
        return Verdict(error.problems, 0, {})
    whole = _source_of(proof, target, pp_rank)
    source = with_copies_of(whole, target.megatron)
    if _lacks_optimizer(source, target, pp_rank):
        text = "it holds no optimizer state, which its source does"
        cure = "add --no-save-optim if it was to hold none, else convert again"
        return Verdict((problem(files.model.path, text, cure=cure),), 0, {})
    twins = _twins(source, target, pp_rank)
    texts = [] if way is not None else [UNLIKE_MAIN.format(samples[0].name)]
    if not target.megatron.is_laid_out_like(proof.target):
        told = f"({target.megatron}) than the target's ({proof.target})"
        texts.append(f"its arguments tell another layout {told}")
    texts += [*_compare_rest(source, target, pp_rank), *_check_groups(target, pp_rank)]
    texts += _lost_copies(whole, target, proof.depth)
    texts += [*_lost_groups(source, target), *twins.problems, *_compare_others(job)]
    found: Mapping[Extent, int] = {}
    differing: Collection[Pair]
    if proof.depth is Depth.FULL:
        known = None if job.known is None else Checksums(job.known)
        in_full = read_in_full(files, target, twins.extents.values(), known)
        differing, found = in_full.differing, in_full.source
        more = [*in_full.problems, *_odd_files(files, is_opened=job.is_opened)]
    else:
        differing = _differing_ends(twins.extents.values())
        more = list(unlike_copies(target))
    texts += twins.differences(differing)
    lines = _lines([*((files.model.path, text) for text in texts), *more])
    length = sum(record.length for file in files.all for record in file.records.values())
    return Verdict(tuple(lines), length, found)


def _odd_files(files: RankFiles, *, is_opened: bool) -> Iterator[tuple[str, str]]:
    """Path and text about what torch writes or reads otherwise."""
    for file in files.all:
        yield from ((file.path, text) for text in framing.differences(file))
    if is_opened:
        yield from _misread(files)


def _misread(files: RankFiles) -> Iterator[tuple[str, str]]:
    """Path and text about what torch reads otherwise."""
    with RangeReader() as reader:
        for file in files.all:
            found = torch_loading.differences(file, reader.read)
            yield from ((file.path, text) for text in found)


def open_folders(directory: str, ranks: Iterable[RankId]) -> list[str]:
    """What torch reads otherwise of some rank folders, as lines to be printed: one task for all,
    beside which others read, for the start of torch takes a second.

    Args:
        directory: the target's iteration folder.
        ranks: the folders.

    Raises:
        UsageError: torch cannot be imported.
    """
    prepare(Depth.FULL)
    found: list[tuple[str, str]] = []
    for rank in ranks:
        with contextlib.suppress(ConversionError):  # ``verify_folder`` says what is wrong
            found += _misread(read_rank(directory, rank))
    return _lines(found)


def _lines(located: Sequence[tuple[str, str]]) -> list[str]:
    """The first of some problems, each with its path."""
    lines = [problem(path, text, cure=_CURE) for path, text in located[:_SHOWN]]
    if len(located) > _SHOWN:
        lines.append(f"{located[0][0]}: {len(located) - _SHOWN} more differences")
    return lines


def _source_of(proof: Proof, target: Family, pp_rank: int) -> Family:
    """The source ranks that hold what a target rank must hold, and its counterpart."""
    needed = proof.run.sources_of(target.megatron, pp_rank)
    files = proof.source.read({proof.run.counterpart(target.megatron, pp_rank), *needed})
    family = known_family(files, proof.run.rules, proof.frozen)
    return family.weights_only() if proof.no_save_optim else family


def _lost_copies(source: Family, target: Family, depth: Depth) -> Iterator[str]:
    """Copies of the word embedding that the target does not have, and that are not equal to it."""
    run = source.megatron
    dropped = run.embedding_copies & run.dropped_for(target.megatron)
    for name in unlike_embeddings(source, dropped, in_full=depth is Depth.FULL):
        yield f"{name} is lost, for it is not equal to the word embedding's in the source"


def _lacks_optimizer(source: Family, target: Family, pp_rank: int) -> bool:
    """Whether a target rank has none at all, and should."""
    return (
        target.kind is OptimizerKind.NONE is not source.kind
        and has_optimizer(target.ranks[pp_rank].parameters, target.megatron)
        and bool(_counterpart(source, target, pp_rank).optimizers)
    )


def _counterpart(source: Family, target: Family, pp_rank: int) -> SourceRank:
    """The rank of the source from which a target rank has what belongs to no layer."""
    return source.ranks[source.megatron.counterpart(target.megatron, pp_rank)]


@dataclass(frozen=True, slots=True)
class _Twins:
    """A target rank's tensors beside those of the same names in the source."""

    problems: tuple[str, ...]
    """What differs but for bytes."""
    extents: Mapping[TensorName, Pair]
    """Those of one form."""

    def differences(self, differing: Collection[Pair]) -> Iterator[str]:
        """What is said of those whose bytes differ."""
        names = (name for name, pair in self.extents.items() if pair in differing)
        yield from (f"{name} differs from its source" for name in names)


def _twins(source: Family, target: Family, pp_rank: int) -> _Twins:
    """Names, forms and numbers compared; bytes are not read."""
    wanted = {item.name: item for item in source.items_in(target.layout, pp_rank)}
    found = {item.name: item for item in target.items()}
    texts = [f"{name} is missing" for name in wanted if name not in found]
    texts += (f"{name} does not belong here" for name in found if name not in wanted)
    common = [name for name in wanted if name in found]
    here = [name for name in common if name not in target.elsewhere]
    values = (
        {name: source.values(wanted[name]) for name in here},
        {name: target.values(found[name]) for name in here},
    )
    for name in _differing(*values):
        texts.append(f"{name} or a number of its optimizer state differs from its source")
    ours = target.manifest(found[name] for name in common)
    theirs = {
        label: tensor
        for label, tensor in source.manifest(wanted[name] for name in common).items()
        if not (label.kind and label.parameter in target.elsewhere)
    }
    texts += (f"{name} is missing" for name in theirs if name not in ours)
    texts += (f"{name} is not in its source" for name in ours if name not in theirs)
    extents: dict[TensorName, Pair] = {}
    for label in (name for name in ours if name in theirs):
        one, other = ours[label], theirs[label]
        if one.form == other.form:
            extents[label] = one.extent, other.extent
        else:
            shown = (f"{t.dtype} {t.shape}, strides {t.stride}" for t in (one, other))
            texts.append(f"{label} is {' instead of '.join(shown)}")
    return _Twins(tuple(texts), extents)


def _differing_ends(pairs: Iterable[Pair]) -> set[Pair]:
    """Those whose first or last bytes differ."""
    with RangeReader() as reader:
        return {pair for pair in pairs if len({reader.ends(extent) for extent in pair}) > 1}


def _compare_rest(source: Family, target: Family, pp_rank: int) -> Iterator[str]:
    """Differences in everything that is no tensor of the model: it comes from one folder."""
    ours, theirs = target.ranks[pp_rank].root, _counterpart(source, target, pp_rank).root
    theirs = for_data_parallel(theirs, target.megatron.arguments)
    moved = {*all_chunk_keys(ours), *all_chunk_keys(theirs), "args", OPTIMIZER}
    left, right = ([key for key in root if key not in moved] for root in (ours, theirs))
    if left != right:
        yield f"its entries are {', '.join(map(str, left))}, not {', '.join(map(str, right))}"
        return
    is_expected = source.kind is not OptimizerKind.NONE and has_optimizer(
        target.ranks[pp_rank].parameters, target.megatron
    )
    if source.kind is OptimizerKind.LAYER_WISE:  # whose files do without
        is_expected = OPTIMIZER in theirs
    if (OPTIMIZER in ours) != is_expected:
        yield f"its entry {OPTIMIZER!r} is {'missing' if is_expected else 'one too many'}"
    for key in _differing(*({key: root[key] for key in left} for root in (ours, theirs))):
        yield f"entry {show(key)} differs from its source"
    forms = [side.megatron.arguments.placement.form for side in (target, source)]
    kinds = {form.kinds if isinstance(form, HybridPattern) else None for form in forms}
    if len(kinds) > 1:
        yield "args.hybrid_layer_pattern tells other layers than its source's"
    mine, yours = (namespace_values(root["args"], "args") for root in (ours, theirs))
    others = following(source.megatron.arguments, target.megatron.arguments)
    names = [name for name in dict.fromkeys((*mine, *yours)) if name not in others]
    kept = ({name: own[name] for name in names if name in own} for own in (mine, yours))
    for name in _differing(*kept):
        yield f"args.{name} differs from its source"


def _differing(ours: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> list[Any]:
    """The keys whose values differ; those of two mappings that differ in nothing are not compared
    one by one."""
    if is_same(dict(ours), dict(theirs)):
        return []
    keys = dict.fromkeys((*ours, *theirs))
    both = [key for key in keys if key in ours and key in theirs]
    alike = {key for key in both if is_same(ours[key], theirs[key])}
    return [key for key in keys if key not in alike]


def _compare_others(job: VerifyJob) -> Iterator[str]:
    """Differences in the files that are copied as they are."""
    ours, _ = other_files(job.directory, job.rank, job.folder)
    proof = job.proof
    is_wanted = proof.run.arguments.dp_size == proof.target.arguments.dp_size
    theirs = proof.source.others(job.rank.pp_rank or 0) if is_wanted else []
    names = [name for name, _ in ours]
    if names != [name for name, _ in theirs]:
        yield f"its other files are {names}, not those of its source"
        return
    with RangeReader() as reader:
        for (name, found), (_, wanted) in zip(ours, theirs, strict=True):
            is_same = found.length == wanted.length
            if is_same and proof.depth is Depth.FULL:
                both = zip(reader.chunks(found), reader.chunks(wanted), strict=True)
                is_same = all(one == other for one, other in both)
            elif is_same:
                is_same = reader.ends(found) == reader.ends(wanted)
            if not is_same:
                yield f"{name} differs from its source"


def _lost_groups(source: Family, target: Family) -> Iterator[str]:
    """Param groups that the target lacks, where every rank has those of all."""
    if target.megatron.rules.keeps_all_groups and target.kind is not OptimizerKind.NONE:
        for _, key in source.group_identities.keys() - target.group_identities.keys():
            yield f"it lacks the source's param group for {key}"


def _check_groups(target: Family, pp_rank: int) -> Iterator[str]:
    """Every parameter needs a param group of its kind, and all groups one step count."""
    rank = target.ranks[pp_rank]
    found: dict[bool | None, set[str]] = {}
    for own in rank.optimizers:
        groups = own.entry.groups
        by_key = own.items
        keys = keys_of_groups(groups)
        known = {*keys, *(key.usual for key in keys)}
        if not are_sorted(groups):
            yield from (f"no param group for {key}" for key in by_key if key not in known)
        if by_key:
            found.setdefault(own.kind.takes_matrices, set()).update(steps(groups, by_key))
    for counts in found.values():
        if len(counts) > 1:
            yield f"its param groups have different step counts: {', '.join(sorted(counts))}"
