"""Planning of a family: what is read for it, proved, and returned."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from pp_to_vpp.checkpoint.family import RankFiles
from pp_to_vpp.container.extents import Extent
from pp_to_vpp.errors import CheckpointError, ConversionError
from pp_to_vpp.megatron.pipeline import Placement
from pp_to_vpp.megatron.ranks import RankId
from pp_to_vpp.run import plan_family as planning
from pp_to_vpp.run.plan_family import PlanJob, PlannedFamily, check_families, plan_family
from pp_to_vpp.source.files import read_source_rank
from pp_to_vpp.source.survey import take_survey
from pp_to_vpp.target import check
from pp_to_vpp.target.request import TargetSpec

from ..edit import copy_of
from ..families import SIDES, families, family, opposite, placed, surveyed, target_of
from ..pairs import pair
from ..test_round_trip import run

DENSE, MOE = "dense-pp2-v016", "moe-pp2ep2-v016"


def job_for(name: str, side: str, number: int = 0, *, needs_contents: bool = True) -> PlanJob:
    """Converting a family of one side to the layout of the other."""
    found = surveyed(name, side)
    ranks = found.family(found.families[number])
    target = target_of(name, opposite(side))
    return PlanJob(found.path, found.iteration, ranks, tuple(ranks), target, needs_contents)


def planned(name: str, side: str = "source") -> list[PlannedFamily]:
    """All families of one side."""
    count = len(surveyed(name, side).families)
    return [plan_family(job_for(name, side, number)) for number in range(count)]


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_what_planning_a_family_shows(name: str, side: str) -> None:
    for number, of in enumerate(families(name, side)):
        found = plan_family(job_for(name, side, number))
        there = families(name, opposite(side))[number]
        assert (found.source, found.target) == (of.layout, there.layout)
        assert (found.rules, found.kind) == (there.rules, there.kind)
        for text, is_held in found.optimizer_states.items():
            assert is_held == there.holds_state(is_expert=text.startswith("expert"))
        assert [rank.rank for rank in found.ranks] == [r.files.rank for r in of.ranks.values()]
        assert found.left_behind == ()
        for file in found.sources:
            assert file.length == Path(file.path).stat().st_size
        assert {file.path for file in found.sources} == {
            path for rank in found.ranks for path in rank.source_paths()
        }


@pytest.mark.parametrize("name", [DENSE, MOE, "dense-pp2-nodistopt-v016"])
def test_records_are_those_of_the_archives(name: str) -> None:
    """With the CRC-32 that the standard library reads, in order of their places."""
    for found in planned(name):
        for path, records in found.records.items():
            with zipfile.ZipFile(path) as file:
                infos = sorted(file.infolist(), key=lambda info: info.header_offset)
            assert [(extent.length, crc32) for extent, crc32 in records] == [
                (info.file_size, info.CRC) for info in infos
            ]
            offsets = [extent.offset for extent, _ in records]
            assert offsets == sorted(offsets)
            assert {extent.path for extent, _ in records} == {path}


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_dry_runs_know_the_sizes(name: str, side: str) -> None:
    """Without contents, which would only have to be carried between processes."""
    whole = plan_family(job_for(name, side))
    dry = plan_family(job_for(name, side, needs_contents=False))
    assert (dry.sources, dry.records) == ((), {})
    for rank, full in zip(dry.ranks, whole.ranks, strict=True):
        assert [(f.name, f.length) for f in rank.files] == [(f.name, f.length) for f in full.files]
        assert all(file.contents == () and file.layout is None for file in rank.files)
        assert rank.length == full.length > 0


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_ranks_planned_alone_are_planned_the_same(name: str, side: str) -> None:
    """Nodes that share the work write what one would, from what each has to read."""
    job = job_for(name, side)
    whole = plan_family(job)
    for number, pp_rank in enumerate(job.pp_ranks):
        alone = plan_family(replace(job, pp_ranks=(pp_rank,)))
        assert alone.ranks == (whole.ranks[number],)


@pytest.mark.parametrize("layout", ["Et*3|t*5L", "E|t*8L", "Et*8|||L", "Et|t*3|t*3|tL"])
@pytest.mark.parametrize("start", ["E|tt||t*6L", "E|t*8||L", "Et*8|L"])
def test_ranks_without_experts_are_planned_the_same_too(
    start: str, layout: str, tmp_path: Path
) -> None:
    """A rank that holds none may be all that is read."""
    source = tmp_path / "iter_0000001"
    run(pair(MOE).source, source, Placement(len(start.split("|")) // 2, layout=start))
    of = family(MOE, "source")
    target = Placement(len(layout.split("|")) // 2, layout=layout)
    found = take_survey(str(source))
    ranks = found.family((0, 1))
    spec = TargetSpec(target, placed(of, target), overlaps_param_gather_with_step=False)
    job = PlanJob(found.path, found.iteration, ranks, tuple(ranks), spec, needs_contents=True)
    whole = plan_family(job)
    for pp_rank in ranks:
        assert plan_family(replace(job, pp_ranks=(pp_rank,))).ranks == (whole.ranks[pp_rank],)


def test_only_what_is_needed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large checkpoints have many ranks; this target moves one layer between neighbours."""
    name = "uneven-31layers-pp4-fork"
    of = family(name, "source")
    counts = [len(of.layout.rank_chunks(p)[0].layers) for p in range(4)]
    counts[0], counts[1] = counts[0] - 1, counts[1] + 1
    stages = ["t" * count for count in counts]
    placement = Placement(layout="E" + "|".join(stages) + "L")
    target = TargetSpec(placement, placed(of, placement), overlaps_param_gather_with_step=False)
    read: list[int] = []
    real = read_source_rank

    def counted(iteration_dir: str, rank: RankId) -> RankFiles:
        read.append(rank.pp_rank)
        return real(iteration_dir, rank)

    monkeypatch.setattr(planning, "read_source_rank", counted)
    found = surveyed(name, "source")
    ranks = found.family(found.families[0])
    for pp_rank, needed in ((0, {0}), (1, {0, 1}), (2, {2}), (3, {3})):
        read.clear()
        plan_family(
            PlanJob(found.path, found.iteration, ranks, (pp_rank,), target, needs_contents=True)
        )
        assert set(read) == needed


def test_other_files_are_planned_and_named(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    loader = source / "mp_rank_00_001" / "train_dataloader_dprank000.pt"
    loader.write_bytes(b"state")
    (source / "mp_rank_00_000" / "notes.txt").touch()
    found = plan_family(replace(job_for(DENSE, "source"), iteration_dir=str(source)))
    assert found.left_behind == ("mp_rank_00_000/notes.txt",)
    assert found.ranks[1].files[-1].contents == ((Extent(str(loader), 0, 5),),)
    assert [file.name for file in found.ranks[0].files] == [
        "model_optim_rng.pt",
        "distrib_optim.pt",
    ]


def test_an_error_of_the_program_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "check", lambda *_, **__: ["a hole"])
    with pytest.raises(ConversionError, match="a hole; this is an error of pp_to_vpp") as caught:
        plan_family(job_for(DENSE, "source"))
    assert caught.value.exit_status == 1


def test_everything_must_be_used_if_all_ranks_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    real = check.check

    def watched(*arguments: object, is_whole: bool) -> list[str]:
        asked.append(is_whole)
        return real(*arguments, is_whole=is_whole)  # type: ignore[arg-type]

    monkeypatch.setattr(check, "check", watched)
    job = job_for(DENSE, "source")
    plan_family(job)
    plan_family(replace(job, pp_ranks=(1,)))
    assert asked == [True, False]


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_real_families_fit_together(name: str, side: str) -> None:
    check_families(planned(name, side), "here")


def test_families_of_two_saves_do_not() -> None:
    one, other = planned(MOE)
    rules = replace(other.rules, aligns_parameters=not other.rules.aligns_parameters)
    with pytest.raises(CheckpointError, match=r"written in different ways.*mp_rank_00_000_001"):
        check_families([one, replace(other, rules=rules)], "here")


def test_one_family_of_those_with_the_same_parameters_holds_their_state() -> None:
    dense = "dense optimizer state of tp rank 0"
    experts = [f"expert optimizer state of etp rank 0 and ep rank {rank}" for rank in (0, 1)]
    found = planned(MOE)
    assert [dict(of.optimizer_states) for of in found] == [
        {dense: True, experts[0]: True},
        {dense: False, experts[1]: True},
    ]
    with pytest.raises(CheckpointError, match=f"no distrib_optim.pt holds the {dense}"):
        check_families(found[1:], "here")
    less = replace(found[1], optimizer_states={dense: False, experts[1]: False})
    with pytest.raises(CheckpointError, match=f"no distrib_optim.pt holds the {experts[1]}"):
        check_families([found[0], less], "here")
    assert planned("dense-pp2-nodistopt-v016")[0].optimizer_states == {}
