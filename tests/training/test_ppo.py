"""PPO is tested by learning."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from ppo_runs import FAVOURITE, PROMPTS, WORDS, config, history, lora, rollouts, trainer
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer

from rsoups import DatasetError, PPOTrainer, SettingsError, TrainingError
from rsoups.data.prompts import question_of
from rsoups.training.checkpoints import last_checkpoint
from rsoups.training.trl_rewards import reward_function


def test_a_reward_for_one_word_is_learnt_and_its_value_too(tmp_path):
    run = trainer(tmp_path, max_steps=160)
    run.train()
    rewards, explained = history(run, "reward"), history(run, "explained_variance")
    assert sum(rewards[:4]) / 4 < 0.2, "the untrained policy already earns the reward: the test tests nothing"
    assert sum(rewards[-8:]) / 8 > 0.7
    assert explained[0] == pytest.approx(0, abs=1e-5) and sum(explained[-8:]) / 8 > 0.2


def test_the_kl_penalty_holds_the_policy_back(tmp_path):
    last = {}
    for coef in (0.0, 1.0):
        run = trainer(tmp_path / str(coef), max_steps=100, learning_rate=1e-2, kl_coef=coef)
        run.train()
        last[coef] = sum(history(run, "kl")[-4:]) / 4
    assert last[1.0] < 1 < 5 < last[0.0]


def test_kl_is_held_near_its_target(tmp_path):
    """From a coefficient far too small and from one far too large."""
    for start in (0.02, 1.0):
        settings = {"kl_coef": start, "kl_target": 2.0, "kl_horizon": 100, "learning_rate": 5e-3}
        run = trainer(tmp_path / str(start), max_steps=320, **settings)
        run.train()
        held = history(run, "kl")[-40:]
        assert sum(held) / len(held) == pytest.approx(2.0, rel=0.15), start
        assert history(run, "kl_coef")[-1] != pytest.approx(start, rel=0.5), "the coefficient had nothing to do"


def test_a_rollout_can_be_generated_in_parts(tmp_path):
    """Greedily, so that a response depends on its prompt only; the rows must come back in the prompts' order."""
    prompts = {"prompt": [" ".join(WORDS[i : i + 1 + i % 4]) for i in range(16)] * 2}
    found = []
    for part in (None, 5):
        run = trainer(
            tmp_path / str(part),
            local_rollout_forward_batch_size=part,
            max_steps=1,
        )
        run.generation_config.do_sample, run._checked = False, True  # texts that no random number changes
        run.train_dataset = Dataset.from_dict(prompts)
        found.append({tuple(a): b for ids, said, _ in rollouts(run) for a, b in zip(ids, said, strict=True)})
    assert found[0] == found[1] and len(set(map(tuple, found[0].values()))) > 4


def adapter_after(run):
    run.train()
    return {key: value.detach().clone() for key, value in run.model.state_dict().items() if "lora_" in key}


def test_gradient_checkpointing_changes_nothing_but_the_memory(tmp_path):
    plain = adapter_after(trainer(tmp_path / "plain"))
    run = trainer(tmp_path / "checkpointed", activation_checkpointing=True)
    recomputed = adapter_after(run)
    assert run.model.get_base_model().is_gradient_checkpointing
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)
    assert any(value.abs().max() > 0 for key, value in recomputed.items() if "lora_B" in key)


def test_bf16_learns_with_float32_adapters_and_values(tmp_path):
    tokenizer = tiny_tokenizer(WORDS)
    base = tiny_llama(vocab_size=len(tokenizer)).to(torch.bfloat16)
    run = trainer(tmp_path, model=base, bf16=True, max_steps=120)
    weights = adapter_after(run)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert run.model.get_base_model().value_head.weight.dtype == torch.float32
    assert run.model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    rewards = history(run, "reward")
    assert sum(rewards[-6:]) / 6 > sum(rewards[:4]) / 4 + 0.3
    assert history(run, "kl")[0] == pytest.approx(0, abs=0.02), "rollout and reference in one precision"


def test_fresh_adapters_start_alike_whatever_the_seed_of_the_run(tmp_path):
    weights = []
    for seed, init in ((0, 0), (1, 0), (0, 1)):
        run = trainer(tmp_path / f"{seed}{init}", seed=seed, adapter_init_seed=init)
        weights.append({k: v.clone() for k, v in run.model.state_dict().items() if "lora_" in k})
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert any(not torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(tmp_path):
    files = []
    for name in "ab":
        run = trainer(tmp_path / name, seed=3)
        run.train()
        run.save_model(str(tmp_path / name))
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_the_reference_of_a_continued_adapter_is_a_frozen_copy_of_it(tmp_path):
    tokenizer = tiny_tokenizer(WORDS)
    first = trainer(tmp_path / "first", max_steps=20)
    first.train()
    first.save_model(str(tmp_path / "first"))
    model = PeftModel.from_pretrained(tiny_llama(vocab_size=len(tokenizer)), tmp_path / "first", is_trainable=True)
    run = trainer(tmp_path / "second", model=model, max_steps=8)
    before = load_file(tmp_path / "first" / "adapter_model.safetensors")
    run.train()
    assert history(run, "kl")[0] == pytest.approx(0, abs=1e-5), "at its start, the adapter is its own reference"
    reference = {k: v for k, v in run.model.state_dict().items() if ".ref." in k}
    for key, value in before.items():
        assert torch.equal(reference[key.replace(".weight", ".ref.weight")], value)


def test_conversations_are_prompts_too(tmp_path):
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    messages = [
        [{"role": "system", "content": "w9"}, {"role": "user", "content": f"w{i} w{i + 1}"}] for i in range(16)
    ] * 2
    seen = []

    def score(prompts, responses):
        seen.extend(zip(map(question_of, prompts), responses, strict=True))
        return [1.0] * len(responses)

    run = PPOTrainer(
        tiny_llama(vocab_size=len(tokenizer)),
        reward_function(score, str.strip),
        config(tmp_path, max_steps=2),
        train_dataset=Dataset.from_dict({"prompt": messages}),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    asked = rollouts(run)[0][0]
    assert sorted(map(tuple, asked))[0] == (13, 4, 5), "the chat template's w9 w0 w1"
    assert {question for question, _ in seen} == {f"w{i} w{i + 1}" for i in range(16)}
    assert all(isinstance(response, str) for _, response in seen)


@pytest.mark.parametrize("training", [True, False])
def test_only_training_adapts_the_kl_coefficient(tmp_path, training):
    run = trainer(tmp_path, evaluate=True, kl_coef=0.3, kl_target=0.001, kl_horizon=100)
    (run.train if training else run.evaluate)()
    assert (run.kl_controller.coef != 0.3) == training


def test_the_seed_of_the_run_decides_what_is_sampled(tmp_path):
    first, again, other = (
        trainer(tmp_path / name, seed=seed)._generate_single_turn([[5, 6]] * 20, None, {}, 1)[0]
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again != other


def test_the_best_checkpoint_by_reward_is_kept_on_request(tmp_path):
    """The reward peaks at step 4 (its sign turns), and only two checkpoints are to be kept."""
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "max_steps": 10, "eval_steps": 2}
    settings |= {"eval_strategy": "steps", "metric_for_best_model": "reward", "greater_is_better": True}
    run = None

    def peaks(prompts, completions, **columns):
        return [1.0 if run.state.global_step == 4 else 0.0] * len(completions)

    run = trainer(tmp_path, reward=peaks, evaluate=True, **settings)
    run.train()
    kept = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert kept == {"checkpoint-4", "checkpoint-10"}
    assert run.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-4")


def test_a_dataset_smaller_than_a_rollout_is_refused(tmp_path):
    """TRL's sampler leaves incomplete rollouts out, and a run without any would end well, untrained."""
    run = trainer(tmp_path)
    run.train_dataset = PROMPTS.select(range(31))
    with pytest.raises(DatasetError, match="31 prompts are fewer than one rollout of 32"):
        run.train()


def test_continuous_batching_in_16_bit_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="continuous_batching"):
        config(tmp_path, bf16=True, use_transformers_continuous_batching=True)


def test_a_policy_that_runs_away_is_warned_of_and_then_stopped(tmp_path, caplog):
    run = trainer(
        tmp_path, max_steps=400, learning_rate=1e-2, kl_coef=0.0, kl_limit=4.0, save_strategy="steps", save_steps=4
    )
    with pytest.raises(TrainingError, match=r"KL is \d+\.\d nats per response, above kl_limit 4: raise kl_coef"):
        run.train()
    assert history(run, "kl")[-1] <= 4 and run.state.global_step < 400
    assert "and stops the run at 4" in caplog.text
    assert last_checkpoint(tmp_path / "run").name == f"checkpoint-{run.state.global_step}"


def test_a_policy_that_collapses_is_warned_of_and_stopped_on_request(tmp_path, caplog):
    def pays_for_sameness(prompts, completions, **columns):
        return [10.0 * (text.split()[:1] == [FAVOURITE]) for text in completions]

    settings = {"max_steps": 200, "learning_rate": 2e-2, "kl_coef": 0.0, "max_completion_length": 1}
    run = trainer(tmp_path / "warned", reward=pays_for_sameness, **settings)
    run.train()
    assert history(run, "distinct")[0] > 0.2 and min(history(run, "distinct")) == 1 / 32
    assert "only 3% of the responses differ" in caplog.text
    with pytest.raises(TrainingError, match="below min_distinct"):
        trainer(tmp_path / "stopped", reward=pays_for_sameness, min_distinct=0.05, **settings).train()


def test_lengths_are_drawn_for_each_response(tmp_path):
    settings = {"max_steps": 8, "min_completion_length": 3, "max_completion_length": 6}
    run = trainer(tmp_path, **settings)
    run.generation_config.suppress_tokens, run._checked = [2], True  # no response ends by itself
    lengths = [len(ids) for _, responses, _ in rollouts(run) for ids in responses]
    assert set(lengths) == {3, 4, 5, 6}
    assert max(lengths.count(n) for n in (3, 4, 5, 6)) < len(lengths) / 2
    with pytest.raises(ValueError, match="min_completion_length"):
        config(tmp_path, min_completion_length=9)
