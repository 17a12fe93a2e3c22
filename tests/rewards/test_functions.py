"""Functions as rewards: their names, columns and scores."""

import math

import pytest
from classifier_cards import write_card

import rsoups
from rsoups import load_reward
from rsoups.rewards.functions import FunctionReward
from rsoups.rewards.interface import check_columns, check_scores


@pytest.mark.parametrize("scores", [[1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [math.inf, 1.0]])
def test_scores_that_would_poison_a_run_are_refused(scores):
    with pytest.raises(rsoups.RewardError, match="reward 'r' returned"):
        check_scores("r", scores, ["p", "q"], ["a", "b"])


def test_functions_are_rewards(tmp_path, monkeypatch):
    def plain(prompts, responses):
        return [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]

    def trls(prompts, completions, references, **kwargs):
        assert kwargs == {"other": [2]}
        return [float(c in r) for c, r in zip(completions, references, strict=True)]

    assert load_reward(plain)(["ab"], ["c"], references=[["x"]]) == [3.0]
    assert load_reward(trls)(["p"], ["c"], references=[["c"]], other=[2]) == [1.0]
    (tmp_path / "my_rewards.py").write_text("def short(prompts, responses): return [-len(r) for r in responses]\nx = 1")
    monkeypatch.chdir(tmp_path)
    reward = load_reward("my_rewards:short")
    assert reward(["p"], ["four"]) == [-4.0] and reward.name == "short"
    for source, words in (
        ("my_rewards:tall", "no reward function"),
        ("my_rewards:x", "is int, not a function"),
        ("no_such:f", "no_such"),
    ):
        with pytest.raises(rsoups.RewardError, match=words):
            load_reward(source)
    with pytest.raises(rsoups.RewardError, match=r"'bad' returned 1 scores for 2 responses"):
        FunctionReward(lambda prompts, responses: [1.0], "bad")(["p"] * 2, ["r"] * 2)
    with pytest.raises(rsoups.RewardError, match="'nan' returned nan"):
        FunctionReward(lambda prompts, responses: [math.nan], "nan")(["p"], ["r"])


def test_a_functions_card_scales_as_a_models_does(tmp_path):
    fields = {
        "function": "length",
        "arguments": "{target: 4}",
        "mean": 0.25,
        "std": 0.5,
        "sign": -1,
    }
    reward = load_reward(write_card(tmp_path, name="short", **fields))
    assert reward(["p"] * 2, ["a b", "a b c d"]) == [(0.5 - 0.25) / 0.5, (0 - 0.25) / 0.5]
    assert reward.name == reward.__name__ == "short"
    assert load_reward(tmp_path / "card.yaml", target=2)(["p"], ["a b"]) == [-0.5]


def test_the_columns_of_a_function_are_those_that_it_names():
    def trls(prompts, completions, completion_ids, answer, trainer_state=None, hint=None, **columns):
        assert (answer, hint, columns) == (["a"], ["h"], {"other": [1]})
        return [1.0]

    reward = load_reward(trls)
    assert (reward.columns, reward.needs) == (("answer", "hint"), ("answer",))
    assert reward(["p"], ["r"], completion_ids=[[1]], answer=["a"], hint=["h"], other=[1]) == [1]
    with pytest.raises(rsoups.RewardError, match=r"'trls' needs the column\(s\) \['answer'\]"):
        reward(["p"], ["r"], completion_ids=[[1]])
    assert load_reward(lambda prompts, responses, answer: [0.0]).needs == ("answer",)
    assert load_reward(lambda texts, answers: [0.0]).columns == ()


def test_data_without_a_needed_column_is_refused_with_its_name():
    rewards = [load_reward("meteor"), load_reward("keywords"), load_reward(len_of_zero)]
    check_columns(rewards, {"prompt": ["p"] * 2, "references": [["r"]] * 2, "number": [0, 0]})
    for columns, words in (
        ({"prompt": ["p"]}, r"'meteor' needs a column 'references', the dataset gives \['prompt'\]"),
        (
            {"prompt": ["p"] * 3, "references": [["r"], [], None]},
            "'meteor' needs 'references' of every row: 2 of 3 have none",
        ),
        ({"prompt": ["p"], "references": [["r"]]}, "'len_of_zero' needs a column 'number'"),
    ):
        with pytest.raises(rsoups.RewardError, match=words):
            check_columns(rewards, columns)


def len_of_zero(prompts, completions, number):
    return number


def test_a_function_of_ones_own_gets_what_a_row_has_and_a_card_needs_a_value():
    rewards = [load_reward(len_of_zero)]
    check_columns(rewards, {"prompt": ["p"] * 3, "number": [None, "", {"x": 1}]})
    with pytest.raises(rsoups.RewardError, match="'len_of_zero' needs a column 'number'"):
        check_columns(rewards, {"prompt": ["p"] * 2, "number": [None, None]})


def test_a_reward_may_have_no_opinion():
    def some(prompts, responses):
        return [None, 2]

    assert load_reward(some)(["p"] * 2, ["a", "b"]) == [None, 2.0]
    with pytest.raises(rsoups.RewardError, match="returned nan for prompt 'p', response 'b'"):
        check_scores("r", [None, math.nan], ["p"] * 2, ["a", "b"])
