"""The README and the pages that it leads to tell the truth: their commands run, their tables name
what the program has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from pp_to_vpp import errors
from pp_to_vpp.megatron import arguments

from .pairs import pair
from .runs import ROOT, run_process

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTION = re.compile(r"--[a-z][a-z-]+")


def page(name: str) -> str:
    """The text of a page in ``docs``."""
    return (ROOT / "docs" / f"{name}.md").read_text()


def section(text: str, title: str) -> str:
    """The part of a page under a heading, with the headings below it."""
    head = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert head is not None, title
    rest = text[head.end() :]
    end = re.search(rf"^#{{2,{len(head[1])}}} ", rest, re.MULTILINE)
    return rest if end is None else rest[: end.start()]


def first_cells(text: str) -> Iterator[str]:
    """The first column of the tables in a text."""
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("|--"):
            yield line.split(" | ")[0].removeprefix("| ")


START = _BLOCK.findall(section(README, "Start"))
"""The two commands of the set-up, the installation, then a description, a plan and a conversion."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints that the commands speak of, a small Slurm, and the program
    under its installed name."""
    folder = tmp_path_factory.mktemp("docs")
    for name, case in (("ckpt", "moe-pp2ep2-v016"), ("uneven", "uneven-31layers-pp4-fork")):
        shutil.copytree(pair(case).source, folder / name / "iter_0001000")
        (folder / name / "latest_checkpointed_iteration.txt").write_text("1000")
    commands = folder / "bin"
    commands.mkdir()
    _make_command(
        commands / "srun",
        "#!/bin/bash\nset -e; shift\n"  # its own option
        'for i in 0 1; do SLURM_PROCID=$i SLURM_NTASKS=2 "$@" & started+=($!); done\n'
        "for one in ${started[@]}; do wait $one; done\n",
    )
    _make_command(commands / "pp-to-vpp", f'#!/bin/sh\nexec "{sys.executable}" -m pp_to_vpp "$@"\n')
    (folder / "scripts").symlink_to(ROOT / "scripts")
    done = run_shell(START[4], folder)
    assert done.returncode == 0, done.stderr
    return folder


def _make_command(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def run_shell(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block of a page."""
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    places = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    return subprocess.run(
        ["bash", "-e", "-c", text],
        cwd=folder,
        env={
            **os.environ,
            "PATH": os.pathsep.join(places),
            "PYTHONPATH": python_path,
            "PP_TO_VPP_EXAMPLE": str(folder / "example"),
            "PP_TO_VPP_LOGS": str(folder / "logs"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_new_user_can_type_what_the_readme_shows(workplace: Path) -> None:
    """The first command leaves the sample where the next ones look for it."""
    first, second = START[0].splitlines()
    done = run_shell(first, workplace)
    assert done.returncode == 0, done.stderr
    assert "launch Megatron with: --num-layers-per-virtual-pipeline-stage 2" in done.stdout
    again = run_shell(first, workplace)
    assert again.returncode == 0, again.stderr
    script = second.split()[0]
    assert os.access(ROOT / script, os.X_OK)
    assert script in (ROOT / ".ci" / "run").read_text()
    shown = run_shell("\n".join(START[2:]), workplace)
    assert shown.returncode == 0, shown.stderr
    assert "verified: full" in shown.stdout
    assert "--num-layers-per-virtual-pipeline-stage 2" in section(README, "Before you relaunch")
    assert _bytes(workplace / "example/ckpt-vpp") == _bytes(workplace / "example/ckpt-converted")


def test_the_layers_that_move_are_those_of_the_plan(workplace: Path) -> None:
    """Source and target stand side by side in the README."""
    printed = [line.strip() for line in run_shell(START[3], workplace).stdout.splitlines()]
    (shown,) = re.findall(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for line in shown.splitlines()]
    assert len(lines) > 3
    assert [line for line in lines if line not in printed] == []


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("name", ["options", "several-nodes"])
def test_the_commands_run_one_after_the_other(name: str, workplace: Path) -> None:
    blocks = _BLOCK.findall(page(name))
    assert len(blocks) >= 3
    for block in blocks:
        if "--picture" in block:
            continue  # has a test of its own
        other = f"({block.replace('NODE=0', 'NODE=1')}) &" if "NODE=0" in block else ""
        done = run_shell(f"{other} {block}\nwait", workplace)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    made = ("node", "nodes", "slurm", "torchrun") if name == "several-nodes" else ()
    for one in made:
        assert _bytes(workplace / f"ckpt-{one}") == _bytes(workplace / "ckpt-vpp")


def _bytes(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*.pt"))
        if path.is_file()
    }


def test_it_installs_as_shown(tmp_path: Path) -> None:
    """Into an environment of its own, beside what is here already: nothing is fetched, and nothing
    here is touched."""
    project, fresh = tmp_path / "project", tmp_path / "fresh"
    project.mkdir()
    shutil.copytree(ROOT / "pp_to_vpp", project / "pp_to_vpp")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True)
    (packages,) = fresh.glob("lib/python*/site-packages")
    (packages / "here.pth").write_text(sysconfig.get_path("purelib"))
    for command in ("pip", "shtab"):
        _make_command(
            fresh / "bin" / command, f'#!/bin/sh\nexec "{fresh}/bin/python" -m {command} "$@"\n'
        )
    pip = {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1"}
    path = f"{fresh / 'bin'}{os.pathsep}{os.environ['PATH']}"
    blocks = [START[1], *_BLOCK.findall(page("install"))]
    assert len(blocks) == 4
    for block in blocks:
        wanted = block.replace("--index-url https://download.pytorch.org/whl/cpu", "")
        done = subprocess.run(
            ["bash", "-e", "-c", wanted], cwd=project, capture_output=True, text=True, check=False,
            env={**os.environ, **pip, "PATH": path},
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    assert (packages / "pp_to_vpp" / "report.schema.json").exists()
    assert "complete" in (project / "completion.bash").read_text()


def test_the_drawing_is_that_of_the_command(workplace: Path) -> None:
    """As matplotlib draws it here: its letters are outlines, the same everywhere."""
    pytest.importorskip("matplotlib")
    (command,) = [block for block in _BLOCK.findall(page("options")) if "--picture" in block]
    done = run_shell(command.replace("uneven-vpp", "uneven-drawn"), workplace)
    assert done.returncode == 0, done.stderr
    assert (workplace / "uneven.svg").read_text() == (ROOT / "logs" / "picture.svg").read_text()


def test_the_library_does_what_its_page_shows(workplace: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", page("library"), re.MULTILINE | re.DOTALL)
    (workplace / "library.py").write_text(code)
    done = run_shell("python library.py", workplace)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Megatron-Core 0.16 or later")
    assert lines[1].endswith("launch with --num-layers-per-virtual-pipeline-stage 2")
    assert lines[2] == "plan 0 4"
    assert "latest_checkpointed_iteration.txt names 1000" in lines[-1]
    assert _bytes(workplace / "ckpt-library") == _bytes(workplace / "ckpt-vpp")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files_that_ship(path: Path) -> None:
    """In a clean clone, which has no logs but those that are kept."""
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_page_can_be_found() -> None:
    """From the README, or from a page that it leads to."""
    linked = " ".join(path.read_text() for path in PAGES)
    assert [path.name for path in PAGES if f"{path.name})" not in linked] == ["README.md"]


def test_the_options_are_those_of_the_program() -> None:
    cells = first_cells(page("options"))
    table = {option for cell in cells for option in _OPTION.findall(cell)}
    shown = re.findall(r"^  (?:-h, )?(--[a-z-]+)", run_process("--help").output, re.MULTILINE)
    assert table == set(shown)


def test_every_exit_status_is_told() -> None:
    text = section(page("options"), "Exit status")
    statuses = {kind.exit_status for kind in errors.ConversionError.__subclasses__()} | {0, 1, 130}
    assert {int(number) for number in re.findall(r"\b(\d+) [a-z]", text)} == statuses


def test_every_refused_argument_stands_in_the_table() -> None:
    cells = " ".join(first_cells(section(page("support"), "What is refused")))
    for name in {name for name, _, _ in arguments._UNSUPPORTED}:
        assert f"`args.{name}`" in cells, name


_CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^\| `([^`]+)` \|", _CONTRIBUTING, re.MULTILINE))
def test_the_longer_suites_exist(command: str, workplace: Path) -> None:
    if "pytest" in command:
        asked = f"cd {ROOT} && {command} --collect-only -q"
    else:
        asked = f"cd {ROOT} && {command} --help"
    done = run_shell(asked, workplace)
    assert done.returncode == 0, done.stderr
