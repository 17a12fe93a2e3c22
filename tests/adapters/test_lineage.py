"""Manifests and their tree."""

import shlex
import shutil
import sys

import pytest
from tiny import tiny_adapter, tiny_llama

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.lineage import fingerprint, history_of, manifest_of, settings_of, write_manifest
from rsoups.adapters.lineage_tree import log
from rsoups.common.published import command


def test_the_tree_of_a_soup_of_a_run_from_a_soup(here):
    """soup -> PPO -> soup of soups: every ancestor once in soup.json, however often it is one."""
    soup = read_adapter("soup")
    tiny_adapter("second", seed=7)
    told = {"base": {"model": "some/base"}, "recipe": "recipes/x.py", "config": {}, "data": {}}
    write_manifest("second", "ppo", **told, parent=("soup", None, soup.sha256), rewards=[{"name": "again"}], seed=3)
    rsoups.interpolate({"second": "second", "first": "helpful"}, [0.5, 0.5]).save_pretrained("last")
    manifest = manifest_of("last")
    hashes = {name: read_adapter(name).sha256 for name in ("second", "soup", "helpful", "harmless", "sft")}
    assert manifest["history"].keys() == set(hashes.values()) and manifest["sha256"] == read_adapter("last").sha256
    assert all("history" not in ancestor for ancestor in manifest["history"].values())
    short = {name: sha[:12] for name, sha in hashes.items()}
    assert log(manifest, "last").splitlines() == [
        f"last  soup, exact, rank 8  {manifest['sha256'][:12]}",
        f"├── 0.5 × second  PPO on again, seed 3  {short['second']}",
        f"│   └── start (soup)  soup, exact, rank 8  {short['soup']}",
        f"│       ├── 0.25 × helpful  PPO on helpful, 5 steps, d, seed 0  {short['helpful']}",
        f"│       │   └── start (sft)  SFT, 5 steps, some/data, seed 0  {short['sft']}",
        "│       │       └── base some/base",
        f"│       └── 0.75 × harmless  PPO on harmless, 5 steps, d, seed 1  {short['harmless']}",
        f"│           └── start (sft)  SFT, 5 steps, some/data, seed 0  {short['sft']}",
        "│               └── base some/base",
        f"└── 0.5 × first (helpful)  PPO on helpful, 5 steps, d, seed 0  (above)  {short['helpful']}",
    ]


def test_a_name_does_not_command_the_terminal():
    parent = {"name": "a\x1b[2J\nb", "source": "\x07c", "revision": None, "sha256": "d"}
    shown = log({"ingredients": [parent], "method": "exact"}, "soup").splitlines()
    assert shown == ["soup  soup, exact", "└── a?[2J?b (?c)  no manifest  d"]


def test_a_manifest_of_other_weights_is_not_believed(here):
    shutil.copy("funny/adapter_model.safetensors", "helpful/adapter_model.safetensors")
    assert history_of([("helpful", None, read_adapter("helpful").sha256)]) == {}
    assert history_of([("gone", None, "x"), ("adapter 'x' of a live model", None, "y")]) == {}
    with pytest.warns(UserWarning, match="the lineage of helpful is not known"):
        (here / "helpful" / "lineage.json").write_text("{")
        assert history_of([("helpful", None, "x")]) == {}


def test_the_tree_goes_on_below_a_base_that_was_trained_here(here):
    """A supervised fine-tuning of whole weights, and an average of such, have manifests of their own."""
    tiny_llama().save_pretrained("whole")
    told = {"recipe": "recipes/x.py", "config": {}}
    write_manifest("whole", "sft", base={"model": "some/base"}, data={"dataset": "some/data"}, seed=0, **told)
    for base, lines in (
        ("whole", ["base whole  SFT, some/data, seed 0", "base some/base"]),
        ("average", ["soup, full weights"]),
    ):
        if base == "average":
            rsoups.interpolate_checkpoints(["whole", "whole"], None, "average", progress=False)
        tiny_adapter("tuned", seed=3)
        write_manifest("tuned", "ppo", base={"model": base}, data={}, seed=0, **told)
        tree = log(manifest_of("tuned"), "tuned")
        assert all(line in tree for line in lines), tree
        shutil.rmtree("tuned")


def test_what_a_manifest_tells_of_the_command_and_the_flags(monkeypatch, tmp_path):
    words = ["/x/recipes/ppo_reward.py", "--config", "/home/me/a.yaml", "--hub_token", "secret", "hf_abc", "--lr", ".1"]
    monkeypatch.setattr(sys, "argv", words)
    assert command() == "python recipes/ppo_reward.py --config a.yaml --hub_token ... ... --lr .1"
    monkeypatch.setattr(sys, "argv", ["/x/rsoups/cli/__main__.py", "sweep", "a b"])
    assert command() == "rsoups sweep 'a b'"
    words = ["--out=/home/me/x", "a=/home/me/b,c=~/d", "--from", "../me/y", "['/home/me/z']", "--o=/home/my files/b"]
    words += [
        "--hub_token=secret",
        "--server=http://host/v1",
        "C:\\Users\\me\\w",
        "user/name@main",
        "file:///home/me/v",
    ]
    monkeypatch.setattr(sys, "argv", ["/x/rsoups/cli/__main__.py", *words])
    told = shlex.split(command())[1:]
    assert told == [
        *"--out=x a=b,c=d --from y ['z'] --o=b --hub_token=... --server=http://host/v1 w user/name@main v".split()
    ]
    config = rsoups.PPOConfig(output_dir=str(tmp_path), bf16=False, learning_rate=3e-5, hub_token="hf_abc", seed=4)
    told = settings_of(config)
    assert told["learning_rate"] == 3e-5 and not [key for key in told if "token" in key.split("_")]
    assert "hf_abc" not in str(told) and str(tmp_path) not in str(told)
    assert fingerprint(["a", "b"]) != fingerprint(["b", "a"]) and fingerprint(["a"])["rows"] == 1
    assert fingerprint(["ab", ""])["sha256"] != fingerprint(["a", "b"])["sha256"]
