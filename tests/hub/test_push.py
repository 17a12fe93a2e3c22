"""Pushing to and pulling from a Hub on loopback, with huggingface_hub's own client in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
from hub_pushes import FILES, PULL, cli, push, python
from peft import PeftModel
from places import HELPERS
from tiny import tiny_llama

import rsoups
from rsoups.adapters.lineage import write_manifest
from rsoups.hub.push import push as push_folder

LOAD = """
import sys
from peft import PeftModel
sys.path.insert(0, sys.argv[1])
from tiny import tiny_llama
import rsoups, torch
ids = tiny_llama().dummy_inputs["input_ids"] % 64
by_peft = PeftModel.from_pretrained(tiny_llama(), "someone/soup")(ids).logits
soup = rsoups.Soup.from_pretrained("someone/soup")
again = rsoups.interpolate(["someone/soup"], [1.0])
expected = rsoups.interpolate(sys.argv[2:4], [0.3, 0.7]).load(tiny_llama())(ids).logits
print([float((found - expected).abs().max()) for found in
       (by_peft, soup.load(tiny_llama())(ids).logits, again.load(tiny_llama())(ids).logits)])
print(soup.lambdas, [i.name for i in soup.ingredients], len(again.ingredients[0].revision), again.lineage["history"].keys())
"""


def test_one_commit_that_peft_loads_by_its_id(hub, two, tmp_path):
    assert push(hub, two).startswith(f"{hub.url}/someone/soup/commit/")
    (commit,) = hub.history("someone/soup")
    assert set(commit["added"]) == FILES and commit["message"] == "Soup: 0.3 helpful, 0.7 harmless"
    differences, told = python(hub, tmp_path, LOAD, HELPERS, *two).splitlines()
    assert json.loads(differences) == [0, 0, 0]
    manifest = json.loads(hub.files("someone/soup")["soup.json"])
    assert told == f"(0.3, 0.7) ['helpful', 'harmless'] 40 dict_keys(['{manifest['sha256']}'])"


def test_pull_with_a_revision(hub, two, tmp_path):
    push(hub, two)
    (first,) = hub.history("someone/soup")
    rsoups.interpolate(two, [0.5, 0.5]).save_pretrained(tmp_path / "other")
    cli(hub, tmp_path, "push", tmp_path / "other", "someone/soup")
    old = f"someone/soup@{first['oid']}"
    assert python(hub, tmp_path, PULL, "someone/soup", old).splitlines() == ["[0.5, 0.5]", "[0.3, 0.7]"]
    assert "pulled" in cli(hub, tmp_path, "pull", old, "--out", "pulled")
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == FILES
    ours = rsoups.interpolate(two, [0.3, 0.7]).load(tiny_llama())
    ids = tiny_llama().dummy_inputs["input_ids"] % 64
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "pulled")
    assert (ours(ids).logits - theirs(ids).logits).abs().max() == 0
    # What was pulled is pushed as it is, lineage included.
    cli(hub, tmp_path, "push", "pulled", "someone/copy")
    copy, soup = (hub.files(name, ref) for name, ref in (("someone/copy", "main"), ("someone/soup", first["oid"])))
    assert all(copy[name] == soup[name] for name in ("adapter_model.safetensors", "soup.json"))
    assert "404" in cli(hub, tmp_path, "pull", "someone/soup@nosuch", "--out", "x", expect=2)


def test_a_pull_request_leaves_the_main_branch(hub, two):
    push(hub, two)
    out = push(hub, two, create_pr=True, commit_message="Another")
    assert out == f"{hub.url}/someone/soup/discussions/1"
    assert [c["message"] for c in hub.history("someone/soup", "refs/pr/1")][-1] == "Another"
    assert len(hub.history("someone/soup")) == 1


def test_a_private_repository_needs_the_token(hub, two, tmp_path):
    push(hub, two, private=True)
    assert hub.repositories["someone/soup"].private
    assert python(hub, tmp_path, PULL, "someone/soup") == "[0.3, 0.7]"


def test_a_dry_run_writes_the_folder_and_asks_no_one(hub, two, tmp_path):
    rsoups.interpolate(two, [0.3, 0.7]).save_pretrained(tmp_path / "soup")
    shown = cli(hub, tmp_path, "push", "soup", "someone/thing", "--dry-run")
    assert {path.name for path in (tmp_path / "thing-dry-run").iterdir()} == FILES
    assert all(name in shown for name in FILES) and "thing-dry-run" in shown
    assert not hub.repositories and not [seen for seen in hub.seen if seen[0] != "GET"]
    cli(hub, tmp_path, "push", "soup", "someone/thing", "--dry-run")  # again: replaced
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "not replaced" in cli(hub, tmp_path, "push", "soup", "someone/thing", "--dry-run", "--out", "mine", expect=2)


def test_names_that_lead_out_of_their_folder_are_never_written(hub, two, tmp_path):
    push(hub, two)
    repository = hub.repositories["someone/soup"]
    blob = next(iter(hub.blobs))
    evil = {"../../evil": blob, "/tmp/evil-rsoups": blob, "adapter_model.safetensors/../../../evil": blob}
    repository.commit("main", evil, [], b"", "evil")
    cli(hub, tmp_path, "pull", "someone/soup", "--out", "in/pulled")
    assert {path.name for path in (tmp_path / "in" / "pulled").iterdir()} == FILES
    assert not [path for path in tmp_path.rglob("evil*")] and not os.path.exists("/tmp/evil-rsoups")
    for source in ("../soup", "/etc/passwd", "someone/../x"):
        assert "Hub id" in cli(hub, tmp_path, "pull", source, "--out", "x", expect=2)


def test_a_folder_that_is_no_soup_is_told(hub, two, tmp_path):
    with pytest.raises(rsoups.AdapterError, match="no folder"):
        push_folder("someone/adapter", "someone/soup")
    assert "holds no lineage.json" in cli(hub, tmp_path, "push", two[0], "someone/soup", expect=2)
    with pytest.raises(rsoups.LineageError, match=r"interpolate\(\[.*\], \[1.0\]\)"):
        rsoups.Soup.from_pretrained(two[0])
    with pytest.raises(rsoups.HubError, match="user/name"):
        rsoups.interpolate(two).push_to_hub("name")
    with pytest.raises(rsoups.HubError, match="one soup at each λ"):
        rsoups.push_front("a/b", rsoups.interpolate(two, [[0.5, 0.5]] * 2))


def test_a_folder_of_soups_is_a_front(two, tmp_path, hub):
    """The subfolders are one repository with one card, if their soups have the same ingredients."""
    for first in (0.25, 0.5):
        soup = rsoups.interpolate({"a": two[0], "b": two[1]}, [first, 1 - first])
        soup.save_pretrained(tmp_path / "front" / f"at-{first}")
    out = push_folder(tmp_path / "front", "someone/front", dry_run=tmp_path / "dry")
    rows = [line for line in (tmp_path / "dry" / "README.md").read_text("utf-8").splitlines() if "](./" in line]
    assert rows == ["| [at-0.5](./at-0.5) | 0.5 | 0.5 |", "| [at-0.25](./at-0.25) | 0.25 | 0.75 |"]
    assert rsoups.Soup.from_pretrained(f"{out}/at-0.25").lambdas == (0.25, 0.75)

    rsoups.interpolate({"b": two[1], "a": two[0]}, [0.1, 0.9]).save_pretrained(tmp_path / "front" / "other")
    assert "the same ingredients" in cli(hub, tmp_path, "push", "front", "someone/front", "--dry-run", expect=2)


def test_what_does_not_belong_together_is_not_published(two, tmp_path, front):
    """A front beside an adapter; a manifest beside other weights, of an adapter and of a soup."""
    write_manifest(two[0], "sft", base={"model": "some/base"}, recipe="sft.py", config={}, data={})
    with pytest.raises(rsoups.HubError, match=r"holds no soup\.json: front= belongs"):
        push_folder(two[0], "someone/a", front=front, dry_run=tmp_path / "dry")
    rsoups.interpolate(two, [0.3, 0.7]).save_pretrained(tmp_path / "soup")
    rsoups.interpolate(two, [0.2, 0.8]).save_pretrained(tmp_path / "other")
    weights = "adapter_model.safetensors"
    for mine, theirs in ((two[0], two[1]), (tmp_path / "soup", tmp_path / "other")):
        (mine / weights).write_bytes((theirs / weights).read_bytes())
        with pytest.raises(rsoups.LineageError, match="its manifest is that of"):
            push_folder(mine, "someone/a", dry_run=tmp_path / "dry")
    assert not (tmp_path / "dry").exists()


@pytest.mark.skipif(not os.environ.get("HF_TOKEN"), reason="THE TRUE HUB IS NOT TESTED: no HF_TOKEN of write scope")
def test_the_true_hub(two, tmp_path):
    """Makes, reads and deletes a private repository of the token's user."""
    code = """
import sys, rsoups, huggingface_hub
name = f"{huggingface_hub.whoami()['name']}/rsoups-test-{sys.argv[1]}"
soup = rsoups.interpolate(sys.argv[2:], [0.3, 0.7])
try:
    print(soup.push_to_hub(name, private=True))
    assert rsoups.Soup.from_pretrained(name).lambdas == (0.3, 0.7)
finally:
    huggingface_hub.delete_repo(name, missing_ok=True)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", code, str(os.getpid()), *map(str, two)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "huggingface.co" in run.stdout, run.stderr
    assert os.environ["HF_TOKEN"] not in run.stdout + run.stderr
