"""Rows read together, in passes, on from a shared beginning, against each row read alone."""

import pytest
import torch
from tiny import tiny_llama, tiny_mixtral
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rsoups.training import reading
from rsoups.training.reading import Reader

SHAPE = {"vocab_size": 64, "initializer_range": 0.2}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2}
BEGINNING = [5, 9, 7, 5, 8, 11, 6, 20, 21]
PROMPTS = [[*BEGINNING, *rest] for rest in ([30], [31, 32, 33], [34, 35], [30, 36, 37, 38, 39], [40], [41, 42])]
RESPONSES = [[2], [50, 51, 52, 2], [53, 54], [55, 56, 57, 58, 59], [60, 61, 62], []]


def gpt2():
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **ends, **SHAPE))


def bloom():
    return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SHAPE))


def windows():
    """A cache that forgets: no beginning can be shared."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    return MistralForCausalLM(MistralConfig(sliding_window=4, **heads, **LAYERS, **SHAPE))


def recurrent():
    return MambaForCausalLM(MambaConfig(state_size=4, **LAYERS, **SHAPE))


BASES = {
    "llama": lambda: tiny_llama(num_key_value_heads=2),
    "gpt2": gpt2,
    "bloom": bloom,
    "mixtral": tiny_mixtral,
    "windows": windows,
    "recurrent": recurrent,
}


def model_of(kind):
    torch.manual_seed(0)
    model = BASES[kind]().double().eval()
    model.base_model.calls = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: module.calls.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return model


def padded(prompts, responses):
    """Ids and mask, prompts to the right, responses to the left; and the responses' columns."""
    left, right = max(map(len, prompts)), max(map(len, responses))
    ids = [[0] * (left - len(p)) + p + r + [0] * (right - len(r)) for p, r in zip(prompts, responses, strict=True)]
    mask = [
        [0] * (left - len(p)) + [1] * (len(p) + len(r)) + [0] * (right - len(r))
        for p, r in zip(prompts, responses, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask), right


def alone(model, prompts, responses):
    """The states before each row's response tokens, row by row without padding, (T, hidden) each."""
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        hidden = model.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        rows.append(hidden[len(prompt) - 1 : len(prompt) - 1 + len(response)])
    return rows


def in_rows(states, places, responses, length):
    """The reader's states by row, in the order of the tokens."""
    table = states.new_zeros(len(responses) * length, states.shape[1]).index_copy(0, places, states)
    return [row[: len(response)] for row, response in zip(table.unflatten(0, (-1, length)), responses, strict=True)]


@pytest.mark.parametrize("pass_of", [512, 16])
@pytest.mark.parametrize("kind", BASES)
def test_states_are_those_of_rows_alone(kind, pass_of, monkeypatch):
    monkeypatch.setitem(reading._PASS, "cpu", pass_of)
    model = model_of(kind)
    ids, mask, length = padded(PROMPTS, RESPONSES)
    reader = Reader(model)
    with torch.no_grad():
        for _ in range(2):  # the second time without the probe
            model.base_model.calls.clear()
            states, places = reader(ids, mask, length)
        read = sum(model.base_model.calls)
        expected = alone(model, PROMPTS, RESPONSES)
    assert len(places.unique()) == len(places) == sum(map(len, RESPONSES))
    rounding = 1e-5 if kind == "bloom" else 1e-9  # Bloom's positions are float32
    for found, row in zip(in_rows(states, places, RESPONSES, length), expected, strict=True):
        assert torch.allclose(found, row, rtol=rounding, atol=rounding)
    assert reader._goes_on is (kind not in ("windows", "recurrent"))
    assert not reader._goes_on or read < int(mask.sum()), "the beginning was read for each row"


def test_gradients_are_those_of_rows_alone(monkeypatch):
    """They flow into the beginning from every row, through keys and values."""
    monkeypatch.setitem(reading._PASS, "cpu", 24)
    model = model_of("llama")
    weights = torch.randn(model.config.hidden_size, 1, dtype=torch.float64)

    def gradients(rows):
        model.zero_grad()
        torch.cat(rows).matmul(weights).sin().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(alone(model, PROMPTS, RESPONSES))
    ids, mask, length = padded(PROMPTS, RESPONSES)
    states, places = Reader(model)(ids, mask, length)
    found = gradients(in_rows(states, places, RESPONSES, length))
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():  # Llama normalizes in float32, whatever its weights are
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max())), name


@pytest.mark.parametrize("case", ["nothing in common", "one token", "one row", "the same prompt", "no response"])
def test_rows_of_any_kind(case):
    prompts, responses = PROMPTS, RESPONSES
    if case == "nothing in common":
        prompts = [[i + 30, *prompt] for i, prompt in enumerate(PROMPTS)]
    elif case == "one token":
        prompts = [[7], *PROMPTS[1:]]
    elif case == "one row":
        prompts, responses = PROMPTS[1:2], RESPONSES[1:2]
    elif case == "the same prompt":
        prompts = PROMPTS[:1] * len(PROMPTS)
    else:  # the rows of a process that only waits: real prompts under an empty mask
        responses = [[] for _ in RESPONSES]
    model = model_of("llama")
    ids, mask, length = padded(prompts, responses)
    if case == "no response":
        ids, mask, length = torch.cat([ids, ids[:, :3]], 1), torch.cat([mask, torch.zeros_like(mask[:, :3])], 1), 3
    states, places = Reader(model)(ids, mask, length)
    for found, row in zip(in_rows(states, places, responses, length), alone(model, prompts, responses), strict=True):
        assert torch.allclose(found, row, rtol=1e-9, atol=1e-9)
    assert states.requires_grad, "a process without responses must still take part in the backward pass"


def test_checkpointing_recomputes_layers_without_a_beginning():
    model = model_of("llama").train()
    model.activation_checkpointing_enable()
    ids, mask, length = padded(PROMPTS, RESPONSES)
    reader = Reader(model)
    states, places = reader(ids, mask, length)
    assert reader._goes_on is None
    states.sum().backward()
    for found, row in zip(
        in_rows(states, places, RESPONSES, length), alone(model.eval(), PROMPTS, RESPONSES), strict=True
    ):
        assert torch.allclose(found, row, rtol=1e-9, atol=1e-9)


def test_sharded_weights_are_gathered_as_often_on_each_process(monkeypatch):
    """Whatever the rows: a process with more passes than another one would wait for it forever."""
    monkeypatch.setitem(reading._PASS, "cpu", 16)
    model = model_of("llama")
    ids, mask, length = padded(PROMPTS, RESPONSES)
    states, places = Reader(model, sharded=True)(ids, mask, length)
    assert len(model.base_model.calls) == 1
    for found, row in zip(in_rows(states, places, RESPONSES, length), alone(model, PROMPTS, RESPONSES), strict=True):
        assert torch.allclose(found, row, rtol=1e-9, atol=1e-9)
