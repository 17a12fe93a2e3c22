"""What is published names nothing of this disk."""

import json
import sys

import pytest
from peft import PeftModel
from tiny import tiny_adapter, tiny_llama

import rsoups
from rsoups.adapters.lineage import write_manifest
from rsoups.cli.main import main
from rsoups.hub.push import push as push_folder

SECRET = "someone-secret"


@pytest.fixture
def secret(tmp_path, monkeypatch):
    """A base and two runs' adapters of it in a folder that nobody shall know of, and a soup of them."""
    home = tmp_path / SECRET
    tiny_llama().save_pretrained(home / "mybase")
    monkeypatch.chdir(home)
    for seed, name in enumerate("ab"):
        folder = tiny_adapter(home / name, type(tiny_llama()).from_pretrained(home / "mybase"), seed=seed)
        monkeypatch.setattr(sys, "argv", ["ppo_reward.py", f"--output_dir={home}/{name}", "--reward", f"{home}/r.yaml"])
        write_manifest(
            folder,
            "ppo",
            base={"model": str(home / "mybase"), "revision": None},
            recipe=str(home / "ppo.py"),
            config={"reward": [f"{home}/r.yaml"], "deepspeed": f"{home}/ds.json"},
            data={"dataset": str(home / "rows.jsonl"), "template": "/think {question}"},
            rewards=[{"name": "r", "model": str(home / "rm"), "input": "/x {response}", "models": [f"{home}/one"]}],
            seed=0,
        )
    monkeypatch.setattr(sys, "argv", ["rsoups", "interpolate", f"--out={home}/soup", f"a={home}/a"])
    rsoups.interpolate([home / "a", home / "b"], [0.3, 0.7]).save_pretrained(home / "soup")
    return home


def published_texts(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".md", ".json")]
    texts = {path.name: path.read_text("utf-8") for path in paths}
    assert not [name for name, text in texts.items() if SECRET in text]
    return texts


@pytest.mark.parametrize("what", ["soup", "made here", "front", "adapter"])
def test_no_path_of_a_disk_is_published(secret, tmp_path, what):
    """Neither those of the base nor of ingredients, rewards, data and commands; the base has the name that is given."""
    soup = rsoups.Soup.from_pretrained(secret / "soup")
    here = rsoups.interpolate({name: secret / name for name in "ab"}, [0.3, 0.7])
    push = {
        "soup": lambda **more: soup.push_to_hub("someone/x", **more),
        "made here": lambda **more: here.push_to_hub("someone/x", **more),
        "front": lambda **more: rsoups.push_front("someone/x", [here], **more),
        "adapter": lambda **more: push_folder(secret / "a", "someone/x", **more),
    }[what]
    with pytest.warns(UserWarning, match="published as 'mybase', which nobody else can load"):
        push(dry_run=tmp_path / "warned")
    assert "`mybase`" in published_texts(tmp_path / "warned")["README.md"]
    push(dry_run=tmp_path / "named", base="someone/base")
    texts = published_texts(tmp_path / "named")
    assert "[someone/base](https://huggingface.co/someone/base)" in texts["README.md"]
    assert json.loads(texts["adapter_config.json"])["base_model_name_or_path"] == "someone/base"
    manifest = json.loads(texts["lineage.json" if what == "adapter" else "soup.json"])
    assert manifest["base"]["model"] == "someone/base"
    run = manifest if what == "adapter" else next(iter(manifest["history"].values()))
    assert run["data"]["template"] == "/think {question}" and run["rewards"][0]["input"] == "/x {response}"
    assert run["config"]["reward"] == ["r.yaml"] and run["rewards"][0]["model"] == "rm"
    assert PeftModel.from_pretrained(tiny_llama(), next((tmp_path / "named").rglob("adapter_config.json")).parent)


def test_the_command_line_publishes_under_a_name(secret, capsys, recwarn):
    assert main(["push", "soup", "someone/x", "--dry-run", "--out", "dry"]) == 0
    assert "--base user/name" in str(recwarn.list[-1].message)
    assert main(["push", "soup", "someone/x", "--dry-run", "--out", "dry", "--base", "someone/base"]) == 0
    assert "someone/base" in published_texts(secret / "dry")["README.md"]


def test_the_dataset_of_a_front_is_no_path(secret, tmp_path, front):
    settings = front.with_suffix(".settings.json")
    settings.write_text(json.dumps({"dataset": str(secret / "rows.jsonl"), "task": "custom"}))
    weights = next(p for p in rsoups.Front.from_jsonl(front).soups if 0 < p.lambdas["helpful"] < 1)
    named = {"helpful": secret / "a", "harmless": secret / "b"}
    soup = rsoups.interpolate(named, list(weights.lambdas.values()))
    soup.push_to_hub("someone/x", front=front, base="someone/base", dry_run=tmp_path / "dry")
    assert json.loads(published_texts(tmp_path / "dry")["front.json"])["settings"]["dataset"] == "rows.jsonl"


def test_what_is_saved_here_still_finds_its_base(secret):
    """Its own adapter_config.json keeps the path, which PEFT and `rsoups merge` read; soup.json does not tell it."""
    config = json.loads((secret / "soup" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(secret / "mybase")
    assert SECRET not in (secret / "soup" / "soup.json").read_text()
    assert main(["merge", str(secret / "soup"), "--out", "merged"]) == 0
    assert SECRET not in (secret / "merged" / "soup.json").read_text() + (secret / "merged" / "config.json").read_text()
