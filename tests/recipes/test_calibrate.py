"""recipes/calibrate.py: what a new card makes of the responses that it was made with."""

import json
import runpy
import sys
from statistics import fmean, pstdev

import pytest
from places import RECIPES
from tiny import tiny_classifier

import rsoups

RECIPE = str(RECIPES / "calibrate.py")


def test_a_calibrated_card_scores_its_references_0_with_a_deviation_of_1(tmp_path, monkeypatch, capsys):
    folder = tiny_classifier(tmp_path / "model", "electra", labels=2)
    card = tmp_path / "liked.yaml"
    card.write_text(f"name: liked\nmodel: {folder}\nlogit: 1\nminus: 0\nsign: -1\nmean: 5\nstd: 3\nlicense: mit")
    rows = [
        {"prompt": f"w{i} w{i + 1}", "response": " ".join(f"w{(i * j) % 20}" for j in range(1, 3 + i % 4))}
        for i in range(15)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "--reward",
        str(card),
        "--task",
        "custom",
        "--dataset",
        str(tmp_path / "rows.jsonl"),
        "--out",
        str(tmp_path / "new"),
        "--split",
        "all",
    ]
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *arguments])
    runpy.run_path(RECIPE, run_name="__main__")
    made = tmp_path / "new" / "liked.yaml"
    assert str(made) in capsys.readouterr().out
    reward = rsoups.load_reward(made)
    scores = reward([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert fmean(scores) == pytest.approx(0, abs=1e-5) and pstdev(scores) == pytest.approx(1, abs=1e-5)
    assert reward.card.calibration == "15 reference responses of custom, rows.jsonl, all"
    assert (reward.card.sign, reward.card.minus, reward.card.license) == (-1, 0, "mit")
    before = rsoups.load_reward(card)([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert sorted(range(15), key=scores.__getitem__) == sorted(range(15), key=before.__getitem__)


ROWS = [{"concepts": ["dog"], "sentences": [f"a dog runs {'x ' * i}home.", "the dog runs", "a dog"]} for i in range(6)]


def calibrate(tmp_path, monkeypatch, *flags):
    """The recipe on six rows of three sentences, and one of one."""
    lines = [*ROWS, {"concepts": ["cat"], "sentences": ["a cat"]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--task", "concepts", "--dataset", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "new")]
    arguments += ["--split", "all"]
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *arguments, *flags])
    runpy.run_path(RECIPE, run_name="__main__")


def test_references_are_compared_with_the_rows_others(tmp_path, monkeypatch):
    calibrate(tmp_path, monkeypatch, "--reward", "rouge-l", "length", "--rows", "7")
    reward = rsoups.load_reward(tmp_path / "new" / "rouge-l.yaml")
    said, others = [row["sentences"][0] for row in ROWS], [row["sentences"][1:] for row in ROWS]
    scores = reward(["p"] * 6, said, references=others)
    assert fmean(scores) == pytest.approx(0, abs=1e-9) and pstdev(scores) == pytest.approx(1, abs=1e-9)
    assert (
        reward.card.calibration == "6 reference responses of concepts, rows.jsonl, all, each against the row's others"
    )
    assert reward.card.arguments == {"score": "fmeasure"}
    assert rsoups.load_reward(tmp_path / "new" / "length.yaml").card.calibration.startswith("7 reference responses")


def test_samples_of_a_policy_are_compared_with_all_references(tmp_path, monkeypatch, capsys):
    corpus = f"corpus={tmp_path / 'rows.jsonl'}"
    policy = ["--policy", "rsoups/tiny-llama", "--temperature", "0.7", "--max_new_tokens", "12"]
    calibrate(tmp_path, monkeypatch, "--reward", "cider", "--arguments", corpus, "column=sentences", *policy)
    reward = rsoups.load_reward(tmp_path / "new" / "cider.yaml")
    assert reward.card.arguments == {"corpus": str(tmp_path / "rows.jsonl"), "column": "sentences"}
    assert reward.card.calibration.startswith(
        "7 samples of rsoups/tiny-llama at temperature 0.7 for the prompts of concepts"
    )
    first = (tmp_path / "new" / "cider.yaml").read_bytes()
    calibrate(tmp_path, monkeypatch, "--reward", "cider", "--arguments", corpus, "column=sentences", *policy)
    assert (tmp_path / "new" / "cider.yaml").read_bytes() == first and 0 < reward.card.std < 5
    (tmp_path / "flat.py").write_text("def zero(prompts, responses): return [0 for r in responses]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        calibrate(tmp_path, monkeypatch, "--reward", "flat:zero")
    assert "rsoups: ['zero'] are functions without a card" in capsys.readouterr().err


def test_what_no_deviation_can_be_taken_of_is_refused(tmp_path):
    recipe = runpy.run_path(RECIPE)
    card = tmp_path / "r.yaml"
    card.write_text(f"name: r\nmodel: {tiny_classifier(tmp_path / 'm', 'electra')}")
    reward, task = rsoups.load_reward(card), rsoups.data.tasks.custom_task("x")

    def tried(references, compared=False):
        rows = [{"prompt": "w1", "references": references}] * 3
        return recipe["calibrated"](reward, recipe["of_people"](rows, task, compared), "responses of x")

    with pytest.raises(rsoups.RewardError, match="0 responses of x"):
        tried([])
    with pytest.raises(rsoups.RewardError, match="0 responses of x"):
        tried(["w2"], compared=True)
    with pytest.raises(rsoups.RewardError, match="the same score"):
        tried(["w2"])
