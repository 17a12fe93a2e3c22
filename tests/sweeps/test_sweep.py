"""Sweeps: what is swept, scored and refined, and what cannot be."""

import json

import numpy as np
import pytest
from sweep_runs import GRID, PROMPTS, REWARDS, WORDS, first, length, run, same, texts
from tiny import tiny_adapter, tiny_llama, tiny_tokenizer

import rsoups
from rsoups.common.files import read_jsonl


def test_a_reward_that_abstains_is_a_mean_over_the_others(two, tmp_path):
    """One prompt it never scores; of another one only responses of an even length. The rest is as if it were not there."""

    def some(prompts, responses):
        scores = length(prompts, responses)
        return [
            None if p == PROMPTS[0] or (p == PROMPTS[1] and s % 2) else s for p, s in zip(prompts, scores, strict=True)
        ]

    front = run(two, tmp_path / "records.jsonl", {"some": some, "length": length}, samples=3, refine=1)
    records = read_jsonl(tmp_path / "records.jsonl")
    assert {r["rewards"]["some"] is None for r in records if r["prompt"] == PROMPTS[0]} == {True}
    for point in front.points:
        mine = [r for r in records if (r["name"], r["lambdas"]) == (point.name, point.lambdas)]
        by_prompt = []
        for prompt in PROMPTS:
            scores = [r["rewards"]["some"] for r in mine if r["prompt"] == prompt and r["rewards"]["some"] is not None]
            by_prompt += [np.mean(scores)] if scores else []
        assert point.mean["some"] == pytest.approx(np.mean(by_prompt))
        assert point.low["some"] <= point.mean["some"] <= point.high["some"] and np.isfinite(point.high["some"])
    assert any(note.startswith("some has no score for the responses to ") for note in front.notes)
    rsoups.write_report(front, records, tmp_path)
    never = [
        r | {"rewards": r["rewards"] | {"some": None}, "abstained": ["some"]} if r["name"] == "base" else r
        for r in records
    ]
    with pytest.raises(rsoups.FrontError, match="some has no score .* for any response of .*base"):
        rsoups.Front.from_records(never)


def test_one_record_for_every_model_prompt_and_sample(two, tmp_path):
    front = run(two, tmp_path / "records.jsonl", others={"MORL": two["a"]}, seed=3, samples=2, ensemble=True)
    records = read_jsonl(tmp_path / "records.jsonl")
    assert [(r["name"], r["prompt"], r["sample"]) for r in records] == [
        (name, prompt, sample)
        for name in ("base", "soup", "soup", "soup", "MORL", "ensemble")
        for prompt in PROMPTS
        for sample in (0, 1)
    ]
    assert list(records[0]) == [
        *("name", "lambdas", "method", "prompt", "response", "rewards", "seed", "sample", "tokens", "kl", "base_nll")
    ]
    for row in records:
        assert row["rewards"] == {name: f([row["prompt"]], [row["response"]])[0] for name, f in REWARDS.items()}
        assert row["seed"] == 3
    assert [p.lambdas for p in front.soups] == [{"a": 1, "b": 0}, {"a": 0.5, "b": 0.5}, {"a": 0, "b": 1}]
    assert [p.name for p in front.others] == ["base", "MORL", "ensemble"]
    found = texts(tmp_path / "records.jsonl")
    for prompt in map(
        json.dumps, PROMPTS
    ):  # the MORL run here is adapter a: under the same random numbers, the same texts
        for sample in (0, 1):
            assert found["MORL", "null", prompt, sample] == found["soup", '{"a": 1.0, "b": 0.0}', prompt, sample]
        assert found["base", "null", prompt, 0] != found["base", "null", prompt, 1]
    assert len(set(found.values())) > 30


def test_rewards_are_handed_their_rows_columns(two, tmp_path):
    seen = {}

    def plain(prompts, responses):
        return [1.0] * len(prompts)

    def named(prompts, responses, references):
        seen.update(zip(prompts, references, strict=True))
        return [float(len(r)) for r in references]

    def trl(prompts, completions, **columns):
        assert columns.keys() == {"references", "place"}
        return [float(place) for place in columns["place"]]

    columns = {"references": [[p, "x"] for p in PROMPTS], "place": list(range(4))}
    run(two, tmp_path / "r.jsonl", {"plain": plain, "named": named, "trl": trl}, columns=columns)
    assert seen == dict(zip(PROMPTS, columns["references"], strict=True))
    for record in read_jsonl(tmp_path / "r.jsonl"):
        assert record["rewards"] == {"plain": 1.0, "named": 2.0, "trl": PROMPTS.index(record["prompt"])}


def widest_gap(means):
    """The middle of the two neighbors, in the order of λ, whose rewards are farthest apart in their own deviations."""
    at = sorted(means)
    values = np.array([means[x] for x in at])
    scaled = values / np.where(values.std(axis=0) > 0, values.std(axis=0), 1)
    gaps = np.linalg.norm(np.diff(scaled, axis=0), axis=1)
    place = int(gaps.argmax())
    assert np.sort(gaps)[-1] > np.sort(gaps)[-2] * 1.001, "the test needs one largest gap"
    return (at[place] + at[place + 1]) / 2


def test_refinement_adds_points_where_the_front_has_gaps(two, tmp_path):
    """Three more, each where the records of those before it say. A second run finds them done."""
    asked = []

    def kinds(prompts, responses):
        asked.extend(prompts)
        return [float(len(set(r.split()))) for r in responses]

    for _ in range(2):
        front = run(two, tmp_path / "r.jsonl", {"kinds": kinds, "first": first}, refine=3)
        assert len(front.soups) == 6
        assert len(asked) == len({(r["prompt"], r["response"]) for r in read_jsonl(tmp_path / "r.jsonl")})
    means = {p.lambdas["b"]: [p.mean["kinds"], p.mean["first"]] for p in front.soups}
    known = {float(row[1]): means[row[1]] for row in GRID}
    for _ in range(3):
        wanted = widest_gap(known)
        assert wanted in means, f"not refined at {wanted}, but at {sorted(set(means) - set(known))}"
        known[wanted] = means[wanted]
    assert known.keys() == means.keys()


def named(folder, base):
    """An adapter that says which base it is of."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))


def test_the_base_is_the_one_that_the_adapters_name(two, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer(WORDS).save_pretrained(tmp_path / "base")
    settings = {"lambdas": GRID, "max_new_tokens": 6, "progress": False}

    def swept(base, out):
        rsoups.sweep(base, two, REWARDS, PROMPTS, out=tmp_path / out, **settings)
        return read_jsonl(tmp_path / out)

    with pytest.raises(rsoups.AdapterError, match=r"\['a', 'b'\] do not name their base"):
        swept(None, "own.jsonl")
    for folder in two.values():
        named(folder, str(tmp_path / "base"))
    assert same(swept(None, "own.jsonl"), swept(str(tmp_path / "base"), "told.jsonl"))
    assert json.loads((tmp_path / "own.settings.json").read_text())["base"] == str(tmp_path / "base")
    named(two["b"], "another/base")
    with pytest.raises(rsoups.AdapterError, match="different bases.*another/base.*say which"):
        swept(None, "two.jsonl")


def test_a_sweep_tells_what_its_adapters_were_trained_on(two, tmp_path):
    """As lineage.json says it, of the same weights; of runs that are added later too."""
    path, beside = tmp_path / "r.jsonl", tmp_path / "r.settings.json"
    sha256 = rsoups.interpolate(two).ingredients[0].sha256
    lineage = two["a"] / "lineage.json"
    lineage.write_text(json.dumps({"kind": "ppo", "sha256": sha256, "rewards": [{"name": "length", "weight": -1.0}]}))
    front = run(two, path)
    assert front.trained_on == {"a": {"length": -1.0}} == json.loads(beside.read_text())["trained_on"]
    morl = tiny_adapter(tmp_path / "morl", seed=7)
    rewards = [{"name": "length", "weight": 0.5}, {"name": "first", "weight": 0.5}]
    (morl / "lineage.json").write_text(json.dumps({"kind": "ppo", "rewards": rewards}))
    expected = {"a": {"length": -1.0}, "MORL": {"length": 0.5, "first": 0.5}}
    assert run(two, path, others={"MORL": morl}).trained_on == expected == run(two, path).trained_on
    for text in (
        json.dumps({"sha256": "0" * 64, "rewards": [{"name": "length"}]}),
        "{",
        '{"rewards": [{"model": "x"}]}',
    ):
        lineage.write_text(text)
        assert run(two, tmp_path / f"{len(text)}.jsonl").trained_on == {}


def test_what_cannot_be_swept(two, tmp_path):
    out = tmp_path / "r.jsonl"
    with pytest.raises(rsoups.RewardError, match="at least one reward"):
        run(two, out, rewards={})
    with pytest.raises(rsoups.RewardError, match=r"held_out names \['x'\]"):
        run(two, out, held_out=["x"])
    with pytest.raises(rsoups.DatasetError, match="got 2 prompts, 1 of them different"):
        run(two, out, prompts=["w1", "w1"])
    with pytest.raises(rsoups.DatasetError, match="got 0 prompts"):
        run(two, out, prompts=[])
    with pytest.raises(rsoups.DatasetError, match="column 'references' has 1 values for 4 prompts"):
        run(two, out, columns={"references": [["x"]]})
    with pytest.raises(rsoups.LambdasError, match="no λ to sweep"):
        run(two, out, lambdas=[])
    with pytest.raises(rsoups.LambdasError, match="sum to 2"):
        run(two, out, lambdas=[[1, 1]])
    with pytest.raises(rsoups.LambdasError, match="no adapters"):
        run({}, out)
    with pytest.raises(rsoups.LambdasError, match=r"\['base'\] among others"):
        run(two, out, others={"base": two["a"]})
    with pytest.raises(rsoups.LambdasError, match=r"\['a'\] among others"):
        run(two, out, others={"a": two["b"]})
    assert not out.exists()
    with pytest.raises(rsoups.RewardError, match="returned nan"):
        run(two, out, rewards={"bad": lambda p, r: [float("nan")] * len(r)})
    with pytest.raises(rsoups.RewardError, match="reward 'bad' raised ZeroDivisionError.*prompt 'w3"):
        run(two, out, rewards={"bad": lambda p, r: [1 / 0]})
    assert out.read_text() == ""
    with pytest.raises(rsoups.DatasetError, match="all responses in .* are empty"):
        run(two, tmp_path / "e.jsonl", cut=lambda text: "")


def test_prompts_that_leave_no_room_are_refused_or_dropped(two, tmp_path):
    long = " ".join(WORDS[:59])  # of 64 in the context
    with pytest.raises(rsoups.DatasetError, match="1 of 5 prompts are longer than 58 tokens"):
        run(two, tmp_path / "r.jsonl", prompts=[*PROMPTS, long])
    columns = {"references": [[p] for p in [long, *PROMPTS]]}

    def known(prompts, responses, references):
        return [float(r == [p]) for p, r in zip(prompts, references, strict=True)]

    front = run(
        two, tmp_path / "r.jsonl", {"known": known}, prompts=[long, *PROMPTS], columns=columns, long_prompts="drop"
    )
    assert front.prompts == sorted(PROMPTS) and all(p.mean == {"known": 1.0} for p in front.points)


def test_a_bases_own_code_runs_on_leave_only(two, tmp_path, monkeypatch):
    """A folder whose config names Python code, which leaves a mark when it runs."""
    mark, folder = tmp_path / "ran", tmp_path / "base"
    folder.mkdir()
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(rsoups.CheckpointError, match="requires custom code.*trust_remote_code"):
        rsoups.sweep(str(folder), two, REWARDS, PROMPTS, out=tmp_path / "records.jsonl", progress=False)
    with pytest.raises(rsoups.CheckpointError, match="requires custom code"):
        rsoups.LiveSoup.from_pretrained(str(folder), two)
    with pytest.raises(rsoups.CheckpointError, match="cannot load"):
        rsoups.LiveSoup.from_pretrained(str(tmp_path / "none"), two)
    assert not mark.exists()
