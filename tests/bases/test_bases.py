"""A base of another name than the adapters': one rule for all that takes a base, one override, recorded."""

import json
import shutil

import pytest
from edited import edit
from safetensors.torch import load_file, save_file
from tiny import tiny_adapter, tiny_llama, tiny_tokenizer
from transformers import T5Config, T5ForConditionalGeneration

import rsoups
from rsoups import LiveSoup
from rsoups.bases.names import public_name, same_base, short_name
from rsoups.cli.main import main
from rsoups.explorer.sweep_folder import SweepFolder


@pytest.fixture
def bases(tmp_path, monkeypatch):
    """Two bases of one shape, an exact copy of the first, and two adapters of the first."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer([f"w{i}" for i in range(20)])
    for name in ("mybase", "otherbase"):
        tiny_llama(vocab_size=24).save_pretrained(name)
        tokenizer.save_pretrained(name)
    weights = load_file("otherbase/model.safetensors")
    save_file(
        {k: 1.5 * tensor for k, tensor in weights.items()}, "otherbase/model.safetensors", metadata={"format": "pt"}
    )
    shutil.copytree("mybase", "copies/renamed")
    for seed, name in enumerate("ab"):
        tiny_adapter(tmp_path / name, loaded("mybase"), seed=seed)
    return {name: tmp_path / name for name in "ab"}


def loaded(name):
    return type(tiny_llama()).from_pretrained(name)


def swept(base, adapters, **more):
    rewards, prompts = {"length": lambda p, r: [0.0] * len(r), "one": lambda p, r: [1.0] * len(r)}, ["w1 w2"]
    options = {"max_new_tokens": 2, "progress": False, "out": "sweep/records.jsonl"} | more
    return rsoups.sweep(base, adapters, rewards, prompts, [[1, 0], [0.5, 0.5]], **options)


def of_other(folder):
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "otherbase"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


# Everything that takes a base: called with it, the adapters and perhaps the override.
ENTRIES: dict = {
    "interpolate": lambda base, ab, **more: rsoups.interpolate(ab, base=base, **more),
    "sweep": swept,
    "sweep, loaded": lambda base, ab, **more: swept(
        loaded(base), ab, tokenizer=tiny_tokenizer([f"w{i}" for i in range(20)]), **more
    ),
    "sweep, others": lambda base, ab, **more: swept(base, ab, others={"morl": ab["a"]}, **more),
    "LiveSoup": lambda base, ab, **more: rsoups.LiveSoup(loaded(base), ab, **more),
    "LiveSoup.from_pretrained": lambda base, ab, **more: rsoups.LiveSoup.from_pretrained(base, ab, **more),
    "Soup.load": lambda base, ab, **more: rsoups.interpolate(ab).load(loaded(base), **more),
    "Soup.attached": lambda base, ab, **more: rsoups.interpolate(ab).attached(loaded(base), **more).__enter__(),
    "Soup.merge": lambda base, ab, **more: rsoups.interpolate(ab).merge(base, "merged", **more),
    "Soup.merge, loaded": lambda base, ab, **more: rsoups.interpolate(ab).merge(loaded(base), "merged", **more),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_another_base_is_refused_everywhere_and_accepted_with_one_override(bases, entry):
    take = ENTRIES[entry]
    with pytest.raises(
        rsoups.AdapterError, match="trained on the base 'mybase', this base is 'otherbase'.*allow_base_mis"
    ):
        take("otherbase", bases)
    take("copies/renamed", bases)  # the same weights in another folder
    shutil.rmtree("sweep", ignore_errors=True)
    take("otherbase", bases, allow_base_mismatch=True)


def test_ingredients_of_different_bases_are_refused_by_all_that_mix_them(bases, capsys):
    of_other(bases["b"])
    for refused in (
        lambda: rsoups.interpolate(bases),
        lambda: rsoups.greedy(bases, lambda soup: 0.0),
        lambda: rsoups.LiveSoup(tiny_llama(vocab_size=24), bases),
        lambda: swept(tiny_llama(vocab_size=24), bases, tokenizer=tiny_tokenizer([f"w{i}" for i in range(20)])),
    ):
        with pytest.raises(rsoups.AdapterError, match="base_model_name_or_path differs"):
            refused()
    folders = [str(path) for path in bases.values()]
    assert main(["interpolate", *folders, "--out", "soup"]) == 2
    assert "--allow-base-mismatch" in capsys.readouterr().err
    assert main(["inspect", *folders]) == 0 and "method exact: no: base_model" in capsys.readouterr().out
    assert main(["inspect", *folders, "--allow_base_mismatch"]) == 0 and "exact: yes" in capsys.readouterr().out
    assert main(["interpolate", *folders, "--out", "soup", "--allow_base_mismatch"]) == 0
    assert json.loads((bases["a"].parent / "soup" / "soup.json").read_text())["base_mismatch_allowed"] is True
    rsoups.interpolate([bases["a"]], [1.0]).save_pretrained("first")
    patched = ["patch", "first", folders[1], "--lambda", ".5", "--out", "patched"]
    assert main(patched) == 2 and main([*patched, "--allow-base-mismatch"]) == 0
    assert rsoups.Soup.from_pretrained("patched").base_mismatch


def test_the_override_is_recorded(bases, capsys):
    allowed = {"allow_base_mismatch": True}
    assert rsoups.LiveSoup.from_pretrained("otherbase", bases, **allowed).to_soup([0.5, 0.5]).base_mismatch
    assert not rsoups.LiveSoup.from_pretrained("mybase", bases).to_soup([0.5, 0.5]).base_mismatch
    capsys.readouterr()
    merge = ["merge", str(bases["a"]), "--base", "otherbase", "--out", "merged"]
    assert main(merge) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "this base is 'otherbase'" in error
    assert main([*merge, "--allow_base_mismatch"]) == 0
    manifest = json.loads((bases["a"].parent / "merged" / "soup.json").read_text())
    assert manifest["base_mismatch_allowed"] is True and manifest["merged_into"] == "otherbase"
    swept("otherbase", bases, **allowed)
    settings = json.loads((bases["a"].parent / "sweep" / "records.settings.json").read_text())
    assert settings["base_mismatch_allowed"] is True and SweepFolder.read("sweep", adapters=bases).base_mismatch


def test_when_two_names_are_one_base(bases, tmp_path):
    there, copy, other = str(tmp_path / "mybase"), str(tmp_path / "copies" / "renamed"), str(tmp_path / "otherbase")
    for one, two in (
        ("user/base", "user/base"),
        ("decapoda-research/llama-7b-hf", "huggyllama/llama-7b"),
        (None, "user/base"),
        ("", "user/base"),
        ("mybase", there),
        (there, copy),
        ("/elsewhere/llama", "meta/llama"),  # a copy of the Hub's on another machine
        ("C:\\models\\llama", "llama"),
        ("rsoups/tiny-llama", rsoups.common.assets.resolve("rsoups/tiny-llama")),
    ):
        assert same_base(one, two) and same_base(two, one), (one, two)
    for one, two in (
        ("user/base", "someone/base"),
        (there, other),
        ("/elsewhere/llama", "meta/llama-2"),
        ("rsoups/tiny-llama", "user/tiny-llama"),
        ("rsoups/no-such-asset", "user/base"),
    ):
        assert not same_base(one, two) and not same_base(two, one), (one, two)


def test_revisions_are_compared_where_both_are_known(bases):
    for folder, revision in zip(bases.values(), ("aaa", "bbb"), strict=True):
        config = json.loads((folder / "adapter_config.json").read_text()) | {"revision": revision}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(rsoups.AdapterError, match="revision differs: 'aaa'.*'bbb'"):
        rsoups.interpolate(bases)
    with pytest.raises(rsoups.AdapterError, match="trained on revision 'aaa' of 'mybase', this base is revision 'bbb'"):
        rsoups.LiveSoup.from_pretrained("mybase", {"a": bases["a"]}, revision="bbb")


def test_the_public_name_of_a_base(bases, tmp_path):
    assert public_name("user/base") == "user/base" and public_name(None) is None
    assert public_name(rsoups.common.assets.resolve("rsoups/tiny-llama")) == "rsoups/tiny-llama"
    assert public_name(str(tmp_path / "mybase"), "user/base") == "user/base"
    for local in (str(tmp_path / "mybase"), "mybase", "./mybase", "~/mybase", "C:\\home\\mybase", "../x/mybase"):
        with pytest.warns(UserWarning, match="published as 'mybase'.*--base user/name"):
            assert public_name(local) == "mybase"
        assert short_name(local) == "mybase"


def test_a_base_that_cannot_answer_is_refused_in_one_line(tmp_path, capsys):
    """An encoder-decoder, a kind that transformers does not know, and a base without a tokenizer."""
    shape = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
    models = {"t5": (t5, ["q"]), "unknown": (tiny_llama(), ["q_proj"]), "silent": (tiny_llama(), ["q_proj"])}
    words = {"t5": "T5Config", "unknown": "model type `newer`", "silent": "has no tokenizer that can be loaded"}
    for name, (model, targets) in models.items():
        base, out = tmp_path / name, tmp_path / f"{name} records"
        model.save_pretrained(base)
        adapter = tiny_adapter(tmp_path / f"{name} adapter", model, target_modules=targets)
        edit(adapter, base_model_name_or_path=str(base))
        if name == "unknown":
            config = base / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "newer"}))
        with pytest.raises(rsoups.CheckpointError, match=words[name]):
            LiveSoup.from_pretrained(str(base), [str(adapter)])
        assert main(["sweep", "--adapters", str(adapter), "--reward", "length", "--output_dir", str(out)]) == 2
        error = capsys.readouterr().err
        assert words[name] in error and "Traceback" not in error


def test_a_model_is_not_loaded_for_a_folder_that_is_not_replaced(tmp_path, monkeypatch):
    soup = rsoups.interpolate([tiny_adapter(tmp_path / "a")])
    monkeypatch.setattr("rsoups.soups.merge._load", None)
    with pytest.raises(rsoups.OutputError, match=r"holds no soup\.json"):
        soup.merge(str(tmp_path / "base"), tmp_path / "a", allow_base_mismatch=True)
