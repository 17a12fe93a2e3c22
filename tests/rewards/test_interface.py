"""One interface: any reward, loaded or a function, goes into PPO, TRL's own trainers, sweeps and probes as it is."""

import json

import pytest
import yaml
from datasets import Dataset
from ppo_runs import FAVOURITE, PROMPTS, WORDS, history, trainer
from sweep_runs import run
from tiny import tiny_adapter, tiny_classifier, tiny_llama, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer

import rsoups
from rsoups.rewards.functions import FunctionReward, as_reward


def plain(prompts, responses):
    return [response.split().count(FAVOURITE) / 6 for response in responses]


def trls(prompts, completions, **columns):
    return plain(prompts, completions)


def card_of(tmp_path, **fields):
    path = tmp_path / f"{fields['name']}.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture(params=["classifier", "average", "function", "own", "trl"])
def reward(request, tmp_path):
    """A loaded reward of each kind that runs here (a judge's server is tests/rewards/test_judge.py's)."""
    if request.param == "own":
        return rsoups.load_reward(plain)
    if request.param == "trl":
        return rsoups.load_reward(trls)
    if request.param == "function":
        return rsoups.load_reward(card_of(tmp_path, name="counts", function="matches", arguments={"pattern": "w.*"}))
    model = str(tiny_classifier(tmp_path / "model", "electra"))
    if request.param == "classifier":
        return rsoups.load_reward(card_of(tmp_path, name="model", model=model))
    return rsoups.load_reward(card_of(tmp_path, name="mean", models=[model, model], average="scores"))


def test_trls_call_and_ours_give_the_same_scores(reward):
    prompts, responses = ["w1 w2", "w3"], ["w4 w7", "w5"]
    scores = reward(prompts, responses, other=[1, 2])
    extras = {"completion_ids": [[1], [2]], "trainer_state": None, "log_extra": None, "log_metric": None}
    assert reward(prompts=prompts, completions=responses, other=[1, 2], **extras) == scores and len(scores) == 2
    answers = [[{"role": "assistant", "content": response}] for response in responses]
    questions = [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert reward(prompts=questions, completions=answers, **extras) == scores
    begun = ["### Instruction: w1 w2 ### Response: w4", "### Instruction: w3 ### Response: "]
    assert reward(prompts=begun, completions=["w7", "w5"], **extras) == scores
    assert reward.__name__ == reward.name and "\n" not in repr(reward) and reward.name in repr(reward)
    assert as_reward(reward, "other") is reward and rsoups.load_reward(reward) is reward
    assert reward([], []) == reward(prompts=[], completions=[]) == []
    with pytest.raises(rsoups.RewardError, match="got 2 prompts but 1 responses"):
        reward(prompts, ["w1"])


def test_a_loaded_reward_trains(tmp_path, reward):
    """Beside a function with our signature, and one with TRL's."""

    def ours(prompts, responses):
        return plain(prompts, responses)

    def theirs(prompts, completions, **columns):
        return plain(prompts, completions)

    run_ = trainer(tmp_path, reward=[reward, ours, theirs], max_steps=1)
    run_.train()
    assert [len(history(run_, f"rewards/{name}")) for name in (reward.name, "ours", "theirs")] == [1, 1, 1]
    assert history(run_, "rewards/ours") == history(run_, "rewards/theirs")


def test_a_loaded_reward_trains_in_grpo(tmp_path):
    tokenizer = tiny_tokenizer(WORDS)
    settings = {"max_completion_length": 4, "per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 1}
    args = GRPOConfig(
        str(tmp_path / "grpo"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        **settings,
    )
    data = Dataset.from_dict({"prompt": PROMPTS["prompt"][:8]})
    model = tiny_llama(vocab_size=len(tokenizer))
    run_ = GRPOTrainer(model, [rsoups.load_reward(plain)], args, train_dataset=data, processing_class=tokenizer)
    run_.train()
    assert len(history(run_, "rewards/plain/mean")) == 1


def test_a_loaded_reward_is_swept_and_probed(tmp_path, reward):
    two = {name: tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    out = tmp_path / "out" / "records.jsonl"
    run(two, out, {"r": reward, "f": plain, "t": trls})
    records = [json.loads(line) for line in out.read_text().splitlines()]
    prompts, responses = [r["prompt"] for r in records], [r["response"] for r in records]
    assert [r["rewards"]["r"] for r in records] == pytest.approx(reward(prompts, responses), abs=1e-5)
    assert [r["rewards"]["f"] for r in records] == [r["rewards"]["t"] for r in records] == plain(prompts, responses)

    sample = rsoups.Sample([f"w{i}" for i in range(12)], [f"w{i} w{i + 1}" for i in range(12)], {"other": [1] * 12})
    probe = rsoups.probe({"r": reward, "f": plain, "t": trls}, sample, progress=False)
    assert probe.mean["f"] == probe.mean["t"] and repr(probe).startswith("Probe(12 responses, rewards ['r', 'f', 't'])")


def test_a_reward_that_raises_is_named_with_the_sample_everywhere(tmp_path):
    def divides(prompts, responses):
        return [1 / 0]

    reward = FunctionReward(divides)
    words = (
        "reward 'divides' raised ZeroDivisionError: division by zero; the batch begins with prompt 'p', response 'r'"
    )
    with pytest.raises(rsoups.RewardError, match=words):
        reward(["p"], ["r"])
    sample = rsoups.Sample(["p"] * 8, ["r"] * 8)
    with pytest.raises(rsoups.RewardError, match=words):
        rsoups.probe({"divides": divides}, sample, progress=False)
    with pytest.raises(rsoups.RewardError, match="reward 'divides' raised ZeroDivisionError"):
        trainer(tmp_path, reward=divides, max_steps=1).train()


def test_cards_are_checked_in_python_as_in_files():
    assert rsoups.RewardCard("r", "m", models=None) == rsoups.RewardCard(name="r", model="m")
    for fields, words in (
        ({"name": "r", "model": "m", "sign": 2}, "reward card 'r': field sign is 2: input should be 1 or -1"),
        ({"name": "r", "model": "m", "lambda": 2}, "reward card 'r': unknown field lambda"),
        ({"name": "r"}, "reward card 'r': a card names either its model"),
    ):
        with pytest.raises(rsoups.RewardError, match=words):
            rsoups.RewardCard(**fields)
    with pytest.raises(rsoups.RewardError, match="reward card 'j': reward card 'j', judge: field rubric is missing"):
        rsoups.JudgeCard("j", {"model": "m"})
