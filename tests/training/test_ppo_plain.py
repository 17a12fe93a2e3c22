"""PPOTrainer's update against a loop written plainly: one response at a time, no padding, no masks, float64.

Both start from one adapter and one rollout (the trainer's own sampled ids, and who was in which minibatch); everything
else is computed twice. With SGD, so that a difference in a gradient is a difference in the result, not only in its sign.
"""

import copy

import pytest
import torch
from ppo_runs import WORDS, config, lora
from tiny import tiny_llama, tiny_tokenizer

from rsoups import PPOTrainer

GAMMA, LAM, KL, CLIP, CLIP_VALUE, VF = 0.95, 0.9, 0.1, 0.05, 0.05, 0.3
TEMPERATURE, RATE, NORM = 0.8, 0.2, 0.7
ENDS_OFTEN = {"sequence_bias": [[[2], 3.0]]}  # the tiny model hardly ever ends a response by itself
PROMPTS = [" ".join(WORDS[(i + k) % 20] for k in range(1 + i % 5)) for i in range(16)]  # one to five words


def score_of(prompt, response):
    return 0.3 * len(response.split()) + 0.5 * prompt.count("w1") - 0.2 * response.count("w3")


def update_once(tmp_path, epochs, minibatches, accumulation, generation=None, **overrides):
    """One rollout of 16 and its PPO epochs; the model before, the trainer after.

    `generation`: what makes responses end early or late. Settings do not allow it, as the sampler is another policy then.
    """
    from datasets import Dataset

    tokenizer = tiny_tokenizer(WORDS)
    micro = 16 // minibatches // accumulation
    steps = epochs * minibatches
    args = config(
        tmp_path, per_device_train_batch_size=micro, steps_per_generation=minibatches * accumulation, max_steps=steps,
        gradient_accumulation_steps=accumulation, num_iterations=epochs, optim="sgd", learning_rate=RATE, kl_coef=KL,
        max_grad_norm=NORM, weight_decay=0.0, gamma=GAMMA, lam=LAM, cliprange=CLIP, cliprange_value=CLIP_VALUE,
        vf_coef=VF, temperature=TEMPERATURE, **overrides,
    )  # fmt: skip
    kept = {}

    def reward(prompts, completions, **columns):
        kept["scores"] = {p: score_of(p, c) for p, c in zip(prompts, completions, strict=True)}
        return list(kept["scores"].values())

    dataset = Dataset.from_dict({"prompt": PROMPTS})
    run = PPOTrainer(
        tiny_llama(vocab_size=len(tokenizer)),
        reward,
        args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora(),
    )
    run.generation_config.update(**(generation or {}))
    run._checked = True
    seen, handed_out = [], run._rows_of_passes

    def hand_out(rollout):
        seen.append(handed_out(rollout))
        return seen[-1]

    run._rows_of_passes = hand_out
    with torch.no_grad():  # a fresh adapter's B is 0: no KL, and no gradient for A
        noise = torch.Generator().manual_seed(1)
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name or "value_head" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    before = copy.deepcopy(run.model).double()
    run.train()
    rows = {}  # prompt text -> (prompt ids, response ids)
    orders = []  # of each epoch: its minibatches by their prompts
    for handed_out_rows in seen:
        parts = []
        for part in handed_out_rows:
            parts.append([])
            for i in range(len(part["prompt_ids"])):
                asked = part["prompt_ids"][i][part["prompt_mask"][i].bool()].tolist()
                said = part["completion_ids"][i][part["completion_mask"][i].bool()].tolist()
                text = tokenizer.decode(asked)
                rows[text] = (asked, said)
                parts[-1].append(text)
        orders.append([sum(parts[i : i + accumulation], []) for i in range(0, len(parts), accumulation)])
    assert sorted(rows) == sorted(PROMPTS) and [len(order) for order in orders] == [minibatches] * epochs
    return before, run, rows, orders, kept["scores"]


def look(model, asked, said):
    """Log-probabilities of the response's tokens and values of the states before them, (T,)."""
    base = model.get_base_model()
    out = base.base_model(input_ids=torch.tensor([asked + said])).last_hidden_state[0, len(asked) - 1 : -1]
    logps = (base.lm_head(out) / TEMPERATURE).log_softmax(-1)[torch.arange(len(said)), said]
    return logps, base.value_head(out).squeeze(-1)


def plainly(model, rows, orders, scores):
    model.get_base_model().value_head.start = float(torch.tensor(list(scores.values())).mean())
    rollout, advantages = {}, []
    for text, (asked, said) in rows.items():
        with torch.no_grad():
            logps, values = look(model, asked, said)
            with model.disable_adapter():
                reference, _ = look(model, asked, said)
        rewards = [-KL * float(a - b) for a, b in zip(logps, reference, strict=True)]
        rewards[-1] += scores[text]
        advantage = [0.0] * len(said)
        for t in reversed(range(len(said))):
            later = float(values[t + 1]) if t + 1 < len(said) else 0.0
            delta = rewards[t] + GAMMA * later - float(values[t])
            advantage[t] = delta + (GAMMA * LAM * advantage[t + 1] if t + 1 < len(said) else 0.0)
        rollout[text] = (logps, values, torch.tensor(advantage, dtype=torch.float64))
        advantages += advantage
    all_of_them = torch.tensor(advantages, dtype=torch.float64)
    mean, std, tokens = all_of_them.mean(), all_of_them.std(), len(advantages)

    parameters = [p for p in model.parameters() if p.requires_grad]
    for order in orders:
        for minibatch in order:
            loss = torch.zeros((), dtype=torch.float64)
            for text in minibatch:
                old_logps, old_values, advantage = rollout[text]
                logps, values = look(model, *rows[text])
                white, returns = (advantage - mean) / std, advantage + old_values
                for t in range(len(logps)):
                    ratio = (logps[t] - old_logps[t]).exp()
                    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                    policy = -torch.min(ratio * white[t], clipped * white[t])
                    near = old_values[t] + (values[t] - old_values[t]).clamp(-CLIP_VALUE, CLIP_VALUE)
                    error = torch.max((values[t] - returns[t]) ** 2, (near - returns[t]) ** 2)
                    loss = loss + policy + VF * 0.5 * error
            gradients = torch.autograd.grad(loss / (tokens / len(order)), parameters)
            norm = torch.sqrt(sum((g**2).sum() for g in gradients))
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= RATE * gradient * min(1.0, NORM / (float(norm) + 1e-6))
    return model


@torch.no_grad()
def compare(before, run, rows, orders, scores):
    start = {k: v.clone() for k, v in before.named_parameters() if v.requires_grad}
    with torch.enable_grad():
        expected = dict(plainly(before, rows, orders, scores).named_parameters())
    moved = max(float((expected[k] - start[k]).abs().max()) for k in start)
    assert moved > 1e-3, "nothing moved: the test tests nothing"
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            difference = float((parameter.double() - expected[name]).abs().max())
            assert difference < 2e-5 + 1e-3 * moved, (name, difference)


@pytest.mark.parametrize(
    ("epochs", "minibatches", "accumulation"), [(1, 1, 1), (2, 2, 1), (4, 1, 1), (3, 4, 1), (2, 2, 2)]
)
def test_epochs_and_minibatches(tmp_path, epochs, minibatches, accumulation):
    found = update_once(tmp_path, epochs, minibatches, accumulation, generation=ENDS_OFTEN)
    lengths = {len(said) for _, said in found[2].values()}
    ended = [said[-1] == 2 for _, said in found[2].values()]
    assert len(lengths) > 2 and any(ended) and not all(ended), "responses that end early and responses that are cut"
    compare(*found)


def test_lengths_drawn_for_each_response(tmp_path):
    found = update_once(
        tmp_path, 2, 2, 1, min_completion_length=2, generation={"suppress_tokens": [2], "min_new_tokens": 6}
    )
    assert len({len(said) for _, said in found[2].values()}) > 2
    assert all(said[-1] != 2 for _, said in found[2].values())
    compare(*found)


def test_the_penalty_of_cut_responses(tmp_path):
    *found, scores = update_once(tmp_path, 2, 1, 1, missing_eos_penalty=0.7, generation=ENDS_OFTEN)
    assert {said[-1] == 2 for _, said in found[2].values()} == {True, False}
    scores = {text: scores[text] - 0.7 * (found[2][text][1][-1] != 2) for text in scores}
    compare(*found, scores)
