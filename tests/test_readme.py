"""The README tells the truth: its commands run, its tables name what the program has."""

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

README = (ROOT / "README.md").read_text()
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTION = re.compile(r"--[a-z][a-z-]+")


def section(title: str) -> str:
    """The text under a heading, with the headings below it."""
    head = re.search(rf"^(#+) {re.escape(title)}$", README, re.MULTILINE)
    assert head is not None, title
    rest = README[head.end() :]
    end = re.search(rf"^#{{2,{len(head[1])}}} ", rest, re.MULTILINE)
    return rest if end is None else rest[: end.start()]


def first_cells(text: str) -> Iterator[str]:
    """The first column of the tables in a text."""
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("|--"):
            yield line.split(" | ")[0].removeprefix("| ")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints that the README's commands speak of, and a small Slurm."""
    folder = tmp_path_factory.mktemp("readme")
    for name, case in (("ckpt", "moe-pp2ep2-v016"), ("uneven", "uneven-31layers-pp4-fork")):
        shutil.copytree(pair(case).source, folder / name / "iter_0001000")
        (folder / name / "latest_checkpointed_iteration.txt").write_text("1000")
    commands = folder / "bin"
    commands.mkdir()
    srun = commands / "srun"
    srun.write_text(
        "#!/bin/bash\nset -e; shift\n"  # its own option
        'for i in 0 1; do SLURM_PROCID=$i SLURM_NTASKS=2 "$@" & started+=($!); done\n'
        "for one in ${started[@]}; do wait $one; done\n"
    )
    srun.chmod(0o755)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    return folder


def run_shell(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block of the README."""
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


def test_the_commands_run_one_after_the_other(workplace: Path) -> None:
    blocks = _BLOCK.findall(section("Use")) + _BLOCK.findall(section("Several nodes"))
    assert len(blocks) >= 6
    for block in blocks:
        other = f"({block.replace('NODE=0', 'NODE=1')}) &" if "NODE=0" in block else ""
        done = run_shell(f"{other} {block}\nwait", workplace)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    for name in ("vpp", "node", "nodes", "slurm", "torchrun"):
        assert _bytes(workplace / f"ckpt-{name}") == _bytes(workplace / "ckpt-vpp")
    assert (workplace / "node.json").stat().st_size > 1000


def _bytes(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
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
        script = fresh / "bin" / command
        script.write_text(f'#!/bin/sh\nexec "{fresh}/bin/python" -m {command} "$@"\n')
        script.chmod(0o755)
    pip = {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1"}
    path = f"{fresh / 'bin'}{os.pathsep}{os.environ['PATH']}"
    blocks = _BLOCK.findall(section("Install"))
    assert len(blocks) == 3
    for block in blocks:
        wanted = block.replace("--index-url https://download.pytorch.org/whl/cpu", "")
        done = subprocess.run(
            ["bash", "-e", "-c", wanted], cwd=project, capture_output=True, text=True, check=False,
            env={**os.environ, **pip, "PATH": path},
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    assert (packages / "pp_to_vpp" / "report.schema.json").exists()
    assert "complete" in (project / "completion.bash").read_text()


def test_the_first_command_converts_the_sample(workplace: Path) -> None:
    first, second = _BLOCK.findall(README)[0].splitlines()
    done = run_shell(first, workplace)
    assert done.returncode == 0, done.stderr
    again = run_shell(first, workplace)
    assert again.returncode == 0, again.stderr
    assert (workplace / "example" / "ckpt-converted" / "iter_0000001" / "pp_to_vpp.json").exists()
    assert "launch Megatron with: --num-layers-per-virtual-pipeline-stage 2" in done.stdout
    assert "--num-layers-per-virtual-pipeline-stage 2" in section("Use")
    script = second.split()[0]
    assert os.access(ROOT / script, os.X_OK)
    assert script in (ROOT / ".ci" / "run").read_text()


def test_the_picture_is_what_the_program_prints(workplace: Path) -> None:
    """Source and target stand side by side in the README."""
    command = _BLOCK.findall(section("Use"))[0].split("\n\n")[1]
    printed = [line.strip() for line in run_shell(command, workplace).stdout.splitlines()]
    (shown,) = re.findall(r"^```text\n(.*?)^```$", section("What moves"), re.MULTILINE | re.DOTALL)
    lines = [line.strip() for line in shown.splitlines()]
    assert len(lines) > 3
    assert [line for line in lines if line not in printed] == []


def test_the_drawing_is_that_of_the_command(workplace: Path) -> None:
    """As matplotlib draws it here: its letters are outlines, the same everywhere."""
    pytest.importorskip("matplotlib")
    (command,) = [block for block in _BLOCK.findall(section("Options")) if "--picture" in block]
    done = run_shell(command.replace("uneven-vpp", "uneven-drawn"), workplace)
    assert done.returncode == 0, done.stderr
    assert (workplace / "uneven.svg").read_text() == (ROOT / "logs" / "picture.svg").read_text()


def test_the_library_does_what_its_section_shows(workplace: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (workplace / "library.py").write_text(code)
    done = run_shell("python library.py", workplace)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Megatron-Core 0.16 or later")
    assert lines[1].endswith("launch with --num-layers-per-virtual-pipeline-stage 2")
    assert lines[2] == "plan 0 4"
    assert "latest_checkpointed_iteration.txt names 1000" in lines[-1]
    command = (
        "python -m pp_to_vpp --load-iteration-dir ckpt --save-iteration-dir ckpt-command "
        "--target-virtual-pipeline-model-parallel-size 2"
    )
    assert run_shell(command, workplace).returncode == 0
    assert _bytes(workplace / "ckpt-library") == _bytes(workplace / "ckpt-command")


def test_links_lead_to_files_that_ship() -> None:
    """In a clean clone, which has no logs but those that are kept."""
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_options_are_those_of_the_program() -> None:
    table = {option for cell in first_cells(section("Options")) for option in _OPTION.findall(cell)}
    shown = re.findall(r"^  (?:-h, )?(--[a-z-]+)", run_process("--help").output, re.MULTILINE)
    assert table == set(shown)


def test_every_exit_status_is_told() -> None:
    text = section("Exit status")
    statuses = {kind.exit_status for kind in errors.ConversionError.__subclasses__()} | {0, 1, 130}
    assert {int(number) for number in re.findall(r"\b(\d+) [a-z]", text)} == statuses


def test_every_refused_argument_stands_in_the_table() -> None:
    cells = " ".join(first_cells(section("What is refused")))
    for name in {name for name, _, _ in arguments._UNSUPPORTED}:
        assert f"`args.{name}`" in cells, name


@pytest.mark.parametrize(
    "command",
    re.findall(r"^\| `([^`]+)` \|", section("Development").split("| room |")[0], re.MULTILINE),
)
def test_the_longer_suites_exist(command: str, workplace: Path) -> None:
    if "pytest" in command:
        asked = f"cd {ROOT} && {command} --collect-only -q"
    else:
        asked = f"cd {ROOT} && {command} --help"
    done = run_shell(asked, workplace)
    assert done.returncode == 0, done.stderr


def test_every_room_has_a_line() -> None:
    table = section("Development").split("| room |")[1]
    named = re.findall(
        r"`([a-z_]+/?)`", "\n".join(re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE))
    )
    package = ROOT / "pp_to_vpp"
    rooms = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert sorted(named) == sorted([*rooms, *(path.stem for path in package.glob("[a-z]*.py"))])
