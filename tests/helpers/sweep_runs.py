"""Small sweeps."""

import json

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

import rsoups
from rsoups.common.files import read_jsonl

WORDS = [f"w{i}" for i in range(60)]
PROMPTS = ["w1 w2", "w3 w4 w5 w6", "w7", "w8 w9 w10"]
GRID = [[1, 0], [0.5, 0.5], [0, 1]]


def length(prompts, responses):
    return [float(len(r.split())) for r in responses]


def first(prompts, responses):
    return [float(sum(map(ord, r))) for r in responses]


REWARDS = {"length": length, "first": first}


def run(two, out, rewards=REWARDS, base=None, prompts=PROMPTS, **kwargs):
    settings = {"lambdas": GRID, "max_new_tokens": 6, "batch_tokens": 30, "progress": False}
    settings |= {"tokenizer": tiny_tokenizer(WORDS), "out": out}
    return rsoups.sweep(tiny_llama() if base is None else base, two, rewards, prompts, **(settings | kwargs))


def same(records, others):
    """The same records in the same order; nats to the rounding of a batch's sums."""
    assert len(records) == len(others)
    for one, other in zip(records, others, strict=True):
        assert one == other | {name: pytest.approx(other[name], abs=2e-3) for name in ("kl", "base_nll")}
    return True


def changed_llama(**size):
    other = tiny_llama(**size)
    with torch.no_grad():
        weight = other.model.layers[1].mlp.up_proj.weight
        weight.mul_(torch.linspace(0.9, 1.1, weight.shape[1]))
    return other


def texts(path):
    return {
        (r["name"], json.dumps(r["lambdas"]), json.dumps(r["prompt"]), r["sample"]): r["response"]
        for r in read_jsonl(path)
    }
