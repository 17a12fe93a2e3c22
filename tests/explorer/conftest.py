"""Fixtures of the explorer."""

import json

import pytest
from explored import NAMES, letters, words
from tiny import tiny_adapter
from transformers import AutoModelForCausalLM

import rsoups
from rsoups.common.assets import resolve
from rsoups.data.datasets import load_rows
from rsoups.data.tasks import TASKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny sweep on the embedded model, of two small random adapters."""
    out = tmp_path_factory.mktemp("explored") / "a sweep"
    adapters = {}
    for seed, name in enumerate(NAMES):
        base = AutoModelForCausalLM.from_pretrained(resolve("rsoups/tiny-llama"))
        adapters[name] = tiny_adapter(out / f"ppo-{name}", base, seed=seed)
        config = json.loads((adapters[name] / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "rsoups/tiny-llama"
        (adapters[name] / "adapter_config.json").write_text(json.dumps(config))
    prompts = [row["prompt"] for row in load_rows(TASKS["concepts"], None, "test", limit=3)]
    rewards = {"letters": letters, "words": words}
    rsoups.sweep(
        "rsoups/tiny-llama",
        adapters,
        rewards,
        prompts,
        [[1, 0], [0.5, 0.5], [0, 1]],
        temperature=0,
        max_new_tokens=12,
        progress=False,
        out=out / "records.jsonl",
    )
    return out
