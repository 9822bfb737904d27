"""A checkpoint described: who wrote it, what it holds, which virtual stages it can have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..errors import LayoutError, UsageError
from ..megatron.forms import Order, Shape, even_layout_string
from ..megatron.layout import PipelineLayout
from ..megatron.megatron import Megatron
from ..megatron.optimizer_chain import OptimizerKind
from ..megatron.placement import FORK_SIGN, LAYOUT_SIGN
from ..megatron.rules import CHANGES, doubted, era
from ..options import Options
from ..source.inspection import StageBytes, facts, look_at, oddities, proofs
from ..source.proven import FamilyJob, ProvenFamily, check_families
from ..source.survey import Survey, take_survey
from ..target import request
from ..verification.compare import prepare
from .listener import Listener, read_families
from .share import number_of_workers
from .workers import Workers


@dataclass(frozen=True, slots=True)
class FoundRule:
    """Whether a rule is in force."""

    name: str
    """See ``megatron.rules.Rules``."""
    since: str
    """Version of Megatron-Core."""
    is_in_force: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """A layout that a checkpoint can have."""

    options: str
    """Of this program, to convert it."""
    launch_flags: str
    """Of Megatron, to train from it."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What looking at a checkpoint has shown."""

    path: str
    iteration: int | None
    source: Megatron
    """The run that saved it."""
    kind: OptimizerKind
    states: tuple[tuple[str, str], ...]
    """Name and dtype of each kind of optimizer state."""
    written_by: str
    """Versions of Megatron, in words."""
    rules: tuple[FoundRule, ...]
    """Which of the rules that changed between versions its files follow."""
    facts: tuple[str, ...]
    proofs: tuple[str, ...]
    """How the rules were proved that explain its files."""
    notes: tuple[str, ...]
    """Oddities."""
    stages: Mapping[tuple[int, int], StageBytes]
    """By (pipeline rank, virtual stage), summed over all tensor and expert ranks."""
    choices: tuple[Choice, ...]
    folders: int
    files: int
    length: int
    """Bytes of all files."""

    @property
    def layouts(self) -> tuple[PipelineLayout, None]:
        """Of the source; there is no target."""
        return self.source.layout, None


def inspect(options: Options, listener: Listener) -> Inspection:
    """Read and prove a checkpoint; nothing is written.

    Raises:
        CheckpointError: it cannot be read, or no rules explain it.
        UsageError: sizes that were given are not its own.
    """
    survey = take_survey(str(options.load_dir), follow_links=options.follow_links)
    request.wanted_ranks(options, survey.arguments)
    jobs = [FamilyJob(survey.family(key), survey.told) for key in survey.families]
    prepare(options.depth)
    count = min(number_of_workers(options), len(jobs))
    with Workers(count, listener.looked) as workers:
        looks = read_families(workers, look_at, jobs, listener)
    families = [look.proven for look in looks]
    check_families(families, survey.path)
    first = looks[0]
    source = first.proven.source
    return Inspection(
        path=survey.path,
        iteration=survey.iteration,
        source=source,
        kind=first.proven.kind,
        states=tuple(sorted(frozenset().union(*(look.states for look in looks)))),
        written_by=_written_by(source),
        rules=tuple(
            FoundRule(change.rule, change.since, getattr(source.rules, change.rule))
            for change in CHANGES
        ),
        facts=facts(survey.arguments, first.proven),
        proofs=proofs(first, sum(look.samples for look in looks)),
        notes=tuple(oddities(survey, families)),
        stages={
            place: sum((look.stages[place] for look in looks), StageBytes())
            for place in first.stages
        },
        choices=(
            *_other_sizes(options, survey, source, families),
            *_choices(options, survey, source),
        ),
        folders=len(survey.ranks),
        files=sum(look.files for look in looks),
        length=sum(look.length for look in looks),
    )


def _written_by(source: Megatron) -> str:
    odd = doubted(source.rules, source.arguments.names)
    told = f"but its files prove otherwise: {', '.join(odd)}" if odd else "and its files agree"
    return f"{era(source.rules)}, as its arguments tell, {told}"


def _other_sizes(
    options: Options, survey: Survey, source: Megatron, families: Iterable[ProvenFamily]
) -> Iterator[Choice]:
    """Half and twice as many pipeline ranks, where layers divide, and no copy of the embedding
    would be lost."""
    are_equal = not any(family.unlike_embeddings for family in families)
    for pp_size in (source.layout.pp_size // 2, source.layout.pp_size * 2):
        asked = replace(options, target_pp_size=max(1, pp_size))
        with contextlib.suppress(LayoutError, UsageError):
            target = request.wanted_target(asked, survey.arguments).of(source)
            if are_equal or not source.dropped_for(target):
                words = f"--target-pipeline-model-parallel-size {asked.target_pp_size}"
                yield Choice(words, target.launch_flags(source))


def _choices(options: Options, survey: Survey, source: Megatron) -> Iterator[Choice]:
    """The virtual pipeline sizes that divide the layers; if none do, stages of the fork, or an even
    layout string, where the version that saved it can launch them."""
    layout, is_divided = source.layout, False
    for vp_size in range(1, max(len(chunk.layers) for chunk in layout.chunks) * layout.vp_size + 2):
        asked = replace(options, target_vp_size=vp_size)
        for flags in _launch_flags(asked, survey, source):
            yield Choice(f"--target-virtual-pipeline-model-parallel-size {vp_size}", flags)
            is_divided |= vp_size > 1
    if is_divided:
        return
    arguments = survey.arguments
    stages = [sum(len(c.layers) for c in layout.rank_chunks(p)) for p in (0, layout.pp_size - 1)]
    if FORK_SIGN in arguments.names and min(stages) > 1:
        first, last = ([count - count // 2, count // 2] for count in stages)
        asked = replace(options, target_vp_size=2, first_split=first, last_split=last)
        for flags in _launch_flags(asked, survey, source):
            yield Choice(
                "--target-virtual-pipeline-model-parallel-size 2 "
                f"--target-first-virtual-pipeline-num-layers-split {first[0]} {first[1]} "
                f"--target-last-virtual-pipeline-num-layers-split {last[0]} {last[1]}",
                flags,
            )
            return
    mtp = arguments.mtp_num_layers or 0
    shape = Shape(arguments.num_layers, arguments.pp_size, 2, mtp, Order.INTERLEAVED)
    text = even_layout_string(shape)
    if text is not None and LAYOUT_SIGN in arguments.names:
        asked = replace(options, layout_string=text)
        for flags in _launch_flags(asked, survey, source):
            yield Choice(f"--target-pipeline-model-parallel-layout '{text}'", flags)


def _launch_flags(options: Options, survey: Survey, source: Megatron) -> Iterator[str]:
    """Megatron's for a target that is possible; nothing for one that is not."""
    with contextlib.suppress(LayoutError, UsageError):
        yield request.wanted_target(options, survey.arguments).of(source).launch_flags(source)
