"""Rollouts by our decoder: the tokens that transformers' `generate` draws, from the policy that is trained."""

import json

import pytest
import torch
from ppo_runs import WORDS, trainer
from trl import GRPOTrainer

from rsoups.training.rollouts import decoder_generates

PROMPTS = [" ".join(WORDS[i : i + 1 + i % 4]) for i in range(16)]


def drawn(run, decodes, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("rsoups.training.ppo.decoder_generates", lambda trainer: decodes)
        torch.manual_seed(5)
        ids = run._tokenize_prompts(PROMPTS)[0]
        return run._generate_single_turn(ids, None, {}, 1)[0]


@pytest.mark.parametrize("part", [None, 5])
def test_the_decoder_draws_the_tokens_that_generate_draws(tmp_path, part, monkeypatch):
    """With the same random numbers, rows that end early and rows that do not."""
    run = trainer(tmp_path, local_rollout_forward_batch_size=part, max_completion_length=6)
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    run.eos_token_ids = run.generation_config.eos_token_id = [2, 9]
    by_generate, by_decoder = (drawn(run, decodes, monkeypatch) for decodes in (False, True))
    lengths = set(map(len, by_generate))
    assert by_decoder == by_generate and len(set(map(tuple, by_generate))) > 8 and 6 in lengths and len(lengths) > 2


@pytest.mark.parametrize("setting", ["suppress_tokens=[7]", "top_k=2", "min_new_tokens=3", "num_beams=2", "top_p=0.5"])
def test_a_generation_config_that_the_decoder_does_not_follow(tmp_path, setting):
    run = trainer(tmp_path)
    assert decoder_generates(run)
    name, value = setting.split("=")
    setattr(run.generation_config, name, json.loads(value))
    assert not decoder_generates(run)


@pytest.mark.parametrize(
    ("settings", "decodes"),
    [({}, True), ({"generation_kwargs": {"use_cache": True}}, False), ({"activation_checkpointing": True}, True)],
)
def test_settings_of_generate_are_left_to_generate(tmp_path, settings, decodes, monkeypatch):
    calls = []
    original = GRPOTrainer._generate_single_turn
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda *args: calls.append(1) or original(*args))
    run = trainer(tmp_path, max_steps=1, **settings)
    run.train()
    assert bool(calls) is not decodes


def test_rollouts_are_generated_in_the_precision_of_the_update(tmp_path, monkeypatch):
    """Otherwise another policy samples than the one whose log-probabilities are old."""
    run = trainer(tmp_path, bf16=True, max_steps=1)
    kinds = []
    layer = run.model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    layer.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    run.train()
    assert set(kinds) == {torch.bfloat16}


def test_bfloat16_changes_log_probabilities_and_gradients_by_its_rounding(tmp_path):
    """bfloat16 has 8 bits: log-probabilities within .05 nats, the adapter's gradient in the same direction."""
    found = []
    for name, bf16 in (("whole", False), ("half", True)):
        run = trainer(tmp_path / name, bf16=bf16)
        torch.manual_seed(3)
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        prompts = [[4, 5, 6, 7, 8, 9], [4, 5, 6], [4, 5, 7, 7]]
        batch = run._rollout_tensors(prompts, [[9, 2], [5, 6, 7, 8], [8]])
        logps, values = run._actor_critic(run.model, batch)
        (logps.sum() + values.sum()).backward()
        adapter = [p.grad.flatten() for name, p in run.model.named_parameters() if "lora_" in name]
        found.append((logps.detach(), torch.cat(adapter)))
    (logps, gradient), (half_logps, half_gradient) = found
    assert half_logps.dtype == half_gradient.dtype == torch.float32
    assert 0 < (logps - half_logps).abs().max() < 0.05
    assert torch.cosine_similarity(gradient, half_gradient, dim=0) > 0.999
