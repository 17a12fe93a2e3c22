"""Rewards of the response alone, by hand."""

import pytest

import rsoups
from rsoups import load_reward


def scores(name, *responses, prompt="p", **arguments):
    return load_reward(name, **arguments)([prompt] * len(responses), list(responses))


def test_length_counts_words_to_the_target():
    assert scores("length", "", "a b", "a  b\nc d", "a b c d e f", target=4) == [-1, -0.5, 0, -0.5]
    with pytest.raises(rsoups.RewardError, match="target is 0"):
        load_reward("length", target=0)


def test_a_regular_expression_matches_the_whole_response():
    assert scores("regex", "A dog runs.", " A dog runs! ", "a dog runs.", "A dog", "A dog.\nNo.") == [1, 1, 0, 0, 0]
    assert scores("regex", "1990", "19901", "in 1990", pattern=r"\d{4}") == [1, 0, 0]
    with pytest.raises(rsoups.RewardError, match=r"'\(' is no regular expression"):
        load_reward("regex", pattern="(")


def test_json_is_what_its_standard_says():
    assert scores("json", '{"a": 1}', " [1, null] ", '"x"', "{'a': 1}", '{"a": NaN}', "", "[" * 100_000) == [
        1,
        1,
        1,
        0,
        0,
        0,
        0,
    ]
    assert scores("json", '{"a": 1, "b": 2}', '{"a": 1}', '["a", "b"]', keys=["a", "b"]) == [1, 0, 0]


def test_keywords_come_from_the_question_or_a_column():
    prompt = "### Instruction: Write one sentence that uses these words. ### Input: dog, run, ice cream ### Response: "
    said = ["The dogs are running.", "An ice-cream for dogs that run", "ice and cream", "doghouse"]
    assert scores("keywords", *said, prompt=prompt) == pytest.approx([2 / 3, 1, 0, 0])
    reward = load_reward("keywords")
    assert (reward.columns, reward.needs) == (("keywords",), ())
    assert reward([prompt] * 2, ["a cat", "cats sleep"], keywords=[["cat"], ["cat", "sleep", "eat"]]) == [
        1,
        pytest.approx(2 / 3),
    ]
    assert reward(["p"], ["cats sleep"], keywords=["cat, sleep, eat"]) == pytest.approx([2 / 3])
    with pytest.raises(rsoups.RewardError, match="has no keywords"):
        reward(["p"], ["r"], keywords=[[]])


def test_readability_by_hand():
    """4.71 characters a word + .5 words a sentence - 21.43, without a dictionary from anywhere."""
    text = "The dog runs home. The old cat sleeps here."  # 34 letters and two full stops, 9 words, 2 sentences
    index = 4.71 * 35 / 9 + 0.5 * 9 / 2 - 21.43
    assert text.count(".") == 2 and len(text.replace(" ", "")) == 35
    (score,) = scores("readability", text, grade=6)
    assert score == pytest.approx(-abs(index - 6), abs=0.01)
    hard = "The considerable animosity between neighboring households eventually disappeared."
    assert score > scores("readability", hard, grade=6)[0]
    easy, harder = scores("readability", text, hard, grade=20)
    assert harder > easy
    with pytest.raises(rsoups.RewardError, match="grade is 'x'"):
        load_reward("readability", grade="x")
