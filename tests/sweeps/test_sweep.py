"""Sweeps: what is written, whatever the batches are; that a killed one goes on, and that the base comes out as it went in."""

import json

import numpy as np
import pytest
import torch
from sweep_runs import GRID, PROMPTS, REWARDS, WORDS, changed_llama, first, length, run, same
from tiny import tiny_adapter, tiny_llama, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import rsoups
from rsoups.common.files import only_run_in, read_jsonl
from rsoups.generation.decoding import seed_of, uniforms
from rsoups.sweeps.base import Base


def texts(path):
    return {
        (r["name"], json.dumps(r["lambdas"]), json.dumps(r["prompt"]), r["sample"]): r["response"]
        for r in read_jsonl(path)
    }


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


def test_responses_are_those_of_generate_on_the_merged_model(two, tmp_path):
    run(two, tmp_path / "records.jsonl", temperature=0, batch_tokens=1)
    tokenizer, model = tiny_tokenizer(WORDS), rsoups.interpolate(two, [0.5, 0.5]).load(tiny_llama()).merge_and_unload()
    found = texts(tmp_path / "records.jsonl")
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=6, pad_token_id=0)
        text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found["soup", '{"a": 0.5, "b": 0.5}', json.dumps(prompt), 0] == text.strip()


@pytest.mark.parametrize(("temperature", "begin"), [(0, ""), (0.8, ""), (0, "w20 w21 w22 "), (0.8, "w20 w21 w22 ")])
def test_the_same_records_for_any_batches(two, tmp_path, temperature, begin, monkeypatch):
    """One by one, many at once, λ by λ with Δ in the weights: with rows that end early, with an ensemble, and with prompts
    that begin alike, one of them the beginning of another.
    """
    monkeypatch.setattr("rsoups.sweeps.places.MERGED_TOKENS", 50)
    merged, merge = [], rsoups.LiveSoup.merged

    def spied(self, row, **settings):
        merged.append(list(row))
        return merge(self, row, **settings)

    monkeypatch.setattr(rsoups.LiveSoup, "merged", spied)
    settings = {"temperature": temperature, "ensemble": True, "others": {"MORL": two["a"]}, "max_new_tokens": 12}
    asked = [begin + prompt for prompt in [*PROMPTS[:3], "w7 w7"]]
    ends = tiny_llama()
    ends.generation_config.eos_token_id = [2, *range(40, 50)]
    expected = None
    for tokens in (1, 30, 100, 10_000):
        run(two, tmp_path / f"{tokens}.jsonl", base=ends, prompts=asked, batch_tokens=tokens, **settings)
        records = read_jsonl(tmp_path / f"{tokens}.jsonl")
        assert len(merged) == (0 if tokens < 100 else 4), "three soups and the MORL run, λ by λ"
        expected = expected or records
        assert same(records, expected)
    assert len({r["tokens"] for r in expected}) > 4


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2)
    ).eval()


def mistral():
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = MistralConfig(**shape, num_key_value_heads=2, sliding_window=4, eos_token_id=2, pad_token_id=0)
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize(("make", "target"), [(gpt2, "c_attn"), (mistral, "q_proj")], ids=["gpt2", "sliding window"])
def test_other_architectures_answer_as_with_generate(tmp_path, make, target):
    """Positions that are learnt; a cache that forgets. One by one and together, against transformers' own loop."""
    lora = {"target_modules": [target], "fan_in_fan_out": make is gpt2}
    two = {name: tiny_adapter(tmp_path / name, make(), seed=seed, **lora) for seed, name in enumerate("ab")}
    asked = [f"w20 w21 w22 w23 {prompt}" for prompt in PROMPTS]
    for tokens in (1, 10_000):
        run(two, tmp_path / f"{tokens}.jsonl", base=make(), prompts=asked, temperature=0, batch_tokens=tokens)
    assert same(read_jsonl(tmp_path / "1.jsonl"), read_jsonl(tmp_path / "10000.jsonl"))
    base, tokenizer = make(), tiny_tokenizer(WORDS)
    model = rsoups.interpolate(two, [0.5, 0.5]).load(make()).merge_and_unload()
    for record in read_jsonl(tmp_path / "1.jsonl"):
        if record["lambdas"] != {"a": 0.5, "b": 0.5}:
            continue
        ids = tokenizer(record["prompt"], return_tensors="pt")["input_ids"]
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
        with torch.no_grad():
            whole = model.generate(input_ids=ids, **settings)
            said, logp = whole[0, ids.shape[1] :], base(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        assert record["response"] == tokenizer.decode(said, skip_special_tokens=True)
        assert record["base_nll"] == pytest.approx(-float(logp.gather(1, said[:, None]).sum()), abs=1e-3)


def test_responses_do_not_depend_on_the_other_prompts(two, tmp_path):
    run(two, tmp_path / "all.jsonl")
    run(two, tmp_path / "some.jsonl", prompts=PROMPTS[2:])
    found = texts(tmp_path / "all.jsonl")
    assert all(found[key] == text for key, text in texts(tmp_path / "some.jsonl").items())


def test_samples_are_drawn_by_each_responses_own_numbers(two, tmp_path):
    """In float64, without padding or cache, by inverting the distribution: a soup's, and the ensemble's mean; nats too."""
    run(two, tmp_path / "r.jsonl", temperature=0.8, seed=5, samples=2, ensemble=True, lambdas=[[0.3, 0.7]])
    base = tiny_llama().double()
    soup = rsoups.interpolate(two, [0.3, 0.7]).load(tiny_llama()).merge_and_unload().double()
    ends = [rsoups.interpolate([folder]).load(tiny_llama()).merge_and_unload().double() for folder in two.values()]
    tokenizer = tiny_tokenizer(WORDS)
    for record in read_jsonl(tmp_path / "r.jsonl"):
        models = {"soup": [soup], "ensemble": ends, "base": [base]}[record["name"]]
        ids = tokenizer(record["prompt"], return_tensors="pt")["input_ids"]
        start, kl, nll = ids.shape[1], 0.0, 0.0
        for number in uniforms(seed_of(5, record["prompt"], record["sample"]), 6):
            with torch.no_grad():
                mean = torch.stack([(m(ids).logits[0, -1] / 0.8).softmax(-1) for m in models]).mean(0)
                plain = base(ids).logits[0, -1]
            token = int((mean.cumsum(0) <= number).sum())
            kl += float(mean[token].log() - (plain / 0.8).log_softmax(-1)[token])
            nll -= float(plain.log_softmax(-1)[token])
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            if token == 2:
                break
        assert record["response"] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        assert record["tokens"] == ids.shape[1] - start
        assert record["kl"] == pytest.approx(kl, abs=1e-3) and record["base_nll"] == pytest.approx(nll, abs=1e-3)
        assert (record["kl"] == 0) == (record["name"] == "base")


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


def test_messages_go_through_the_chat_template(two, tmp_path):
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}w59{% endif %}"
    )
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    asked = []

    def reward(prompts, responses):
        asked.extend(prompts)
        return [1.0] * len(prompts)

    front = run(two, tmp_path / "chat.jsonl", {"r": reward}, prompts=chats, tokenizer=tokenizer, temperature=0)
    run(two, tmp_path / "text.jsonl", prompts=[f"{text} w59" for text in PROMPTS], temperature=0)
    records = read_jsonl(tmp_path / "chat.jsonl")
    assert [r["prompt"] for r in records[:4]] == chats and all(prompt in chats for prompt in asked)
    assert [r["response"] for r in records] == [r["response"] for r in read_jsonl(tmp_path / "text.jsonl")]
    assert len(front.prompts) == 4


@pytest.mark.filterwarnings("ignore:these ingredients do not start")
def test_what_cannot_be_live_is_attached(two, tmp_path, monkeypatch):
    """Whole trained parameters; and the same adapters by both ways give the same records."""
    whole = {n: tiny_adapter(tmp_path / f"w{n}", seed=i, modules_to_save=["lm_head"]) for i, n in enumerate("ab")}
    run(whole, tmp_path / "whole.jsonl", others={"MORL": whole["a"]})
    found = texts(tmp_path / "whole.jsonl")
    key = "null", json.dumps(PROMPTS[1]), 0
    assert found["MORL", *key] == found["soup", '{"a": 1.0, "b": 0.0}', *key[1:]] != found["base", *key]
    with pytest.raises(rsoups.AdapterError, match=r"lm_head.weight was trained as a whole"):
        run(whole, tmp_path / "ensemble.jsonl", ensemble=True)
    for method in ("exact", "factors"):
        settings = {"method": method, "others": {"MORL": two["b"]}}
        run(two, tmp_path / f"live-{method}.jsonl", **settings)
        with monkeypatch.context() as patched:
            patched.setattr("rsoups.sweeps.places.LiveSoup.__init__", refuse)
            run(two, tmp_path / f"attached-{method}.jsonl", **settings)
        assert same(read_jsonl(tmp_path / f"live-{method}.jsonl"), read_jsonl(tmp_path / f"attached-{method}.jsonl"))


def refuse(self, *args, **kwargs):
    raise rsoups.AdapterError("not live")


def test_a_live_soup_is_swept_as_it_is(two, tmp_path):
    run(two, tmp_path / "base.jsonl", others={"MORL": two["a"]})
    live = rsoups.LiveSoup(tiny_llama(), two)
    run(None, tmp_path / "live.jsonl", base=live, others={"MORL": two["a"]})
    assert same(read_jsonl(tmp_path / "live.jsonl"), read_jsonl(tmp_path / "base.jsonl"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), live.at([0.5, 0.5]) as model:
        assert not torch.allclose(model(ids).logits, tiny_llama()(ids).logits, atol=1e-3), "its adapters were taken off"
    with pytest.raises(rsoups.LambdasError, match="leave them out"):
        run({"c": two["a"]}, tmp_path / "c.jsonl", base=live)


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


def test_line_breaks_of_other_alphabets_stay_within_their_record(two, tmp_path):
    run(two, tmp_path / "r.jsonl", cut=lambda text: f"{text}\u2028\x85\u2029 end")
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 16
    assert all(r["response"].endswith("\u2028\x85\u2029 end") for r in read_jsonl(tmp_path / "r.jsonl"))


def test_the_tokenizer_and_the_base_come_out_as_they_went_in(two, tmp_path):
    base, tokenizer = tiny_llama(), tiny_tokenizer(WORDS)
    tokenizer.padding_side = "right"
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    run(two, tmp_path / "r.jsonl", base=base, tokenizer=tokenizer, others={"M": two["a"]}, batch_tokens="auto")
    assert tokenizer.padding_side == "right"
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
    assert not any(module._forward_hooks for module in base.modules())


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
