"""From a PPO run to the Hub and back: lineage beside the adapter, `--push_to_hub`, the iterated recipe."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from forked import warm_python
from hub_server import TOKEN, HubServer, files_with_the_token
from places import RECIPES

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.lineage import manifest_of
from rsoups.cli.main import main

SHORT = [
    "--per_device_train_batch_size",
    "8",
    "--max_steps",
    "4",
    "--max_completion_length",
    "8",
    "--disable_tqdm",
    "true",
]
SHORT += ["--eval_prompts", "3"]


@pytest.fixture(scope="module")
def iterated(tmp_path_factory):
    """Two rounds, very short, the start of the second half way to the first soup; pushed by the last run of all."""
    root = tmp_path_factory.mktemp("iterated")
    flags = ["--rounds", "2", "--eta", ".5", "--prompts", "3", "--scales", "0.5", "1", "--output_dir", "out"]
    command = [warm_python(), str(RECIPES / "iterate.py"), *flags, *SHORT]
    for _ in range(2):  # the second time nothing is left to do
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("already there") == 4
    return root


def test_iterated_soups(iterated, monkeypatch, capsys):
    monkeypatch.chdir(iterated)
    records = [json.loads(line) for line in Path("out/records.jsonl").read_text().splitlines()]
    names = ["start", *(f"round {r}, η {e}" for r in (1, 2) for e in ("0.5", "1"))]
    assert list(dict.fromkeys(r["name"] for r in records)) == names and len(records) == 3 * 5
    assert all(set(r["rewards"]) == {"naturalness", "coverage", "-KL"} for r in records)
    kl = {name: [-r["rewards"]["-KL"] for r in records if r["name"] == name] for name in names}
    assert max(map(abs, kl["start"])) < 1e-5 and all(x >= -1e-5 for values in kl.values() for x in values)
    assert sum(kl["round 1, η 1"]) > 0 and Path("out/iterate.png").read_bytes().startswith(b"\x89PNG")
    assert "| round 2, η 1 |" in Path("out/report.md").read_text()
    # The second round began half way to the first soup, at the rank of the first start.
    start = rsoups.Soup.from_pretrained("out/round-1/next")
    assert start.lambdas == (0.5, 0.25, 0.25) and start.config.r == read_adapter("out/start").config.r == 16
    manifest = manifest_of("out/round-2/coverage")
    (parent,) = manifest["parents"]
    assert parent["sha256"] == read_adapter("out/round-1/next").sha256 and parent["source"] == "out/round-1/next"
    assert main(["verify", "out/round-2/soup"]) == 0 and "bit for bit" in capsys.readouterr().out
    assert main(["log", "out/round-2/soup"]) == 0
    tree = capsys.readouterr().out
    assert tree.count("PPO on coverage, 4 steps, KL 0.05, rsoups/concepts, seed 0") == 2
    assert "start  fresh LoRA, seed 0" in tree and "base rsoups/tiny-llama" in tree


def test_the_manifest_of_a_run(iterated):
    manifest = manifest_of(iterated / "out" / "round-1" / "coverage")
    assert manifest["kind"] == "ppo" and manifest["base"] == {"model": "rsoups/tiny-llama", "revision": None}
    (reward,) = manifest["rewards"]
    assert (reward["name"], reward["model"], reward["input"]) == ("coverage", "rsoups/coverage", "pair")
    assert manifest["config"]["max_steps"] == manifest["config"]["steps"] == 4 and manifest["config"]["kl_coef"] == 0.05
    assert manifest["data"]["dataset"] == "rsoups/concepts" and manifest["data"]["rows"] > 100
    assert manifest["command"].startswith("python recipes/ppo_reward.py --config recipes/configs/embedded.yaml")
    assert manifest["sha256"] == read_adapter(iterated / "out" / "round-1" / "coverage").sha256
    assert manifest["results"]["prompts"] == 3 and manifest["results"]["after"].keys() >= {"reward", "kl"}
    assert str(iterated) not in json.dumps(manifest)


def test_a_run_pushes_its_adapter_with_its_card(tmp_path):
    with HubServer() as hub:
        hub.token = TOKEN
        hub_at = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
        env = os.environ | hub_at
        flags = ["--reward", "coverage", "--push_to_hub", "true", "--hub_private_repo", "true", *SHORT]
        flags += ["--output_dir", str(tmp_path / "ppo-coverage")]
        command = [warm_python(**hub_at), str(RECIPES / "ppo_reward.py"), *flags]
        run = subprocess.run(command, env=env | {"HF_TOKEN": "hf_wrong"}, capture_output=True, text=True, check=False)
        assert run.returncode and "the token in HF_TOKEN" in run.stderr and "hf_wrong" not in run.stdout + run.stderr
        assert not (tmp_path / "ppo-coverage").exists()  # it was known before the training
        run = subprocess.run(command, env=env | {"HF_TOKEN": TOKEN}, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        assert TOKEN not in run.stdout + run.stderr and not files_with_the_token(tmp_path)
        (commit,) = hub.history("someone/ppo-coverage")
        files = hub.files("someone/ppo-coverage")
        hub.shutdown()
    assert commit["message"] == "PPO adapter" and hub.repositories["someone/ppo-coverage"].private
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "lineage.json", "README.md"}
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert {"rewarded-soups", "lora"} <= set(metadata["tags"]) and "merge" not in metadata["tags"]
    assert "| coverage |" in card and "**KL:** to the start of the run, coefficient 0.05" in card
    assert "python recipes/ppo_reward.py --reward coverage" in card and "### Instruction:" in card
    assert "On 3 held-out prompts" in card and "| reward |" in card and "| kl |" in card


def test_the_manifest_of_a_supervised_start(tmp_path, monkeypatch, capsys):
    rows = [{"concepts": [f"dog{i}", "run"], "sentences": ["a dog runs home in the rain today."]} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model_name_or_path", "rsoups/tiny-llama", "--dataset", str(tmp_path / "rows.jsonl")]
    flags += [
        "--use_peft",
        "true",
        "--max_steps",
        "2",
        "--output_dir",
        str(tmp_path / "sft"),
        "--bf16",
        "false",
        "--report_to",
        "none",
    ]
    flags += ["--lora_target_modules", "q_proj", "v_proj", "--disable_tqdm", "true", "--use_cpu", "true"]
    run = subprocess.run([warm_python(), str(RECIPES / "sft.py"), *flags], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    manifest = manifest_of(tmp_path / "sft")
    assert manifest["sha256"] == read_adapter(tmp_path / "sft").sha256 and manifest["config"]["steps"] == 2
    assert (manifest["data"]["dataset"], manifest["data"]["rows"]) == ("rows.jsonl", 15)  # one of 16 is held out
    assert str(tmp_path) not in json.dumps(manifest)
    config = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "rsoups/tiny-llama", "no path of this machine"
    assert main(["log", str(tmp_path / "sft")]) == 0
    assert "SFT, 2 steps, rows.jsonl, seed 42" in capsys.readouterr().out
    assert main(["push", str(tmp_path / "sft"), "a/sft", "--dry-run", "--out", str(tmp_path / "dry")]) == 0
    assert "trained by SFT" in (tmp_path / "dry" / "README.md").read_text()
    assert main(["push", str(tmp_path / "sft"), "a/sft", "--dry-run", "--out", str(tmp_path / "sft")]) == 2
    assert "it is not replaced" in capsys.readouterr().err and (tmp_path / "sft" / "adapter_model.safetensors").exists()
