"""Hypothesis strategies for what tests share: layouts, and buffers of parameters."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from pp_to_vpp.megatron.arguments import SavedArguments
from pp_to_vpp.megatron.buffers import BucketPolicy, BufferParameter
from pp_to_vpp.megatron.forms import Ends, Even, HybridPattern, LayoutString
from pp_to_vpp.megatron.placement import Placement
from pp_to_vpp.megatron.rules import CHANGES, Rules

rules = st.builds(Rules, **{change.rule: st.booleans() for change in CHANGES})

policies = st.builds(
    BucketPolicy,
    bucket_size=st.none() | st.integers(1, 5000),
    dense_shards=st.integers(1, 12),
    expert_shards=st.integers(1, 12),
    pads_for_bandwidth=st.booleans(),
)

parameters = st.lists(
    st.builds(
        BufferParameter,
        numel=st.integers(1, 1000) | st.integers(1, 40).map(lambda n: 64 * n),
        dtype=st.sampled_from(["bfloat16", "float32"]),
        is_expert=st.booleans(),
        is_shared_embedding=st.integers(0, 9).map(lambda n: n == 0),
    ),
    max_size=12,
)


@st.composite
def cut_anywhere(draw: st.DrawFn, letters: str, stages: int) -> list[str]:
    """A text in so many parts, some of them empty."""
    count = len(letters)
    cuts = draw(st.lists(st.integers(0, count), min_size=stages - 1, max_size=stages - 1))
    ends = [0, *sorted(cuts), count]
    return [letters[a:b] for a, b in itertools.pairwise(ends)]


@st.composite
def layout_strings(draw: st.DrawFn, num_layers: int, stages: int, mtp: int = 0) -> str:
    """A valid layout string, empty stages included."""
    parts = draw(cut_anywhere("t" * num_layers, stages))
    parts[0] = "E" + parts[0]
    parts[-1] += "m" * mtp + "L"
    return "|".join(parts)


@st.composite
def hybrid_patterns(draw: st.DrawFn, own: HybridPattern, stages: int) -> HybridPattern:
    """The same layers in other stages, empty ones included."""
    parts = draw(cut_anywhere(own.letters, stages))
    return HybridPattern("/".join(("|".join(parts), *own.depths)))


@st.composite
def placements(draw: st.DrawFn) -> tuple[int, int, Placement]:
    """Number of layers, pipeline size, and a placement that Megatron could build."""
    pp_size, vp_size = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    chunks = pp_size * vp_size
    kind = draw(st.sampled_from(["even", "accounted", "uneven", "split", "string"]))
    if kind == "even":
        return draw(st.integers(1, 4)) * chunks, pp_size, Placement(vp_size)
    if kind == "accounted":
        embedding, loss = draw(st.booleans()), draw(st.booleans())
        layers = draw(st.integers(1, 4)) * chunks - embedding - loss
        return layers, pp_size, Placement(vp_size, Even(embedding, loss))
    if kind == "string":
        layers = draw(st.integers(0, 12))
        text = draw(layout_strings(layers, chunks))
        return layers, pp_size, Placement(vp_size, LayoutString(text))
    middle = draw(st.integers(1, 3)) * vp_size
    splits = st.lists(st.integers(1, 4), min_size=vp_size, max_size=vp_size).map(tuple)
    if kind == "split":
        first, last = draw(splits), draw(splits)
        layers = sum(first) + sum(last) + middle * (pp_size - 2)
        return layers, pp_size, Placement(vp_size, Ends(sum(first), sum(last), first, last))
    sizes = st.integers(1, 3).map(lambda n: n * vp_size)
    ends = [draw(st.none() | sizes), draw(st.none() | sizes)]
    given = [end for end in ends if end is not None]
    layers = sum(given) + middle * (pp_size - len(given))
    return (
        layers,
        pp_size,
        Placement(vp_size, Ends(ends[0], ends[1])) if given else Placement(vp_size),
    )


@st.composite
def targets(draw: st.DrawFn, arguments: SavedArguments) -> Placement:
    """A placement for a model that is there: a VPP size that divides its layers, or any layout
    string, its MTP layers on any rank that Megatron allows; for hybrids any pattern."""
    own = arguments.placement.form
    if isinstance(own, HybridPattern):
        vp_size = draw(st.integers(1, 3))
        return Placement(vp_size, draw(hybrid_patterns(own, arguments.pp_size * vp_size)))
    layers, pp_size, mtp = arguments.num_layers, arguments.pp_size, arguments.mtp_num_layers or 0
    sizes = [v for v in (1, 2, 3, 4) if layers % (pp_size * v) == 0]
    if sizes and draw(st.integers(0, 3)) == 0:
        return Placement(draw(st.sampled_from(sizes)))
    vp_size = draw(st.integers(1, 3))
    stages = draw(layout_strings(layers, pp_size * vp_size)).split("|")
    last_layer = max((i for i, stage in enumerate(stages) if "t" in stage), default=0)
    first_allowed = pp_size * (vp_size - 1) + 1  # not on the first pipeline rank
    holder = draw(st.integers(max(last_layer, first_allowed), len(stages) - 1))
    stages[-1] = stages[-1].removesuffix("L")
    stages[holder] += "m" * mtp
    stages[-1] += "L"
    return Placement(vp_size, LayoutString("|".join(stages)))
