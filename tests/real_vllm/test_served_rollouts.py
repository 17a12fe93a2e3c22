"""PPO's rollouts from a real vLLM server: sampling, reloading, learning."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from ppo_runs import config, history
from tiny import tiny_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import concepts

import rsoups
from rsoups import PPOTrainer

pytestmark = pytest.mark.vllm


def rows(count, repeat=1):
    """Prompts; repeated, they are longer than a block of the server's memory of prompts."""
    return Dataset.from_dict({"prompt": [" ".join([prompt] * repeat) for prompt in concepts(count, "train")]})


def pays_for_the(prompts, completions, **columns):
    return [text.split().count("the") / 4 for text in completions]


def trainer(base, folder, url=None, dataset=None, model=None, **overrides):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    settings = {"rollout_server": url, "max_completion_length": 12, "learning_rate": 5e-3} | overrides
    return PPOTrainer(
        model or AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        pays_for_the,
        config(folder, **settings),
        train_dataset=dataset or rows(64),
        processing_class=AutoTokenizer.from_pretrained(base, padding_side="left"),
        peft_config=None if model else lora,
    )


def test_a_reward_that_pays_for_one_word_is_learnt_as_by_local_rollouts(base, server, tmp_path, capsys):
    rewards = {}
    for name, url in (("local", None), ("server", server.url)):
        run = trainer(base, tmp_path / name, url, max_steps=60)
        run.train()
        rewards[name] = history(run, "reward")
    difference = max(history(run, "server_difference"))
    with capsys.disabled():
        print(f"\nreward: {rewards}; log p differ by {difference:.1e} nats at most")
    for each in rewards.values():
        assert sum(each[-4:]) > sum(each[:4]) + 4 * 0.15
    assert difference < 1e-4


def test_an_adapter_is_loaded_anew_and_no_prompt_is_remembered(base, server, tmp_path):
    """Prompts of more than a block: what the server remembers of them belongs to the adapter of the rollout before."""
    run = trainer(base, tmp_path, server.url, rows(32, repeat=8), max_steps=8, num_iterations=1, learning_rate=2e-2)
    assert min(len(run.processing_class(prompt)["input_ids"]) for prompt in run.train_dataset["prompt"]) > 128
    run.train()
    assert max(history(run, "server_difference")) < 1e-3 and history(run, "kl")[-1] > 0.1


def test_sampling_is_that_of_the_softmax_at_a_temperature(base, server, tmp_path):
    adapter = tiny_adapter(tmp_path / "a", AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, is_trainable=True
    )
    run = trainer(base, tmp_path, server.url, model=model, temperature=0.7, max_completion_length=1)
    prompt = run.processing_class(run.train_dataset["prompt"][0])["input_ids"]
    count = 2000
    first = torch.tensor([ids[0] for ids in run.rollout_server.generate([prompt] * count)])
    with torch.no_grad():
        weights = (run.model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    expected = count * weights
    counts = torch.bincount(first, minlength=len(weights))
    likely = expected > 5
    chi2 = float((((counts - expected) ** 2 / expected)[likely]).sum())
    freedom = int(likely.sum())
    assert freedom > 5 and abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5, (chi2, freedom)


def test_another_base_is_refused_before_the_first_step(base, server, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    run = trainer(base, tmp_path, server.url, model=get_peft_model(other, lora))
    with pytest.raises(rsoups.TrainingError, match="the server has another base"):
        run.train()
    assert run.state.global_step == 0


def test_a_rank_above_the_servers_is_refused(base, server, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    run = trainer(base, tmp_path, server.url, model=get_peft_model(model, LoraConfig(r=33, target_modules=["q_proj"])))
    with pytest.raises(rsoups.ServerError, match="no LoRA of rank 64: serve with --max-lora-rank 64"):
        run.train()
