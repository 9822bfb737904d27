"""Flat buffers against cells that are laid one by one, by the rules of the file format.

Megatron's own buffers judge in tests/test_megatron_rules.py, those of its older versions in
tests/compatibility.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from pp_to_vpp.errors import LayoutError
from pp_to_vpp.megatron.buffers import (
    BucketPolicy,
    Buffer,
    BufferParameter,
    bucket_policy,
    chunk_buffers,
)
from pp_to_vpp.megatron.megatron import Megatron
from pp_to_vpp.megatron.rules import CHANGES, Rules

from ..examples import examples
from ..families import family
from ..pairs import INSTANCES
from ..strategies import parameters, policies, rules

NEW = Rules(*[True] * len(CHANGES))


def buffers_of(
    found: list[BufferParameter], rule: Rules, policy: BucketPolicy
) -> tuple[Buffer, ...]:
    """What is tested here."""
    return chunk_buffers(found, rule, policy)


def buildable(
    found: list[BufferParameter], rule: Rules, policy: BucketPolicy
) -> tuple[Buffer, ...]:
    """The same; what a version fails to build is no example."""
    try:
        return buffers_of(found, rule, policy)
    except LayoutError:
        reject()


class Bucket:
    """Cells from a multiple of the divisor on; each is 0 or the number of the parameter in it."""

    def __init__(self, divisor: int) -> None:
        self.cells = bytearray()
        self.divisor = divisor

    def leave_empty_until(self, multiple: int) -> None:
        """Holes inside a bucket: they are saved."""
        self.cells += bytes(-len(self.cells) % multiple)

    @property
    def padded(self) -> bytes:
        """With the padding of its end, which is not saved."""
        return bytes(self.cells) + bytes(-len(self.cells) % self.divisor)


def painted(
    members: Iterable[tuple[int, BufferParameter]], rule: Rules, policy: BucketPolicy
) -> list[Bucket] | None:
    """The buckets of one buffer; None if the version cannot build it.

    Buckets begin at multiples of the divisor, hence of all smaller alignments: so the cells of each
    depend on nothing before it. Parameters come last to first. One begins a bucket if it is a
    shared embedding, or if the bucket before it holds one or has reached the bucket size.
    """
    first, *rest = sorted(members, reverse=True)
    is_expert = first[1].is_expert
    ranks = policy.expert_shards if is_expert else policy.dense_shards
    divisor = math.lcm(ranks, 65536 if policy.pads_for_bandwidth else 128)
    buckets = [Bucket(divisor)]
    for (number, parameter), before in zip([first, *rest], [None, first, *rest], strict=False):
        bucket = buckets[-1]
        size = policy.bucket_size
        if before and (
            before[1].is_shared_embedding or (size is not None and len(bucket.cells) >= size)
        ):
            bucket = Bucket(divisor)
            buckets.append(bucket)
        if rule.aligns_parameters:
            bucket.leave_empty_until(64)
        if parameter.is_shared_embedding and bucket.cells:
            if not rule.closes_bucket_cleanly:
                # Such a version pads the bucket before only if the ranks do not divide its end;
                # where this bucket cannot begin after that, the version fails.
                if len(bucket.cells) % ranks and rule.pads_shared_embedding:
                    bucket.leave_empty_until(divisor)
                if len(bucket.cells) % divisor:
                    return None
            bucket = Bucket(divisor)
            buckets.append(bucket)
        bucket.cells += bytes([number + 1]) * parameter.numel
    return buckets


@examples(500)
@given(parameters, rules, policies)
def test_buffers_are_their_buckets_end_to_end(
    found: list[BufferParameter], rule: Rules, policy: BucketPolicy
) -> None:
    kinds = list(dict.fromkeys((p.is_expert, p.dtype) for p in found))
    wanted = []
    for is_expert, dtype in sorted(kinds, key=lambda kind: kind[0]):
        members = [
            (i, p) for i, p in enumerate(found) if (p.is_expert, p.dtype) == (is_expert, dtype)
        ]
        buckets = painted(members, rule, policy)
        if buckets is None:
            with pytest.raises(LayoutError, match="fails to build"):
                buffers_of(found, rule, policy)
            return
        whole = b"".join(bucket.padded for bucket in buckets)
        saved = b"".join(bucket.cells for bucket in buckets)
        wanted.append(
            Buffer(
                dtype=dtype,
                is_expert=is_expert,
                members=tuple(i for i, _ in members),
                starts=tuple(whole.index(i + 1) for i, _ in members),
                saved_starts=tuple(saved.index(i + 1) for i, _ in members),
                numel=len(whole),
                numel_unpadded=len(saved),
            )
        )
    assert buffers_of(found, rule, policy) == tuple(wanted)


@given(parameters, rules, policies)
def test_shared_embeddings_are_alone_in_their_buckets(
    found: list[BufferParameter], rule: Rules, policy: BucketPolicy
) -> None:
    """No bucket begins inside one, and nothing else lies between its start and the next bucket."""
    for buffer in buildable(found, rule, policy):
        divisor = policy.divisor(is_expert=buffer.is_expert)
        assert buffer.numel % divisor == 0
        places = dict(zip(buffer.members, buffer.starts, strict=True))
        assert sorted(places.values(), reverse=True) == list(buffer.starts), "last to first"
        assert sorted(buffer.saved_starts, reverse=True) == list(buffer.saved_starts)
        for member, start in places.items():
            if rule.aligns_parameters:
                assert start % 64 == 0
            if found[member].is_shared_embedding:
                end = start + found[member].numel
                assert start % divisor == 0
                later = [other for other in (*places.values(), buffer.numel) if other > start]
                assert min(later) >= end + -end % divisor


@given(parameters, rules, policies)
def test_parameters_do_not_overlap_in_either_form(
    found: list[BufferParameter], rule: Rules, policy: BucketPolicy
) -> None:
    buffers = buildable(found, rule, policy)
    members = [index for buffer in buffers for index in buffer.members]
    assert sorted(members) == list(range(len(found)))
    for buffer in buffers:
        for starts, end in (
            (buffer.starts, buffer.numel),
            (buffer.saved_starts, buffer.numel_unpadded),
        ):
            ranges = sorted(
                (start, start + found[index].numel)
                for start, index in zip(starts, buffer.members, strict=True)
            )
            assert ranges[0][0] >= 0
            assert ranges[-1][1] <= end
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


def dense(*numels: int, shared: int | None = None) -> list[BufferParameter]:
    """Parameters of one buffer; ``shared`` is the index of a shared embedding."""
    return [BufferParameter(n, "bfloat16", False, i == shared) for i, n in enumerate(numels)]


def policy(bucket_size: int | None = None, shards: int = 1) -> BucketPolicy:
    return BucketPolicy(bucket_size, shards, shards, pads_for_bandwidth=False)


def with_rules(**changed: bool) -> Rules:
    return Rules(**{name: changed.get(name, True) for name in Rules.__dataclass_fields__})


def test_alignment_holes_are_saved() -> None:
    """Before 0.8 there were none (FORMAT 9.1)."""
    (buffer,) = buffers_of(dense(10, 5), NEW, policy())
    assert (buffer.saved_starts, buffer.numel_unpadded) == ((64, 0), 74)
    (old,) = buffers_of(dense(10, 5), with_rules(aligns_parameters=False), policy())
    assert old.numel_unpadded == 15


def test_buckets_change_sizes() -> None:
    """A parameter behind a bucket's end starts where it ends, unaligned (FORMAT 9.2)."""
    (buffer,) = buffers_of(dense(10, 5), NEW, policy(bucket_size=5))
    assert (buffer.saved_starts, buffer.numel_unpadded) == ((5, 0), 15)
    assert buffer.starts == (128, 0)


def test_shared_embeddings_are_asymmetric() -> None:
    """On the last stage first in reverse order, on the first last: behind a hole (FORMAT 9.3)."""
    (last,) = buffers_of(dense(100, 1000, shared=1), NEW, policy())
    assert (last.saved_starts, last.numel_unpadded) == ((1000, 0), 1100)
    (first,) = buffers_of(dense(1000, 100, shared=0), NEW, policy())
    assert (first.saved_starts, first.numel_unpadded) == ((128, 0), 1128)
    old = with_rules(closes_bucket_cleanly=False)
    (padded,) = buffers_of(dense(1000, 100, shared=0), old, policy(shards=3))
    assert padded.saved_starts == (384, 0)
    (clean,) = buffers_of(dense(1000, 100, shared=0), NEW, policy(shards=3))
    assert clean.saved_starts == (128, 0)
    older = with_rules(closes_bucket_cleanly=False, pads_shared_embedding=False)
    (fitting,) = buffers_of(dense(1000, 100, shared=0), older, policy(shards=2))
    assert fitting.saved_starts == (128, 0)
    with pytest.raises(LayoutError, match="at element 128 of its buffer, which 3 data-parallel"):
        buffers_of(dense(1000, 100, shared=0), older, policy(shards=3))


@given(st.integers(1, 64), st.booleans())
def test_divisors_fit_all_ranks(shards: int, pads: bool) -> None:
    divisor = BucketPolicy(None, shards, 1, pads).divisor(is_expert=False)
    assert divisor % shards == 0
    assert divisor % (1 << 16 if pads else 128) == 0


@pytest.mark.parametrize(("version", "shards"), [(17, (4, 2)), (18, (12, 6)), (19, (4, 2))])
def test_buckets_are_padded_for_the_ranks_of_an_optimizer_instance(
    version: int, shards: tuple[int, int]
) -> None:
    """In 0.18 for those of all."""
    saved = family(INSTANCES, "source").megatron
    sizes = replace(saved.arguments, optimizer_instances=3, dp_size=12, ep_size=2)
    rules = with_rules(pads_for_all_instances=version >= 18, pads_for_one_instance=version >= 19)
    run = Megatron(sizes, rules)
    found = bucket_policy(run.layout.chunks[0], 0, run)
    assert (found.dense_shards, found.expert_shards) == shards
