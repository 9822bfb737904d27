"""Flat buffers against a literal, slow transcription of Megatron's own loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_to_vpp.errors import LayoutError
from pp_to_vpp.megatron.buffers import BucketPolicy, Buffer, BufferParameter, chunk_buffers
from pp_to_vpp.megatron.rules import CHANGES, Rules

from ..examples import examples
from ..strategies import parameters, policies, rules


class CrashError(Exception):
    """Megatron itself fails on these parameters."""


def megatron_buffer(
    numels: Sequence[tuple[int, bool]], rule: Rules, bucket_size: int | None, shards: int, pad: bool
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[int]]:
    """``_ParamAndGradBuffer.__init__`` (0.12.3, and 0.8.0 and 0.13.1 where they differ), line
    by line.

    Takes (numel, shared_embedding) of each parameter; returns ``param_index_map`` in the same
    order, ``bucket_indices`` and ``per_bucket_numel_unpadded``.
    """

    def _pad(number_to_be_padded: int, divisor: int) -> int:
        return math.ceil(number_to_be_padded / divisor) * divisor

    def _pad_end_of_bucket_if_needed(bucket_end_index: int) -> int:
        if pad:
            return _pad(bucket_end_index, math.lcm(shards, 128, 2**16))
        return _pad(bucket_end_index, math.lcm(shards, 128))

    param_start_index = 0
    bucket_start_index = 0
    bucket_params: set[int] = set()
    bucket_indices: list[tuple[int, int]] = []
    per_bucket_numel_unpadded: list[int] = []
    param_index_map: dict[int, tuple[int, int, int]] = {}
    bucket_id = 0

    def _update_bucket_metadata(param_end_index: int) -> int:
        nonlocal bucket_start_index, bucket_params, bucket_id
        per_bucket_numel_unpadded.append(param_end_index - bucket_start_index)
        bucket_end_index = _pad_end_of_bucket_if_needed(param_end_index)
        bucket_indices.append((bucket_start_index, bucket_end_index))
        bucket_start_index = bucket_end_index
        bucket_params = set()
        bucket_id += 1
        return bucket_end_index

    param_end_index = 0
    for param in reversed(range(len(numels))):
        this_numel, is_shared = numels[param]
        if rule.aligns_parameters:
            param_start_index = _pad(param_start_index, 64)
        if rule.closes_bucket_cleanly:
            if is_shared and len(bucket_params) > 0:
                param_start_index = _update_bucket_metadata(param_start_index)
        elif is_shared:
            if param_start_index % shards != 0:
                if not rule.pads_shared_embedding:
                    raise CrashError("data_start_index % data_parallel_world_size == 0")
                param_start_index = _pad_end_of_bucket_if_needed(param_start_index)
            if len(bucket_params) > 0:
                _update_bucket_metadata(param_start_index)
        param_end_index = param_start_index + this_numel
        param_index_map[param] = (param_start_index, param_end_index, bucket_id)
        bucket_params.add(param)
        if (
            bucket_size is not None and (param_end_index - bucket_start_index) >= bucket_size
        ) or is_shared:
            param_start_index = _update_bucket_metadata(param_end_index)
        else:
            param_start_index = param_end_index
    if len(bucket_params) > 0:
        _update_bucket_metadata(param_end_index)
    for start, end, bucket in param_index_map.values():
        low, high = bucket_indices[bucket]
        if not low <= start <= end <= high:
            raise CrashError("Param should not be in param_gbuf_map")
    places = [param_index_map[param][:2] for param in range(len(numels))]
    return places, bucket_indices, per_bucket_numel_unpadded


def saved_positions(
    places: list[tuple[int, int]], buckets: list[tuple[int, int]], unpadded: list[int]
) -> list[int]:
    """``get_parameter_state_dp_zero``: the buckets one after the other, without their padding."""
    found = []
    for start, _ in places:
        for index, (low, high) in enumerate(buckets):
            if low <= start < high:
                found.append(sum(unpadded[:index]) + start - low)
                break
    return found


@examples(500)
@given(parameters, rules, policies)
def test_buffers_are_megatrons(
    found: list[BufferParameter], rule: Rules, policy: BucketPolicy
) -> None:
    keys = list(dict.fromkeys((p.is_expert, p.dtype) for p in found))
    keys.sort(key=lambda key: key[0])
    wanted = []
    try:
        for is_expert, dtype in keys:
            members = [
                i for i, p in enumerate(found) if (p.is_expert, p.dtype) == (is_expert, dtype)
            ]
            shards = policy.expert_shards if is_expert else policy.dense_shards
            numels = [(found[i].numel, found[i].is_shared_embedding) for i in members]
            places, buckets, unpadded = megatron_buffer(
                numels, rule, policy.bucket_size, shards, policy.pads_for_bandwidth
            )
            wanted.append(
                Buffer(
                    dtype=dtype,
                    is_expert=is_expert,
                    members=tuple(members),
                    starts=tuple(start for start, _ in places),
                    saved_starts=tuple(saved_positions(places, buckets, unpadded)),
                    numel=buckets[-1][1],
                    numel_unpadded=sum(unpadded),
                )
            )
    except CrashError:
        with pytest.raises(LayoutError, match="fails to build"):
            chunk_buffers(found, rule, policy)
        return
    assert chunk_buffers(found, rule, policy) == tuple(wanted)


@given(parameters, rules, policies)
def test_parameters_do_not_overlap_in_either_form(
    found: list[BufferParameter], rule: Rules, policy: BucketPolicy
) -> None:
    try:
        buffers = chunk_buffers(found, rule, policy)
    except LayoutError:
        return
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


NEW = Rules(*[True] * len(CHANGES))


def dense(*numels: int, shared: int | None = None) -> list[BufferParameter]:
    """Parameters of one buffer; ``shared`` is the index of a shared embedding."""
    return [BufferParameter(n, "bfloat16", False, i == shared) for i, n in enumerate(numels)]


def policy(bucket_size: int | None = None, shards: int = 1) -> BucketPolicy:
    return BucketPolicy(bucket_size, shards, shards, pads_for_bandwidth=False)


def with_rules(**changed: bool) -> Rules:
    return Rules(**{name: changed.get(name, True) for name in Rules.__dataclass_fields__})


def test_alignment_holes_are_saved() -> None:
    """FORMAT 9.1."""
    (buffer,) = chunk_buffers(dense(10, 5), NEW, policy())
    assert (buffer.saved_starts, buffer.numel_unpadded) == ((64, 0), 74)
    (old,) = chunk_buffers(dense(10, 5), with_rules(aligns_parameters=False), policy())
    assert old.numel_unpadded == 15


def test_buckets_change_sizes() -> None:
    """FORMAT 9.2."""
    (buffer,) = chunk_buffers(dense(10, 5), NEW, policy(bucket_size=5))
    assert (buffer.saved_starts, buffer.numel_unpadded) == ((5, 0), 15)
    assert buffer.starts == (128, 0)


def test_shared_embeddings_are_asymmetric() -> None:
    """FORMAT 9.3."""
    (last,) = chunk_buffers(dense(100, 1000, shared=1), NEW, policy())
    assert (last.saved_starts, last.numel_unpadded) == ((1000, 0), 1100)
    (first,) = chunk_buffers(dense(1000, 100, shared=0), NEW, policy())
    assert (first.saved_starts, first.numel_unpadded) == ((128, 0), 1128)
    old = with_rules(closes_bucket_cleanly=False)
    (padded,) = chunk_buffers(dense(1000, 100, shared=0), old, policy(shards=3))
    assert padded.saved_starts == (384, 0)
    (clean,) = chunk_buffers(dense(1000, 100, shared=0), NEW, policy(shards=3))
    assert clean.saved_starts == (128, 0)
    older = with_rules(closes_bucket_cleanly=False, pads_shared_embedding=False)
    (fitting,) = chunk_buffers(dense(1000, 100, shared=0), older, policy(shards=2))
    assert fitting.saved_starts == (128, 0)
    with pytest.raises(LayoutError, match="at element 128 of its buffer, which 3 data-parallel"):
        chunk_buffers(dense(1000, 100, shared=0), older, policy(shards=3))


@given(st.integers(1, 64), st.booleans())
def test_divisors_fit_all_ranks(shards: int, pads: bool) -> None:
    divisor = BucketPolicy(None, shards, 1, pads).divisor(is_expert=False)
    assert divisor % shards == 0
    assert divisor % (1 << 16 if pads else 128) == 0
