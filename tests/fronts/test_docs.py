"""docs/FRONTS.md is true: its code runs, its commands end well, its vote is a vote."""

import json
import re
import shlex
from pathlib import Path

import pytest
from front_records import PUBLISHED, above

from rsoups.cli.main import main

TEXT = (Path(__file__).parents[2] / "docs" / "FRONTS.md").read_text(encoding="utf-8")


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The files that the page names, in the current folder."""
    rows = above([(1.0, 0.1), (0.6, 0.3), (0.2, 0.5)], n=20)
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "records.jsonl", tmp_path / "other" / "records.jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "published.csv").write_text(PUBLISHED)
    (vote,) = blocks("json")
    (tmp_path / "votes.jsonl").write_text(vote)
    monkeypatch.chdir(tmp_path)


def test_the_code_runs():
    names = {}
    for code in blocks("python"):
        exec(code, names)
    assert names["front"].rewards == ["a", "b"] and names["utility"].votes == 1


@pytest.mark.parametrize("command", [line for block in blocks("") for line in block.splitlines()])
def test_the_commands_run(command, capsys):
    program, *arguments = shlex.split(command)
    assert program == "rsoups" and main(arguments) == 0
    assert capsys.readouterr().out


def test_attributes_in_the_tables_exist():
    from rsoups import Front
    from rsoups.fronts.advantage import Advantage

    calls = set(re.findall(r"\bfront\.(\w+)", TEXT)) | set(re.findall(r"`\.(\w+)", TEXT))
    front = Front.from_jsonl("records.jsonl")
    assert all(hasattr(front, name) for name in calls) and len(calls) > 15
    fields = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert fields and set(fields) <= set(Advantage.__dataclass_fields__)
