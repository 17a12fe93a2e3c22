"""Rewards as TRL calls them: what they are given of a rollout, and what of their scores is refused."""

import pytest
from ppo_runs import history, trainer
from tiny import tiny_tokenizer

from rsoups import RewardError
from rsoups.data.prompts import question_of
from rsoups.training.trl_rewards import PLACE, reward_function


def test_conversations_are_scored_by_their_last_question_and_answer():
    seen = []

    def score(prompts, responses):
        seen.extend((question_of(p), r) for p, r in zip(prompts, responses, strict=True))
        return [0.0] * len(responses)

    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    answer = [{"role": "assistant", "content": " 2 "}]
    reward_function(score, str.strip)([messages], [answer], completion_ids=[[1]])
    assert seen == [("Two?", "2")]


def test_a_response_that_the_prompt_began_is_scored_whole():
    seen = []
    tokenizer = tiny_tokenizer([*(f"w{i}" for i in range(9)), "###", "Instruction:", "Response:"])

    def score(prompts, responses):
        seen.extend(responses)
        return [0.0] * len(responses)

    prompts = ["### Instruction: w1 ### Response: w2 w3", "### Instruction: w1 ### Response: "]
    ids = [tokenizer("w4 w5")["input_ids"] + [2], tokenizer("w6")["input_ids"]]
    reward_function(score, str.upper, tokenizer)(prompts, ["w4 w5", "w6"], completion_ids=ids)
    reward_function(score, str.upper)(prompts, ["w4 w5", "w6"])
    assert seen == ["W2 W3 W4 W5", "W6"] * 2


def test_rewards_get_columns_as_the_rows_have_them():
    """By place: a column of the dataset itself would have gone through Arrow, which makes all of one type."""
    seen = []

    def score(prompts, responses, spec, answer):
        seen.extend(zip(spec, answer, strict=True))
        return [0.0] * len(responses)

    columns = {"spec": [{"a": 1}, {"b": "2"}, None], "answer": [1, 0.5, "1"]}
    reward_function(score, str.strip, data=columns)(["p"] * 4, ["r"] * 4, **{PLACE: [2, 0, 1, 1], "other": [1] * 4})
    assert seen == [(None, "1"), ({"a": 1}, 1), ({"b": "2"}, 0.5), ({"b": "2"}, 0.5)]
    assert [type(answer) for _, answer in seen] == [str, int, float, float]


def test_trl_sees_a_named_function_of_cut_responses():
    seen = []

    def score(prompts, responses):
        seen.extend(responses)
        return [1.0] * len(responses)

    function = reward_function(score, str.strip)
    assert function(["p"], ["  x "], extra=[1]) == [1.0]
    assert seen == ["x"] and function.__name__ == "score"


def test_a_reward_without_an_opinion_is_left_out_and_counted(tmp_path):
    """One reward pays 1; the other pays 3 for every second response and has no opinion on the rest."""

    def one(prompts, completions, **columns):
        return [1.0] * len(completions)

    def some(prompts, completions, **columns):
        return [None if i % 2 else 3.0 for i in range(len(completions))]

    run = trainer(tmp_path, reward=[one, some], reward_weights=[1.0, 3.0], max_steps=1)
    run.train()
    logged = {
        key: history(run, key) for key in ("rewards/one", "rewards/some", "abstained/some", "abstained/one", "reward")
    }
    assert logged == {
        "rewards/one": [1.0],
        "rewards/some": [3.0],
        "abstained/some": [0.5],
        "abstained/one": [],
        "reward": [pytest.approx(((1 + 9) / 4 + 1) / 2)],
    }
    alone = trainer(tmp_path / "alone", reward=some, max_steps=1)
    with pytest.raises(RewardError, match=r"none of the rewards \['some'\] has an opinion .* on the response"):
        alone.train()


def test_several_rewards_are_their_weighted_mean(tmp_path):
    def one(prompts, completions, **columns):
        return [1.0] * len(completions)

    def three(prompts, completions, **columns):
        return [3.0] * len(completions)

    run = trainer(tmp_path, reward=[one, three], reward_weights=[3.0, 1.0])
    run.train()
    assert history(run, "reward") == pytest.approx([1.5])
    assert history(run, "rewards/three")[0] == 3.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_stops_the_run_and_shows_the_sample(tmp_path, bad):
    def broken(prompts, completions, **columns):
        return [bad] * len(completions)

    run = trainer(tmp_path, reward=broken)
    with pytest.raises(RewardError, match=r"'broken' returned (nan|inf) for prompt 'w\d"):
        run.train()


def test_a_reward_that_raises_is_named_with_the_sample(tmp_path):
    def divides(prompts, completions, **columns):
        return [1 / 0 for _ in completions]

    with pytest.raises(
        RewardError, match=r"'divides' raised ZeroDivisionError: .*; the batch begins with prompt 'w\d w\d'"
    ):
        trainer(tmp_path, reward=divides).train()


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_score_too_few_or_too_many_is_refused(tmp_path, extra):
    def miscounts(prompts, completions, **columns):
        return [1.0] * (len(completions) + extra)

    with pytest.raises(RewardError, match=rf"'miscounts' returned {32 + extra} scores for 32 responses"):
        trainer(tmp_path, reward=miscounts).train()


def test_a_response_that_was_cut_pays_the_penalty(tmp_path):
    seen = []

    def one(prompts, completions, completion_ids, **columns):
        seen.extend(completion_ids)
        return [1.0] * len(completions)

    run = trainer(tmp_path, reward=one, missing_eos_penalty=0.5, max_steps=1)
    run.train()
    cut = sum(ids[-1] != 2 for ids in seen)
    assert 0 < cut < len(seen)
    assert history(run, "reward") == pytest.approx([1 - 0.5 * cut / len(seen)])
