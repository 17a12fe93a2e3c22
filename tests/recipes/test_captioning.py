"""recipes/captioning.py: the data it keeps, what its records hold; the whole of it, short, with -m slow."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from places import RECIPES
from tiny import tiny_adapter
from transformers import AutoModelForCausalLM

import rsoups
from rsoups.common.assets import resolve
from rsoups.common.files import read_jsonl

ROWS = [
    {
        "concepts": [f"dog{i}", "run"],
        "sentences": [f"a dog{i} runs home.", "the dog is running", "dogs run"][: 1 + i % 3],
    }
    for i in range(9)
]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))  # as when it is run: it borrows from demo.py
    return runpy.run_path(str(RECIPES / "captioning.py"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_train_rows_have_enough_references(recipe, tmp_path):
    rows = write(tmp_path / "rows.jsonl", ROWS)
    recipe["prepare"](rows, rows, tmp_path / "data", 2)
    assert [len(row["sentences"]) for row in read_jsonl(tmp_path / "data" / "train.jsonl")] == [2, 3] * 3
    assert read_jsonl(tmp_path / "data" / "test.jsonl") == ROWS


def test_records_hold_every_score_against_the_prompts_own_references(recipe, tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", ROWS)
    for seed, name in enumerate(recipe["REWARDS"]):
        base = AutoModelForCausalLM.from_pretrained(resolve("rsoups/tiny-llama"))
        tiny_adapter(tmp_path / f"ppo-{name}", base, seed=seed)
    references = {row["prompt"]: row["references"] for row in recipe["TASK"].rows(ROWS[:3])}
    recipe["evaluate"](tmp_path / "all", list(recipe["REWARDS"]), [[1.0, 0, 0, 0], [0.25] * 4], references, 0)
    records = read_jsonl(tmp_path / "all" / "records.jsonl")
    assert len(records) == 3 * 3 and (tmp_path / "all" / "report.html").is_file()
    for name in recipe["REWARDS"]:
        arguments = {"corpus": str(tmp_path / "data" / "train.jsonl"), "column": "sentences"} if name == "cider" else {}
        reward = rsoups.load_reward(name, **arguments)
        for record in records:
            (score,) = reward([""], [record["response"]], references=[references[record["prompt"]]])
            assert record["rewards"][name] == score


@pytest.mark.slow
def test_the_whole_recipe(tmp_path):
    asked = [row["concepts"] for row in read_jsonl(Path(resolve("rsoups/concepts")) / "train.jsonl")[:90]]
    said = [[f"a {words[0]} and the {words[1]}.", f"{' '.join(words)} in a park", "nothing else"] for words in asked]
    pairs = zip(asked, said, strict=True)
    rows = write(tmp_path / "rows.jsonl", [{"concepts": words, "sentences": texts} for words, texts in pairs])
    command = [sys.executable, str(RECIPES / "captioning.py"), "--train", str(rows), "--test", str(rows)]
    command += ["--rollouts", "1", "--prompts", "5", "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(read_jsonl(tmp_path / "out" / "front" / "records.jsonl")) == 5 * 12
    assert len(read_jsonl(tmp_path / "out" / "all" / "records.jsonl")) == 5 * 6
