"""The rules that the bytes of a family agree with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from ..checkpoint.copies import tensors_of_copies
from ..checkpoint.family import Family, RankFiles, Sample, TensorName
from ..checkpoint.reading import read_family
from ..container.extents import Extent
from ..container.tensors import FLOAT_BYTES, TensorRef, item_bytes
from ..errors import NOT_CONVERTED, ONE_SAVE, CheckpointError
from ..megatron import rounding
from ..megatron.megatron import Megatron
from ..megatron.naming import Section
from ..megatron.optimizer_chain import OptimizerKind
from ..megatron.rules import Rules
from .files import RangeReader


def proven_family(files: Mapping[int, RankFiles]) -> tuple[Family, str]:
    """The inventory of a family under the first rules that its bytes agree with, and how the
    16-bit weights come from their main parameters (see ``check_samples``).

    Raises:
        CheckpointError: no rules explain structure and samples.
    """
    family, way, differing = likeliest_family(files)
    if way is None:
        raise CheckpointError.of(
            differing[0].main.path,
            f"{len(differing)} weights are not their main parameters rounded, {differing[0].name} "
            "first",
            expected="16-bit weights that follow from the fp32 main parameters",
            cure=ONE_SAVE,
        )
    if way in rounding.UNCOMPARED and not family.shares_storages:
        raise CheckpointError.of(
            family.any_rank.files.model.path,
            "nothing proves where optimizer states lie: weights are no views of flat buffers, and "
            "what is left of main parameters cannot be compared with them",
            cure=f"{NOT_CONVERTED}; Megatron's own file has views",
        )
    for path, text in (*unlike_copies(family), *family.lost_groups()):
        raise CheckpointError.of(path, text, cure=ONE_SAVE)
    return family, way


def likeliest_family(
    files: Mapping[int, RankFiles], only: Rules | None = None, frozen: Collection[str] | None = None
) -> tuple[Family, str | None, list[Sample]]:
    """The inventory of a family under the first rules that its bytes agree with, or the first that
    explain its structure; and what its samples show (see ``check_samples``).

    Args:
        files: as ``read_family`` takes them.
        only: the rules, where they are known.
        frozen: names of the parameters that are not trained, where they are known.

    Raises:
        CheckpointError: no rules explain the structure.
    """
    first: tuple[Family, str | None, list[Sample]] | None = None
    with RangeReader() as reader:
        for family in read_family(files, SampledAgreement(reader), only, frozen):
            found = (family, *check_samples(family.samples(), family.megatron.arguments.ways))
            if found[1] is not None:
                return found
            first = first or found
    assert first is not None, "else reading has raised an error"
    return first


def known_family(files: Mapping[int, RankFiles], rules: Rules, frozen: Collection[str]) -> Family:
    """The inventory of a family whose rules and frozen parameters were proved before; samples are
    read only where those leave more than one answer: main parameters may tell other groups.

    Raises:
        CheckpointError: the rules do not explain the structure.
    """
    with RangeReader() as reader:
        family = next(read_family(files, SampledAgreement(reader), rules, frozen))
    is_one = family.kind is not OptimizerKind.PLAIN
    return family if is_one else likeliest_family(files, rules, frozen)[0]


class SampledAgreement:
    """Whether weights can follow from main parameters, by the samples of each, read once."""

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        self._known: dict[Extent, bytes] = {}

    def __call__(self, weight: TensorRef, main: TensorRef, ways: Collection[str]) -> bool:
        """Whether one of some ways of getting from fp32 to 16 bits explains the samples."""
        both = [self._ends(tensor) for tensor in (weight, main)]
        return bool(rounding.explain(weight.dtype, both[:1], both[1:], ways).ways)

    def _ends(self, tensor: TensorRef) -> bytes:
        extent = tensor.extent
        if extent not in self._known:
            self._known[extent] = self._reader.ends(extent, tensor.item_bytes)
        return self._known[extent]


def unlike_copies(family: Family) -> Iterator[tuple[str, str]]:
    """Path and text about each tensor that the files hold twice with other bytes at both ends."""
    with RangeReader() as reader:
        for name, copy, original in family.copies():
            if reader.ends(copy) != reader.ends(original):
                yield copy.path, f"{name} is not as in the layer-wise file beside it"


def unlike_embeddings(
    family: Family, sections: Collection[Section], *, in_full: bool
) -> Iterator[TensorName]:
    """The tensors of the copies of the word embedding in some sections that are not equal to those
    of the embedding, at both ends or in full."""
    with RangeReader() as reader:
        read = reader.chunks if in_full else lambda extent: iter([reader.ends(extent)])
        for name, copy, original in tensors_of_copies(family, sections):
            both = [] if copy is None or original is None else [copy.extent, original.extent]
            if not both or any(a != b for a, b in zip(*map(read, both), strict=True)):
                yield name


def check_dropped(family: Family, target: Megatron) -> None:
    """A copy of the word embedding that a target does not have must be equal to it.

    Raises:
        CheckpointError: it is not, so that what it holds would be lost.
    """
    run = family.megatron
    dropped = run.embedding_copies & run.dropped_for(target)
    for name in unlike_embeddings(family, dropped, in_full=True):
        raise CheckpointError.of(
            family.any_rank.files.model.path,
            f"the target has no copy of the word embedding on another pipeline rank, and {name} is "
            "not equal to the embedding's",
            expected="equal copies, as Megatron keeps them",
            cure="ask for a layout with the copies that the source has",
        )


def check_samples(wanted: Iterable[Sample], ways: Sequence[str]) -> tuple[str | None, list[Sample]]:
    """Compare the first and last elements of weights with those of their main parameters.

    Args:
        wanted: the samples.
        ways: those of getting from fp32 to 16 bits that the run may have gone, likeliest first.

    Returns:
        The first way that explains every sample, "" if there were none; None if none does, with
        the samples that differ.
    """
    by_dtype: dict[str, list[Sample]] = {}
    for sample in wanted:
        by_dtype.setdefault(sample.dtype, []).append(sample)
    left = set(ways)
    differing: list[Sample] = []
    with RangeReader() as reader:
        for dtype, found in by_dtype.items():
            explained = rounding.explain(
                dtype,
                [reader.ends(sample.weight, item_bytes(dtype)) for sample in found],
                [reader.ends(sample.main, FLOAT_BYTES) for sample in found],
                ways,
            )
            left &= explained.ways
            differing += [found[index] for index in explained.differing]
    if not by_dtype:
        return "", []
    best = next((way for way in ways if way in left), None)
    return best, differing or [sample for found in by_dtype.values() for sample in found]
