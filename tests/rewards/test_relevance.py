"""Relevance, against embeddings computed one by one; grammar, by hand."""

import pytest
import torch
from tiny import tiny_tokenizer
from transformers import BertConfig, BertModel

import rsoups
from rsoups import load_reward
from rsoups.data.tasks import TASKS

TEXTS = ["w1 w2 w3 w4", "w5 w6", "w1 w2 w3 w9 w9", "w7"]


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=24, max_position_embeddings=64, initializer_range=0.5, **shape)).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer([f"w{i}" for i in range(20)]).save_pretrained(tmp_path)
    return str(tmp_path), model


def cosine(model, one, other):
    tokenizer = tiny_tokenizer([f"w{i}" for i in range(20)])
    with torch.no_grad():
        ends = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in (one, other)]
    return float(torch.nn.functional.cosine_similarity(*ends, dim=0))


def test_it_is_the_cosine_of_the_column_or_the_question(encoder):
    folder, model = encoder
    reward = load_reward("relevance", model=folder, copied=0)
    assert reward.columns == ("plot",) and reward.needs == ()
    responses = ["w1 w2", "w8 w9 w10", "w3", "w7"]
    expected = [cosine(model, text, response) for text, response in zip(TEXTS, responses, strict=True)]

    prompts = [f"### Instruction: x ### Input: {text} ### Response: " for text in TEXTS]
    assert reward(prompts, responses) == pytest.approx(expected, abs=1e-5)
    films = TASKS["film"].rows([{"plot": text} for text in TEXTS], kept=["plot"])
    prompts = [row["prompt"] for row in films]
    assert reward(prompts, responses, plot=TEXTS) == pytest.approx(expected, abs=1e-5)
    assert reward(["w7"], ["w7"]) == pytest.approx([1], abs=1e-6)


def test_what_is_copied_costs(encoder):
    folder, model = encoder
    reward = load_reward("relevance", model=folder, copied=0.5)
    response = "w1 w2 w3 w9 w9"  # one of three rows of three words is the text's
    expected = cosine(model, TEXTS[0], response) - 0.5 / 3
    assert reward(["q"], [response], plot=[TEXTS[0]]) == pytest.approx([expected], abs=1e-5)
    assert reward(["q"], [TEXTS[0]], plot=[TEXTS[0]]) == pytest.approx([0.5], abs=1e-5)
    assert reward(["q"], ["w1 w2"], plot=["w1 w2"]) == pytest.approx([1], abs=1e-5)  # too short to be copied


def test_what_it_refuses(encoder, tmp_path):
    with pytest.raises(rsoups.RewardError, match="copied is -1"):
        load_reward("relevance", model=encoder[0], copied=-1)
    with pytest.raises(rsoups.RewardError, match="cannot load the encoder"):
        load_reward("relevance", model=str(tmp_path / "none"))


def test_grammar_counts_faults():
    reward = load_reward("grammar")
    good, bad = "This film offers a captivating tale of hope.", "An movie that that are are bad bad."
    scores = reward(["q"] * 4, [good, bad, "", f"{good} An movie was there."])
    assert scores[0] == 0 and -1 <= scores[1] <= -0.2 and scores[2] == -1
    assert scores[1] < scores[3] < 0
