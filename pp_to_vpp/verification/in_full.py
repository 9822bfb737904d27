"""Rank folders read in full, each byte once.

In one pass tensors are compared with those of the source, added up to the checksums of their
records, and held to their main parameters. What is equal has one checksum: so the pass finds that
of the source's ranges, too, to which its records are held when all of a family is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.family import Family, RankFiles, Sample
from ..container.archive import Record
from ..container.crc32 import Checksums, of_bytes
from ..container.extents import Extent
from ..container.tensors import FLOAT_BYTES, item_bytes
from ..errors import ANOTHER_COPY, CheckpointError, problem
from ..megatron import rounding
from ..megatron.ranks import is_rank_file
from ..megatron.rules import Rules
from ..source.files import FamilyFolders, RangeReader, read_directory
from ..source.proof import known_family

Pair = tuple[Extent, Extent]
"""A tensor of the target and one of the source."""

UNLIKE_MAIN = "{} is not its main parameter rounded to 16 bits"
_ELEMENTS = 1 << 16
"""Of a weight and its main parameter at a time."""
_READ_BYTES = 1 << 18
"""Of other tensors at a time: read, compared and added up within the second-level cache."""
_FREED_ONCE = 4 * _READ_BYTES
"""The C library gives blocks of more than 128 KiB back to the system at once, which hands them out
anew page by page, until a larger one was freed: 3.2 s of system time for 12 GB, 1.8 s from then."""


@dataclass(frozen=True, slots=True)
class InFull:
    """What reading a rank folder has shown."""

    differing: Collection[Pair]
    """Those whose bytes are not equal."""
    problems: tuple[tuple[str, str], ...]
    """Path and text: of states that the files hold twice with other bytes, of records whose bytes
    are not those that were written, of weights that are not their main parameters rounded."""
    source: Mapping[Extent, int]
    """CRC-32 of the source's ranges that were read."""


def read_in_full(
    files: RankFiles, family: Family, pairs: Iterable[Pair], known: Checksums | None
) -> InFull:
    """Read a rank folder of the target, and what it came from.

    Args:
        files: of the folder.
        family: its inventory.
        pairs: the tensors that must be equal.
        known: what copying has read of the source, which then is not read again.

    Raises:
        CheckpointError: files cannot be read.
    """
    bytes(_FREED_ONCE)
    tensors = {tensor.extent for tensor in family.manifest().values()}
    copies = list(family.copies())
    with RangeReader() as reader:
        reading = _Pass(reader, pairs, known)
        unlike = [
            (sample.main.path, UNLIKE_MAIN.format(sample.name))
            for sample in reading.unlike_mains(family.samples(), family.megatron.arguments.ways)
        ]
        reading.finish((*tensors, *(copy for _, copy, _ in copies)))
        problems = [
            (copy.path, f"{name} is not as in the layer-wise file beside it")
            for name, copy, original in copies
            if reading.ours[copy] != reading.ours[original]
        ]
        ours = Checksums(reading.ours)
        for file in files.all:
            for whole, record in _damaged(reader, file.path, file.records.values(), ours):
                problems.append((file.path, _damage(whole, record, family)))
    return InFull(reading.differing, (*problems, *unlike), reading.theirs)


class _Pass:
    """Reads tensors once."""

    def __init__(
        self, reader: RangeReader, pairs: Iterable[Pair] = (), known: Checksums | None = None
    ) -> None:
        self._reader = reader
        self._known = known
        self._twins: dict[Extent, list[Extent]] = {}
        for ours, theirs in pairs:
            self._twins.setdefault(ours, []).append(theirs)
        self.ours: dict[Extent, int] = {}
        """CRC-32 of the tensors read."""
        self.theirs: dict[Extent, int] = {}
        """Of the source's."""
        self.differing: set[Pair] = set()

    def finish(self, tensors: Iterable[Extent]) -> None:
        """Read those that have not been read."""
        for tensor in tensors:
            if tensor not in self.ours:
                for _ in self._chunks(tensor, _READ_BYTES):
                    pass

    def unlike_mains(self, wanted: Iterable[Sample], ways: Iterable[str]) -> Iterator[Sample]:
        """Weights that do not follow from their fp32 main parameter in the way that all do."""
        possible = frozenset(ways)
        for sample in wanted:
            left = possible
            weights = self._chunks(sample.weight, _ELEMENTS * item_bytes(sample.dtype))
            mains = self._chunks(sample.main, _ELEMENTS * FLOAT_BYTES)
            for weight, main in zip(weights, mains, strict=True):
                left = rounding.explain(sample.dtype, [weight], [main], left).ways
            if left:
                possible = left
            else:
                yield sample

    def _chunks(self, tensor: Extent, length: int) -> Iterator[bytes]:
        """The bytes of a tensor, so many at a time, compared and added up on the way."""
        twins = self._twins.get(tensor, [])
        crc32, theirs = 0, dict.fromkeys(twins if self._known is None else (), 0)
        for part in tensor.segments(length):
            data = self._reader.read(part)
            before, crc32 = crc32, of_bytes(data, crc32)
            for twin, other in theirs.items():
                found = self._reader.read(twin.cut(part.offset - tensor.offset, part.length))
                is_equal = found == data
                if not is_equal:
                    self.differing.add((tensor, twin))
                theirs[twin] = crc32 if is_equal and other == before else of_bytes(found, other)
            yield data
        self.ours[tensor] = crc32
        self.theirs |= theirs
        if self._known is not None:
            found_by_copy = (self._known.of(twin, self._reader.crc32) for twin in twins)
            pairs = zip(twins, found_by_copy, strict=True)
            self.differing |= {(tensor, twin) for twin, other in pairs if other != crc32}


def _damaged(
    reader: RangeReader, path: str, records: Iterable[Record], known: Checksums
) -> Iterator[tuple[Extent, Record]]:
    """Records of a file whose bytes do not have their checksum; what is not known is read."""
    for record in records:
        whole = record.extent(path)
        if record.has_checksum and known.of(whole, reader.crc32) != record.crc32:
            yield whole, record


@dataclass(frozen=True, slots=True)
class SourceJob:
    """The source of a family, of which every byte was read that is wanted."""

    folders: FamilyFolders
    rules: Rules
    frozen: frozenset[str]
    found: Mapping[Extent, int]
    """CRC-32 of what was read."""


def check_source(job: SourceJob) -> None:
    """Hold the records of the source to their checksums.

    All those of the family's files are held; in the folders of other expert ranks, where states of
    dense parameters lie, those of which something was read.

    Raises:
        CheckpointError: some are damaged.
    """
    own = {rank.folder for rank in job.folders.ranks.values()}
    known = Checksums(job.found)
    damaged: list[tuple[Extent, Record]] = []
    with RangeReader() as reader:
        for path in (Path(path) for path in known.paths if is_rank_file(Path(path).name)):
            records = read_directory(path)
            if path.parent.name not in own:
                records = [r for r in records if any(known.inside(r.extent(str(path))))]
            damaged += _damaged(reader, str(path), records, known)
    if damaged:
        family = known_family(job.folders.read(job.folders.ranks), job.rules, job.frozen)
        raise CheckpointError(
            *(
                problem(whole.path, _damage(whole, record, family), cure=ANOTHER_COPY)
                for whole, record in damaged[:8]
            )
        )


def _damage(whole: Extent, record: Record, family: Family) -> str:
    """What is said of a damaged record: the parameter too, where its main parameter betrays it."""
    end = whole.offset + whole.length
    names = [
        name
        for name, tensor in family.manifest().items()
        if tensor.extent.path == whole.path and whole.offset <= tensor.extent.offset < end
    ]
    held = {name.parameter for name in names}
    with RangeReader() as reader:
        suspects = (sample for sample in family.samples() if sample.name in held)
        ways = family.megatron.arguments.ways
        guilty = next(_Pass(reader).unlike_mains(suspects, ways), None)
    if guilty is not None:
        owner = f"parameter {guilty.name}"
    elif names:
        owner = f"{names[0]}" + (f" or one of {len(names) - 1} more" if names[1:] else "")
    else:
        owner = "no parameter"
    return (
        f"record {record.name!r} is damaged ({owner}): its bytes do not have the CRC-32 they were "
        "written with"
    )
