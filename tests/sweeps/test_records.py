"""A sweep's records: a killed sweep goes on, a later one adds to it, and records of another one are not mixed in."""

import json

import pytest
import torch
from sweep_runs import GRID, PROMPTS, WORDS, changed_llama, first, length, run, same
from tiny import tiny_llama, tiny_tokenizer

import rsoups
from rsoups.common.files import only_run_in, read_jsonl
from rsoups.sweeps.base import Base


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
    assert same(read_jsonl(killed), read_jsonl(tmp_path / "whole.jsonl"))
    assert len(asked) == len(whole) - keep
    asked.clear()
    run(two, killed, rewards={"length": counting, "first": first})
    assert asked == []


def test_a_later_sweep_adds_models_and_samples(two, tmp_path):
    path = tmp_path / "r.jsonl"
    run(two, path)
    before = read_jsonl(path)
    run(two, path, lambdas=[*GRID, [0.25, 0.75]], samples=2, others={"MORL": two["a"]})
    records = read_jsonl(path)
    assert len(records) == 6 * 4 * 2 and all(record in records for record in before)
    run(two, path)
    assert read_jsonl(path)[:16] == before and len(read_jsonl(path)) == 48
    assert json.loads((tmp_path / "r.settings.json").read_text())["others"] == {"MORL": "a"}
    with pytest.raises(rsoups.OutputError, match=r"differing: \['others: MORL'\]"):
        run(two, path, others={"MORL": two["b"]})


@pytest.mark.parametrize(
    ("setting", "more"),
    [
        ("seed", {"seed": 1}),
        ("temperature", {"temperature": 0.5}),
        ("max_new_tokens", {"max_new_tokens": 5}),
        ("prompts", {"prompts": PROMPTS[:3]}),
        ("columns", {"columns": {"place": [1, 2, 3, 4]}}),
        ("cut", {"cut": str.upper}),
        ("rewards", {"rewards": {"length": length}}),
        ("server", {"server": "http://127.0.0.1:9"}),
    ],
)
def test_records_with_another_setting_are_not_mixed_in(two, tmp_path, setting, more):
    path = tmp_path / "records.jsonl"
    run(two, path)
    before = path.read_bytes()
    with pytest.raises(rsoups.OutputError, match=rf"differing: \['{setting}'\]"):
        run(two, path, **more)
    assert path.read_bytes() == before


def test_records_of_another_sweep_are_not_mixed_in(two, tmp_path):
    run(two, tmp_path / "records.jsonl")
    before = (tmp_path / "records.jsonl").read_bytes()
    exchanged = dict(zip("ab", reversed(two.values()), strict=True))
    for others in (exchanged, {"a": two["a"], "c": two["b"]}):
        with pytest.raises(rsoups.OutputError, match=r"differing: \['ingredients'\]"):
            run(others, tmp_path / "records.jsonl")
    with pytest.raises(rsoups.OutputError, match=r"differing: \['the order of the ingredients'\]"):
        run({"b": two["b"], "a": two["a"]}, tmp_path / "records.jsonl")
    with only_run_in(tmp_path), pytest.raises(rsoups.OutputError, match="another run is writing"):
        run(two, tmp_path / "records.jsonl")
    assert (tmp_path / "records.jsonl").read_bytes() == before
    (tmp_path / "records.settings.json").unlink()
    with pytest.raises(rsoups.OutputError, match=r"without its records.settings.json"):
        run(two, tmp_path / "records.jsonl")


def test_the_hash_of_a_base_looks_beyond_the_first_values():
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.view(-1)[1:] *= 1.5
    hashes = [Base(model, tiny_tokenizer(WORDS)).fingerprint() for model in (tiny_llama(), tiny_llama(), changed)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_records_go_on_with_the_weights_of_their_base_only(two, tmp_path):
    path, beside = tmp_path / "records.jsonl", tmp_path / "records.settings.json"
    for name, model in (("base", tiny_llama()), ("moved", tiny_llama()), ("other", changed_llama())):
        model.save_pretrained(tmp_path / name)
    base, moved, other = (str(tmp_path / name) for name in ("base", "moved", "other"))
    run(two, path, base=base)
    run(two, path, base=other)  # all is answered: nothing is loaded, and nothing tells of this base
    pinned = json.loads(beside.read_text())
    assert pinned["base"] == base and len(pinned["base_weights"]) == 64
    more = iter([0.1, 0.2, 0.3, 0.4])
    for same_base in (moved, tiny_llama(), rsoups.LiveSoup(tiny_llama(), two), tiny_llama().bfloat16()):
        adapters = None if isinstance(same_base, rsoups.LiveSoup) else two
        run(adapters, path, base=same_base, lambdas=[[x := next(more), 1 - x]])
        told = json.loads(beside.read_text())
        assert (told["base"], told["base_weights"]) == (moved, pinned["base_weights"])
    before = path.read_bytes()
    for another in (other, changed_llama(), rsoups.LiveSoup(changed_llama(), two)):
        adapters = None if isinstance(another, rsoups.LiveSoup) else two
        with pytest.raises(
            rsoups.OutputError, match=rf"the base's weights; theirs are of {moved}.*choose another file"
        ):
            run(adapters, path, base=another, samples=2)
        assert path.read_bytes() == before and json.loads(beside.read_text())["base"] == moved
    beside.write_text(json.dumps({k: v for k, v in told.items() if k != "base_weights"}))  # as older ones
    run(two, path, samples=2)
    assert json.loads(beside.read_text())["base_weights"] == pinned["base_weights"]
    path.write_text("")  # no records: nothing to protect
    run(two, path, base=other)
    assert json.loads(beside.read_text())["base"] == other


def test_the_settings_tell_how_the_records_were_made(two, tmp_path):
    notes = {"task": "concepts"}
    run(two, tmp_path / "out" / "r.jsonl", held_out=["first"], others={"M": two["a"]}, notes=notes, seed=2)
    found = json.loads((tmp_path / "out" / "r.settings.json").read_text())
    assert found["adapters"] == {"a": "../a", "b": "../b"} and found["others"] == {"M": "../a"}
    assert (found["base"], found["rewards"], found["held_out"]) == (None, ["length", "first"], ["first"])
    assert (found["task"], found["seed"], found["max_new_tokens"], found["temperature"]) == ("concepts", 2, 6, 1.0)
    assert found["ingredients"]["a"] == rsoups.interpolate(two).ingredients[0].sha256
    assert {"command", "time", "versions", "samples", "method"} <= found.keys()


def test_line_breaks_of_other_alphabets_stay_within_their_record(two, tmp_path):
    run(two, tmp_path / "r.jsonl", cut=lambda text: f"{text}\u2028\x85\u2029 end")
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 16
    assert all(r["response"].endswith("\u2028\x85\u2029 end") for r in read_jsonl(tmp_path / "r.jsonl"))
