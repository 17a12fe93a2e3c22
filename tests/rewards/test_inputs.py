"""The ids that a classifier reads of a question and a response."""

import logging
import math

import pytest
import torch
from classifier_cards import alone, write_card
from tiny import tiny_classifier
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import rsoups
from rsoups import load_reward
from rsoups.rewards.inputs import encode_texts


def test_a_long_question_loses_its_end_and_never_the_response(tmp_path):
    folder = tiny_classifier(tmp_path / "m", "electra")
    reward = load_reward(write_card(tmp_path, name="r", model=folder, max_length=12))
    (encoded,) = reward.encode(["w1 " * 40], ["w2 w3 w4"])
    assert len(encoded["input_ids"]) == 12
    assert encoded["input_ids"][-4:-1] == [6, 7, 8]


@pytest.mark.parametrize("kind", ["pair", "reversed_pair", '"{question} {response}"', '"{response} {question}"'])
def test_the_side_of_a_long_question_that_is_lost_is_the_cards(tmp_path, kind):
    folder = tiny_classifier(tmp_path / "m", "electra")
    for cut, kept in (("end", ["w0", "w1"]), ("start", ["w8", "w9"])):
        reward = load_reward(write_card(tmp_path, name="r", model=folder, input=kind, max_length=8, cut=cut))
        (encoded,) = reward.encode([" ".join(f"w{i}" for i in range(10))], ["w17 w18 w19"])
        read = reward._tokenizer.decode(encoded["input_ids"]).replace("<s>", "").replace("</s>", "").split()
        assert len(encoded["input_ids"]) == 8 and [w for w in read if w in ("w17", "w18", "w19")] == [
            "w17",
            "w18",
            "w19",
        ]
        assert [w for w in read if len(w) == 2][:: -1 if cut == "start" else 1][:2] == kept[
            :: -1 if cut == "start" else 1
        ]
        assert reward._tokenizer.truncation_side == "right"


def test_one_text_made_by_a_template_is_what_the_model_reads(tmp_path):
    """gpt2_reward_summarization's recipe: the response, the bos token and the post, in one string."""
    folder = tiny_classifier(tmp_path / "m", "gpt2")
    card = write_card(tmp_path, name="r", model=folder, input='"{response} {bos} {question}"', max_length=9)
    reward = load_reward(card)
    prompt = "### Instruction: w9 ### Input: w1 {response} w2 ### Response: "  # a field's name in a text is text
    (encoded,) = reward.encode([prompt], ["w3 w4"])
    assert encoded["input_ids"] == [7, 8, 1, 5, 3, 6]
    long = "### Instruction: w9 ### Input: " + "w1 w2 " * 9 + "### Response: "
    (encoded,) = reward.encode([long], ["w3 w4"])
    assert encoded["input_ids"] == [7, 8, 1, 5, 6, 5, 6, 5, 6]
    expected = alone(folder, "w3 w4 <s> w1 w2 w1 w2 w1 w2", None)[0].item()
    assert reward([long], ["w3 w4"]) == pytest.approx([expected], abs=1e-5)
    assert reward([long, prompt], ["w3 w4", "w5"])[0] == pytest.approx(expected, abs=1e-5)


def test_questions_and_responses_are_prepared_as_the_card_says(tmp_path):
    folder = tiny_classifier(tmp_path / "m", "electra")
    chat = {"question": '"w0 {question} w19"', "response": "first_sentence"}
    (encoded,) = load_reward(write_card(tmp_path, name="r", model=folder, **chat)).encode(["w1"], ["w2. w3"])
    assert encoded["input_ids"] == [1, 4, 5, 23, 2, 3, 2]  # "w2." is no word of this tokenizer
    humor = {"input": '"{response}"'}
    (encoded,) = load_reward(write_card(tmp_path, name="r", model=folder, **humor)).encode(["w1"], ["w2 w3"])
    assert encoded["input_ids"] == [1, 6, 7, 2]


@pytest.mark.parametrize(
    ("kind", "short", "long"),
    [
        ("pair", [1, 5, 6, 2, 7, 2], [1, 2, *range(4, 11), 2]),
        ("reversed_pair", [1, 7, 2, 5, 6, 2], [1, *range(4, 12), 2]),
        ('"{question} {response}"', [1, 5, 6, 7, 2], [1, *range(4, 13)]),  # of one text the end token is lost too
    ],
)
def test_a_response_that_leaves_no_room_keeps_its_beginning(tmp_path, caplog, kind, short, long):
    folder = tiny_classifier(tmp_path / "m", "electra")
    reward = load_reward(write_card(tmp_path, name="r", model=folder, input=kind, max_length=10))
    asked, said = ["w1 w2", "w1 w2"], ["w3", " ".join(f"w{i}" for i in range(20))]
    assert [one["input_ids"] for one in reward.encode(asked[:1], said[:1])] == [short] and not caplog.text
    assert [one["input_ids"] for one in reward.encode(asked, said)] == [short, long]
    assert "fills all 10 tokens" in caplog.text


def test_a_response_that_fills_the_room_to_its_last_token_is_said_to(tmp_path, caplog):
    folder = tiny_classifier(tmp_path / "m", "electra")
    reward = load_reward(write_card(tmp_path, name="r", model=folder, max_length=8))
    for words, warned in ((4, False), (5, True)):  # 8 less three special tokens
        reward.encode(["w1 w2"], [" ".join(["w3"] * words)])
        assert ("its end is not seen" in caplog.text) == warned


def test_a_text_that_ends_with_end_of_text_is_scored_at_its_end(tmp_path, caplog):
    """GPT-2 has no pad token and looks for the last token that is not one: end-of-text must not stand in for it."""
    caplog.set_level(logging.INFO)
    folder = tiny_classifier(tmp_path / "m", "gpt2")
    reward = load_reward(write_card(tmp_path, name="r", model=folder, input='"{response} {sep} {eos}"'))
    assert "no pad token" in caplog.text and "no separator token" in caplog.text
    responses = ["w1", "w2 w3 w4 w5", "w1 w2", ""]
    tokenizer, model = (c.from_pretrained(folder) for c in (AutoTokenizer, AutoModelForSequenceClassification))
    assert tokenizer.pad_token is None and model.config.pad_token_id is None
    with torch.no_grad():
        rows = [torch.tensor([tokenizer(response)["input_ids"] + [2]]) for response in responses]
        expected = [model(row).logits[0, 0].item() for row in rows]  # alone and without a pad token: at the last one
    assert reward(["w9"] * 4, responses) == pytest.approx(expected, abs=1e-5)
    for response, score in zip(responses, expected, strict=True):
        assert reward.explain("w9", response)["logits"]["LABEL_0"] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "electra", "deberta"])
@pytest.mark.parametrize("input", ["pair", "reversed_pair", '"{response}"'])
def test_an_empty_response_has_a_score(tmp_path, kind, input):
    folder = tiny_classifier(tmp_path / "m", kind)
    reward = load_reward(write_card(tmp_path, name="r", model=folder, input=input))
    empty, said = reward(["w1"] * 2, ["", "w2 w3"])
    assert math.isfinite(empty) and empty != said and reward(["w1"], [""]) == pytest.approx([empty], abs=1e-5)


def test_a_question_that_ends_in_a_character_of_several_tokens_is_cut(tmp_path):
    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    for cut in ("end", "start"):
        for question in ("ab\U0001f600", "\U0001f600ab", "\U0001f600\U0001f600"):
            for longest in range(1, 12):
                (one,) = encode_texts(fast, "{question}{response}", [question], ["c"], longest, cut)
                assert len(one["input_ids"]) <= longest and one["input_ids"][-1] == vocabulary["c"]


def test_an_empty_question_is_refused_where_it_is_read(tmp_path):
    folder = tiny_classifier(tmp_path / "m", "electra")
    with pytest.raises(rsoups.DatasetError, match="asks nothing"):
        load_reward(write_card(tmp_path, name="r", model=folder))([" "], ["w1"])
    assert len(load_reward(write_card(tmp_path, name="r", model=folder, input='"{response}"'))([""], ["w1"])) == 1
