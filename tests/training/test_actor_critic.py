"""The one forward of policy and critic, against a plain one."""

import json

import pytest
import torch
from ppo_runs import PROMPTS, WORDS, config, lora, pays_for_one_word, trainer
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel
from trl.generation.vllm_generation import VLLMGeneration

from rsoups import PPOTrainer
from rsoups.training.actor_critic import _token_logps, add_actor_critic_forward, hide_value_head


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
