"""Sweeps through a real vLLM server, compared with sweeps by LiveSoup and with PEFT."""

import threading

import pytest
import torch
from peft import PeftModel
from tiny import tiny_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import concepts, vllm_server

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.common.files import read_jsonl
from rsoups.fronts.points import SOUP
from rsoups.generation.decoding import encode
from rsoups.sweeps.items import Item, Model
from rsoups.sweeps.vllm_server import Server

pytestmark = pytest.mark.vllm
GRID = [[1, 0], [0.5, 0.5], [0, 1]]


def words(prompts, responses):
    return [float(len(response.split())) for response in responses]


def run(base, adapters, out, rewards=None, count=24, **settings):
    settings = {"lambdas": GRID, "temperature": 0, "max_new_tokens": 24, "progress": False, "out": out} | settings
    rsoups.sweep(str(base), adapters, rewards or {"words": words}, concepts(count, "test"), **settings)
    return read_jsonl(out)


@pytest.fixture(scope="module")
def local(base, ingredients, tmp_path_factory):
    return run(base, ingredients, tmp_path_factory.mktemp("local") / "r.jsonl")


def model_of(base, ingredients, record, folder):
    """The model of a record: the base alone, or PEFT's, with the soup that rsoups writes."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if record["name"] != SOUP:
        return model
    weights = list(record["lambdas"].values())
    rsoups.interpolate(ingredients, weights).save_pretrained(folder)
    return PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def gap(model, tokenizer, prompt, theirs):
    """Gap between the two largest logits where the model's own greedy response leaves another one."""
    start = ids = encode(tokenizer, prompt)
    while True:
        best, second = model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        text = tokenizer.decode(ids[len(start) :], skip_special_tokens=True).strip()
        if not theirs.startswith(text) or ids[-1] == tokenizer.eos_token_id or len(ids) == len(start) + 24:
            return best - second


def test_greedy_records_equal_livesoups_but_for_rounding(base, ingredients, local, server, tmp_path, capsys):
    served = run(base, ingredients, tmp_path / "r.jsonl", server=server.url)
    assert len(served) == len(local) == 4 * 24
    differ, equal, nats = [], 0, 0.0
    for theirs, ours in zip(served, local, strict=True):
        assert (theirs["prompt"], theirs["lambdas"]) == (ours["prompt"], ours["lambdas"])
        if (theirs["response"], theirs["tokens"]) == (ours["response"], ours["tokens"]):
            equal += 1
            nats = max(nats, *(abs(theirs[name] - ours[name]) for name in ("kl", "base_nll")))
        else:
            differ.append((theirs, ours))

    tokenizer = AutoTokenizer.from_pretrained(base)
    gaps = [
        gap(model_of(base, ingredients, ours, tmp_path / str(i)), tokenizer, ours["prompt"], theirs["response"])
        for i, (theirs, ours) in enumerate(differ)
    ]
    with capsys.disabled():
        print(f"\n{equal} of {len(local)} responses equal, nats to {nats:.1e}; logit gaps where they differ: {gaps}")
    assert equal >= 0.95 * len(local)
    assert all(each < 1e-3 for each in gaps), "more than rounding"
    assert nats < 5e-3 and max(abs(record["kl"]) for record in local) > 1


@pytest.mark.parametrize("lambdas", [[1, 0], [0.3, 0.7], [0, 1]])
def test_log_probabilities_are_pefts(base, ingredients, server, tmp_path, lambdas):
    """Of sampled responses, token by token, for ranks and scalings that vLLM gets padded."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapters = {name: read_adapter(folder) for name, folder in ingredients.items()}
    options = {"method": "exact", "temperature": 1.0, "max_new_tokens": 16, "seed": 3}
    through = Server(server.url, adapters, {}, tmp_path, **options)
    model = Model(SOUP, dict(zip(ingredients, map(float, lambdas), strict=True)), "exact")
    items = [Item(model, i, p, encode(tokenizer, p), 0) for i, p in enumerate(concepts(8, "test"))]
    answers = through(items)
    nats = through.nats(items, answers)
    through.close()

    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    rsoups.interpolate(ingredients, lambdas).save_pretrained(tmp_path / "soup")
    soup = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), tmp_path / "soup")
    for item, answer, found in zip(items, answers, nats, strict=True):
        own, of_base = (logp(each.eval(), item.ids, answer.ids) for each in (soup, bare))
        assert found.kl == pytest.approx(own - of_base, abs=2e-3)
        assert found.base_nll == pytest.approx(-of_base, abs=2e-3)


@torch.no_grad()
def logp(model, prompt, response):
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return float(logits.double().log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum())


def test_a_server_that_restarts_in_the_middle_is_waited_for(base, ingredients, local, tmp_path):
    with vllm_server(base, tmp_path / "log") as server:
        calls = []

        def kills(prompts, responses):
            """Kills the server once the base has responded, and lets it start again in its own time."""
            calls.append(len(responses))
            if len(calls) == 1:
                server.kill()
                threading.Timer(2, server.start, kwargs={"wait": False}).start()
            return words(prompts, responses)

        served = run(base, ingredients, tmp_path / "r.jsonl", {"words": kills}, server=server.url)
    same = [one["response"] == other["response"] for one, other in zip(served, local, strict=True)]
    assert len(served) == len(local) and sum(same) >= 0.95 * len(local) and len(calls) > 1


def test_refusals_of_a_real_server_are_told(base, ingredients, server, tmp_path):
    def policy():
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    big = {"big": tiny_adapter(tmp_path / "big", policy(), r=40)}
    with pytest.raises(rsoups.ServerError, match="no LoRA of rank 64: serve with --max-lora-rank 64.*svd"):
        run(base, big, tmp_path / "r.jsonl", lambdas=[[1]], server=server.url)
    saved = {"saved": tiny_adapter(tmp_path / "saved", policy(), modules_to_save=["norm"])}
    with pytest.raises(rsoups.AdapterError, match="trained beside them"):
        run(base, saved, tmp_path / "h.jsonl", lambdas=[[1]], server=server.url)
    with pytest.raises(rsoups.ServerError, match="answers 400 .*(maximum context length|max_model_len)"):
        run(base, ingredients, tmp_path / "l.jsonl", server=server.url, max_new_tokens=400, count=1)


def test_a_server_without_runtime_loading_is_told_to_allow_it(base, ingredients, tmp_path):
    with (
        vllm_server(base, tmp_path / "log", VLLM_ALLOW_RUNTIME_LORA_UPDATING="0") as server,
        pytest.raises(rsoups.ServerError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ):
        run(base, ingredients, tmp_path / "r.jsonl", server=server.url)
