"""What a run asks for, held against what the checkpoint is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import LayoutError, UsageError, problem
from ..megatron.arguments import SavedArguments
from ..megatron.pipeline import PipelineLayout, Placement, parse_layout
from ..megatron.rules import candidates
from ..options import Options


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """What a conversion makes: the same for all families."""

    placement: Placement
    layout: PipelineLayout
    overlaps_param_gather_with_step: bool


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
    pp_ranks = options.pp_ranks or tuple(range(arguments.pp_size))
    problems += [
        problem(
            "--pipeline-ranks-to-process",
            f"there is no pipeline rank {pp_rank}",
            expected=f"0 to {arguments.pp_size - 1}",
            cure="name target pipeline ranks",
        )
        for pp_rank in pp_ranks
        if not 0 <= pp_rank < arguments.pp_size
    ]
    if options.save_dir is not None:
        source, target = options.load_dir.resolve(), options.save_dir.resolve()
        if target == source or source in target.parents:
            problems.append(
                problem(
                    "--save-iteration-dir",
                    "it lies in the source, which is never written",
                    cure="choose another folder",
                )
            )
    if problems:
        raise UsageError(*problems)
    return tuple(sorted(set(pp_ranks)))


def target_spec(options: Options, arguments: SavedArguments) -> TargetSpec:
    """Placement and layout of the target.

    Raises:
        LayoutError: it is impossible, or the source has it already.
    """
    placement = _placement(options, arguments)
    rules = next(candidates(arguments.names))

    def place(wanted: Placement) -> PipelineLayout:
        return arguments.place(wanted, rules)

    layout, overlaps = place(placement), options.overlaps_param_gather_with_step
    own = (place(arguments.placement), arguments.overlaps_param_gather_with_step)
    if (layout, overlaps) == own:
        raise LayoutError.of(
            options.load_dir,
            "the source already has the layout that is asked for",
            found=f"virtual pipeline size {layout.vp_size} with the same layers per chunk",
            cure="there is nothing to convert; ask for another layout",
        )
    if overlaps and layout.vp_size == 1:
        raise LayoutError.of(
            "--target-overlap-param-gather-with-optimizer-step",
            "Megatron allows it with virtual pipeline stages only",
            cure="leave it out",
        )
    return TargetSpec(placement, layout, overlaps)


def _placement(options: Options, arguments: SavedArguments) -> Placement:
    """The target's placement: the source's own words, with those of the options."""
    given = options.target_vp_size
    if options.target_layout is not None:
        stages = len(parse_layout(options.target_layout))
        vp_size = max(1, stages // arguments.pp_size)
        if given is not None and given != vp_size:
            raise LayoutError.of(
                "--target-virtual-pipeline-model-parallel-size",
                "disagrees with the layout string",
                expected=f"{stages} stages / {arguments.pp_size} ranks = {vp_size}",
                found=given,
                cure="leave it out, or correct the string",
            )
        return Placement(vp_size=vp_size, layout=options.target_layout)
    vp_size = given or 1
    if options.first_split is not None and options.last_split is not None:
        return Placement(
            vp_size=vp_size,
            first_layers=sum(options.first_split),
            last_layers=sum(options.last_split),
            first_split=options.first_split,
            last_split=options.last_split,
        )
    own = replace(
        arguments.placement, vp_size=vp_size, first_split=None, last_split=None, layout=None
    )
    if arguments.pp_size == 2 and own.first_layers == own.last_layers:
        # Two equal halves are even, and in these words Megatron could not launch (see ``notes``).
        own = replace(own, first_layers=None, last_layers=None)
    return own


def notes(target: TargetSpec, arguments: SavedArguments) -> list[str]:
    """What the user should know about the target that was asked for."""
    found = []
    placement, known = target.placement, arguments.names
    if placement.layout is not None and "pipeline_model_parallel_layout" not in known:
        found.append("layout strings need Megatron 0.13 or later to launch; this one is older")
    if placement.first_split is not None and "decoder_first_pipeline_num_layers_split" not in known:
        found.append("the layer splits need Microsoft's fork of Megatron-LM to launch")
    if placement.vp_size > 1 and placement.last_layers is not None:
        if placement.first_layers is None:
            found.append(
                "Megatron 0.11 to 0.13 counts the layers of virtual stages wrongly when only "
                "--decoder-last-pipeline-num-layers is given: launch those with "
                f"--decoder-first-pipeline-num-layers {_layers_of_rank(target.layout, 0)} too"
            )
        elif arguments.pp_size == 2:
            found.append(
                "Megatron divides by zero when both ends of 2 pipeline ranks are given with "
                "virtual stages: launch with a layout string"
            )
    if arguments.placement.layout is not None and placement.layout is None:
        found.append(
            f"the source's layout string {arguments.placement.layout!r} is dropped: the target's "
            "layers are placed evenly"
        )
    return found


def _layers_of_rank(layout: PipelineLayout, pp_rank: int) -> int:
    return sum(len(chunk.layers) for chunk in layout.rank_chunks(pp_rank))
