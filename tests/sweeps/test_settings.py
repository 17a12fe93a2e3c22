"""Settings of a sweep, and what a sweep needs to be installed."""

import json
import subprocess
import sys

import pytest
from sweep_runs import PROMPTS, REWARDS, run
from tiny import tiny_llama, tiny_tokenizer

import rsoups
from rsoups.common.files import read_jsonl

EXTRAS = ("gradio", "httpx", "matplotlib", "nltk", "openai", "sklearn")
ALONE = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))  # as if they were not installed
import rsoups
base, a, b, out = sys.argv[1:]
front = rsoups.sweep(base, {{"a": a, "b": b}}, {{"length": lambda prompts, responses: [len(r) for r in responses]}},
                     ["w1 w2", "w3"], [[1, 0], [0, 1]], max_new_tokens=4, out=out, progress=False)
print(front.to_markdown())
for refused in (lambda: rsoups.sweep(base, {{"a": a}}, {{"r": len}}, ["w1"], server="http://127.0.0.1:1", out=out + "-server"),
                lambda: rsoups.explore(None)):
    try:
        refused()
    except rsoups.SettingsError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; pass a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"samples": 0}, "samples is 0; pass a whole number of at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"refine": -1}, "refine is -1; pass a whole number of at least 0"),
        ({"batch_tokens": "all"}, "batch_tokens is 'all'"),
        ({"method": "svd"}, "method is 'svd'; pass one of"),
        ({"long_prompts": "cut"}, "long_prompts is 'cut'; pass 'refuse' or 'drop'"),
        ({"ensemble": True, "server": "http://x"}, "leave out ensemble or server"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(changes, message):
    with pytest.raises(rsoups.SettingsError, match=message):
        rsoups.sweep("no/base", {"a": "no/adapter"}, REWARDS, PROMPTS, **changes)


def test_keywords_replace_fields_of_the_settings(two, tmp_path):
    settings = rsoups.SweepSettings(temperature=0, max_new_tokens=3, seed=7)
    run(two, tmp_path / "both.jsonl", settings=settings, max_new_tokens=6)
    run(two, tmp_path / "keywords.jsonl", temperature=0, seed=7)
    assert read_jsonl(tmp_path / "both.jsonl") == read_jsonl(tmp_path / "keywords.jsonl")
    with pytest.raises(TypeError, match="temprature"):
        run(two, tmp_path / "unknown.jsonl", temprature=0)


def test_the_core_alone_sweeps_and_names_the_extra_that_more_needs(two, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer([f"w{i}" for i in range(60)]).save_pretrained(tmp_path / "base")
    for folder in two.values():
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / "base")
        (folder / "adapter_config.json").write_text(json.dumps(config))
    arguments = [tmp_path / "base", two["a"], two["b"], tmp_path / "records.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| λ 0 / 1 |" in done.stdout and len(read_jsonl(tmp_path / "records.jsonl")) == 6
    assert "needs the package openai" in done.stdout and "pip install 'rsoups[server]'" in done.stdout
    assert "needs the package gradio" in done.stdout and "pip install 'rsoups[app]'" in done.stdout
    assert not (tmp_path / "records.jsonl-server").exists()
