"""Planning of a family: what is read for it, proved, and returned."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from pp_to_vpp.checkpoint.family import RankFiles
from pp_to_vpp.container import crc32
from pp_to_vpp.container.extents import Extent
from pp_to_vpp.errors import ConversionError
from pp_to_vpp.megatron.forms import LayoutString
from pp_to_vpp.megatron.megatron import Megatron
from pp_to_vpp.megatron.placement import Placement
from pp_to_vpp.megatron.ranks import RankId
from pp_to_vpp.run.plan_family import PlanJob, plan_family
from pp_to_vpp.source import files
from pp_to_vpp.source.files import read_source_rank
from pp_to_vpp.source.survey import take_survey
from pp_to_vpp.target import check
from pp_to_vpp.target.request import Target

from ..edit import copy_of
from ..families import OF_KINDS, families, family, opposite, surveyed, target_of
from ..inline import run
from ..pairs import DENSE, FORK, MOE, PLAIN, pair


def target_like(megatron: Megatron) -> Target:
    """What asks for the layout of a run."""
    arguments = megatron.arguments
    return Target(arguments.placement, arguments.overlaps_param_gather_with_step)


def job_for(name: str, side: str, number: int = 0, *, needs_contents: bool = True) -> PlanJob:
    """Converting a family of one side to the layout of the other."""
    found = surveyed(name, side)
    folders = found.family(found.families[number])
    target = target_like(target_of(name, opposite(side)))
    return PlanJob(folders, found.told, tuple(folders.ranks), target, needs_contents)


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
def test_what_planning_a_family_shows(name: str, side: str) -> None:
    for number, of in enumerate(families(name, side)):
        found = plan_family(job_for(name, side, number))
        there = families(name, opposite(side))[number]
        proven = found.proven
        assert (proven.source, found.target.layout) == (of.megatron, there.layout)
        assert found.target.is_laid_out_like(there.megatron)
        assert (found.target.rules, proven.kind) == (there.megatron.rules, there.kind)
        assert proven.folders == job_for(name, side, number).folders
        for text, is_held in proven.optimizer_states.items():
            assert is_held == there.holds_state(is_expert=text.startswith("expert"))
        assert [rank.id for rank in found.ranks] == [r.files.id for r in of.ranks.values()]
        assert proven.left_behind == ()
        for file in found.sources:
            assert file.length == Path(file.path).stat().st_size
        assert {file.path for file in found.sources} == {
            path for rank in found.ranks for path in rank.source_paths()
        }


@pytest.mark.parametrize("name", [DENSE, MOE, PLAIN])
def test_checksums_that_are_derived_are_those_of_the_bytes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From those of the archive's records and of what else is copied."""

    def crc32_of(extent: Extent) -> int:
        data = Path(extent.path).read_bytes()
        return zlib.crc32(data[extent.offset : extent.offset + extent.length])

    monkeypatch.setattr(crc32, "_WORTH_DERIVING", 1)
    monkeypatch.setattr(crc32, "_WORTH_READING", 0)
    count = len(surveyed(name, "source").families)
    planned = [plan_family(job_for(name, "source", number)) for number in range(count)]
    found = [d for family in planned for d in family.derivations.items()]
    assert found
    for extent, derivation in found:
        assert derivation.solve(crc32_of) == crc32_of(extent)


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
def test_dry_runs_know_the_sizes(name: str, side: str) -> None:
    """Without contents, which would only have to be carried between processes."""
    whole = plan_family(job_for(name, side))
    dry = plan_family(job_for(name, side, needs_contents=False))
    assert (dry.sources, dry.derivations) == ((), {})
    for rank, full in zip(dry.ranks, whole.ranks, strict=True):
        assert [(f.name, f.length) for f in rank.files] == [(f.name, f.length) for f in full.files]
        assert all(file.contents == () and file.archive is None for file in rank.files)
        assert rank.length == full.length > 0


@pytest.mark.parametrize(("name", "side"), OF_KINDS)
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
    run(pair(MOE).source, source, Placement(len(start.split("|")) // 2, LayoutString(start)))
    target = Target(Placement(len(layout.split("|")) // 2, LayoutString(layout)), overlaps=False)
    found = take_survey(str(source))
    folders = found.family((0, 1))
    job = PlanJob(folders, found.told, tuple(folders.ranks), target, needs_contents=True)
    whole = plan_family(job)
    for pp_rank in folders.ranks:
        assert plan_family(replace(job, pp_ranks=(pp_rank,))).ranks == (whole.ranks[pp_rank],)


def test_only_what_is_needed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large checkpoints have many ranks; this target moves one layer between neighbours."""
    of = family(FORK, "source")
    counts = [len(of.layout.rank_chunks(p)[0].layers) for p in range(4)]
    counts[0], counts[1] = counts[0] - 1, counts[1] + 1
    stages = ["t" * count for count in counts]
    target = Target(Placement(1, LayoutString("E" + "|".join(stages) + "L")), overlaps=False)
    read: list[int] = []
    real = read_source_rank

    def counted(iteration_dir: str, rank: RankId) -> RankFiles:
        read.append(rank.pp_rank or 0)
        return real(iteration_dir, rank)

    monkeypatch.setattr(files, "read_source_rank", counted)
    found = surveyed(FORK, "source")
    folders = found.family(found.families[0])
    for pp_rank, needed in ((0, {0}), (1, {0, 1}), (2, {2}), (3, {3})):
        read.clear()
        plan_family(PlanJob(folders, found.told, (pp_rank,), target, needs_contents=True))
        assert set(read) == needed


def test_other_files_are_planned_and_named(tmp_path: Path) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    loader = source / "mp_rank_00_001" / "train_dataloader_dprank000.pt"
    loader.write_bytes(b"state")
    (source / "mp_rank_00_000" / "notes.txt").touch()
    job = job_for(DENSE, "source")
    found = plan_family(replace(job, folders=replace(job.folders, directory=str(source))))
    assert found.proven.left_behind == ("mp_rank_00_000/notes.txt",)
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
