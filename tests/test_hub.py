"""Pushing, against a server on loopback that stores what it is sent and fails on demand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from peft import PeftModel
from tiny import tiny_adapter, tiny_llama

import rsoups
from rsoups.hub import card

PUSH = """
import sys, rsoups, rsoups.hub
rsoups.hub.time.sleep = lambda seconds: print(f"waited {seconds:g}")
soup = rsoups.interpolate({"helpful": sys.argv[1], "harmless": sys.argv[2]}, [0.3, 0.7])
try:
    print(soup.push_to_hub("someone/soup"))
except rsoups.HubError as error:
    print("HubError:", error)
"""
TOKEN = "hf_neverToBePrinted"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server
        server.shutdown()


@pytest.fixture
def two(tmp_path):
    return [tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]


def push(hub, two):
    """In a process of its own: huggingface_hub reads its endpoint when it is imported."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "HF_HOME": str(two[0].parent / "hf")}
    run = subprocess.run(
        [sys.executable, "-c", PUSH, *map(str, two)], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert TOKEN not in run.stdout + run.stderr
    return run.stdout.strip()


def test_one_commit_that_peft_loads(hub, two, tmp_path):
    assert push(hub, two).startswith(f"{hub.url}/someone/soup/commit/")
    ((name, _, files),) = hub.commits
    assert name == "someone/soup"
    assert set(files) == {"adapter_model.safetensors", "adapter_config.json", "soup.json", "README.md"}
    folder = tmp_path / "pulled"
    folder.mkdir()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    loaded = PeftModel.from_pretrained(tiny_llama(), folder)
    ours = rsoups.interpolate(two, [0.3, 0.7]).load(tiny_llama())
    ids = tiny_llama().dummy_inputs["input_ids"] % 64
    assert (loaded(ids).logits - ours(ids).logits).abs().max() == 0
    assert json.loads(files["soup.json"])["ingredients"][0]["name"] == "helpful"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_explained_and_not_tried_again(hub, two, status):
    hub.faults = [("/api/repos/create", status, {})]
    assert "write scope for someone" in push(hub, two)
    assert len([path for _, path in hub.seen if "create" in path]) == 1 and not hub.commits


def test_busy_hubs_and_conflicts_are_tried_again(hub, two):
    hub.faults = [
        ("/commit/main", 429, {"Retry-After": "7"}),
        ("/commit/main", 409, {}),
        ("/commit/main", 412, {}),
    ]
    out = push(hub, two)
    assert "waited 7" in out and "HubError" in out and "412" in out  # what waiting cannot help is not tried again
    assert not hub.commits
    hub.faults = [("/commit/main", 409, {}), ("/commit/main", 503, {})]
    assert "/commit/" in push(hub, two) and len(hub.commits) == 1


def test_giving_up_says_so(hub, two):
    hub.faults = [("/commit/main", 500, {})] * 5
    assert "in 5 attempts (status 500)" in push(hub, two)
    assert not hub.commits


def test_the_card_is_short_and_true(two, tmp_path):
    text = card(rsoups.interpolate({"helpful": two[0], "harmless": two[1]}, [0.3, 0.7]), "someone/soup")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "peft" and "rewarded-soups" in metadata["tags"]
    assert "base_model" not in metadata  # it was made from a config, and has no name on the Hub
    assert "| helpful | 0.3 |" in text and str(Path(tmp_path)) not in text
    for folder in two:
        config = json.loads((folder / "adapter_config.json").read_text()) | {
            "base_model_name_or_path": "huggyllama/llama-7b"
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
    metadata = yaml.safe_load(card(rsoups.interpolate(two), "someone/soup").split("---")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("huggyllama/llama-7b", "adapter")
