"""What adapters were trained on: prompts that a sweep must not evaluate on, and the chat template that it must read with."""

import json
import shutil

import pytest
from sweep_runs import PROMPTS, run
from tiny import tiny_adapter

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.lineage import write_manifest
from rsoups.data.training_data import chat_template_of, check_trained, manifests_of, prompt_marks

CHAT = [[{"role": "user", "content": f"w{i}"}] for i in range(3)]


def trained(folder, prompts, seed=0, parent=None, **config):
    """An adapter with the manifest of a run on these prompts."""
    tiny_adapter(folder, seed=seed)
    told = {
        "base": {"model": "b", "revision": None},
        "recipe": "r.py",
        "config": config,
        "seed": seed,
        "parent": parent,
    }
    write_manifest(folder, "ppo", **told, data={"dataset": "d", "prompt_marks": prompt_marks(prompts)})
    return folder


def counts(folder, prompts):
    return check_trained({"it": manifests_of(read_adapter(folder))}, prompts, allowed=True)


def test_a_prompt_is_found_however_it_is_written(tmp_path):
    folder = trained(tmp_path / "a", ["Why  so?", "### Instruction: x ### Input: y ### Response: Begun so", *CHAT])
    parts = [{"role": "user", "content": [{"type": "text", "text": "w1"}], "name": "me"}]
    for prompt in (" Why so? ", "### Instruction: x ### Input: y ### Response: ", CHAT[0], parts):
        assert counts(folder, [prompt]) == {"it": 1}
    assert counts(folder, ["Why?", "why so?", [{"role": "system", "content": "w0"}, *CHAT[0]]]) == {}


def test_ancestors_count_and_the_manifest_of_other_weights_does_not(tmp_path):
    start = trained(tmp_path / "start", PROMPTS[:1])
    parent = (str(start), None, read_adapter(start).sha256)
    run = trained(tmp_path / "run", PROMPTS[1:2], seed=1, parent=parent)
    rsoups.interpolate([run, trained(tmp_path / "other", PROMPTS[2:3], seed=2)]).save_pretrained(tmp_path / "soup")
    assert counts(run, PROMPTS) == {"it": 2} and counts(tmp_path / "soup", PROMPTS) == {"it": 3}
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", run)
    assert counts(run, PROMPTS) == {}


def test_of_very_many_prompts_an_even_share_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("rsoups.data.training_data._MOST", 100)
    prompts = [f"prompt {i}" for i in range(1000)]
    folder = trained(tmp_path / "a", prompts)
    assert prompt_marks(prompts)["one_in"] == 10 and 50 < counts(folder, prompts)["it"] < 200
    assert counts(folder, [f"other {i}" for i in range(1000)]) == {}


@pytest.mark.parametrize("told", [None, 3, "x", {}, {"base64": 3}, {"base64": "!"}, {"base64": "AA=="}])
def test_marks_may_come_from_anyone(told):
    assert check_trained({"it": [{"data": {"prompt_marks": told}}], "no": [{}, {"data": None}]}, PROMPTS) == {}


def test_a_sweep_refuses_prompts_that_an_ingredient_was_trained_on(tmp_path):
    two = {name: trained(tmp_path / name, PROMPTS[:n], seed=n) for n, name in enumerate("ab")}
    out = tmp_path / "out" / "records.jsonl"
    with pytest.raises(rsoups.DatasetError, match="of 4 prompts, b on 1 were trained on.*allow_trained_prompts"):
        run(two, out)
    assert not out.exists()
    front = run(two, out, allow_trained_prompts=True)
    (note,) = [note for note in front.notes if "trained on" in note]
    assert note == "Of the 4 prompts, b on 1 were trained on: the figures are not of new prompts."
    rsoups.write_report(front, [json.loads(line) for line in out.read_text().splitlines()], out.parent)
    assert note in (out.parent / "report.md").read_text() and note in (out.parent / "report.html").read_text()
    assert not run(two, tmp_path / "new" / "records.jsonl", prompts=PROMPTS[1:]).trained_prompts


def template_of(**folders):
    return chat_template_of({name: manifests_of(read_adapter(folder)) for name, folder in folders.items()})


def test_the_chat_template_is_read_as_in_training(tmp_path):
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}
    a, b = (trained(tmp_path / name, [], seed=n, **quiet) for n, name in enumerate("ab"))
    c, plain = trained(tmp_path / "c", [], seed=2), tiny_adapter(tmp_path / "plain", seed=3)
    assert template_of(a=a, b=b, plain=plain) == {"enable_thinking": False} and template_of(c=c) == {}
    for name, other in (("ac", c), ("ab", b)):
        rsoups.interpolate([a, other]).save_pretrained(tmp_path / name)
    assert template_of(soup=tmp_path / "ab") == {"enable_thinking": False}
    with pytest.raises(rsoups.DatasetError, match="trained with different chat_template_kwargs.*'c': {}"):
        template_of(a=a, c=c)
    with pytest.raises(rsoups.DatasetError, match="soup, ingredient 2"):
        template_of(soup=tmp_path / "ac")


def test_a_sweep_has_the_chat_template_of_its_ingredients_runs(tmp_path):
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer([f"w{i}" for i in range(60)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if quiet %}w50{% else %}w51{% endif %}"
    )
    two = {
        name: trained(tmp_path / name, [], seed=n, chat_template_kwargs={"quiet": True}) for n, name in enumerate("ab")
    }
    texts = {}
    for name, more in (
        ("own", {}),
        ("same", {"chat_template_kwargs": {"quiet": True}}),
        ("loud", {"chat_template_kwargs": {}}),
    ):
        out = tmp_path / name / "records.jsonl"
        run(two, out, prompts=CHAT, tokenizer=tokenizer, **more)
        texts[name] = [json.loads(line)["response"] for line in out.read_text().splitlines()]
    assert texts["own"] == texts["same"] != texts["loud"]
    with pytest.raises(rsoups.OutputError, match="chat_template_kwargs"):
        run(two, tmp_path / "own" / "records.jsonl", prompts=CHAT, tokenizer=tokenizer, chat_template_kwargs={})


@pytest.mark.parametrize(
    "prompt", ["  ", [{"role": "assistant", "content": "w1"}], [{"role": "user", "content": None}]]
)
def test_a_sweep_refuses_prompts_that_ask_nothing(tmp_path, prompt):
    two = {name: tiny_adapter(tmp_path / name, seed=n) for n, name in enumerate("ab")}
    with pytest.raises(rsoups.DatasetError, match="asks nothing|nothing to answer|must be a text"):
        run(two, tmp_path / "records.jsonl", prompts=[*PROMPTS, prompt])
    assert not (tmp_path / "records.jsonl").exists()
