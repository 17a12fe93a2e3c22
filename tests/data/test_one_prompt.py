"""Every command reads a prompt as a sweep and PPO do: the same tokens, sampled purely, ended by the same tokens."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import RECIPES
from tiny import tiny_llama, tiny_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

import rsoups
from rsoups.cli.main import main
from rsoups.data.tasks import custom_task
from rsoups.generation.decoding import Decoder, encode
from rsoups.generation.respond import respond, texts_of_policy
from rsoups.generation.samples import sample_of, sample_of_records

CHAT = [[{"role": "user", "content": f"w{i} w3"}] for i in range(12)]
QUIET = {"quiet": True}


@pytest.fixture
def base(tmp_path):
    """A model whose tokenizer begins texts with BOS, and whose chat template does so too."""
    tokenizer = tiny_tokenizer([f"w{i}" for i in range(60)])
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = (
        "{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
        "{% if quiet %}w50{% else %}w51{% endif %}"
    )
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "tag": {f"t{i}": i}}) + "\n" for i, p in enumerate(CHAT)))
    return str(path)


@pytest.fixture
def read(monkeypatch):
    """The ids that `generate` gets, by row, without padding."""
    seen, own = [], LlamaForCausalLM.generate

    def generate(self, *args, **settings):
        for ids, mask in zip(settings["input_ids"].tolist(), settings["attention_mask"].tolist(), strict=True):
            seen.append([token for token, real in zip(ids, mask, strict=True) if real])
        return own(self, *args, **settings)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    return seen


def test_messages_begin_once_and_are_read_with_the_same_template(base, rows, read, tmp_path, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = [encode(tokenizer, prompt, QUIET) for prompt in CHAT]
    assert expected[2] == [1, 6, 7, 54]  # BOS, w2, w3, w50
    sample = sample_of(custom_task(rows), rows, rows=12, model=base, template=QUIET, kept=["tag"])
    assert read == expected and sample.prompts == CHAT and sample.columns["tag"][3] == {"t3": 3}

    read.clear()
    arguments = [
        "--reward",
        "length",
        "--task",
        "custom",
        "--dataset",
        rows,
        "--policy",
        base,
        "--out",
        str(tmp_path / "cal"),
    ]
    arguments += ["--split", "all", "--chat_template_kwargs", '{"quiet": true}']
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *arguments])
    runpy.run_path(str(RECIPES / "calibrate.py"), run_name="__main__")
    assert read == expected

    read.clear()
    monkeypatch.chdir(tmp_path)
    Path("tagged.py").write_text(
        "def tagged(prompts, responses, tag): return [float(sum(t.values())) + len(r) for t, r in zip(tag, responses)]"
    )
    flags = ["--task", "custom", "--dataset", rows, "--chat_template_kwargs", '{"quiet": true}']
    capsys.readouterr()
    assert main(["probe", "tagged:tagged", *flags, "--model", base]) == 0 and read == expected
    assert main(["preview", *flags, "--tokenizer", base, "--split", "test", "--reward", "tagged:tagged"]) == 0
    shown = capsys.readouterr().out
    assert "1 of them are the split 'test'" in shown and "[4 tokens] <s> w11 w3 w50" in shown
    assert main(["preview", *flags[:-1], "3", "--tokenizer", base]) == 2
    assert "must be a JSON object" in capsys.readouterr().err


def test_records_of_conversations_are_probed(tmp_path):
    records = [{"prompt": prompt, "response": f"w{i}"} for i in range(2) for prompt in CHAT] * 2
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sample = sample_of_records(tmp_path / "records.jsonl", rows=24)
    assert len({json.dumps(pair) for pair in zip(sample.prompts, sample.responses, strict=True)}) == 24


@pytest.mark.parametrize(
    "inherited",
    [{"top_p": 0.01}, {"min_p": 0.9}, {"suppress_tokens": [*range(4, 40)]}, {"num_beams": 3}, {"min_new_tokens": 8}],
    ids=str,
)
def test_nothing_of_the_base_settings_changes_what_is_sampled(base, inherited):
    settings = {"temperature": 1.0, "max_new_tokens": 8, "seed": 3}
    before = texts_of_policy(base, CHAT, **settings)
    GenerationConfig(eos_token_id=2, pad_token_id=0, do_sample=True, **inherited).save_pretrained(base)
    assert texts_of_policy(base, CHAT, **settings) == before and len(set(before)) > 6


def test_responses_are_greedy_at_temperature_0_and_end_at_any_end_token(base):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    said = Decoder(model, tokenizer, 0, 8)([encode(tokenizer, prompt) for prompt in CHAT])
    greedy = respond(model, tokenizer, CHAT, temperature=0, max_new_tokens=8)
    assert greedy == [one.ids for one in said]
    model.generation_config.eos_token_id = [2, greedy[0][3]]
    own = model.generation_config
    ended = respond(model, tokenizer, CHAT[:1], temperature=0, max_new_tokens=8)
    assert ended == [greedy[0][: greedy[0].index(greedy[0][3]) + 1]] and model.generation_config is own


def test_a_conversation_needs_a_chat_template():
    with pytest.raises(rsoups.DatasetError, match="has no chat template"):
        encode(tiny_tokenizer(["w1"]), [{"role": "user", "content": "w1"}])


def test_the_kl_of_iterated_soups_counts_up_to_any_end_token(base, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import iterate

    model, start = (AutoModelForCausalLM.from_pretrained(base).eval() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    ends = [2, 30, 31, 32, 33, 34]
    model.generation_config.eos_token_id = ends
    evaluator = object.__new__(iterate.Evaluator)
    evaluator.training = SimpleNamespace(max_completion_length=10, temperature=1.3, seed=0, chat_template_kwargs=QUIET)
    evaluator.tokenizer = AutoTokenizer.from_pretrained(base)
    ids, inputs = evaluator.sample(model, CHAT)
    found = iterate.divergence(evaluator.logits(model, *inputs), evaluator.logits(start, *inputs), ids)

    lengths = []
    for prompt, row, kl in zip(CHAT, ids.tolist(), found, strict=True):
        said = [token for token in row if token >= 0]
        assert not set(said[:-1]) & set(ends)
        lengths.append(len(said))
        before = encode(evaluator.tokenizer, prompt, QUIET)
        whole = torch.tensor([before + said])
        with torch.no_grad():
            p, q = (
                each(whole).logits[0, len(before) - 1 : -1].double().div(1.3).log_softmax(-1) for each in (model, start)
            )
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
    assert min(lengths) < 10 and len(set(lengths)) > 2


@pytest.mark.parametrize(
    ("column", "value"),
    [('{"a": 1}', {"a": 1}), ("7", 7), ("007", "007"), ("null", None), ('"7"', "7"), ("a=b", "a=b")],
)
def test_score_gives_a_column_as_a_row_would(tmp_path, monkeypatch, capsys, column, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "told.py").write_text(
        "def told(prompts, responses, spec=1, number=2):\n"
        f"    assert spec == [{value!r}] and number == [3.5]\n    return [1.0]\n"
    )
    monkeypatch.delitem(sys.modules, "told", raising=False)
    said = ["score", "--reward", "told:told", "--prompt", "p", "--response", "r"]
    assert main([*said, "--column", f"spec={column}", "number=3.5"]) == 0
    assert "score   1" in capsys.readouterr().out
    assert main([*said, "--column", "spec"]) == 2 and "NAME=VALUE" in capsys.readouterr().err
