"""Sweeps: what is written, that a killed one goes on, and that the base comes out as it went in."""

import json

import pytest
import torch
from tiny import tiny_adapter, tiny_llama, tiny_tokenizer

import rsoups
from rsoups.tasks import read_jsonl

WORDS = [f"w{i}" for i in range(60)]
PROMPTS = ["w1 w2", "w3 w4 w5 w6", "w7", "w8 w9 w10"]


def length(prompts, responses):
    return [float(len(r.split())) for r in responses]


def first(prompts, responses):
    return [float(sum(map(ord, r))) for r in responses]


REWARDS = {"length": length, "first": first}


@pytest.fixture
def two(tmp_path):
    return {name: tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")}


def run(two, out, rewards=REWARDS, **kwargs):
    settings = {"lambdas": [[1, 0], [0.5, 0.5], [0, 1]], "max_new_tokens": 6, "batch_tokens": 30, "progress": False}
    return rsoups.sweep(
        tiny_llama(), two, rewards, PROMPTS, tokenizer=tiny_tokenizer(WORDS), out=out, **(settings | kwargs)
    )


def test_simplex():
    assert rsoups.simplex(2, 3) == [[1, 0], [0.5, 0.5], [0, 1]]
    grid = rsoups.simplex(3, 5)
    assert len(grid) == 15 and all(sum(row) == pytest.approx(1) for row in grid)
    with pytest.raises(ValueError, match="at least"):
        rsoups.simplex(2, 1)


def test_one_record_for_every_model_and_prompt(two, tmp_path):
    front = run(two, tmp_path / "records.jsonl", others={"MORL": two["a"]}, seed=3)
    records = read_jsonl(tmp_path / "records.jsonl")
    assert len(records) == 5 * 4
    assert list(records[0]) == [
        *("name", "lambdas", "method", "prompt", "response", "rewards", "seed", "sample", "tokens", "kl", "base_nll")
    ]
    for row in records:
        assert row["rewards"] == {name: f([row["prompt"]], [row["response"]])[0] for name, f in REWARDS.items()}
        assert row["seed"] == 3
    assert [p.lambdas for p in front.soups] == [{"a": 1, "b": 0}, {"a": 0.5, "b": 0.5}, {"a": 0, "b": 1}]
    assert [p.name for p in front.others] == ["base", "MORL"]
    texts = {(r["name"], json.dumps(r["lambdas"]), r["prompt"]): r["response"] for r in records}
    for prompt in PROMPTS:  # the MORL run here is adapter a: the same texts as the soup at its end
        assert texts["MORL", "null", prompt] == texts["soup", '{"a": 1.0, "b": 0.0}', prompt]
    assert len(set(texts.values())) > 8


def test_responses_are_those_of_generate_on_the_merged_model(two, tmp_path):
    run(two, tmp_path / "records.jsonl", temperature=0, batch_tokens=1)
    tokenizer, model = tiny_tokenizer(WORDS), rsoups.interpolate(two, [0.5, 0.5]).load(tiny_llama()).merge_and_unload()
    found = {
        r["prompt"]: r["response"]
        for r in read_jsonl(tmp_path / "records.jsonl")
        if r["lambdas"] == {"a": 0.5, "b": 0.5}
    }
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=6, pad_token_id=0)
        text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found[prompt] == text.strip()


@pytest.mark.parametrize("keep", [0, 5, 8, 15])
def test_a_killed_sweep_goes_on_and_ends_the_same(two, tmp_path, keep):
    run(two, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    killed = tmp_path / "killed.jsonl"
    killed.write_text("".join(whole[:keep]) + (whole[keep][:20] if keep else ""))
    (tmp_path / "killed.settings.json").write_bytes((tmp_path / "whole.settings.json").read_bytes())
    asked = []

    def counting(prompts, responses):
        asked.extend(prompts)
        return length(prompts, responses)

    run(two, killed, rewards={"length": counting, "first": first})
    assert sorted(killed.read_text().splitlines()) == sorted(line.rstrip("\n") for line in whole)
    assert len(asked) <= len(whole) - keep + 2  # at most one batch again
    asked.clear()
    run(two, killed, rewards={"length": counting, "first": first})
    assert asked == []


def test_records_of_another_sweep_are_not_mixed_in(two, tmp_path):
    run(two, tmp_path / "records.jsonl")
    before = (tmp_path / "records.jsonl").read_bytes()
    with pytest.raises(rsoups.OutputError, match=r"differing: \['seed'\]"):
        run(two, tmp_path / "records.jsonl", seed=1)
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_what_cannot_be_swept(two, tmp_path):
    with pytest.raises(rsoups.RewardError, match="at least one reward"):
        run(two, tmp_path / "r.jsonl", rewards={})
    with pytest.raises(rsoups.DatasetError, match="2, 1 of them different"):
        rsoups.sweep(
            tiny_llama(), two, REWARDS, ["w1", "w1"], tokenizer=tiny_tokenizer(WORDS), out=tmp_path / "r.jsonl"
        )
    with pytest.raises(rsoups.LambdasError, match="sum to 2"):
        run(two, tmp_path / "r.jsonl", lambdas=[[1, 1]])
    with pytest.raises(rsoups.RewardError, match="returned nan"):
        run(two, tmp_path / "r.jsonl", rewards={"bad": lambda p, r: [float("nan")] * len(r)})
    assert (tmp_path / "r.jsonl").read_text() == ""


def test_the_tokenizer_and_the_base_come_out_as_they_went_in(two, tmp_path):
    base, tokenizer = tiny_llama(), tiny_tokenizer(WORDS)
    tokenizer.padding_side = "right"
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    out = tmp_path / "r.jsonl"
    rsoups.sweep(
        base, two, REWARDS, PROMPTS, [[0.5, 0.5]], tokenizer=tokenizer, max_new_tokens=2, progress=False, out=out
    )
    assert tokenizer.padding_side == "right"
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
