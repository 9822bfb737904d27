"""Sources that are made of links: refused, or followed if that is asked for."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from ..compare import differences
from ..edit import copy_of
from ..pairs import DENSE, LAYER_WISE, MOE, pair
from ..runs import Program

_FILE = Path("mp_rank_00_001") / "model_optim_rng.pt"


def stored(iteration: Path, folder: Path) -> Path:
    """A copy of links into a store, where files are called by their contents."""
    target = folder / "linked" / iteration.name
    (folder / "store").mkdir()
    for path in sorted(iteration.glob("*/*")):
        kept = folder / "store" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, kept)
        link = target / path.relative_to(iteration)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(kept, link.parent))
    return target


def contents(target: Path) -> dict[str, bytes]:
    """Every file of an iteration folder."""
    files = (path for path in sorted(target.rglob("*")) if path.is_file())
    return {str(path.relative_to(target)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", [DENSE, MOE, LAYER_WISE])
def test_the_target_does_not_tell_whether_links_were_followed(
    name: str, program: Program, tmp_path: Path
) -> None:
    """Neither its files nor its manifest: nodes may see one source in two ways."""
    case = pair(name)
    source = stored(case.source, tmp_path)
    before = contents(tmp_path / "store")
    plain, followed = (tmp_path / folder / case.truth.name for folder in ("plain", "followed"))
    assert program.convert(case.source, plain, case.options, "--verify", "full").status == 0
    options = [*case.options, "--follow-links"]
    first = program.convert(source, followed, options, "--pipeline-ranks-to-process", "1")
    assert first.status == 0, first.errors
    rest = program.convert(source, followed, options, "--resume", "--verify", "full")
    assert rest.status == 0, rest.errors
    assert contents(followed) == contents(plain)
    assert differences(followed, case.truth, case.source) == []
    assert contents(tmp_path / "store") == before
    folders = ("--load-iteration-dir", source, "--save-iteration-dir", plain)
    assert program(*folders, "--follow-links").status == 0
    program.refuses(4, program(*folders), "it is a link out of the checkpoint")


def test_whole_rank_folders_may_be_links(program: Program, tmp_path: Path) -> None:
    case = pair(DENSE)
    source = copy_of(case.source, tmp_path)
    real = tmp_path / "elsewhere"
    shutil.move(source / "mp_rank_00_001", real)
    (source / "mp_rank_00_001").symlink_to(real)
    target = tmp_path / "target" / case.truth.name
    run = program.convert(source, target, case.options)
    program.refuses(4, run, "mp_rank_00_001: it is a link out of", "--follow-links allows it")
    within = program.convert(source, real / "x", case.options, "--follow-links")
    program.refuses(2, within, "it lies in the source")
    assert program.convert(source, target, case.options, "--follow-links").status == 0
    assert differences(target, case.truth, case.source) == []


@pytest.mark.parametrize("name", ["model_optim_rng.pt", "distrib_optim.pt"])
@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("/dev/zero", "it is no regular file"),
        ("pipe", "it is no regular file"),
        ("nowhere", "cannot be read (No such file"),
        ("itself", "cannot be read (Too many levels"),
        ("/", "cannot be read (Is a directory"),
    ],
)
def test_links_to_what_is_no_file_are_refused_all_the_same(
    where: str, reason: str, name: str, program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    path = source / "mp_rank_00_001" / name
    path.unlink()
    path.symlink_to(path if where == "itself" else tmp_path / where)
    run = program.convert(source, tmp_path / "x", (), "--follow-links")
    program.refuses(4, run, f"{path}: {reason}")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_a_broken_link_is_no_missing_file(name: str, program: Program, tmp_path: Path) -> None:
    """Weights alone are converted without their optimizer, but not because it is out of reach."""
    source = copy_of(pair(DENSE).source, tmp_path)
    path = source / "mp_rank_00_001" / name
    path.unlink()
    path.symlink_to("nowhere")
    run = program.convert(source, tmp_path / "x")
    program.refuses(4, run, f"{path}: cannot be read (No such file")


@pytest.mark.parametrize("of_folder", [True, False])
def test_the_target_holds_no_links(of_folder: bool, program: Program, tmp_path: Path) -> None:
    """What an earlier run or another node wrote is there itself, whatever the source may be."""
    case = pair(DENSE)
    target = tmp_path / "target" / case.truth.name
    assert program.convert(case.source, target, case.options).status == 0
    moved = target / (_FILE.parent if of_folder else _FILE)
    shutil.move(moved, tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    for more in (("--resume",), ("--resume", "--verify", "none")):
        run = program.convert(case.source, target, case.options, "--follow-links", *more)
        program.refuses(4, run, f"{moved}: it is a link out of the checkpoint")
    others = (*case.options, "--resume", "--pipeline-ranks-to-process", "0", "--follow-links")
    program.refuses(6, program.convert(case.source, target, others), f"{moved}: it is a link out")
    folders = ("--load-iteration-dir", case.source, "--save-iteration-dir", target)
    program.refuses(6, program(*folders, "--follow-links"), f"{moved}: it is a link out of")


@pytest.mark.parametrize("option", ["--log-file", "--report"])
@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_report_is_not_written_over_what_a_link_leads_to(
    option: str, make: object, program: Program, tmp_path: Path
) -> None:
    source = copy_of(pair(DENSE).source, tmp_path)
    real = tmp_path / "real.pt"
    shutil.move(source / _FILE, real)
    assert callable(make)
    make(real, source / _FILE)
    before = real.read_bytes()
    run = program.convert(source, tmp_path / "x", (), "--follow-links", option, real)
    assert run.status == 2
    assert f"{option} {real}: cannot be written (it lies in the checkpoint {source})" in run.errors
    assert real.read_bytes() == before
