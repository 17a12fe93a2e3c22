"""recipes/calibrate.py: what a new card makes of the responses that it was made with."""

import json
import runpy
import sys
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from tiny import tiny_classifier

import rsoups

RECIPE = str(Path(__file__).parent.parent / "recipes" / "calibrate.py")


def test_a_calibrated_card_scores_its_references_0_with_a_deviation_of_1(tmp_path, monkeypatch, capsys):
    folder = tiny_classifier(tmp_path / "model", "electra", labels=2)
    card = tmp_path / "liked.yaml"
    card.write_text(f"name: liked\nmodel: {folder}\nlogit: 1\nminus: 0\nsign: -1\nmean: 5\nstd: 3\nlicence: mit")
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
    ]
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *arguments])
    runpy.run_path(RECIPE, run_name="__main__")
    made = tmp_path / "new" / "liked.yaml"
    assert str(made) in capsys.readouterr().out
    reward = rsoups.load_reward(made)
    scores = reward([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert fmean(scores) == pytest.approx(0, abs=1e-5) and pstdev(scores) == pytest.approx(1, abs=1e-5)
    assert reward.card.calibration == "15 reference responses of custom, rows.jsonl, train"
    assert (reward.card.sign, reward.card.minus, reward.card.licence) == (-1, 0, "mit")
    before = rsoups.load_reward(card)([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert sorted(range(15), key=scores.__getitem__) == sorted(range(15), key=before.__getitem__)


def test_what_no_deviation_can_be_taken_of_is_refused(tmp_path):
    calibrated = runpy.run_path(RECIPE)["calibrated"]
    card = tmp_path / "r.yaml"
    card.write_text(f"name: r\nmodel: {tiny_classifier(tmp_path / 'm', 'electra')}")
    reward, task = rsoups.load_reward(card), rsoups.tasks.custom_task("x")
    with pytest.raises(rsoups.RewardError, match="0 reference responses"):
        calibrated(reward, [{"prompt": "w1", "references": []}] * 3, task, "nothing")
    with pytest.raises(rsoups.RewardError, match="the same score"):
        calibrated(reward, [{"prompt": "w1", "references": ["w2"]}] * 3, task, "one")
