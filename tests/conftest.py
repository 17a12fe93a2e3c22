"""Fixtures that several folders use."""

import gc

import rsoups  # isort: skip  (before torch, whose idle threads then sleep)

import pytest
from tiny import tiny_adapter

from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.lineage import write_manifest


def pytest_collection_finish():
    """Leave what the imports made out of every later collection of garbage, of which each training run asks for one."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def two(tmp_path):
    """Two adapters of one base that differ in every weight."""
    return [tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Three ingredients with manifests: two PPO runs that were trained on from one SFT adapter, and another one."""
    monkeypatch.chdir(tmp_path)
    tiny_adapter("sft", seed=9)
    told = {"base": {"model": "some/base", "revision": None}, "recipe": "recipes/x.py", "config": {"steps": 5}}
    write_manifest("sft", "sft", **told, data={"dataset": "some/data"}, seed=0)
    start = ("sft", None, read_adapter("sft").sha256)
    for seed, name in enumerate(("helpful", "harmless", "funny")):
        tiny_adapter(name, seed=seed)
        rewards = [{"name": name, "model": f"some/{name}"}]
        parent = start if name != "funny" else None
        write_manifest(name, "ppo", **told, data={"dataset": "d", "rows": 1}, parent=parent, rewards=rewards, seed=seed)
    rsoups.interpolate({"helpful": "helpful", "harmless": "harmless"}, [0.25, 0.75]).save_pretrained("soup")
    return tmp_path
