"""rsoups.probe: rewards whose faults are known are told them."""

import json
import math
import random

import numpy as np
import pytest
from scipy.stats import spearmanr

import rsoups
from rsoups.data.prompts import question_of
from rsoups.data.tasks import TASKS, custom_task
from rsoups.generation.samples import sample_of, sample_of_records
from rsoups.rewards.probing import spearman

DRAW = random.Random(0)
QUESTIONS = [" ".join(DRAW.sample("abcdefghijklmnop", k=4)) for _ in range(40)]
SAMPLE = rsoups.Sample(
    prompts=[f"### Instruction: Do it. ### Input: {question} ### Response: " for question in QUESTIONS],
    responses=[" ".join([*q.split()[: 1 + i % 4], *["x"] * (i % 7)]) for i, q in enumerate(QUESTIONS)],
)


def long(prompts, responses):
    return [float(len(response.split())) for response in responses]


def constant(prompts, responses):
    return [1.0] * len(responses)


def answers(prompts, responses):
    """Words of the question that are in the response."""
    pairs = zip(map(question_of, prompts), responses, strict=True)
    return [float(len(set(question.split()) & set(response.split()))) for question, response in pairs]


def shy(prompts, responses):
    """Length, but for questions with a role."""
    return [score - 50 * ("Human:" in prompt) for score, prompt in zip(long(prompts, responses), prompts, strict=True)]


def found(reward, sample=SAMPLE, seed=0):
    probe = rsoups.probe({"r": reward}, sample, seed=seed, progress=False)
    return probe, {finding.check: finding for finding in probe.findings["r"]}


def test_rank_correlation_is_scipys():
    draw = np.random.default_rng(0)
    for ties in (2, 5, 1000):
        a, b = draw.integers(0, ties, 50), draw.integers(0, ties, 50)
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3])) and spearman([1, 2, 9], [3, 2, 1]) == pytest.approx(-1)


def test_a_reward_of_length_is_told_so():
    probe, checks = found(long)
    lengths = np.array([len(response.split()) for response in SAMPLE.responses])
    assert checks["length"].rho.value == pytest.approx(1) and "strongly prefers longer" in checks["length"].text
    twice = checks["said twice"].change
    assert twice.value == pytest.approx(lengths.mean() / lengths.std()) and twice.low < twice.value < twice.high
    assert checks["said twice"].higher == 1 and "scores higher; higher for 100%" in checks["said twice"].text
    halves = [max(n // 2, 1) - n for n in lengths]
    assert checks["first half"].change.value == pytest.approx(np.mean(halves) / lengths.std())
    assert checks["nothing"].change.value == pytest.approx(-lengths.mean() / lengths.std())
    assert "scores lower" in checks["nothing"].text and "above 0% of the sample's scores" in checks["nothing"].text
    for check in ("one word", "template", "other question"):
        assert "makes no difference at all" in checks[check].text and checks[check].change.value == 0
    assert checks["other question"].text.endswith("the question is not read")
    assert probe.mean["r"] == pytest.approx(lengths.mean()) and probe.deviation["r"] == pytest.approx(lengths.std())
    _, shorter = found(lambda prompts, responses: [-score for score in long(prompts, responses)])
    assert "strongly prefers shorter" in shorter["length"].text


def test_a_reward_that_reads_the_question_is_told_so():
    _, checks = found(answers)
    other = checks["other question"]
    assert other.change.high < 0 and "a response to another question scores lower" in other.text
    assert checks["said twice"].higher == 0 and checks["template"].change.value == 0
    one = checks["one word"]
    assert one.change.value < 0 and one.higher == 0


def test_a_template_that_matters_is_found():
    _, checks = found(shy)
    assert checks["template"].change.high < -1 and checks["template"].rho.value == pytest.approx(1)
    assert "scores lower" in checks["template"].text and "alike: rho = 1.00" in checks["template"].text


def test_what_cannot_be_measured_is_said():
    _, checks = found(constant)
    assert checks["length"].text == "not measured: all scores are the same" and checks["length"].rho is None
    one_question = rsoups.Sample(["Write a review."] * 40, SAMPLE.responses)
    _, checks = found(long, one_question)
    assert checks["other question"].text == "not measured: all prompts ask the same"
    _, checks = found(answers, rsoups.Sample(SAMPLE.prompts, ["a b"] * 40))
    assert checks["length"].text == "not measured: all lengths are the same"


def test_rewards_agree_or_not():
    probe = rsoups.probe({"long": long, "answers": answers, "constant": constant}, SAMPLE, progress=False)
    expected = spearmanr(long(SAMPLE.prompts, SAMPLE.responses), answers(SAMPLE.prompts, SAMPLE.responses)).statistic
    pair = probe.agreement["long"]["answers"]
    assert pair.value == pytest.approx(expected) and pair.low < pair.value < pair.high
    assert probe.agreement["answers"]["long"].value == pytest.approx(expected)
    assert probe.agreement["constant"]["long"] is None and probe.agreement["long"]["long"].value == pytest.approx(1)
    text = probe.to_text()
    assert text.count("prefers longer") == 2 and "agreement (rank correlation)" in text
    data = json.loads(probe.to_json())
    assert data["responses"] == 40 and data["agreement"]["constant"]["long"] is None
    assert "NaN" not in probe.to_json()


def test_a_seed_gives_one_probe_and_columns_are_passed():
    def seen(prompts, responses, references):
        return [float(len(references[0])) * len(response) for response in responses]

    sample = rsoups.Sample(SAMPLE.prompts, SAMPLE.responses, {"references": [["x", "y"]] * 40})
    reward = rsoups.load_reward(seen)
    assert found(reward, sample)[0] == found(reward, sample)[0] != found(reward, sample, seed=1)[0]


def test_what_no_probe_can_be_made_of_is_refused():
    few = rsoups.Sample(SAMPLE.prompts[:7], SAMPLE.responses[:7])
    with pytest.raises(rsoups.DatasetError, match="needs 8 responses or more"):
        found(long, few)
    with pytest.raises(rsoups.DatasetError, match="got 40, 39"):
        found(long, rsoups.Sample(SAMPLE.prompts[1:], SAMPLE.responses))
    with pytest.raises(rsoups.RewardError, match="at least one reward"):
        rsoups.probe({}, SAMPLE)
    with pytest.raises(rsoups.RewardError, match="reward 'r' returned nan"):
        found(lambda prompts, responses: [math.nan] * len(responses))


def test_samples_come_from_references_records_and_the_policy(tmp_path):
    rows = [{"prompt": f"q{i}", "references": [f" r{i} ", f"s{i}"]} for i in range(10)] + [
        {"prompt": "q", "references": []}
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sample = sample_of(custom_task(str(tmp_path / "rows.jsonl")), str(tmp_path / "rows.jsonl"), rows=11)
    assert sample.prompts == [f"q{i}" for i in range(10)] and sample.responses == [f"r{i}" for i in range(10)]
    assert sample.columns == {"references": [[f"s{i}"] for i in range(10)]}

    records = [{"prompt": f"p{i % 9}", "response": f"a{i % 18}", "name": "soup"} for i in range(36)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    sample = sample_of_records(tmp_path / "records.jsonl", rows=12, seed=1)
    pairs = set(zip(sample.prompts, sample.responses, strict=True))
    assert len(pairs) == 12 and pairs <= {(f"p{i % 9}", f"a{i}") for i in range(18)}
    with pytest.raises(rsoups.DatasetError, match="no records file"):
        sample_of_records(tmp_path / "nothing.jsonl")
    with pytest.raises(rsoups.DatasetError, match="without prompt or response"):
        sample_of_records(tmp_path / "rows.jsonl")

    sample = sample_of(TASKS["concepts"], rows=9)
    assert len(set(sample.responses)) > 5 and all(p.startswith("### Instruction:") for p in sample.prompts)
    assert sample.responses == sample_of(TASKS["concepts"], rows=9).responses
    assert sample.responses != sample_of(TASKS["concepts"], rows=9, seed=1).responses
