"""Our rules against those of an installed Megatron-Core: hypothesis makes up parameters, placements
and layout strings, Megatron's own code says what becomes of them, and ours must say the same.

A process is forked for each call, so that each example is a list of cases.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pp_to_vpp.checkpoint.family import Family, SourceRank
from pp_to_vpp.container.pickling import Global, Instance
from pp_to_vpp.errors import CheckpointError, LayoutError
from pp_to_vpp.megatron.arguments import read_arguments
from pp_to_vpp.megatron.buffers import BucketPolicy, Buffer, BufferParameter, chunk_buffers
from pp_to_vpp.megatron.forms import Ends, Even, LayoutString, parse_layout
from pp_to_vpp.megatron.layer_wise import deal
from pp_to_vpp.megatron.layout import PipelineLayout
from pp_to_vpp.megatron.megatron import Megatron as MegatronRun
from pp_to_vpp.megatron.naming import Section
from pp_to_vpp.megatron.optimizer_chain import items_by_group
from pp_to_vpp.megatron.param_groups import keys_of_groups
from pp_to_vpp.megatron.parameters import GroupKey
from pp_to_vpp.megatron.placement import Placement
from pp_to_vpp.megatron.rules import CHANGES, Rules
from pp_to_vpp.source.proof import proven_family
from pp_to_vpp.source.survey import take_survey

from ..examples import FACTOR, examples
from ..strategies import layout_strings, parameters, placements
from .cases import DENSE, LATE_MOE, MTP, virtual
from .launch import Megatron
from .spec import Model, Run

_LEAST, _MOST = 20, 60
"""Cases in a list."""


# What is asked of the package, and nowhere else in this file.


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in version.split(".")[:2])


def rules_of(version: str) -> Rules:
    """The rules in force in a version."""
    found = release(version)
    return Rules(**{change.rule: release(change.since) <= found for change in CHANGES})


def our_buffers(case: dict[str, Any], rules: Rules) -> tuple[Buffer, ...] | None:
    """The buffers of a chunk; None if they cannot be built."""
    policy = BucketPolicy(
        bucket_size=case["bucket_size"],
        dense_shards=case["ranks"],
        expert_shards=case["ranks"] // case["expert_size"],
        pads_for_bandwidth=case["pads"],
    )
    try:
        return chunk_buffers([BufferParameter(*p) for p in case["parameters"]], rules, policy)
    except LayoutError:
        return None


_ARGUMENTS = {
    "num_layers": "num_layers",
    "pp_size": "pipeline_model_parallel_size",
    "vp_size": "virtual_pipeline_model_parallel_size",
    "mtp_layers": "mtp_num_layers",
    "first_layers": "decoder_first_pipeline_num_layers",
    "last_layers": "decoder_last_pipeline_num_layers",
    "account_for_embedding": "account_for_embedding_in_pipeline_split",
    "account_for_loss": "account_for_loss_in_pipeline_split",
    "layout": "pipeline_model_parallel_layout",
}


def our_layout(case: dict[str, Any], rules: Rules) -> PipelineLayout | None:
    """The chunks of a run with the arguments of a case; None if it is impossible."""
    state = {_ARGUMENTS[name]: value for name, value in case.items() if name in _ARGUMENTS}
    node = Instance(Global("argparse", "Namespace"), (), by_new=True, state=state)
    try:
        saved = MegatronRun(read_arguments({"args": node}, "args"), rules)
        placement = saved.arguments.placement
        if isinstance(placement.form, Ends):
            # The splits are those that Microsoft's fork makes up: Megatron-Core has none.
            own = replace(placement.form, first_split=None, last_split=None)
            saved = saved.relaunched(replace(placement, form=own), overlaps=False)
        return saved.layout
    except (LayoutError, CheckpointError):
        return None


def options_of(placement: Placement) -> dict[str, Any] | None:
    """A placement in the words of cases; None for one with splits, which Megatron-Core lacks."""
    options: dict[str, Any] = {**_PLAIN, "vp_size": placement.vp_size}
    match placement.form:
        case Even(counts_embedding, counts_loss):
            return {
                **options,
                "account_for_embedding": counts_embedding,
                "account_for_loss": counts_loss,
            }
        case Ends(first, last, None, None):
            return {**options, "first_layers": first, "last_layers": last}
        case LayoutString(text):
            return {**options, "layout": text}
        case _:
            return None


def our_stages(text: str) -> list[str] | None:
    """The letters of each stage of a layout string; None if it is none."""
    try:
        return list(parse_layout(text))
    except LayoutError:
        return None


def our_families(iteration: Path) -> Iterator[tuple[int, Family]]:
    """What is read of the first tensor-parallel rank, by expert-parallel rank."""
    survey = take_survey(str(iteration))
    for key in survey.families:
        folders = survey.family(key)
        (ep_rank,) = {rank.ep_rank or 0 for rank in folders.ranks.values()}
        yield ep_rank, proven_family(folders.read(folders.ranks))[0]


def our_groups(of: Family, rank: SourceRank) -> list[tuple[GroupKey, list[tuple[int, int]]]]:
    """The param groups of a rank, those of experts last: members by virtual stage and place among
    the parameters."""
    places = {
        id(item): (stage, place)
        for stage, items in enumerate(rank.parameters)
        for place, item in enumerate(items)
    }
    return [
        (key, [places[id(item)] for item in items])
        for own in rank.optimizers
        for key, items in items_by_group(rank.parameters, own.kind, of.megatron).items()
    ]


# Flat buffers


@st.composite
def _buffer_cases(draw: st.DrawFn, *, may_pad: bool) -> dict[str, Any]:
    ranks = draw(st.sampled_from((1, 2, 3, 4, 5, 6, 8, 12)))
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    return {
        "parameters": [dataclasses.astuple(p) for p in draw(parameters) or [_ONE]],
        "bucket_size": draw(st.none() | st.integers(1, 5000)),
        "pads": may_pad and draw(st.integers(0, 9)) == 0,
        "ranks": ranks,
        "expert_size": draw(st.sampled_from(sizes)),
    }


_ONE = BufferParameter(1, "bfloat16", is_expert=False, is_shared_embedding=False)


def buffers_agree(server: Megatron, version: str) -> None:
    """Where each parameter lies, in the buffer and in the optimizer file; where a buffer ends; and
    which cannot be built."""
    rules = rules_of(version)
    cases = _buffer_cases(may_pad=release(version) >= (0, 12))

    def agree(case: dict[str, Any], theirs: Any) -> None:
        ours = our_buffers(case, rules)
        if _is_error(theirs) or any(_straddles(case, buffer) for buffer in theirs):
            assert ours is None, theirs
            return
        assert ours is not None
        assert [
            {
                "is_expert": buffer.is_expert,
                "dtype": buffer.dtype,
                "numel": buffer.numel,
                "starts": dict(zip(map(str, buffer.members), buffer.starts, strict=True)),
                "saved": dict(zip(map(str, buffer.members), buffer.saved_starts, strict=True)),
                "numel_unpadded": buffer.numel_unpadded,
            }
            for buffer in ours
        ] == [_with_saved_places(buffer) for buffer in theirs]

    _for_all(server, "buffers", 10, cases, agree)


def _straddles(case: dict[str, Any], buffer: dict[str, Any]) -> bool:
    """Whether a parameter lies outside its bucket: Megatron fails when it builds the optimizer."""
    for number, start in buffer["starts"].items():
        low, size, _ = buffer["buckets"][buffer["bucket_of"][number]]
        if start < low or start + case["parameters"][int(number)][0] > low + size:
            return True
    return False


def _with_saved_places(buffer: dict[str, Any]) -> dict[str, Any]:
    """The file holds the buckets one behind the other, each without the padding of its end."""
    saved_buckets = [0, *itertools.accumulate(unpadded for *_, unpadded in buffer["buckets"])]
    saved = {}
    for number, start in buffer["starts"].items():
        bucket = buffer["bucket_of"][number]
        saved[number] = saved_buckets[bucket] + start - buffer["buckets"][bucket][0]
    kept = {name: buffer[name] for name in ("is_expert", "dtype", "numel", "starts")}
    return {**kept, "saved": saved, "numel_unpadded": saved_buckets[-1]}


def states_agree(server: Megatron, version: str) -> None:
    """Every cell of an optimizer file, as the distributed optimizer of one rank gathers it."""
    rules = rules_of(version)
    # A smaller shared embedding may lie in the padding before its own bucket: 0.12 loses it there.
    least = 0 if rules.closes_bucket_cleanly else 128

    def on_one_rank(case: dict[str, Any]) -> dict[str, Any]:
        """Megatron mixes up main parameters of two dtypes in a param group."""
        alike = [
            (numel + least * is_shared, "bfloat16", is_expert, is_shared)
            for numel, _, is_expert, is_shared in case["parameters"]
        ]
        return {**case, "parameters": alike, "ranks": 1, "expert_size": 1}

    def agree(case: dict[str, Any], theirs: Any) -> None:
        ours = our_buffers(case, rules)
        if ours is None or _is_error(theirs):
            assert ours is None, theirs
            assert _is_error(theirs), "Megatron saved it"
            return
        assert [
            {
                "dtype": buffer.dtype,
                "numel_unpadded": buffer.numel_unpadded,
                "runs": _painted(buffer, [p[0] for p in case["parameters"]]),
            }
            for buffer in ours
        ] == theirs

    _for_all(server, "saved_states", 8, _buffer_cases(may_pad=False).map(on_one_rank), agree)


def _painted(buffer: Buffer, numels: Sequence[int]) -> list[list[int]]:
    """Runs of equal cells where each parameter is full of its number, from 1."""
    cells = [0] * buffer.numel_unpadded
    for member, start in zip(buffer.members, buffer.saved_starts, strict=True):
        cells[start : start + numels[member]] = [member + 1] * numels[member]
    return [[number, len(list(run))] for number, run in itertools.groupby(cells)]


# Placement


_PLAIN: dict[str, Any] = {
    "first_layers": None,
    "last_layers": None,
    "account_for_embedding": False,
    "account_for_loss": False,
    "layout": None,
}
_ends = st.none() | st.integers(1, 6)
_possible = placements().filter(lambda case: case[0] > 0 and options_of(case[2]) is not None)
_layer_cases = _possible.map(
    lambda case: {"num_layers": case[0], "pp_size": case[1], **(options_of(case[2]) or {})}
) | st.fixed_dictionaries(
    {
        **{name: st.just(value) for name, value in _PLAIN.items()},
        "num_layers": st.integers(1, 24),
        "pp_size": st.integers(2, 4),
        "vp_size": st.integers(1, 3),
        "first_layers": _ends,
        "last_layers": _ends,
        "account_for_embedding": st.booleans(),
        "account_for_loss": st.booleans(),
    }
)


def layers_agree(server: Megatron, version: str) -> None:
    """The decoder layers of each chunk; and which placements are impossible."""
    rules = rules_of(version)

    def agree(case: dict[str, Any], theirs: Any) -> None:
        layout = our_layout(case, rules)
        if _is_error(theirs) and _is_refused_there_alone(case, theirs, version):
            return
        counts = [] if _is_error(theirs) else [count for count, _ in theirs]
        if sum(counts) != case["num_layers"] or min(counts) < 0:
            assert layout is None, theirs
            return
        assert layout is not None
        assert [len(chunk.layers) for chunk in layout.chunks] == counts
        if release(version) < (0, 14) and case["first_layers"] is None and case["last_layers"]:
            return  # Megatron numbered such layers wrongly
        for chunk, (count, offset) in zip(layout.chunks, theirs, strict=True):
            assert offset is None or count == 0 or offset == chunk.layers.start

    _for_all(server, "layers", 25, _layer_cases, agree)


def _is_refused_there_alone(case: dict[str, Any], error: str, version: str) -> bool:
    """Placements that mean something and that Megatron, or this version of it, refuses."""
    given = [case[name] for name in ("first_layers", "last_layers") if case[name] is not None]
    found = release(version)
    return any(
        (
            error.startswith("NotImplementedError"),  # There is no such argument yet.
            # It divides by the number of middle stages.
            len(given) == case["pp_size"] and error.startswith("ZeroDivisionError"),
            # Nothing is left for the middle stages.
            0 < len(given) < case["pp_size"] and sum(given) == case["num_layers"],
            # Up to 0.10 not with virtual stages.
            found < (0, 11) and case["vp_size"] > 1 and len(given) > 0,
            # 0.11 wants the other stages to divide the layers too.
            found < (0, 12)
            and case["vp_size"] == 1
            and (case["account_for_embedding"] or case["account_for_loss"]),
        )
    )


@st.composite
def _layout_cases(draw: st.DrawFn) -> dict[str, Any]:
    """A layout string that is valid but for a few letters, or only looks like one."""
    pp_size, vp_size = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    num_layers, mtp = draw(st.integers(1, 9)), draw(st.integers(0, 2))
    count = pp_size * vp_size
    used = draw(st.integers(1, count))
    stages = draw(layout_strings(num_layers, used)).removesuffix("L").split("|")
    stages += [""] * (count - used)
    for _ in range(mtp):
        # Mostly behind all decoder layers, often on the same stage.
        stages[draw(st.sampled_from((used - 1, used - 1, count - 1, 0)))] += "m"
    text = "|".join(stages) + "L"
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(text)))
        written = draw(st.sampled_from(("", "E", "t", "m", "L", "|", ",", "t*2", "(t|)*2", " ")))
        text = text[:place] + written + text[place + draw(st.integers(0, 1)) :]
    if draw(st.integers(0, 4)) == 0:
        text = draw(st.text("EtmL|,*()123 x", max_size=25))
    return {"text": text, "pp_size": pp_size, "num_layers": num_layers, "mtp_layers": mtp}


def layouts_agree(server: Megatron, version: str) -> None:
    """What a layout string says; and which strings say nothing, or nothing that can be built."""
    rules = rules_of(version)

    def agree(case: dict[str, Any], theirs: Any) -> None:
        stages = our_stages(case["text"])
        parsed, checked = theirs["parsed"], theirs["checked"]
        assert stages == (None if _is_error(parsed) else parsed), parsed
        if stages is None:
            return
        placed = {
            **_PLAIN,
            "layout": case["text"],
            "num_layers": case["num_layers"],
            "pp_size": case["pp_size"],
            "vp_size": max(1, len(stages) // case["pp_size"]),
            "mtp_layers": case["mtp_layers"],
        }
        layout = our_layout(placed, rules)
        if _is_error(checked):
            # 0.13 has no MTP layers in layout strings.
            assert layout is None or checked.startswith("NotImplementedError"), checked
            return
        if layout is None and _is_refused_here_alone(checked, case["pp_size"], version):
            return
        assert layout is not None
        # Embedding and loss are on the first and the last chunk, wherever the string has them.
        assert _letters(layout, case["mtp_layers"]) == [stage.strip("EL") for stage in checked]

    _for_all(server, "layouts", 25, _layout_cases(), agree)


def _is_refused_here_alone(stages: list[str], pp_size: int, version: str) -> bool:
    """MTP layers apart from the loss, which 0.14 takes and then puts there nevertheless; and those
    on the first rank with virtual stages, where 0.16 hangs when it saves the model."""
    holder = next((index for index, stage in enumerate(stages) if "m" in stage), len(stages) - 1)
    is_on_first_rank = len(stages) > pp_size and holder % pp_size == 0
    return is_on_first_rank or (release(version) < (0, 15) and "m" not in stages[-1])


def _letters(layout: PipelineLayout, mtp_layers: int) -> list[str]:
    """The layers of each chunk, in the letters of layout strings."""
    return [
        "t" * len(chunk.layers) + "m" * (mtp_layers if Section.MTP in chunk.sections else 0)
        for chunk in layout.chunks
    ]


# Layer-wise optimizers


@st.composite
def _layer_wise_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Param groups of few sizes, so that many are equal."""
    experts, expert_ranks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    sizes = st.lists(st.sampled_from([1, 2, 3, 10, 16, 40]), max_size=9)
    groups = draw(st.lists(st.tuples(st.booleans(), sizes), max_size=5))
    return {"ranks": experts * expert_ranks, "experts": experts, "groups": groups}


def layer_wise_agrees(server: Megatron, _: str) -> None:
    """Which data-parallel rank keeps which parameter, and in which order."""

    def agree(case: dict[str, Any], theirs: Any) -> None:
        sizes = [(n, is_expert) for is_expert, numels in case["groups"] for n in numels]
        owners = [i for i, (_, numels) in enumerate(case["groups"]) for _ in numels]
        ours = []
        for kept in deal(sizes, case["ranks"], case["experts"]):
            groups: list[list[int]] = [[] for _ in case["groups"]]
            for index in kept:
                groups[owners[index]].append(index)
            ours.append(groups)
        assert ours == theirs

    _for_all(server, "layer_wise", 25, _layer_wise_cases(), agree)


# Param groups


GROUP_RUNS: dict[str, Run] = {
    "dense": DENSE,
    "dense, embeddings kept from decay": replace(DENSE, embedding_std=0.1),
    "dense, decoupled, VPP 2": replace(virtual(DENSE), decoupled_lr=1e-4),
    "experts leave the first stage": LATE_MOE,
    "experts on all stages, VPP 2": virtual(LATE_MOE),
    "MTP, decoupled": replace(MTP, decoupled_lr=1e-4),
    "DeepSeek, norms of queries and keys decay": Run(
        Model("deepseek", layers=4, tied=False), decays_qk_norms=True
    ),
}


def groups_agree(server: Megatron, run: Run, version: str) -> None:
    """Members of each param group and their order; and the order of groups, where files are read
    by it."""
    answers = {
        (answer["ep_rank"], answer["pp_rank"]): answer["groups"]
        for answer in server.run("groups", run)
    }
    with tempfile.TemporaryDirectory(prefix="saved_") as root:
        server.run("save", run, root=root)
        (iteration,) = Path(root).glob("iter_*")
        families = dict(our_families(iteration))
    assert set(answers) == {(ep, pp) for ep, of in families.items() for pp in of.ranks}
    for (ep_rank, pp_rank), groups in answers.items():
        of = families[ep_rank]
        ours = our_groups(of, of.ranks[pp_rank])
        theirs = [
            (keys_of_groups([group["key"]])[0], [tuple(place) for place in group["members"]])
            for group in groups
        ]
        assert len(dict(theirs)) == len(theirs)
        assert dict(ours) == {key: members for key, members in theirs if members}
        if not rules_of(version).keeps_all_groups:
            # Dense and expert groups are in files of their own.
            theirs.sort(key=lambda group: group[0].is_expert)
            assert ours == theirs


# All of them


def _is_error(answer: Any) -> bool:
    return isinstance(answer, str)


def _for_all(
    server: Megatron,
    question: str,
    lists: int,
    cases: SearchStrategy[dict[str, Any]],
    agree: Callable[[dict[str, Any], Any], None],
) -> None:
    """Ask Megatron about lists of cases, and compare each answer with ours."""

    # The message names the one case that matters, so that nothing need be shrunk.
    @settings(
        examples(lists),
        phases=[Phase.explicit, Phase.generate],
        derandomize=FACTOR == 1,
        deadline=None,
        database=None,
    )
    @given(st.lists(cases, min_size=_LEAST, max_size=_MOST))
    def all_agree(asked: list[dict[str, Any]]) -> None:
        (answers,) = server.run(question, Run(pp=1), cases=asked)
        for case, answer in zip(asked, answers, strict=True):
            try:
                agree(case, answer)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error

    all_agree()


PROPERTIES: dict[str, tuple[str, Callable[[Megatron, str], None]]] = {
    "flat buffers": ("0.7", buffers_agree),
    "cells of optimizer files": ("0.12", states_agree),
    "layers of chunks": ("0.8", layers_agree),
    "layout strings": ("0.13", layouts_agree),
    "layer-wise optimizers": ("0.16", layer_wise_agrees),
}
"""Each rule with the first version that can be asked about it."""


def disagreement(server: Megatron, name: str, version: str) -> str | None:
    """What is wrong with a rule, if anything."""
    _, agree = PROPERTIES[name]
    try:
        agree(server, version)
    except AssertionError as error:
        return str(error)
    return None
