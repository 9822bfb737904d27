"""The JSON report: it is as its schema tells, and its values are true."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pp_to_vpp import __version__, report
from pp_to_vpp.errors import UsageError
from pp_to_vpp.megatron.rules import CHANGES

from .pairs import (
    DEEPSEEK,
    DENSE,
    FORK,
    HYBRID,
    HYBRID_MOE,
    LAYER_WISE,
    LAYOUT,
    MOE,
    NOOP,
    PLAIN,
    WEIGHTS,
    Pair,
    pair,
)
from .runs import Program, run_process

_V2 = ("--target-virtual-pipeline-model-parallel-size", "2")
_SCHEMA = json.loads((Path(report.__file__).parent / "report.schema.json").read_text())
_VALIDATOR = jsonschema.Draft202012Validator(_SCHEMA)


def strange(found: Any) -> list[str]:
    """What of a report is not as its schema tells."""
    return [error.message for error in _VALIDATOR.iter_errors(found)]


def test_the_schema_is_one_and_refuses_what_it_does_not_know() -> None:
    jsonschema.Draft202012Validator.check_schema(_SCHEMA)
    call = report.Call(("--help",), 0.0)
    found = json.loads(report.of_refusal(UsageError("wrong"), call))
    assert strange(found) == []
    assert (found["argv"], found["start"]) == (["--help"], "1970-01-01T00:00:00+00:00")
    assert strange({**found, "more": 1})
    assert strange({**found, "problems": []})
    assert strange({**found, "status": 0})
    assert strange({name: value for name, value in found.items() if name != "host"})


def reports_of(case: Pair, program: Program, folder: Path) -> dict[str, Any]:
    """Those of a dry run, a conversion, its resumption and a verification."""
    target = folder / case.truth.name
    paths = {word: folder / f"{word}.json" for word in ("dry", "done", "resumed", "verified")}
    options: list[str | Path] = ["--load-iteration-dir", case.source]
    options += ["--save-iteration-dir", target]
    calls: dict[str, list[str | Path]] = {
        "dry": [*case.options, "--dry-run"],
        "done": [*case.options],
        "resumed": [*case.options, "--resume", "--verify", "none"],
        "verified": [],
    }
    for word, path in paths.items():
        run = program(*options, *calls[word], "--report", path)
        assert run.status == 0, run.errors
    return {word: json.loads(path.read_text()) for word, path in paths.items()}


_UNLIKE = (DENSE, MOE, DEEPSEEK, PLAIN, LAYER_WISE, WEIGHTS, LAYOUT, FORK, HYBRID, NOOP)
"""Pairs of every kind of optimizer and of placement."""


@pytest.mark.parametrize("name", _UNLIKE)
def test_reports_have_known_fields_with_true_values(
    name: str, program: Program, tmp_path: Path
) -> None:
    case = pair(name)
    target = tmp_path / case.truth.name
    found = reports_of(case, program, tmp_path)
    kinds = {"dry": "plan", "done": "conversion", "resumed": "conversion"}
    for word, each in found.items():
        kind = kinds.get(word, "verification")
        assert strange(each) == []
        assert (each["kind"], each["tool"], each["version"]) == (kind, "pp_to_vpp", __version__)
        assert each["schema"] == report.SCHEMA
        assert each["source"]["path"] == str(case.source)
        assert each["target"]["path"] == str(target)
        assert each["target"]["layers"] == found["dry"]["target"]["layers"]
    written = {path: path.read_bytes() for path in sorted(target.glob("*/*"))}
    check_ranks(found, target, written)
    assert found["done"]["tracker"].endswith("latest_checkpointed_iteration.txt names 1")


def check_ranks(found: dict[str, Any], target: Path, written: dict[Path, bytes]) -> None:
    """Sizes and checksums are those of the files, summed up as they should be."""
    total = sum(map(len, written.values()))
    assert found["dry"]["bytes"] == found["done"]["bytes"] == found["resumed"]["bytes"] == total
    assert found["done"]["bytes_written"] == total
    assert found["resumed"]["bytes_written"] == 0
    assert 0 < found["verified"]["bytes_verified"] <= total
    for word in ("dry", "done", "resumed"):
        files = {
            target / rank["folder"] / file["name"]: file
            for rank in found[word]["ranks"]
            for file in rank["files"]
        }
        assert {path: file["bytes"] for path, file in files.items()} == {
            path: len(data) for path, data in written.items()
        }
        for path, file in files.items():
            crc32 = f"{zlib.crc32(written[path]):08x}"
            assert file.get("crc32") == (crc32 if word == "done" else None)
    assert [rank["kept"] for rank in found["done"]["ranks"]] == [False] * len(
        found["done"]["ranks"]
    )
    assert all(rank["kept"] for rank in found["resumed"]["ranks"])
    assert found["done"]["verification"] == found["verified"]["verification"] == "structure"
    assert found["resumed"]["verification"] == "none"


def test_a_dry_run_needs_no_target(program: Program, tmp_path: Path) -> None:
    case, path = pair(DENSE), tmp_path / "plan.json"
    run = program("--load-iteration-dir", case.source, *case.options, "--dry-run", "--report", path)
    assert run.status == 0
    found = json.loads(path.read_text())
    assert strange(found) == []
    assert found["target"]["path"] is None


@pytest.mark.parametrize("name", [DENSE, MOE, HYBRID_MOE])
def test_an_inspection_is_told(name: str, program: Program, tmp_path: Path) -> None:
    source, path = pair(name).source, tmp_path / "inspection.json"
    assert program("--load-iteration-dir", source, "--report", path).status == 0
    found = json.loads(path.read_text())
    assert strange(found) == []
    assert (found["kind"], found["status"], found["source"]["path"]) == (
        "inspection", 0, str(source),
    )  # fmt: skip
    assert found["bytes"] == sum(file.stat().st_size for file in source.glob("*/*"))
    places = [(stage["pp_rank"], stage["vp_stage"]) for stage in found["stages"]]
    layers = found["source"]["layers"]
    assert places == [(p, v) for p, row in enumerate(layers) for v in range(len(row))]
    assert [rule["name"] for rule in found["rules"]] == [change.rule for change in CHANGES]


def test_a_share_is_told(program: Program, tmp_path: Path) -> None:
    """All of them together are the whole."""
    case, path = pair(MOE), tmp_path / "plan.json"
    total, ranks = 0, []
    found: dict[str, Any] = {}
    for index in range(3):
        run = program(
            "--load-iteration-dir", case.source, *case.options, "--dry-run", "--report", path,
            "--share", f"{index}/3",
        )  # fmt: skip
        assert run.status == 0, run
        found = json.loads(path.read_text())
        assert strange(found) == []
        assert (found["share"]["index"], found["share"]["count"]) == (index, 3)
        assert f"share {index}/3: {found['share']['folders']} rank folders" in run.output
        assert 1 <= found["share"]["largest_over_mean"] < 2
        assert found["share"]["bytes"] == found["bytes"]
        assert found["share"]["folders"] == len(found["ranks"])
        total += found["bytes"]
        ranks += found["ranks"]
    program("--load-iteration-dir", case.source, *case.options, "--dry-run", "--report", path)
    whole = json.loads(path.read_text())
    assert total == whole["bytes"]
    assert sorted(ranks, key=str) == sorted(whole["ranks"], key=str)


def test_a_refusal_has_its_report(program: Program, tmp_path: Path) -> None:
    case, path = pair(DENSE), tmp_path / "refusal.json"
    target = ("--target-virtual-pipeline-model-parallel-size", "3", "--dry-run")
    run = program("--load-iteration-dir", case.source, *target, "--report", path)
    assert run.status == 3
    found = json.loads(path.read_text())
    assert strange(found) == []
    assert (found["kind"], found["status"]) == ("refusal", run.status)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--dry-run", "--verify", "some"), "argument --verify: invalid Depth value: 'some'"),
        (("--unknown", "3", "--dry-run"), "unrecognized arguments: --unknown 3"),
        (("--dry-run",), "give --target-virtual-pipeline-model-parallel-size, "),
        (("--share", "3/3"), "give --target-virtual-pipeline-model-parallel-size, "),
        (
            (*_V2, "--dry-run", "--log-file", "/"),
            "--log-file /: cannot be written (it is a folder)",
        ),
        ((*_V2, "--dry-run", "--pipeline-ranks-to-process", "9"), "there is no pipeline rank 9"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_wrong_call_has_its_report(
    arguments: tuple[str, ...], problem: str, first: bool, program: Program, tmp_path: Path
) -> None:
    """Wherever the option stands: before what is wrong, or after it."""
    source = ("--load-iteration-dir", pair(DENSE).source)
    path = tmp_path / "deep" / "refusal.json"
    wanted = ("--report", path)
    run = program(*(wanted if first else ()), *source, *arguments, *(() if first else wanted))
    assert run.status == 2
    found = json.loads(path.read_text())
    assert strange(found) == []
    assert (found["kind"], found["status"]) == ("refusal", 2)
    assert problem in found["problems"][0]
    assert [line for line in run.errors.splitlines() if line.startswith("pp_to_vpp: error: ")] == [
        f"pp_to_vpp: error: {line}" for line in found["problems"]
    ]


@pytest.mark.parametrize("wrong", [("--verify", "some"), ("--resume",)])
def test_a_wrong_call_reports_to_standard_output(wrong: tuple[str, ...]) -> None:
    run = run_process("--load-iteration-dir", "x", "--report", "-", *wrong)
    assert run.status == 2
    assert json.loads(run.output)["status"] == 2


@pytest.mark.parametrize("place", ["source", "target", "nowhere"])
def test_a_wrong_call_has_no_report_where_none_may_be(
    place: str, program: Program, tmp_path: Path
) -> None:
    """Neither in a checkpoint, nor at a place that the call does not name."""
    options: list[str | Path] = [
        "--load-iteration-dir",
        tmp_path / "source",
        "--save-iteration-dir",
    ]
    options += [tmp_path / "target", "--verify", "some", "--report"]
    run = program(*options, *([tmp_path / place / "report.json"] if place != "nowhere" else []))
    assert run.status == 2
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_opened_has_its_report(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "refusal.json"
    os.mkfifo(tmp_path / "pipe")  # which nobody reads
    options = ("--dry-run", "--log-file", tmp_path / "pipe", "--report", path)
    run = program("--load-iteration-dir", pair(DENSE).source, *_V2, *options)
    assert run.status == 5
    found = json.loads(path.read_text())
    assert found["status"] == 5
    assert run.errors == f"pp_to_vpp: error: {found['problems'][0]}\n"
