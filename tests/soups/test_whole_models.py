"""Whole models, averaged file by file: against float64 sums of their state dicts, and transformers' own loading."""

import json
import subprocess
import sys
from pathlib import Path

import memory
import pytest
import torch
from places import HELPERS
from safetensors.torch import load_file, save_file
from tiny import tiny_classifier, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rsoups

IDS = torch.tensor([[1, 5, 9, 30, 7], [1, 2, 40, 41, 42]])


def saved(folder, seed, dtype=torch.float32, shard="5GB", **overrides):
    model = tiny_llama(**overrides)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def weights(folder):
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def average(*args, **kwargs):
    return rsoups.interpolate_checkpoints(*args, progress=False, **kwargs)


def test_weights_are_the_float64_sum_rounded_once(tmp_path):
    folders = [saved(tmp_path / str(i), i, shard) for i, shard in enumerate([torch.float32] * 3)]
    out = average(dict(zip("abc", folders, strict=True)), [0.2, 0.5, 0.3], tmp_path / "out")
    each, found = [weights(folder) for folder in folders], weights(out)
    assert found.keys() == each[0].keys()
    for key, tensor in found.items():
        expected = sum(w * part[key].double() for w, part in zip((0.2, 0.5, 0.3), each, strict=True))
        assert torch.equal(tensor, expected.float()), key
    lineage = json.loads((out / "soup.json").read_text())
    assert [(i["name"], i["lambda"]) for i in lineage["ingredients"]] == [("a", 0.2), ("b", 0.5), ("c", 0.3)]
    assert len(lineage["ingredients"][0]["sha256"]["model.safetensors"]) == 64
    model = AutoModelForCausalLM.from_pretrained(out).double()
    with torch.no_grad():
        base = tiny_llama().double()
        base.load_state_dict(
            {k: sum(w * e[k].double() for w, e in zip((0.2, 0.5, 0.3), each, strict=True)) for k in each[0]}
        )
        assert torch.allclose(model(IDS).logits, base(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_dtypes_and_blocks(tmp_path, monkeypatch, dtype):
    """Models in other files than the first's, read a few rows at a time."""
    monkeypatch.setattr("rsoups.soups.whole_models._BLOCK", 70)
    first = saved(tmp_path / "a", 1, dtype, shard="20KB")
    second = saved(tmp_path / "b", 2, torch.float32)
    out = average([first, second], [0.25, 0.75], tmp_path / "out")
    names = sorted(path.name for path in first.glob("*.safetensors"))
    assert len(names) > 2 and names == sorted(path.name for path in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((first / "model.safetensors.index.json").read_text())["weight_map"]
    one, two, found = weights(first), weights(second), weights(out)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    for key, tensor in found.items():
        assert torch.equal(tensor, (0.25 * one[key].double() + 0.75 * two[key].double()).to(dtype)), key
    wide = average([first, second], [0.25, 0.75], tmp_path / "wide", dtype=torch.float32)
    assert {tensor.dtype for tensor in weights(wide).values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(wide).dtype == torch.float32


def test_one_hot_and_uniform(tmp_path):
    folders = [saved(tmp_path / str(i), i) for i in range(2)]
    first, original = map(weights, folders)
    hot = weights(average(folders, [0, 1], tmp_path / "hot"))
    assert hot.keys() == original.keys() and all(torch.equal(hot[key], original[key]) for key in original)
    uniform = weights(average(folders, None, tmp_path / "uniform"))
    assert uniform.keys() == first.keys()
    for key, tensor in uniform.items():
        assert torch.equal(tensor, ((first[key].double() + original[key].double()) / 2).float()), key
    with pytest.raises(rsoups.LambdasError, match="normalize"):
        average(folders, [1, 1], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    beyond = weights(average(folders, [1.5, -0.5], tmp_path / "extra", extrapolate=True))
    for key, tensor in beyond.items():
        assert torch.equal(tensor, (1.5 * first[key].double() - 0.5 * original[key].double()).float()), key


def test_reward_models_with_their_tokenizers(tmp_path):
    """WARM: weight-averaged reward models."""
    folders = [tiny_classifier(tmp_path / name, "electra") for name in "ab"]
    tensors = {key: tensor * 1.5 for key, tensor in weights(folders[1]).items()}
    save_file(tensors, folders[1] / "model.safetensors", metadata={"format": "pt"})
    out = average(folders, [0.25, 0.75], tmp_path / "warm")
    model = AutoModelForSequenceClassification.from_pretrained(folders[0]).double()
    mean = {key: 0.25 * one.double() + 0.75 * tensors[key].double() for key, one in weights(folders[0]).items()}
    model.load_state_dict(mean)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    with torch.no_grad():
        expected = float(model(**tokenizer("w1", "w2", return_tensors="pt")).logits)

    scores = {}
    for folder in (out, *folders):
        card = tmp_path / "card.yaml"
        card.write_text(f"name: warm\nmodel: {folder}")
        (scores[folder],) = rsoups.load_reward(card)(["w1"], ["w2"])
    assert scores[out] == pytest.approx(expected, abs=1e-5)
    assert all(abs(scores[folder] - expected) > 1e-3 for folder in folders), "the test tells nothing apart"


def edit(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_models_that_do_not_add_up_are_refused_before_anything_is_written(tmp_path):
    first = saved(tmp_path / "first", 0)
    tiny_tokenizer(["a", "b"]).save_pretrained(first)

    def refused(words, **overrides):
        other = saved(tmp_path / f"other{len(list(tmp_path.iterdir()))}", 1, **overrides)
        check(other, words)
        return other

    def check(other, words):
        with pytest.raises(rsoups.CheckpointError, match=words):
            average([first, other], [0.5, 0.5], tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    refused("vocab_size differs.*64 and 70", vocab_size=70)
    refused("(hidden_size|head_dim) differs", hidden_size=64)
    refused("tie_word_embeddings differs", tie_word_embeddings=True)
    other = refused("num_hidden_layers differs", num_hidden_layers=3)
    edit(other, "config.json", num_hidden_layers=2)
    check(other, r"only one of .* holds model.layers.2")
    other = saved(tmp_path / "ids", 1)
    edit(other, "generation_config.json", eos_token_id=7)
    check(other, "generation_config.json: eos_token_id differs.*2 and 7")
    other = saved(tmp_path / "words", 1)
    tiny_tokenizer(["b", "a"]).save_pretrained(other)
    check(other, "vocabularies.*'a' is 4 and 5")
    other = saved(tmp_path / "shape", 1)
    tensors = weights(other)
    save_file(tensors | {"lm_head.weight": torch.zeros(65, 32)}, other / "model.safetensors")
    check(other, r"lm_head.weight has shapes \(64, 32\) and \(65, 32\)")
    tensors["lm_head.weight"][3, 3] = float("nan")
    save_file(tensors, other / "model.safetensors")
    check(other, "lm_head.weight holds NaN")
    (other / "model.safetensors").write_bytes(b"\x00" * 30)
    check(other, "corrupt")
    (other / "model.safetensors").unlink()
    torch.save({}, other / "pytorch_model.bin")
    check(other, "only pickled weights")
    with pytest.raises(rsoups.CheckpointError, match="does not fit into torch.float16"):
        big = {key: tensor * 1e7 for key, tensor in weights(first).items()}
        save_file(big, first / "model.safetensors")
        average([first, first], [0.5, 0.5], tmp_path / "out", dtype=torch.float16)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/part.safetensors", "link.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    folder = saved(tmp_path / "a", 0)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(rsoups.CheckpointError, match="not a file of its folder"):
        average([folder, folder], [0.5, 0.5], tmp_path / "out")


def test_no_code_no_pickle_and_no_path_goes_along(tmp_path):
    folders = [saved(tmp_path / str(i), i) for i in range(2)]
    tiny_tokenizer(["a", "b"]).save_pretrained(folders[0])
    for name in ("modeling_x.py", "tokenizer_x.py", "vocab.py", "extra.bin", "tokenizer.bin", "vocab.pkl"):
        (folders[0] / name).write_bytes(b"1")
    (tmp_path / "secret.json").write_text("{}")
    (folders[0] / "tokenizer_more.json").symlink_to(tmp_path / "secret.json")
    edit(folders[0], "config.json", _name_or_path="/home/someone/x")
    out = average({"a": f"{folders[1]}/../0", "b": folders[1]}, None, tmp_path / "o")
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith((".py", ".bin", ".pkl"))] and "tokenizer_more.json" not in names
    assert "someone" not in (out / "config.json").read_text()
    assert [i["source"] for i in json.loads((out / "soup.json").read_text())["ingredients"]] == ["0", "1"]


def test_integers_must_be_the_same(tmp_path):
    folders = [saved(tmp_path / str(i), i) for i in range(2)]
    for i, folder in enumerate(folders):
        save_file(weights(folder) | {"steps": torch.tensor([3, 4 + i])}, folder / "model.safetensors")
    with pytest.raises(rsoups.CheckpointError, match="steps is not floating-point, and differs"):
        average(folders, [0.5, 0.5], tmp_path / "out")
    assert weights(average([folders[0]] * 2, None, tmp_path / "same"))["steps"].tolist() == [3, 4]


@memory.told
def test_memory_is_that_of_a_few_blocks(tmp_path):
    """Two models of 240 MB, in a process whose memory is limited by what the work adds to the imports."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"architectures": ["X"]}')
        tensors = {f"{i}": torch.full((5_000, 2_000), float(i)) for i in range(6)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    code = """
import sys, tqdm.auto, rsoups.soups.whole_models
from memory import growth
average = rsoups.soups.whole_models.interpolate_checkpoints
print(growth(lambda: average(sys.argv[1:3], None, sys.argv[3], progress=False)))
"""
    places = f"{Path(rsoups.__file__).parent.parent}:{HELPERS}"
    environment = {"PYTHONPATH": places, "PATH": "/usr/bin:/bin"} | memory.GIVEN_BACK
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("a", "b", "out"))]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 40 * (2 + 2), "the largest tensor has 40 MB, the model 240"
    assert weights(tmp_path / "out")["5"].unique().tolist() == [5.0]


def as_transformers_4(config):
    """A config in the words of transformers 4."""
    written = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "head_dim")}
    return written | {
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "transformers_version": "4.46.0",
    }


CONFIGS = {
    "transformers 4": as_transformers_4,
    "Unsloth's mark": lambda config: config | {"unsloth_fixed": True, "unsloth_version": "2026.1"},
    "a list of end tokens": lambda config: config | {"eos_token_id": [config["eos_token_id"]]},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_are_compared_as_they_are_read(tmp_path, kind):
    folders = [saved(tmp_path / str(i), i) for i in range(2)]
    for name in ("config.json", "generation_config.json"):
        path = folders[1] / name
        config = json.loads(path.read_text())
        path.write_text(
            json.dumps(CONFIGS[kind](config) if "model_type" in config or kind == "a list of end tokens" else config)
        )
    out = average(folders, [0.5, 0.5], tmp_path / "out")
    each = [weights(folder) for folder in folders]
    assert all(
        torch.equal(t, ((each[0][k].double() + each[1][k].double()) / 2).float()) for k, t in weights(out).items()
    )
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0, "rope_parameters": None}))
    with pytest.raises(rsoups.CheckpointError, match=r"config\.json: rope_parameters differs"):
        average(folders, [0.5, 0.5], tmp_path / "out")


def with_more(folder, more):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | more(tensors), path, metadata={"format": "pt"})


def test_what_transformers_does_not_read_is_left_out(tmp_path):
    """Rotary buffers of old checkpoints, and the stored copy of a head that is tied to the embeddings."""
    plain, more = (
        saved(tmp_path / name, seed, tie_word_embeddings=True) for seed, name in enumerate(("plain", "more"))
    )
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    with_more(more, lambda tensors: frequencies | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    for folders in ([plain, more], [more, plain]):
        out = average(folders, [0.5, 0.5], tmp_path / "out")
        assert weights(out).keys() == weights(plain).keys()
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    with_more(more, lambda tensors: {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})  # not tied at all
    with pytest.raises(rsoups.CheckpointError, match=r"only one of .* holds lm_head\.weight"):
        average([plain, more], [0.5, 0.5], tmp_path / "out")


def test_whole_models_sum_to_one_even_where_extrapolated(tmp_path):
    """Each holds the base, so that other sums would scale it."""
    folders = [saved(tmp_path / str(i), i) for i in range(2)]
    with pytest.raises(rsoups.LambdasError, match="sum to 1.6, not 1; normalize=True divides by the sum$"):
        average(folders, [0.9, 0.7], tmp_path / "out", extrapolate=True)
