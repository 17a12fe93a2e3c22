"""The recipes of weight averaging, DiWA and WARM: their sums against plain ones, and each from trained runs to its report."""

import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from places import RECIPES
from safetensors.torch import load_file, save_file
from tiny import tiny_adapter, tiny_classifier
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, RewardConfig, TrlParser

import rsoups
from rsoups.common.assets import resolve
from rsoups.common.files import read_jsonl
from rsoups.data.datasets import load_rows
from rsoups.data.tasks import TASKS
from rsoups.training.run_arguments import parse

BASE = "rsoups/tiny-llama"


@pytest.fixture(scope="module")
def recipes():
    """The folder on the path, as it is for a script that is run from it."""
    sys.path.insert(0, str(RECIPES))
    yield
    sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def diwa(recipes):
    import diwa

    return diwa


@pytest.fixture(scope="module")
def warm(recipes):
    import warm

    return warm


def base_model():
    return AutoModelForCausalLM.from_pretrained(resolve(BASE), dtype=torch.float32)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return {f"run-{i}": tiny_adapter(folder / f"run-{i}", base_model(), seed=i, lora_alpha=2) for i in range(3)}


PROMPTS = [row["prompt"] for row in load_rows(TASKS["concepts"], None, "test", 5)]


@pytest.fixture(scope="module")
def alone(members):
    """Each member in float64 on a base of its own, and the tokenizer."""
    models = [PeftModel.from_pretrained(base_model(), folder).eval().double() for folder in members.values()]
    return models, AutoTokenizer.from_pretrained(resolve(BASE))


def test_divergences_are_those_of_the_members_distributions(diwa, members, alone):
    models, tokenizer = alone
    responses = ["a man rides a horse.", "dog", "the girl sits on a chair in the park.", "snow.", "two cars"]
    live = rsoups.LiveSoup.from_pretrained(BASE, members)
    found = diwa.divergences(live, PROMPTS, responses, 0.7)
    expected, tokens = np.zeros((3, 3)), 0
    for prompt, response in zip(PROMPTS, responses, strict=True):
        asked = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([asked + tokenizer(response, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():  # the distributions before each token of the response
            logits = [model(ids).logits[0, len(asked) - 1 : -1] / 0.7 for model in models]
        each = [torch.distributions.Categorical(logits=x) for x in logits]
        expected += [[float(torch.distributions.kl_divergence(p, q).sum()) for q in each] for p in each]
        tokens += len(logits[0])
    assert np.allclose(found, expected / tokens, rtol=1e-4, atol=1e-6) and found[0, 1] > 1e-3


def test_more_words_than_in_training(diwa):
    for prompt in diwa.more_words(PROMPTS, seed=1):
        words = prompt.partition("### Input: ")[2].partition(" ###")[0].split(", ")
        assert len(set(words)) == len(words) >= 6
    train = [len(row["concepts"]) for row in read_jsonl(Path(resolve("rsoups/concepts")) / "train.jsonl")]
    assert max(train) <= 5


def run_diwa(diwa, monkeypatch, out, *flags):
    """The recipe, of which the training is left out; returns what it would have trained."""
    jobs = []
    monkeypatch.setattr(diwa, "train_all", jobs.extend)
    monkeypatch.setattr(sys, "argv", ["diwa.py", "--out", str(out), *map(str, flags)])
    diwa.main()
    return jobs


@pytest.fixture
def out(tmp_path, members):
    for name, folder in members.items():
        shutil.copytree(folder, tmp_path / "out" / name)
    return tmp_path / "out"


def test_from_runs_to_the_report_of_diwa(diwa, monkeypatch, out):
    flags = ["--prompts", 4, "--validation", 3, "--samples", 2, "--starts", "runs/a", "runs/b", "runs/c"]
    jobs = run_diwa(diwa, monkeypatch, out, *flags)
    drawn = [parse([*run.flags, "--output_dir", "x"])[:2] for run in jobs]
    assert [script.adapter_name_or_path for script, _ in drawn] == ["runs/a", "runs/b", "runs/c"]
    assert [training.seed for _, training in drawn] == [0, 1, 2]
    assert all(script.reward == ["coverage"] and 5e-4 <= t.learning_rate <= 1.4e-3 for script, t in drawn)
    assert len({(t.learning_rate, t.kl_coef) for _, t in drawn}) > 1 and {t.adapter_init_seed for _, t in drawn} == {0}

    results = json.loads((out / "results.json").read_text())
    records = read_jsonl(out / "records" / "held-out.jsonl")
    assert len({r["prompt"] for r in records}) == 4

    def mean(*weights):
        found = [r["rewards"]["coverage"] for r in records if r["lambdas"] and (*r["lambdas"].values(),) == weights]
        assert len(found) == 4 * 2
        return np.mean(found)

    singles = [mean(*row) for row in np.eye(3).tolist()]
    held_out, third = results["held-out"], (1 / 3,) * 3
    assert [held_out["reward"][f"run-{i}"][0] for i in range(3)] == pytest.approx(singles)
    assert held_out["reward"]["uniform soup"][0] == pytest.approx(mean(*third))
    assert held_out["uniform soup less the runs' mean"][0] == pytest.approx(mean(*third) - np.mean(singles))
    ensemble = [r["rewards"]["coverage"] for r in records if r["name"] == "ensemble"]
    assert held_out["differences"]["uniform soup less ensemble"][0] == pytest.approx(mean(*third) - np.mean(ensemble))
    pair = held_out["pairs"][1]
    assert pair["runs"] == ["run-0", "run-2"]
    assert pair["gain"][0] == pytest.approx(mean(0.5, 0, 0.5) - (singles[0] + singles[2]) / 2) and pair["diversity"] > 0
    validation = results["validation"]
    assert results["best"] == max(("run-0", "run-1", "run-2"), key=validation.get)
    assert validation["+".join(results["greedy"])] == max(validation.values())
    assert json.loads((out / "greedy" / "soup.json").read_text())["method"] == "exact"
    assert (out / "out.png").read_bytes().startswith(b"\x89PNG") and "| uniform soup |" in (
        out / "report.md"
    ).read_text()


WORDS = [f"w{i}" for i in range(20)]


def pairs(count, seed):
    rng = random.Random(seed)
    return [
        {"prompt": rng.choice(WORDS), "chosen": " ".join(rng.sample(WORDS, 3)), "rejected": rng.choice(WORDS)}
        for _ in range(count)
    ]


def test_a_share_of_the_labels_is_swapped(warm):
    rows = pairs(40, 0)
    found = warm.swapped(rows, 0.25, seed=1)
    hit = [i for i, row in enumerate(found) if row.get("swapped")]
    assert len(hit) == 10 and hit != list(range(10)) and warm.swapped(rows, 0.25, seed=1) == found
    for i, (before, after) in enumerate(zip(rows, found, strict=True)):
        turned = {"chosen": before["rejected"], "rejected": before["chosen"], "swapped": True}
        assert after == (before | turned if i in hit else before)


def test_misspelt_words_keep_their_letters_and_ends(warm):
    text = "the brown horses jump over green hills " * 20
    found = warm.misspelt(text, random.Random(0)).split()
    changed = [(a, b) for a, b in zip(text.split(), found, strict=True) if a != b]
    assert 20 < len(changed) < 60
    assert all(sorted(a) == sorted(b) and (a[0], a[-1]) == (b[0], b[-1]) and len(a) >= 4 for a, b in changed)


def test_accuracies_are_shares_of_pairs(warm):
    found = {
        "run-0": {"held-out": np.array([1.0, -1.0, 2.0, -0.1])},
        "run-1": {"held-out": np.array([-3.0, 2.0, 1.0, -0.2])},
        "average": {"held-out": np.array([0.5, 0.5, 1.5, 0.1])},
    }
    figures = {model: values[0] for model, values in warm.accuracies(found, ["run-0", "run-1"], 0)["held-out"].items()}
    assert figures["run-0"] == 0.5 and figures["run-1"] == 0.5 and figures["average"] == 1.0
    assert figures["ensemble"] == 0.5, "of scores -1, .5, 1.5, -.15"
    assert figures["average less the ensemble"] == 0.5 == figures["average less the members' mean"]


def test_from_runs_to_the_report_of_warm(warm, monkeypatch, tmp_path):
    """Two classifiers take the place of the training; the one whose head is turned round has every pair the other way."""
    out, jobs = tmp_path / "warm", []
    for i, sign in enumerate((1.0, -1.0)):
        folder = tiny_classifier(out / f"run-{i}", "electra")
        weights = load_file(folder / "model.safetensors")
        head = {key: sign * value for key, value in weights.items() if "out_proj" in key}
        save_file(weights | head, folder / "model.safetensors", metadata={"format": "pt"})
    for name, seed in (("train", 0), ("test", 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(24, seed)))
    monkeypatch.setattr(warm, "train_all", lambda runs, recipe: jobs.append((runs, recipe)))
    flags = [
        "--dataset",
        tmp_path / "train.jsonl",
        "--eval_dataset",
        tmp_path / "test.jsonl",
        "--runs",
        2,
        "--out",
        out,
    ]
    monkeypatch.setattr(sys, "argv", ["warm.py", "--start", "rsoups/coverage", *map(str, flags)])
    warm.main()

    ((runs, recipe),) = jobs
    assert recipe == "reward_model.py"
    parser = TrlParser((__import__("reward_model").ScriptArguments, RewardConfig, ModelConfig))
    parsed = [parser.parse_args_and_config([*run.flags, "--output_dir", "x"]) for run in runs]
    assert [training.seed for _, training, _ in parsed] == [0, 1]
    assert {model.model_name_or_path for *_, model in parsed} == {"rsoups/coverage"}
    assert {script.dataset for script, *_ in parsed} == {str(out / "train.jsonl")}

    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"held-out", "held-out, misspelt", "swapped train pairs"}
    for by_model in results.values():
        assert by_model["run-0"][0] == pytest.approx(1 - by_model["run-1"][0])
        assert by_model["average"][0] == 0 and by_model["ensemble"][0] == 0, "what cancels out tells no pair apart"
    score = rsoups.Reward(rsoups.RewardCard(name="run-0", model=str(out / "run-0"), max_length=128))
    right = [
        a > b for a, b in ([score([r["prompt"]], [r[s]])[0] for s in ("chosen", "rejected")] for r in pairs(24, 1))
    ]
    assert results["held-out"]["run-0"][0] == pytest.approx(np.mean(right))
    assert json.loads((out / "average" / "soup.json").read_text())["ingredients"][1]["lambda"] == 0.5
    assert (out / "warm.png").read_bytes().startswith(b"\x89PNG") and "| average |" in (out / "report.md").read_text()
