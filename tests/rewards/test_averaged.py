"""Cards of several reward models: averaged in weight space (WARM), or in score."""

import json
from statistics import fmean

import pytest
import torch
import yaml
from tiny import tiny_classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rsoups

PROMPTS = [" ".join(["w3"] * (i % 4 + 1)) for i in range(9)]
RESPONSES = [" ".join(f"w{(i * 7 + j) % 20}" for j in range(1 + i % 5)) for i in range(9)]


@pytest.fixture
def folders(tmp_path):
    """Three fine-tunings of one classifier: its weights and noise."""
    made = []
    for seed in range(3):
        folder = tiny_classifier(tmp_path / f"m{seed}", "electra", labels=2)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
        made.append(str(folder))
    return made


def card_of(tmp_path, **fields):
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump({"name": "many", "logit": 1, "minus": 0, "mean": 0.5, "std": 2} | fields))
    return path


def by_hand(models, tokenizer, weights):
    """One by one: (Σ λi·(logit 1 - logit 0) - .5) / 2."""
    scores = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            logits = [model(**tokenizer(prompt, response, return_tensors="pt")).logits[0].double() for model in models]
        raw = sum(weight * float(one[1] - one[0]) for weight, one in zip(weights, logits, strict=True))
        scores.append((raw - 0.5) / 2)
    return scores


@pytest.mark.parametrize("lambdas", [None, [0.5, 0.2, 0.3]])
def test_averaged_weights_are_the_mean_of_the_state_dicts(tmp_path, folders, lambdas, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    fields = {"lambdas": lambdas} if lambdas else {}
    reward = rsoups.load_reward(card_of(tmp_path, models=folders, average="weights", **fields))
    assert not list((tmp_path / "tmp").iterdir()), "the average is loaded, its files are gone"
    weights = lambdas or [1 / 3] * 3
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in folders]
    states = [model.state_dict() for model in models]
    mean = {key: sum(w * state[key].double() for w, state in zip(weights, states, strict=True)) for key in states[0]}
    loaded = reward._model.state_dict()
    assert loaded.keys() == mean.keys()
    for key, value in loaded.items():
        assert torch.equal(value, mean[key].to(value.dtype)), key
    models[0].load_state_dict(mean)
    scores = reward(PROMPTS, RESPONSES)
    assert scores == pytest.approx(by_hand(models[:1], AutoTokenizer.from_pretrained(folders[0]), [1.0]), abs=1e-5)
    assert reward.explain(PROMPTS[0], RESPONSES[0])["score"] == pytest.approx(scores[0], abs=1e-5)


@pytest.mark.parametrize("lambdas", [None, [0.5, 0.2, 0.3]])
def test_averaged_scores_are_the_mean_of_the_scores(tmp_path, folders, lambdas):
    fields = {"lambdas": lambdas} if lambdas else {}
    reward = rsoups.load_reward(card_of(tmp_path, models=folders, average="scores", **fields))
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in folders]
    expected = by_hand(models, AutoTokenizer.from_pretrained(folders[0]), lambdas or [1 / 3] * 3)
    scores = reward(PROMPTS, RESPONSES, references=[["x"]] * 9)
    assert scores == pytest.approx(expected, abs=1e-5) and len(set(scores)) == 9
    assert reward.name == reward.__name__ == "many"
    weights = rsoups.load_reward(card_of(tmp_path, models=folders, average="weights", **fields))
    assert scores != pytest.approx(weights(PROMPTS, RESPONSES), abs=1e-3), "the two averages differ"


def test_scores_of_unlike_models_average(tmp_path, folders):
    others = [folders[0], str(tiny_classifier(tmp_path / "gpt2", "gpt2", labels=2)), "rsoups/coverage"]
    fields = {"average": "scores", "minus": None, "logit": 0}
    reward = rsoups.load_reward(card_of(tmp_path, models=others, **fields))
    alone = [rsoups.load_reward(card_of(tmp_path, model=m, logit=0, minus=None))(PROMPTS, RESPONSES) for m in others]
    expected = [fmean(scores) for scores in zip(*alone, strict=True)]
    assert reward(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-6)


def test_embedded_models_average_in_full_precision(tmp_path):
    """They are stored in half precision: the average is not rounded to it."""
    fields = {"average": "weights", "logit": 0, "minus": None}
    reward = rsoups.load_reward(card_of(tmp_path, models=["rsoups/coverage"] * 2, **fields))
    alone = rsoups.load_reward(card_of(tmp_path, model="rsoups/coverage", logit=0, minus=None))
    assert reward._model.dtype == torch.float32
    assert reward(PROMPTS, RESPONSES) == pytest.approx(alone(PROMPTS, RESPONSES), abs=1e-6)


def changed(folder, file, **fields):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_models_that_do_not_average_are_refused(tmp_path, folders):
    gpt2 = str(tiny_classifier(tmp_path / "gpt2", "gpt2", labels=2))
    words = r"reward card 'many': its models' weights do not average: config.json: .* differs"
    with pytest.raises(rsoups.RewardError, match=words):
        rsoups.load_reward(card_of(tmp_path, models=[folders[0], gpt2], average="weights"))
    names = {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}
    changed(tmp_path / "m1", "config.json", **names)
    with pytest.raises(rsoups.RewardError, match="config.json: id2label differs"):
        rsoups.load_reward(card_of(tmp_path, models=folders[:2], average="weights"))
    vocabulary = json.loads((tmp_path / "m2" / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    ids["w1"], ids["w2"] = ids["w2"], ids["w1"]
    (tmp_path / "m2" / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(rsoups.RewardError, match="the vocabularies of .* differ"):
        rsoups.load_reward(card_of(tmp_path, models=[folders[0], folders[2]], average="weights"))


@pytest.mark.parametrize("average", ["weights", "scores"])
@pytest.mark.parametrize(
    ("lambdas", "words"), [([0.5, 0.5], "lambdas"), ([0.5, 0.5, 0.5], "sum to 1.5"), ([2, -0.5, -0.5], "within")]
)
def test_bad_lambdas_are_refused(tmp_path, folders, average, lambdas, words):
    with pytest.raises(rsoups.RewardError, match=f"reward card 'many'.*{words}"):
        rsoups.load_reward(card_of(tmp_path, models=folders, average=average, lambdas=lambdas))


def test_one_reward_is_no_ensemble(folders):
    with pytest.raises(rsoups.RewardError, match="use load_reward"):
        rsoups.Reward(rsoups.RewardCard("r", models=folders, average="scores"))
