"""FORMAT.md tells what the code relies on: whatever cites it, and its own tables, agree with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pp_to_vpp.megatron.buffers import BucketPolicy, BufferParameter, chunk_buffers
from pp_to_vpp.megatron.rules import CHANGES, Rules

from ..runs import ROOT

TEXT = (ROOT / "pp_to_vpp" / "megatron" / "FORMAT.md").read_text()
_HEADING = re.compile(r"^##+ (?P<number>[0-9]+(?:\.[0-9]+)*)\.? \S", re.MULTILINE)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_REFERENCE = re.compile(r"§(?P<number>[0-9.]*[0-9])?")
_MENTION = re.compile(r"\bFORMAT\b(?!\.md)(?: (?P<number>[0-9]+(?:\.[0-9]+)*)(?!\.?\w))?")
"""One citation is the word, one space and one number; whatever else follows the word is wrong."""


def headings(text: str) -> list[str]:
    """The numbers of all headings, in order."""
    return [found["number"] for found in _HEADING.finditer(_FENCED.sub("", text))]


def dangling(pattern: re.Pattern[str], text: str, known: list[str]) -> list[str]:
    """Citations in a text that lead nowhere, as they stand there."""
    return [found[0] for found in pattern.finditer(text) if found["number"] not in known]


def code_files(root: Path) -> Iterator[Path]:
    """Whatever may cite."""
    for folder in ("pp_to_vpp", "tests", "scripts"):
        yield from sorted((root / folder).rglob("*.py"))


def dangling_in_code(root: Path) -> list[str]:
    """``file: citation`` for each citation in the code below a folder that leads nowhere."""
    known = headings(TEXT)
    return [
        f"{path.relative_to(root)}: {citation}"
        for path in code_files(root)
        for citation in dangling(_MENTION, path.read_text(), known)
    ]


def table(first_header: str) -> list[list[str]]:
    """The rows of the table whose first column has this header; code marks are taken off."""
    lines = TEXT[TEXT.index(f"\n| {first_header} |") :].lstrip("\n").split("\n\n")[0].splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_headings_are_numbered_in_order() -> None:
    found = [tuple(map(int, number.split("."))) for number in headings(TEXT)]
    assert found == sorted(set(found))
    assert {number[:1] for number in found if len(number) > 1} <= set(found)


def test_every_citation_in_the_code_has_its_heading() -> None:
    assert dangling_in_code(ROOT) == []
    mentions = [m for path in code_files(ROOT) for m in _MENTION.finditer(path.read_text())]
    assert len(mentions) >= 5


@pytest.mark.parametrize(
    "citation", ["99.1", "5.4.1", "5.99", "99", "trap 1", "5.x", "§5.4", "(5.4)", "\n5.4", ""]
)
@pytest.mark.parametrize("place", ["pp_to_vpp/megatron/a.py", "tests/a.py", "scripts/a/b.py"])
def test_citations_that_lead_nowhere_are_found(citation: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    word = Path("FORMAT.md").stem
    path.write_text(f'"""See {word}.md; {word} 5.4, {word} 9.1."""\n')
    assert dangling_in_code(tmp_path) == []
    path.write_text(f'"""{word} 5.4, {word} {citation}"""\n')
    assert len(dangling_in_code(tmp_path)) == 1


def test_references_inside_resolve() -> None:
    known = headings(TEXT)
    assert dangling(_REFERENCE, TEXT, known) == []
    assert len(_REFERENCE.findall(TEXT)) > 50
    assert dangling(_REFERENCE, "§5.4, §5.99 and § 5.4.", known) == ["§5.99", "§"]


def test_the_table_of_versions_is_that_of_the_rules() -> None:
    rows = [row[:4] for row in table("rule")]
    sources = [re.split("[:,]", change.source)[0] for change in CHANGES]
    wanted = zip(CHANGES, sources, strict=True)
    assert rows == [[change.rule, change.since, change.sign, source] for change, source in wanted]


def test_the_example_of_a_buffer_is_computed() -> None:
    rows = table("parameter, in named order")
    parameters = [
        BufferParameter(int(numel), "bfloat16", False, shared == "yes")
        for _, numel, shared, _, _ in rows
    ]
    newest = Rules(*[True] * len(CHANGES))
    policy = BucketPolicy(None, dense_shards=2, expert_shards=2, pads_for_bandwidth=False)
    (buffer,) = chunk_buffers(parameters, newest, policy)
    assert buffer.starts == tuple(int(row[3]) for row in rows)
    assert buffer.saved_starts == tuple(int(row[4]) for row in rows)
    sizes = f"The storage has {buffer.numel} elements, `numel_unpadded` is 448 + 1000 = "
    assert f"{sizes}{buffer.numel_unpadded}." in " ".join(TEXT.split())
