"""Pushing to and pulling from a Hub on loopback, with huggingface_hub's own client in a process of its own."""

import json
import math
import os
import subprocess
import sys

import httpx2
import pytest
import yaml
from front_records import records
from hub_server import CUT, TOKEN, Client, HubServer, files_with_the_token
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from places import HELPERS
from tiny import tiny_adapter, tiny_llama

import rsoups
from rsoups.adapters.lineage import write_manifest
from rsoups.cli.main import main
from rsoups.hub.licenses import strictest
from rsoups.hub.push import push as push_folder
from rsoups.hub.upload import retried

REQUEST = httpx2.Request("POST", "https://huggingface.co/api/models/x/commit/main")
PUSH = """
import ast, sys, time, rsoups
time.sleep = lambda seconds: print(f"waited {seconds:g}")
soup = rsoups.interpolate({"helpful": sys.argv[1], "harmless": sys.argv[2]}, [0.3, 0.7])
try:
    print(soup.push_to_hub("someone/soup", **ast.literal_eval(sys.argv[3])))
except rsoups.RsoupsError as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with HubServer() as server:
        server.client = Client(server, home, TOKEN)
        yield server
        server.client.close()
        server.shutdown()
    assert not files_with_the_token(home)


@pytest.fixture
def hub(served):
    yield served
    assert not [blob for blob in served.blobs.values() if TOKEN.encode() in blob]
    served.clear()


def python(hub, folder, code, *arguments, expect=0):
    """Run code in a folder, in a process of its own; nothing ever shows the token, nor is it in any file."""
    status, out, err = hub.client(folder, code, *arguments)
    assert status == expect, err
    assert TOKEN not in out + err and not files_with_the_token(folder)
    return (out if expect == 0 else err).strip()


def push(hub, two, **options):
    return python(hub, two[0].parent, PUSH, *two, repr(options))


def cli(hub, folder, *arguments, expect=0):
    return python(
        hub,
        folder,
        f"import sys, rsoups.cli.main; sys.exit(rsoups.cli.main.main({[str(a) for a in arguments]}))",
        expect=expect,
    )


FILES = {"adapter_model.safetensors", "adapter_config.json", "soup.json", "README.md"}
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


PULL = """
import sys, rsoups, json
for source in sys.argv[1:]:
    print(json.dumps(rsoups.Soup.from_pretrained(source).lambdas))
"""


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


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_explained_and_not_tried_again(hub, two, status):
    hub.faults = [("POST", "/api/repos/create", status, {})]
    out = push(hub, two)
    assert "the token in HF_TOKEN" in out and "write scope for someone" in out
    assert len([path for _, path in hub.seen if "create" in path]) == 1 and not hub.repositories


def test_busy_hubs_and_conflicts_are_tried_again(hub, two):
    hub.faults = [
        ("POST", "/commit/main", 429, {"Retry-After": "7"}),
        ("POST", "/commit/main", 409, {}),
        ("POST", "/commit/main", 503, {}),
    ]
    out = push(hub, two).splitlines()
    assert out[:3] == ["waited 7", "waited 2", "waited 4"] and "/commit/" in out[3]
    assert len(hub.history("someone/soup")) == 1 and len(hub.puts()) == 1  # the weights went over once
    heads = [path for method, path in hub.seen if (method, path) == ("GET", "/api/models/someone/soup")]
    assert len(heads) == 4  # each attempt looked where the head is


@pytest.mark.parametrize(
    ("told", "waited"),
    [
        ("86400", 60),
        ("0", 0),
        ("9" * 400, 60),
        ("-1", 1),
        ("inf", 1),
        ("\u00b2", 1),
        ("Fri, 31 Dec 2099 23:59:59 GMT", 1),
    ],
)
def test_a_hub_cannot_make_anyone_wait_for_ever(monkeypatch, told, waited):
    slept, answers = [], [429, 200]
    monkeypatch.setattr("time.sleep", slept.append)

    def call():
        if (status := answers.pop(0)) == 200:
            return "done"
        response = httpx2.Response(status, headers=[(b"Retry-After", told.encode("latin-1"))], request=REQUEST)
        raise HfHubHTTPError("busy", response=response)

    assert retried("someone/soup", None, call) == "done" and slept == [waited]


def test_a_commit_is_made_on_the_head_that_was_looked_at(hub, two, tmp_path):
    """Someone else pushes between the look and the commit: ours is refused, and made on theirs."""
    code = """
import sys, time, rsoups
from huggingface_hub import CommitOperationAdd, HfApi
time.sleep = lambda seconds: print(f"waited {seconds:g}")
look, raced = HfApi.model_info, []
def then_someone_else_pushes(api, repo_id, **more):
    found = look(api, repo_id, **more)
    if not raced:
        raced.append(True)
        api.create_commit(repo_id, [CommitOperationAdd("theirs.txt", b"theirs")], commit_message="theirs")
    return found
HfApi.model_info = then_someone_else_pushes
print(rsoups.interpolate(sys.argv[1:], [0.3, 0.7]).push_to_hub("someone/soup", commit_message="ours"))
"""
    out = python(hub, tmp_path, code, *two).splitlines()
    assert out[0] == "waited 1" and "/commit/" in out[1]
    assert [commit["message"] for commit in hub.history("someone/soup")] == ["theirs", "ours"]
    assert "theirs.txt" in hub.files("someone/soup")


def test_the_license_is_that_of_the_revision(hub, two, tmp_path):
    for license in ("mit", "apache-2.0"):
        push(hub, two, license=license)
    first, second = (commit["oid"] for commit in hub.history("someone/soup"))
    code = (
        "import sys; from rsoups.hub.licenses import _stated; print([_stated('someone/soup', r) for r in sys.argv[1:]])"
    )
    assert python(hub, tmp_path, code, first, second) == "['mit', 'apache-2.0']"


def test_what_waiting_cannot_help_is_not_tried_again(hub, two):
    hub.faults = [("POST", "/commit/main", 400, {})]
    assert "HubError: the Hub refused someone/soup (400)" in push(hub, two)
    assert not hub.history("someone/soup")


def test_giving_up_says_so(hub, two):
    hub.faults = [("POST", "/commit/main", 500, {})] * 5
    assert "in 5 attempts (status 500)" in push(hub, two)
    assert not hub.history("someone/soup")


def test_a_connection_that_is_cut_in_an_upload_is_gone_on_with(hub, two, tmp_path):
    """Two soups' weights: one of the uploads is cut; the other one is not sent again."""
    code = """
import sys, time, rsoups
time.sleep = lambda seconds: None
soups = rsoups.interpolate(sys.argv[1:], [[0.25, 0.75], [0.5, 0.5]])
print(rsoups.push_front("someone/front", soups))
"""
    hub.faults = [("PUT", "/blob/", CUT, {})]
    assert "/commit/" in python(hub, tmp_path, code, *two)
    (commit,) = hub.history("someone/front")
    folders = ("lambda-0.25-0.75", "lambda-0.5-0.5")
    assert {p for p in commit["added"] if "/" in p} == {f"{f}/{n}" for f in folders for n in FILES - {"README.md"}}
    assert len(hub.puts()) == 3 and len(set(hub.puts())) == 2
    pulled = python(hub, tmp_path, PULL, *(f"someone/front/{f}" for f in folders))
    assert pulled.splitlines() == ["[0.25, 0.75]", "[0.5, 0.5]"]
    cli(hub, tmp_path, "pull", "someone/front/lambda-0.5-0.5", "--out", "half")
    assert {path.name for path in (tmp_path / "half").iterdir()} == FILES - {"README.md"}


def test_a_connection_that_is_cut_in_the_commit_publishes_nothing_or_all(hub, two):
    hub.faults = [("POST", "/commit/main", CUT, {})] * 5
    assert "HubError" in push(hub, two) and not hub.history("someone/soup")
    hub.faults = [("POST", "/commit/main", CUT, {})]
    assert "/commit/" in push(hub, two) and len(hub.history("someone/soup")) == 1


def test_concurrent_pushes_lose_nothing(hub, two, tmp_path):
    """Four at once to one repository: every soup is a commit, one after the other, and all are there in the end."""
    code = """
import sys, time, rsoups
from concurrent.futures import ThreadPoolExecutor
sleep = time.sleep
time.sleep = lambda seconds: sleep(0.05 * seconds)
soups = rsoups.interpolate(sys.argv[1:], [[w, 1 - w] for w in (0.2, 0.4, 0.6, 0.8)])
with ThreadPoolExecutor(4) as pool:
    print(*pool.map(lambda soup: rsoups.push_front("someone/front", [soup]), soups), sep="\\n")
"""
    urls = python(hub, tmp_path, code, *two).splitlines()
    commits = hub.history("someone/front")
    assert {url.rsplit("/", 1)[1] for url in urls} == {commit["oid"] for commit in commits} and len(commits) == 4
    folders = {path.split("/")[0] for path in hub.files("someone/front") if "/" in path}
    assert folders == {"lambda-0.2-0.8", "lambda-0.4-0.6", "lambda-0.6-0.4", "lambda-0.8-0.2"}


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


@pytest.fixture
def front(tmp_path):
    path = tmp_path / "records.jsonl"
    rows, _ = records(n=40)
    for row in rows:
        if row["lambdas"]:
            row["lambdas"] = dict(zip(("helpful", "harmless"), row["lambdas"].values(), strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"temperature": 0.7, "seed": 3, "task": "assistant", "adapters": {"x": "/home/someone/x"}}
    path.with_suffix(".settings.json").write_text(json.dumps(settings))
    return path


def test_a_front_goes_along(hub, two, front, tmp_path):
    """Its figures, its picture, and evaluation results with n and interval in the card's metadata."""
    weights = next(p for p in rsoups.Front.from_jsonl(front).soups if 0 < p.lambdas["helpful"] < 1)
    rsoups.interpolate(
        dict(zip(("helpful", "harmless"), two, strict=True)), list(weights.lambdas.values())
    ).save_pretrained(tmp_path / "soup")
    cli(hub, tmp_path, "push", "soup", "someone/soup", "--front", front, "--license", "mit")
    files = hub.files("someone/soup")
    assert set(files) == FILES | {"front.json", "front.png"} and files["front.png"].startswith(b"\x89PNG")
    data = json.loads(files["front.json"])
    assert data["settings"] == {"temperature": 0.7, "seed": 3, "task": "assistant"} and "/home" not in str(files)
    (mine,) = [p for p in data["points"] if p["lambdas"] == weights.lambdas]
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    (result,) = metadata["model-index"][0]["results"]
    assert metadata["license"] == "mit" and result["dataset"]["type"] == "Anthropic/hh-rlhf"
    found = {m["type"]: (m["value"], m["args"]["low"], m["args"]["high"], m["args"]["n"]) for m in result["metrics"]}
    expected = {r: tuple(round(mine[k][r], 6) for k in ("mean", "low", "high")) + (mine["n"],) for r in data["rewards"]}
    assert found == expected
    assert "![The front: rewards at every λ](front.png)" in card and "rsoups interpolate" in card
    # A push without a front takes the old one's files away: they would tell of another soup.
    cli(hub, tmp_path, "push", "soup", "someone/soup")
    assert set(hub.files("someone/soup")) == FILES


def test_a_front_without_this_soup_is_refused(hub, two, front, tmp_path):
    rsoups.interpolate(two, [0.123, 0.877]).save_pretrained(tmp_path / "soup")
    assert "no soup at λ" in cli(hub, tmp_path, "push", "soup", "someone/soup", "--front", front, expect=2)
    assert not hub.repositories


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


def test_a_soup_that_was_read_is_the_soup_that_was_saved(two, tmp_path):
    made = rsoups.interpolate(two, [0.25, 0.75], method="svd", rank=3)
    made.save_pretrained(tmp_path / "soup")
    read = rsoups.Soup.from_pretrained(tmp_path / "soup")
    assert read.ingredients == made.ingredients and read.lambdas == made.lambdas and read.svd_error == made.svd_error
    assert all((read.state_dict[key] == tensor).all() for key, tensor in made.state_dict.items())
    read.save_pretrained(tmp_path / "again")
    assert all(
        (tmp_path / "again" / n).read_bytes() == (tmp_path / "soup" / n).read_bytes() for n in FILES - {"README.md"}
    )
    both = rsoups.interpolate({"old": read, "new": two[0]}, [0.5, 0.5])
    assert [i.name for i in both.ingredients] == ["old", "new"]
    assert both.ingredients[0].sha256 == json.loads((tmp_path / "soup" / "soup.json").read_text())["sha256"]
    assert read.truncate(2).config.r == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ingredients", 3),
        ("ingredients", [{"name": "a"}]),
        ("ingredients", [{"name": "a", "source": "b", "sha256": "c", "lambda": math.nan}]),
        ("ingredients", []),
        ("ingredients", [{"name": "a", "source": "b", "sha256": "c"}]),
        ("method", "full weights"),
        ("svd_error", "none"),
        ("history", []),
        ("history", {"a": 3}),
        ("config", "x"),
        ("rewards", ["x"]),
    ],
)
def test_a_soup_json_that_is_none_is_refused(two, tmp_path, field, value):
    rsoups.interpolate(two).save_pretrained(tmp_path / "soup")
    path = tmp_path / "soup" / "soup.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(rsoups.LineageError, match=r"soup\.json"):
        rsoups.Soup.from_pretrained(tmp_path / "soup")


def card_of(soup, folder, **options):
    soup.push_to_hub("someone/soup", dry_run=folder, **options)
    return (folder / "README.md").read_text("utf-8")


def test_the_card_is_true(two, tmp_path):
    soup = rsoups.interpolate({"helpful": two[0], "harmless": two[1]}, [0.3, 0.7])
    text = card_of(soup, tmp_path / "dry")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "peft" and {"rewarded-soups", "lora", "merge"} <= set(metadata["tags"])
    assert "base_model" not in metadata  # it was made from a config, and has no name on the Hub
    assert "license" not in metadata and "none is known of" in text
    assert "| helpful | 0.3 |" in text and str(tmp_path) not in text
    assert "--lambdas 0.3 0.7 --out soup" in text
    for folder in two:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "huggyllama/llama-7b"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    metadata = yaml.safe_load(card_of(rsoups.interpolate(two), tmp_path / "dry", license="other").split("---")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("huggyllama/llama-7b", "adapter")
    assert metadata["license"] == "other"


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


def test_licenses_are_not_guessed(two, tmp_path):
    assert strictest({"base": "apache-2.0", "a": "mit"}) == ("apache-2.0", "")
    assert strictest({"base": "llama2", "a": "mit"})[0] == "llama2"
    license, why = strictest({"base": "llama2", "a": "cc-by-nc-4.0"})
    assert license is None and "several sets of terms" in why and "a: cc-by-nc-4.0" in why
    license, why = strictest({"base": "mit", "a": None})
    assert license is None and "none is known of a" in why
    for folder in two:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "rsoups/tiny-llama"
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    text = card_of(rsoups.interpolate(two), tmp_path / "dry")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "apache-2.0" and "base_model" not in metadata  # the embedded base is not on the Hub


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
