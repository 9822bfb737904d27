"""How Megatron lays the parameters of a model chunk out in flat buffers.

Each chunk has a buffer per (dense or expert, dtype), created in the order in which
``named_parameters()`` first meets them; inside one, parameters lie in reverse order, each aligned,
cut into buckets whose ends are padded (param_and_grad_buffer.py, 0.7 to 0.17;
distrib_optimizer.py ``_compute_per_buffer_param_layout``, 0.18 and 0.19). The optimizer file holds
the same buffer with the padding of bucket ends taken out, the holes inside buckets kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LayoutError
from .layout import ModelChunk
from .megatron import Megatron
from .optimizer_chain import ChainedOptimizer
from .parameters import Items, is_in_expert_buffer, is_shared_embedding
from .rules import Rules

_PARAMETER_ALIGNMENT = 64
"""Elements: 128 bytes at 16 bits."""
_BUCKET_ALIGNMENT = 128
_HIGH_BANDWIDTH_ALIGNMENT = 1 << 16
_DEFAULT_BUCKET = 40_000_000
_DEFAULT_BUCKET_PER_RANK = 1_000_000


@dataclass(frozen=True, slots=True)
class BufferParameter:
    """A trained parameter, as far as its buffer cares."""

    numel: int
    dtype: str
    is_expert: bool
    is_shared_embedding: bool
    """Gets a bucket of its own, because its gradient is summed over two pipeline stages."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """One flat buffer. Positions are in elements; members are indices into the chunk's
    parameters."""

    dtype: str
    is_expert: bool
    members: tuple[int, ...]
    """In the order of ``named_parameters()``."""
    starts: tuple[int, ...]
    """Where each member starts in the buffer itself."""
    saved_starts: tuple[int, ...]
    """Where each member starts in the tensors of distrib_optim.pt."""
    numel: int
    """With all padding: the size of the storage in model_optim_rng.pt."""
    numel_unpadded: int
    """Without the padding of bucket ends: the size of the tensors in distrib_optim.pt."""


@dataclass(frozen=True, slots=True)
class BucketPolicy:
    """What else the layout of a chunk's buffers depends on."""

    bucket_size: int | None
    """Elements after which a bucket is closed; None for one bucket."""
    dense_shards: int
    expert_shards: int
    pads_for_bandwidth: bool

    def shards(self, *, is_expert: bool) -> int:
        """Ranks among which each bucket is divided."""
        return self.expert_shards if is_expert else self.dense_shards

    def divisor(self, *, is_expert: bool) -> int:
        """Bucket ends are padded to a multiple of this."""
        divisors = [self.shards(is_expert=is_expert), _BUCKET_ALIGNMENT]
        if self.pads_for_bandwidth:
            divisors.append(_HIGH_BANDWIDTH_ALIGNMENT)
        return math.lcm(*divisors)


def bucket_policy(chunk: ModelChunk, rank_numel: int, megatron: Megatron) -> BucketPolicy:
    """The policy of one chunk (training.py get_model; distributed_data_parallel.py).

    Args:
        chunk: only the first one of the first stage has buckets: elsewhere there is no gradient
            left to reduce while others are still computed (FORMAT 5.4).
        rank_numel: elements of all parameters of the rank, frozen ones too, for
            ``ddp_num_buckets``.
        megatron: the run; what it was told of buckets must be told to the relaunch too.
    """
    arguments = megatron.arguments
    size: int | None = None
    if (
        arguments.overlaps_grad_reduce
        and (chunk.pp_rank, chunk.vp_stage) == (0, 0)
        and not arguments.overlaps_param_gather_with_step
    ):
        ranks = arguments.dp_size
        if megatron.rules.counts_cp_in_default_bucket:
            ranks *= arguments.cp_size
        size = max(_DEFAULT_BUCKET, _DEFAULT_BUCKET_PER_RANK * ranks)
        if arguments.ddp_num_buckets is not None:
            size = rank_numel // arguments.ddp_num_buckets
        elif arguments.ddp_bucket_size is not None:
            size = arguments.ddp_bucket_size
    rules, instances = megatron.rules, arguments.optimizer_instances
    if rules.pads_for_all_instances and not rules.pads_for_one_instance:
        instances = 1
    return BucketPolicy(
        bucket_size=size,
        dense_shards=max(1, arguments.dense_replicas // instances),
        expert_shards=max(1, arguments.expert_replicas // instances),
        pads_for_bandwidth=arguments.pads_buckets,
    )


def chunk_buffers(
    parameters: Sequence[BufferParameter], rules: Rules, policy: BucketPolicy
) -> tuple[Buffer, ...]:
    """The buffers of one chunk: the dense ones, then the expert ones.

    Args:
        parameters: of the chunk, in the order of ``named_parameters()``.
        rules: of the version.
        policy: buckets and padding.

    Raises:
        LayoutError: Megatron could not build such a buffer.
    """
    groups: dict[tuple[bool, str], list[int]] = {}
    for index, parameter in enumerate(parameters):
        groups.setdefault((parameter.is_expert, parameter.dtype), []).append(index)
    # Stable: dense first, dtypes as named_parameters() meets them (FORMAT 5.2).
    ordered = sorted(groups, key=lambda group: group[0])
    return tuple(_lay_out(parameters, groups[group], rules, policy, *group) for group in ordered)


def _ceil(position: int, divisor: int) -> int:
    return -(-position // divisor) * divisor


@dataclass(slots=True)
class _Cursor:
    """Where the walk over the members of a buffer stands, in elements."""

    divisor: int
    """Bucket ends are padded to a multiple of this."""
    position: int = 0
    bucket_start: int = 0
    saved: int = 0
    """Elements of all closed buckets, without their padding."""
    is_open: bool = False
    """The current bucket has members."""

    def close_bucket(self) -> None:
        """End the current bucket at the position; the next one starts at a multiple of the
        divisor, which may lie behind the position."""
        self.saved += self.position - self.bucket_start
        self.bucket_start = _ceil(self.position, self.divisor)
        self.is_open = False


def _separate_shared_embedding(cursor: _Cursor, rules: Rules, shards: int) -> None:
    """Give a shared embedding that comes next a bucket of its own, as the version does.

    Raises:
        LayoutError: the version fails to build it.
    """
    place = f"shared embedding at element {cursor.position} of its buffer"
    if not rules.closes_bucket_cleanly and cursor.position % shards:
        if not rules.pads_shared_embedding:
            raise LayoutError(
                f"{place}, which {shards} data-parallel ranks do not divide: Megatron-LM up to 0.8 "
                "fails to build that ('assert data_start_index % data_parallel_world_size == 0'); "
                "choose another layout, or save once with another data-parallel size"
            )
        cursor.position = _ceil(cursor.position, cursor.divisor)
    if cursor.is_open:
        cursor.close_bucket()
        if rules.closes_bucket_cleanly:
            cursor.position = cursor.bucket_start
    if cursor.position < cursor.bucket_start:
        raise LayoutError(
            f"{place}, before its bucket at {cursor.bucket_start}: Megatron-LM up to 0.12 fails to "
            "build that ('each param only belongs to a single bucket'); choose another layout"
        )


def _lay_out(
    parameters: Sequence[BufferParameter],
    members: list[int],
    rules: Rules,
    policy: BucketPolicy,
    is_expert: bool,  # noqa: FBT001
    dtype: str,
) -> Buffer:
    """Walk the members in reverse order, closing buckets as the version does."""
    cursor = _Cursor(policy.divisor(is_expert=is_expert))
    starts: dict[int, int] = {}
    saved_starts: dict[int, int] = {}
    for member in reversed(members):  # in this order gradients arrive (FORMAT 5.4)
        parameter = parameters[member]
        if rules.aligns_parameters:
            cursor.position = _ceil(cursor.position, _PARAMETER_ALIGNMENT)
        if parameter.is_shared_embedding:
            _separate_shared_embedding(cursor, rules, policy.shards(is_expert=is_expert))
        starts[member] = cursor.position
        saved_starts[member] = cursor.saved + cursor.position - cursor.bucket_start
        cursor.position += parameter.numel
        cursor.is_open = True
        held = cursor.position - cursor.bucket_start
        is_full = policy.bucket_size is not None and held >= policy.bucket_size
        if is_full or parameter.is_shared_embedding:
            cursor.close_bucket()
            cursor.position = cursor.bucket_start
    if cursor.is_open:
        cursor.close_bucket()
    return Buffer(
        dtype=dtype,
        is_expert=is_expert,
        members=tuple(members),
        starts=tuple(starts[member] for member in members),
        saved_starts=tuple(saved_starts[member] for member in members),
        numel=cursor.bucket_start,
        numel_unpadded=cursor.saved,
    )


@dataclass(frozen=True, slots=True)
class RankBuffers:
    """The flat buffers of one rank's chunks."""

    by_stage: tuple[tuple[Buffer, ...], ...]
    """For each virtual stage, the buffers of its chunk."""

    def of(self, optimizer: ChainedOptimizer) -> list[tuple[int, Buffer]]:
        """(virtual stage, buffer) of each buffer of an optimizer, in the order of its index
        ``gbuf_idx``: chunks without such parameters have none."""
        return [
            (stage, buffer)
            for stage in optimizer.vp_stages
            for buffer in self.by_stage[stage]
            if buffer.is_expert == optimizer.is_expert
        ]


def buffers_of(items_of_chunks: Items, pp_rank: int, megatron: Megatron) -> RankBuffers:
    """The flat buffers of a pipeline rank with these items.

    Raises:
        LayoutError: Megatron could not build them.
    """
    chunks = megatron.layout.rank_chunks(pp_rank)
    parameters = [[item for item in items if item.is_trained] for items in items_of_chunks]
    # ddp_num_buckets divides the parameters of all chunks of the rank (FORMAT 5.4).
    rank_numel = sum(
        item.weight.numel for items in items_of_chunks for item in items if item.is_parameter
    )
    return RankBuffers(
        tuple(
            chunk_buffers(
                [
                    BufferParameter(
                        numel=item.weight.numel,
                        dtype=item.weight.dtype,
                        is_expert=is_in_expert_buffer(item, megatron),
                        is_shared_embedding=is_shared_embedding(item, megatron),
                    )
                    for item in items
                ],
                megatron.rules,
                bucket_policy(chunk, rank_numel, megatron),
            )
            for chunk, items in zip(chunks, parameters, strict=True)
        )
    )
