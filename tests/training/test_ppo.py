"""PPO is tested by learning, and its one forward against a plain one."""

import json
import re

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from ppo_runs import FAVOURITE, PROMPTS, WORDS, config, history, lora, pays_for_one_word, trainer
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_llama, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel
from trl.generation.vllm_generation import VLLMGeneration

from rsoups import DatasetError, PPOTrainer, RewardError, SettingsError, TrainingError
from rsoups.data.prompts import question_of
from rsoups.training.actor_critic import _token_logps, add_actor_critic_forward, hide_value_head
from rsoups.training.checkpoints import last_checkpoint
from rsoups.training.trl_rewards import reward_function


def test_a_reward_for_one_word_is_learnt_and_its_value_too(tmp_path):
    run = trainer(tmp_path, max_steps=160)
    run.train()
    rewards, explained = history(run, "reward"), history(run, "explained_variance")
    assert sum(rewards[:4]) / 4 < 0.2, "the untrained policy already earns the reward: the test tests nothing"
    assert sum(rewards[-8:]) / 8 > 0.7
    assert explained[0] == pytest.approx(0, abs=1e-5) and sum(explained[-8:]) / 8 > 0.2


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


def test_one_forward_gives_the_log_probabilities_and_values_of_a_plain_one():
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=50).eval()
    model.value_head = torch.nn.Linear(model.config.hidden_size, 1)
    ids = torch.randint(3, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # a shorter prompt
    mask[1, -2:] = 0  # a response that ended early
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        expected = (plain.logits / 0.7).log_softmax(-1)[:, 4:-1].gather(-1, ids[:, 5:, None]).squeeze(-1)
        states = plain.hidden_states[-1][:, 4:-1]
        add_actor_critic_forward(model, temperature=0.7)
        logps, values = model(input_ids=ids, attention_mask=mask, response_length=4)
        again = model(input_ids=ids, attention_mask=mask).logits
    real = mask[:, 5:].bool()
    assert torch.allclose(logps[real], expected[real], atol=1e-5)
    assert torch.allclose(values[real], model.value_head(states).squeeze(-1)[real], atol=1e-5)
    assert logps[~real].abs().max() == 0 and values[~real].abs().max() == 0
    assert torch.equal(again, plain.logits), "an ordinary call must stay as it was"


@pytest.mark.parametrize("positions", ["absolute", "rotary"])
def test_padding_changes_no_log_probability(tmp_path, positions):
    """A rollout of prompts of unequal length, each row against itself alone; GPT-2 learns a vector for each position."""
    tokenizer = tiny_tokenizer(WORDS)
    shape = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(initializer_range=0.3, **shape, **ends))
    targets = lora() if positions == "rotary" else lora(target_modules=["c_attn"], fan_in_fan_out=True)
    base = tiny_llama(vocab_size=len(tokenizer)) if positions == "rotary" else gpt2
    run = PPOTrainer(
        base,
        pays_for_one_word,
        config(tmp_path),
        train_dataset=PROMPTS,
        processing_class=tokenizer,
        peft_config=targets,
    )
    torch.nn.init.normal_(run.model.get_base_model().value_head.weight)
    prompts = [[4, 5, 6, 7, 8, 9], [4], [7, 5, 4]]
    responses = [[9, 2], [5, 6, 7, 8], [8]]
    batch = run._rollout_tensors(prompts, responses)
    run.model.eval()
    with torch.no_grad():
        for chunk in (None, 2, 1):
            logps, values = run._actor_critic(run.model, batch, chunk)
            assert logps.shape == values.shape == (3, 4)
            for row, (asked, said) in enumerate(zip(prompts, responses, strict=True)):
                plain = run.model(input_ids=torch.tensor([asked + said]), output_hidden_states=True)
                states = plain.hidden_states[-1][0, len(asked) - 1 : -1]
                expected = plain.logits[0, len(asked) - 1 : -1].log_softmax(-1)[range(len(said)), said]
                assert torch.allclose(logps[row, : len(said)], expected, atol=1e-5)
                value = run.model.get_base_model().value_head(states).squeeze(-1)
                assert torch.allclose(values[row, : len(said)], value, atol=1e-5)
                assert not logps[row, len(said) :].any() and not values[row, len(said) :].any()


def test_vllm_is_handed_the_merged_base_without_the_critic(tmp_path):
    run = trainer(tmp_path)
    run.train()
    generation = object.__new__(VLLMGeneration)
    generation.model, generation._dist, generation.accelerator = run.model, run._dist, run.accelerator
    hide_value_head(generation)
    handed = {name: tensor.clone() for name, tensor in generation._iter_named_params()}
    base = tiny_llama(vocab_size=24)
    assert handed.keys() == dict(base.named_parameters()).keys()
    model = tiny_llama(vocab_size=24)
    model.load_state_dict(handed)
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        run.model.eval()
        assert torch.allclose(model(ids).logits, run.model(ids).logits, atol=1e-5)
        assert not torch.allclose(model(ids).logits, base(ids).logits, atol=1e-3), "the adapter was not merged"


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_values_and_log_probabilities_are_float32(dtype):
    model = tiny_llama(vocab_size=50).to(dtype)
    model.value_head = torch.nn.Linear(model.config.hidden_size, 1)
    add_actor_critic_forward(model, temperature=1.0)
    ids = torch.randint(3, 50, (2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        logps, values = model(input_ids=ids, attention_mask=torch.ones_like(ids), response_length=3)
    assert logps.dtype == values.dtype == torch.float32
    (logps.sum() + values.sum()).backward()
    assert model.value_head.weight.grad.dtype == torch.float32


def test_chunked_log_probabilities_have_the_gradient_of_the_whole(monkeypatch):
    head = torch.nn.Linear(8, 30, bias=False).double()
    states = torch.randn(11, 8, dtype=torch.float64)
    tokens = torch.randint(0, 30, (11,))
    grads = []
    for size in (100, 4):
        monkeypatch.setattr("rsoups.training.actor_critic._CHUNK", size)
        part = states.clone().requires_grad_()
        _token_logps(head, part, tokens, 1.0).pow(2).sum().backward()
        grads.append(part.grad)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-7)


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


def test_the_critic_starts_at_the_first_rollouts_mean_score(tmp_path):
    def twelve(prompts, completions, **columns):
        return [11.0 + 2 * (i % 2) for i in range(len(completions))]

    run = trainer(tmp_path, reward=twelve, max_steps=8, save_strategy="steps", save_steps=4)
    seen = []
    real = run._log_rollout
    run._log_rollout = lambda *args: seen.append(args[4]) or real(*args)
    run.train()
    first = seen[0]
    mask = first["completion_mask"].bool()
    assert torch.allclose(first["old_values"][mask], torch.tensor(12.0)) and not first["old_values"][~mask].any()
    assert run._value_head.start == 12.0
    resumed = trainer(tmp_path, reward=twelve)
    resumed._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-4"))
    assert resumed._value_head.start == 12.0 and not resumed._first_rollout


def test_checkpoints_hold_the_critic_and_the_published_adapter_does_not(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=4, kl_target=0.01)
    run.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    head = load_file(checkpoint / "value_head.safetensors")
    assert head["weight"].abs().max() > 0
    assert json.loads((checkpoint / "ppo_state.json").read_text())["kl_coef"] == run.kl_controller.coef != 0.02
    run.save_model(str(tmp_path / "published"))
    assert not any("value_head" in key for key in load_file(tmp_path / "published" / "adapter_model.safetensors"))

    resumed = trainer(tmp_path, kl_target=0.01)
    resumed._load_from_checkpoint(str(checkpoint))
    assert resumed.kl_controller.coef == run.kl_controller.coef
    assert torch.equal(resumed.model.get_base_model().value_head.weight, head["weight"])


def test_explained_variance_is_of_the_returns_by_the_values(tmp_path):
    run = trainer(tmp_path, max_steps=8)
    kept = []
    real = run._log_rollout
    run._log_rollout = lambda *args: kept.append(args[4]) or real(*args)
    run.train()
    for batch, logged in zip(kept, history(run, "explained_variance"), strict=True):
        tokens = batch["completion_mask"].bool()
        returns, values = batch["returns"][tokens].double(), batch["old_values"][tokens].double()
        expected = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
        assert logged == pytest.approx(float(expected), abs=1e-6)


def test_metrics_are_documented_and_the_documented_ones_are_logged(tmp_path):
    def some(prompts, completions, **columns):
        return [None if i % 2 else 3.0 for i in range(len(completions))]

    run = trainer(tmp_path, reward=[pays_for_one_word, some])
    run.train()
    logged = {key for row in run.state.log_history[:-1] for key in row} - {"epoch", "step"}
    family = {"rewards": "rewards/NAME", "abstained": "abstained/NAME", "completions": "completions/..."}
    documented = set(re.findall(r"``([\w/.]+)``", PPOTrainer.__doc__.split("Metrics are")[1].split("Differs by")[0]))
    parts = {"clipped_ratio", "terminated"}  # of completions/...
    assert parts <= documented and {"completions/clipped_ratio", "completions/mean_terminated_length"} <= logged
    assert {family.get(key.partition("/")[0], key) for key in logged} == documented - parts


def test_metrics_are_those_of_the_rollout(tmp_path):
    """One rollout of 32 responses, two minibatches of it, against sums over its tokens."""
    run = trainer(tmp_path, max_steps=2, num_iterations=1, learning_rate=1e-9, log_completions=True)
    logged, real = [], run._log_rollout
    run._log_rollout = lambda *args: logged.append(args) or real(*args)
    ((prompts, responses, batch),) = rollouts(run)
    ((_, _, texts, _, _, _),) = logged

    logps = [batch["old_logps"][i, : len(ids)].tolist() for i, ids in enumerate(responses)]
    ended = [ids for ids in responses if ids[-1] == 2]
    scores = pays_for_one_word(None, texts)
    assert 0 < len(ended) < 32 and any(scores)
    expected = {
        "entropy": -sum(map(sum, logps)) / sum(map(len, responses)),
        "reward": sum(scores) / 32,
        "rewards/pays_for_one_word": sum(scores) / 32,
        "distinct": len(set(texts)) / 32,
        "completions/mean_length": sum(map(len, responses)) / 32,
        "completions/max_length": max(map(len, responses)),
        "completions/clipped_ratio": 1 - len(ended) / 32,
        "completions/mean_terminated_length": sum(map(len, ended)) / len(ended),
        "num_tokens": sum(map(len, prompts + responses)),
        "kl_coef": 0.02,
    }
    for key, value in expected.items():
        assert history(run, key)[0] == pytest.approx(value, rel=1e-5), key
    assert history(run, "clip_fraction") == [0, 0], "the policy has hardly moved"
    assert list(run._logs["completion"]) == texts and list(run._logs["rewards"]["pays_for_one_word"]) == pytest.approx(
        scores
    )


def test_the_clip_fraction_is_the_share_of_tokens_whose_ratio_is_clipped(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    batch = run._rollout_tensors([[4]] * 2, [[5, 6, 2], [7]])
    logps, values = (tensor.detach() for tensor in run._actor_critic(run.model, batch))
    # Ratios of 1.5, 1, 0.5 and 1.5: of positive advantages the clip bounds what is above 1.2, of negative ones below 0.8.
    moved = torch.tensor([[1.5, 1.0, 0.5], [1.5, 1.0, 1.0]]).log()
    batch |= {"old_logps": logps - moved, "old_values": values, "returns": values}
    batch |= {"advantages": torch.tensor([[1.0, 1.0, -1.0], [-1.0, 1.0, 1.0]]), "num_items_in_batch": torch.tensor(4.0)}
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    run._compute_loss(run.model, batch)
    assert run._metrics["train"]["clip_fraction"] == [pytest.approx(2 / 4)]
    assert run._metrics["train"]["policy_loss"] == [pytest.approx((-1.2 - 1 + 0.8 + 1.5) / 4, rel=1e-5)]


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


def test_sample_responses_are_shown_as_a_table_on_request(tmp_path, capsys):
    run = trainer(tmp_path, log_completions=True, num_completions_to_print=3, max_steps=2)
    run.train()
    shown = capsys.readouterr().out
    assert "pays_for_one_word" in shown and "Completion" in shown
    assert any(text in shown for text in run._logs["completion"] if text)


def test_trackers_of_transformers_get_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = trainer(tmp_path, max_steps=4, report_to="tensorboard")
    run.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    written = [event.value for event in board.Scalars("train/reward")]
    assert written == pytest.approx(history(run, "reward"))
    assert {"train/kl", "train/value_loss", "train/rewards/pays_for_one_word"} <= set(board.Tags()["scalars"])


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


def rollouts(run):
    """Train, and return what each rollout held."""
    seen = []
    real = run._rollout_tensors

    def spy(prompt_ids, response_ids):
        batch = real(prompt_ids, response_ids)
        seen.append((prompt_ids, response_ids, batch))
        return batch

    run._rollout_tensors, run._checked = spy, True  # without the two responses that are looked at before the first step
    run.train()
    return seen


def test_lengths_are_drawn_for_each_response(tmp_path):
    settings = {"max_steps": 8, "min_completion_length": 3, "max_completion_length": 6}
    run = trainer(tmp_path, **settings)
    run.generation_config.suppress_tokens, run._checked = [2], True  # no response ends by itself
    lengths = [len(ids) for _, responses, _ in rollouts(run) for ids in responses]
    assert set(lengths) == {3, 4, 5, 6}
    assert max(lengths.count(n) for n in (3, 4, 5, 6)) < len(lengths) / 2
    with pytest.raises(ValueError, match="min_completion_length"):
        config(tmp_path, min_completion_length=9)


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
