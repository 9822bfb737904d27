"""What a run asks for, held against what the checkpoint is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import CheckpointError, LayoutError, UsageError, problem, show
from ..megatron.arguments import SavedArguments
from ..megatron.forms import Ends, Even, HybridPattern, LayoutString, Listed, Order, parse_layout
from ..megatron.megatron import Megatron
from ..megatron.naming import Section
from ..megatron.placement import FORK_SIGN, LAYOUT_SIGN, Placement
from ..megatron.rules import placing
from ..options import Options


@dataclass(frozen=True, slots=True)
class Target:
    """What a conversion makes: the same for all families."""

    placement: Placement
    overlaps: bool
    """overlap_param_gather_with_optimizer_step."""
    no_save_optim: bool = False
    """It has no optimizer state."""
    pp_size: int | None = None
    """None for the source's, like the next."""
    dp_size: int | None = None

    def of(self, source: Megatron) -> Megatron:
        """The run that will load it, of the version that saved the source.

        Raises:
            LayoutError: it is impossible, or the source has it already.
        """
        given = {"pp_size": self.pp_size, "dp_size": self.dp_size}
        sizes = {name: size for name, size in given.items() if size is not None}
        target = source.relaunched(self.placement, overlaps=self.overlaps, **sizes)
        _check_launch(target, source)
        if target.is_laid_out_like(source) and not self.no_save_optim:
            raise LayoutError.of(
                "target layout",
                "the source already has the layout that is asked for",
                found=f"virtual pipeline size {target.layout.vp_size} with the same layers per "
                "chunk",
                cure="there is nothing to convert; ask for another layout",
            )
        _check_mtp_kind(source, target)
        return target


def wanted_ranks(options: Options, arguments: SavedArguments) -> tuple[int, ...]:
    """The target pipeline ranks to be written.

    Raises:
        UsageError: options disagree with the checkpoint, or with each other.
    """
    problems = [
        problem(
            f"--{name}-model-parallel-size",
            "disagrees with the checkpoint",
            expected=found,
            found=given,
            cure="leave it out, or check that this is the right checkpoint",
        )
        for name, given, found in (
            ("pipeline", options.pp_size, arguments.pp_size),
            ("expert", options.ep_size, arguments.ep_size),
            ("tensor", options.tp_size, arguments.tp_size),
        )
        if given is not None and given != found
    ]
    pp_size = options.target_pp_size or arguments.pp_size
    pp_ranks = range(pp_size) if options.pp_ranks is None else options.pp_ranks
    problems += [
        problem(
            "--pipeline-ranks-to-process",
            f"there is no pipeline rank {pp_rank}",
            expected=f"0 to {pp_size - 1}",
            cure="name target pipeline ranks",
        )
        for pp_rank in pp_ranks
        if not 0 <= pp_rank < pp_size
    ]
    if problems:
        raise UsageError(*problems)
    return tuple(sorted(set(pp_ranks)))


def wanted_target(options: Options, arguments: SavedArguments) -> Target:
    """The target that the options ask for; where a rule decides whether it is possible, those who
    prove the rule judge it (``Target.of``).

    Raises:
        LayoutError: it is impossible by all rules, or the source has it already.
        CheckpointError: the placement of the source is not understood.
    """
    sources = _placed(options, arguments)
    sized = _sized(options, arguments)
    sizes = sized.pp_size, sized.dp_size
    ends = (options.first_layers, options.last_layers)
    words = (options.layout_string, options.hybrid_pattern, options.target_vp_size, *ends)
    is_moved = sized.pp_size != arguments.pp_size or any(word is not None for word in words)
    is_kept = not is_moved and arguments.placement.order is Order.INTERLEAVED
    placement = arguments.placement if is_kept else _placement(options, sized)
    wanted = Target(placement, options.overlaps, options.no_save_optim, *sizes)
    if options.overlaps and wanted.placement.vp_size == 1:
        raise LayoutError.of(
            "--target-overlap-param-gather-with-optimizer-step",
            "Megatron allows it with virtual pipeline stages only",
            cure="leave it out",
        )
    refusals: list[LayoutError] = []
    for source in sources:
        try:
            wanted.of(source)
        except LayoutError as error:
            refusals.append(error)
        else:
            return wanted
    raise refusals[0]


def _placed(options: Options, arguments: SavedArguments) -> list[Megatron]:
    """The run that saved the source, by each rule under which its placement is possible.

    Raises:
        CheckpointError: there is none.
    """
    found: list[Megatron] = []
    errors: list[LayoutError] = []
    for source in (Megatron(arguments, rules) for rules in placing(arguments.names)):
        try:
            _ = source.layout
        except LayoutError as error:
            errors.append(error)
        else:
            found.append(source)
    if not found:
        where = f"{options.load_dir}: the source's own arguments tell no possible placement"
        raise CheckpointError(*(f"{where}: {line}" for line in errors[0].problems))
    return found


def _sized(options: Options, arguments: SavedArguments) -> SavedArguments:
    """The source's arguments with the sizes of the target, and with those of its words for the
    placement that mean the same for another number of pipeline ranks."""
    pp_size, placement = options.target_pp_size or arguments.pp_size, arguments.placement
    if pp_size != arguments.pp_size and not isinstance(placement.form, Even | HybridPattern):
        placement = Placement()
    dp_size = options.target_dp_size or arguments.dp_size
    return replace(arguments, pp_size=pp_size, dp_size=dp_size, placement=placement)


def _check_launch(target: Megatron, source: Megatron) -> None:
    """Megatron must be able to launch, and load, a run of these sizes (arguments.py
    ``validate_args``, parallel_state.py ``initialize_model_parallel``, 0.7 to 0.19).

    Raises:
        LayoutError: it is not.
    """
    wanted, own = target.arguments, source.arguments
    vp_size, is_new = wanted.placement.vp_size, wanted.sizes != own.sizes
    experts, instances = wanted.etp_size * wanted.ep_size, wanted.optimizer_instances
    sharing = wanted.dp_size * wanted.cp_size
    for is_wrong, what in (
        (wanted.pp_size == 1 < vp_size, f"{vp_size} virtual stages on one pipeline rank"),
        (
            wanted.pp_size == 1 and isinstance(wanted.placement.form, Ends),
            "layers of a first or last pipeline stage where one has all",
        ),
        (
            wanted.pp_size == 2 != own.pp_size
            and vp_size > 1
            and not target.rules.aligns_parameters,
            "virtual stages on 2 pipeline ranks with Megatron up to 0.7",
        ),
        (
            is_new and wanted.tp_size * sharing % experts,
            f"data-parallel size {wanted.dp_size} where the ranks of a pipeline stage are no "
            f"multiple of {experts}, expert tensor times expert size",
        ),
        (
            is_new and sharing % instances,
            f"data-parallel size {wanted.dp_size} for {instances} instances of the optimizer",
        ),
        (
            own.random_by_dp_rank and wanted.dp_size > own.dp_size,
            f"more data-parallel ranks than the {own.dp_size} of the source, in whose files each "
            "has a random state of its own (--data-parallel-random-init)",
        ),
    ):
        if is_wrong:
            text = f"no run could be launched, or load it, with {what}"
            raise LayoutError.of("target layout", text, cure="ask for other sizes")


def _check_mtp_kind(source: Megatron, target: Megatron) -> None:
    """MTP layers are built like the last decoder layer where their chunk has decoder layers, and
    like layers that follow from no number elsewhere (gpt_builders.py, 0.13 to 0.19; FORMAT 3.4).

    Raises:
        LayoutError: these differ, and the target's chunk has some where the source's has none, or
            the other way round.
    """
    has_layers = [
        bool(chunk.layers)
        for run in (source, target)
        for chunk in run.layout.chunks
        if Section.MTP in chunk.sections
    ]
    is_hybrid = isinstance(source.arguments.placement.form, HybridPattern)
    if len(set(has_layers)) > 1 and source.arguments.last_kind_is_its_own and not is_hybrid:
        raise LayoutError.of(
            "target layout",
            "MTP layers are built like the last decoder layer, which is of a kind of its own, only "
            "where decoder layers are in their chunk: the target's would be others than the "
            "source's",
            expected=f"{'some' if has_layers[0] else 'no'} decoder layers beside them",
            found="some" if has_layers[1] else "none",
            cure="ask for a layout with decoder layers in the chunk of m as in the source",
        )


def _placement(options: Options, arguments: SavedArguments) -> Placement:
    """The target's placement, given its sizes: the source's words, with those of the options."""
    own = arguments.placement.form
    if isinstance(own, HybridPattern):
        return _hybrid_placement(options, own, arguments.pp_size)
    if options.hybrid_pattern is not None:
        raise UsageError.of(
            "--target-hybrid-layer-pattern",
            "the checkpoint is that of no hybrid model: its arguments have no hybrid_layer_pattern",
            cure="give --target-virtual-pipeline-model-parallel-size or "
            "--target-pipeline-model-parallel-layout",
        )
    if options.layout_string is not None:
        stages = len(parse_layout(options.layout_string))
        vp_size = _vp_size_of(stages, options, arguments.pp_size, "layout string")
        return Placement(vp_size, LayoutString(options.layout_string))
    vp_size = options.target_vp_size or 1
    first, last = options.first_split, options.last_split
    if first is not None and last is not None:
        return Placement(vp_size, Ends(sum(first), sum(last), tuple(first), tuple(last)))
    if options.first_layers is not None or options.last_layers is not None:
        own = Ends(options.first_layers, options.last_layers)
    match own:
        case Even() as even:
            return Placement(vp_size, even)
        case Ends(first=own_first, last=own_last):
            # Two equal halves are even; in these words Megatron could not launch (``notes``).
            is_even = arguments.pp_size == 2 and own_first == own_last
            found = Placement(vp_size, Even() if is_even else Ends(own_first, own_last))
            is_misnumbered = arguments.misnumbers_kinds and found.has_last_stage_alone
            return _with_first_stage(found, arguments) if is_misnumbered else found
        case LayoutString() | Listed():
            return Placement(vp_size)


def _with_first_stage(found: Placement, arguments: SavedArguments) -> Placement:
    """The same placement in words that the version counts right: with the first stage, too.

    Raises:
        LayoutError: it cannot be launched with these.
    """
    if arguments.pp_size == 2:
        raise LayoutError.of(
            "target layout",
            "its layers are of several kinds by their numbers, which Megatron 0.11 to 0.13 counts "
            "wrongly in virtual stages with --decoder-last-pipeline-num-layers alone; with both "
            "ends of 2 pipeline ranks it divides by zero",
            cure="ask for a layout string (0.13), or save once with another placement",
        )
    layout = replace(found, vp_size=1).place(arguments.num_layers, arguments.pp_size)
    (first,) = layout.rank_chunks(0)
    assert isinstance(found.form, Ends)
    return replace(found, form=replace(found.form, first=len(first.layers)))


def _vp_size_of(stages: int, options: Options, pp_size: int, text: str) -> int:
    """The virtual pipeline size of a text that spells out all stages."""
    vp_size, given = max(1, stages // pp_size), options.target_vp_size
    if given is not None and given != vp_size:
        raise LayoutError.of(
            "--target-virtual-pipeline-model-parallel-size",
            f"disagrees with the {text}",
            expected=f"{stages} stages / {pp_size} ranks = {vp_size}",
            found=given,
            cure=f"leave it out, or correct the {text}",
        )
    return vp_size


def _hybrid_placement(options: Options, own: HybridPattern, pp_size: int) -> Placement:
    """The target's placement of a hybrid model: no layer may change its kind."""
    others = (options.layout_string, options.first_split, options.first_layers, options.last_layers)
    if any(words is not None for words in others):
        raise UsageError.of(
            "target layout",
            "layout strings, layer splits and layers of end stages do not place the layers of a "
            "hybrid model",
            cure="give --target-hybrid-layer-pattern, or "
            "--target-virtual-pipeline-model-parallel-size alone",
        )
    if options.hybrid_pattern is None:
        vp_size = options.target_vp_size or 1
        return Placement(vp_size, own.divided(pp_size, vp_size))
    wanted = HybridPattern(options.hybrid_pattern)
    if wanted.kinds != own.kinds:
        raise LayoutError.of(
            "--target-hybrid-layer-pattern",
            "its layers are not those of the source",
            expected=f"the letters of {show(own.text)} in this order, with any |",
            found=show(wanted.text),
            cure="move only the |",
        )
    return Placement(_vp_size_of(len(wanted.stages), options, pp_size, "hybrid pattern"), wanted)


def notes(source: Megatron, target: Megatron) -> list[str]:
    """What the user should know about the target that was asked for."""
    found = []
    placement, known = target.arguments.placement, source.arguments.names
    form, own = placement.form, source.arguments.placement.form
    is_string = isinstance(form, LayoutString)
    if is_string and LAYOUT_SIGN not in known:
        found.append("layout strings need Megatron 0.13 or later to launch; this one is older")
    if isinstance(form, Ends):
        if form.first_split and FORK_SIGN not in known:
            found.append("the layer splits need Microsoft's fork of Megatron-LM to launch")
        if placement.vp_size > 1 and form.last is not None:
            found += _notes_on_the_last_stage(form, target)
    found += _notes_on_copies(source, target)
    if source.arguments.placement.order is Order.V_SHAPED:
        found.append("the source's V-shaped schedule is dropped: launch without it")
    if isinstance(own, LayoutString) and not is_string:
        found.append(
            f"the source's layout string {own.text!r} is dropped: the target's "
            "layers are placed evenly"
        )
    return [*found, *_notes_on_sizes(source, target)]


_COPIES = {
    Section.HEAD: "output_layer.weight",
    Section.MTP_EMBEDDING: "the MTP layers' copy of the word embedding",
}


def _notes_on_copies(source: Megatron, target: Megatron) -> Iterator[str]:
    """Which copies of the word embedding come and go."""
    for section, name in _COPIES.items():
        was, is_used = (section in run.embedding_copies for run in (source, target))
        if section in source.made_for(target):
            unused = "" if is_used else ", and no forward uses it beside MTP layers"
            yield f"{name} is made of the word embedding{unused}"
        elif section in source.dropped_for(target):
            why = "is equal to the word embedding" if was else "was used by no forward"
            yield f"{name}, which {why}, is dropped"
        elif section in source.embedding_copies - target.embedding_copies:
            yield (
                f"{name} keeps its value, which no forward uses: beside MTP layers the tied weight "
                "is their copy of the word embedding"
            )


def _notes_on_sizes(source: Megatron, target: Megatron) -> Iterator[str]:
    """What another number of ranks means, and what no file tells of it."""
    own, wanted = source.arguments, target.arguments
    if own.sizes == wanted.sizes:
        return
    gpus, before = (run.sizes["world_size"] for run in (wanted, own))
    keeping, rest = divmod(own.dp_size * own.pp_size, wanted.pp_size)
    kept = (
        "" if rest or gpus == before else f"; --target-data-parallel-size {keeping} keeps {before}"
    )
    yield f"the target is for {gpus} GPUs, of data-parallel size {wanted.dp_size}{kept}"
    if wanted.pp_size != own.pp_size:
        form = own.placement.form
        if isinstance(form, Ends | Listed):
            flags = own.placement.launch_flags(own.num_layers, own.pp_size)
            told = form.argument if isinstance(form, Listed) else flags
            yield f"the source's {told} is dropped, for it tells stages of {own.pp_size} ranks"
        yield (
            "no file tells random states for another number of pipeline ranks: each begins with "
            "those of its number, or else of one that has its layers. Without dropout that is of "
            "no effect; with it, masks are others, and --no-load-rng starts each from its own seed"
        )
    sums = own.ties_embeddings or bool(own.mtp_num_layers)
    if own.dp_size != wanted.dp_size or (sums and 1 in (own.pp_size, wanted.pp_size)):
        yield (
            "gradients are summed in another order than before, so that from the second step on "
            "losses differ in their last bits"
        )


def _notes_on_the_last_stage(form: Ends, target: Megatron) -> Iterator[str]:
    """What versions do wrong when its layers are given and there are virtual stages."""
    if form.first is None:
        layers = sum(len(chunk.layers) for chunk in target.layout.rank_chunks(0))
        yield (
            "Megatron 0.11 to 0.13 counts the layers of virtual stages wrongly when only "
            "--decoder-last-pipeline-num-layers is given: launch those with "
            f"--decoder-first-pipeline-num-layers {layers} too"
        )
    elif target.arguments.pp_size == 2:
        yield (
            "Megatron divides by zero when both ends of 2 pipeline ranks are given with "
            "virtual stages: launch with a layout string"
        )
