"""The rules that the bytes of a family agree with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ..checkpoint.family import Family, RankFiles, Sample, read_family
from ..container.tensors import FLOAT_BYTES, item_bytes
from ..errors import ONE_SAVE, CheckpointError
from ..megatron import rounding
from .files import RangeReader


def proven_family(files: Mapping[int, RankFiles]) -> tuple[Family, str]:
    """The inventory of a family under the first rules that its bytes agree with, and how the
    16-bit weights come from their main parameters: "rounded", "cut off", or "" if there are none.

    Raises:
        CheckpointError: no rules explain structure and samples.
    """
    worst: list[Sample] = []
    for family in read_family(files):
        way, differing = check_samples(family.samples())
        if way is not None:
            odd = next(unlike_copies(family), None)
            if odd is not None:
                path, text = odd
                raise CheckpointError.of(path, text, cure=ONE_SAVE)
            return family, way
        worst = worst or differing
    raise CheckpointError.of(
        worst[0].main.path,
        f"{len(worst)} weights are not their main parameters rounded, {worst[0].name} first",
        expected="16-bit weights that follow from the fp32 main parameters",
        cure=ONE_SAVE,
    )


def unlike_copies(family: Family, *, in_full: bool = False) -> Iterator[tuple[str, str]]:
    """Path and text about each tensor that the files hold twice with other bytes, at both ends or
    anywhere."""
    with RangeReader() as reader:
        for name, copy, original in family.copies():
            both = (copy, original)
            if in_full:
                pairs = zip(*map(reader.chunks, both), strict=True)
                is_same = all(one == other for one, other in pairs)
            else:
                is_same = len({reader.ends(extent) for extent in both}) == 1
            if not is_same:
                yield copy.path, f"{name} is not as in the layer-wise file beside it"


def check_samples(wanted: Iterable[Sample]) -> tuple[str | None, list[Sample]]:
    """Compare the first and last elements of weights with those of their main parameters.

    Returns:
        "rounded" or "cut off" if one way of getting from fp32 to 16 bits explains every sample,
        "" if there were none; None if neither does, with the samples that differ.
    """
    by_dtype: dict[str, list[Sample]] = {}
    for sample in wanted:
        by_dtype.setdefault(sample.dtype, []).append(sample)
    ways: set[str] = set(rounding.WAYS)
    differing: list[Sample] = []
    with RangeReader() as reader:
        for dtype, found in by_dtype.items():
            explained = rounding.explain(
                dtype,
                [reader.ends(sample.weight, item_bytes(dtype)) for sample in found],
                [reader.ends(sample.main, FLOAT_BYTES) for sample in found],
            )
            ways &= explained.ways
            differing += [found[index] for index in explained.differing]
    if not by_dtype:
        return "", []
    best = next((way for way in rounding.WAYS if way in ways), None)
    return best, differing or [sample for found in by_dtype.values() for sample in found]
