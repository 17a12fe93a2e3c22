"""A sweep's responses: those of generate, whatever the batches are."""

import json

import pytest
import torch
from sweep_runs import PROMPTS, WORDS, run, same, texts
from tiny import tiny_adapter, tiny_llama, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import rsoups
from rsoups.common.files import read_jsonl
from rsoups.generation.decoding import seed_of, uniforms


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


def test_the_tokenizer_and_the_base_come_out_as_they_went_in(two, tmp_path):
    base, tokenizer = tiny_llama(), tiny_tokenizer(WORDS)
    tokenizer.padding_side = "right"
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    run(two, tmp_path / "r.jsonl", base=base, tokenizer=tokenizer, others={"M": two["a"]}, batch_tokens="auto")
    assert tokenizer.padding_side == "right"
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
    assert not any(module._forward_hooks for module in base.modules())
