"""Soups on the disk: what is read of the ingredients, and how often; what is written, and that it is whole."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter

import memory
import pytest
import torch
from dense import one_start
from peft import PeftModel
from places import HELPERS
from safetensors.torch import load_file, save_file
from tiny import tiny_adapter, tiny_llama

import rsoups
from rsoups.adapters import tensor_files


@pytest.mark.parametrize("method", ["exact", "factors", "svd"])
def test_for_a_matrix_each_ingredient_is_read_once(tmp_path, monkeypatch, method):
    folders = [tiny_adapter(tmp_path / str(i), seed=i) for i in range(3)]
    one_start(folders)
    rows = [[1, 0, 0], [0.5, 0.25, 0.25], [0, 0.5, 0.5]]
    alone = [rsoups.interpolate(folders, row, method=method) for row in rows]
    opened, reads = tensor_files.safe_open, Counter()

    class Counting:
        def __init__(self, path, *arguments, **options):
            self.path, self.file = path, opened(path, *arguments, **options)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            reads[self.path, name] += 1
            return self.file.get_tensor(name)

    monkeypatch.setattr(tensor_files, "safe_open", Counting)
    soups = rsoups.interpolate(folders, rows, method=method)
    for i, soup in enumerate(soups):
        soup.save_pretrained(tmp_path / f"soup-{i}")
    assert len(reads) == 3 * 8 and set(reads.values()) == {1}
    for soup, expected in zip(soups, alone, strict=True):
        assert soup.lambdas == expected.lambdas and soup.ingredients == expected.ingredients
        assert all(torch.equal(soup.state_dict[k], t) for k, t in expected.state_dict.items())
    monkeypatch.setattr(tensor_files, "_HELD", 1_000)  # as of ingredients that are too large to be kept
    again = rsoups.interpolate(folders, rows, method=method)[1].state_dict
    assert all(torch.equal(again[key], tensor) for key, tensor in alone[1].state_dict.items())


@pytest.mark.parametrize("rows", [[0.5, 0.5], [[0.5, 0.5], [0.25, 0.75]]], ids=["streamed", "kept"])
def test_tensors_may_begin_anywhere_in_the_file(two, rows):
    """A header of any length, and tensors of several dtypes in any order: safetensors itself pads and sorts."""

    def made():
        soups = rsoups.interpolate(two, rows)
        return [soup.state_dict for soup in ([soups] if isinstance(soups, rsoups.Soup) else soups)]

    before = made()
    path = two[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    tensors[names[1]] = tensors[names[1]].half()
    header, data = {}, b""
    for name in names:
        raw = tensors[name].numpy().tobytes()
        kind = "F16" if tensors[name].dtype == torch.float16 else "F32"
        header[name] = {
            "dtype": kind,
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (3 - len(text) % 8 + 8 * (len(text) % 8 > 3))
    assert len(text) % 2
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    for state, expected in zip(made(), before, strict=True):
        for key, tensor in expected.items():
            assert torch.allclose(state[key], tensor, atol=1e-3 if key == names[1] else 0, rtol=0), key


def test_an_error_of_the_disk_is_told_wherever_it_comes(two, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_UNSYNCED", 100)

    def failing(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(rsoups.OutputError, match="Input/output error"):
        rsoups.interpolate(two).save_pretrained(tmp_path / "soup")
    assert not (tmp_path / "soup").exists() and not list(tmp_path.glob(".*"))


def test_saving_is_all_or_nothing(two, tmp_path, monkeypatch):
    soup = rsoups.interpolate(two)
    target = tmp_path / "out" / "soup"
    soup.save_pretrained(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for early in (True, False):  # found where space is set aside, and while writing
        if not early:
            monkeypatch.delattr(os, "posix_fallocate")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))
        try:
            with pytest.raises(rsoups.OutputError, match="File too large"):
                soup.save_pretrained(target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        assert [path.name for path in target.parent.iterdir()] == ["soup"]
    monkeypatch.undo()
    rsoups.interpolate(two, [0.2, 0.8]).save_pretrained(target)  # a soup may be replaced
    assert json.loads((target / "soup.json").read_text())["ingredients"][0]["lambda"] == 0.2
    with pytest.raises(rsoups.OutputError, match="not replaced"):
        soup.save_pretrained(two[0])  # an adapter may not


def test_nothing_is_written_for_tensors_that_share_memory(two, tmp_path):
    soup = rsoups.interpolate(two, [1, 0])
    soup.save_pretrained(tmp_path / "s")
    save_file(soup.state_dict, tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "s" / "adapter_model.safetensors").read_bytes()


def test_changes_in_a_state_dict_are_not_saved(two, tmp_path):
    for soup in rsoups.interpolate(two, [[1, 0], [1, 0]]):
        for tensor in soup.state_dict.values():
            tensor.zero_()
        soup.save_pretrained(tmp_path / "soup")
    saved, ingredient = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "soup", two[0]))
    assert all(torch.equal(saved[key], tensor) for key, tensor in ingredient.items())


def test_a_soup_is_made_of_what_was_checked(two, tmp_path):
    """Its files are read again when it is saved: a changed one is refused, one that is gone is read on."""
    soup, other = rsoups.interpolate(two), rsoups.interpolate(two)
    other.save_pretrained(tmp_path / "before")
    weights = two[0] / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(rsoups.AdapterError, match=r"adapter_model\.safetensors was written to"):
        soup.save_pretrained(tmp_path / "soup")
    with pytest.raises(rsoups.AdapterError, match="was written to"):
        soup.state_dict  # noqa: B018
    assert not (tmp_path / "soup").exists() and not list(tmp_path.glob(".*"))

    soup = rsoups.interpolate(two)
    for folder in two:
        shutil.rmtree(folder)
    soup.save_pretrained(tmp_path / "soup")
    saved, expected = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("soup", "before"))
    differ = [key for key in expected if not torch.equal(saved[key], expected[key])]
    assert len(differ) == 1 and saved.keys() == expected.keys()


@pytest.mark.parametrize("method", ["exact", "factors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_float64_rounded_once_in_blocks_of_any_size(tmp_path, monkeypatch, method, dtype):
    lora = {"modules_to_save": ["lm_head"], "target_modules": ["embed_tokens", "q_proj"]}
    folders = [tiny_adapter(tmp_path / str(i), seed=i, **lora) for i in range(3)]
    one_start(folders)
    row = [0.2, 0.5, 0.3]
    each = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for piece in (2**18, 100, 1, 400):
        monkeypatch.setattr("rsoups.soups.blends._READ", piece)
        soup = rsoups.interpolate(folders, row, method=method, dtype=dtype)
        soup.save_pretrained(tmp_path / "soup")
        saved = load_file(tmp_path / "soup" / "adapter_model.safetensors")
        assert saved.keys() == soup.state_dict.keys() == each[0].keys()
        for key, tensor in saved.items():
            scale = 2.0 if method == "exact" and "lora_" in key else 1.0
            parts = [w * scale * t[key].double() for w, t in zip(row, each, strict=True)]
            if method == "exact" and "_A" in key:
                expected = torch.cat([t[key] for t in each]).to(dtype)
            elif method == "exact" and "_B" in key:
                expected = torch.cat([part.to(dtype) for part in parts], dim=1)
            else:
                expected = sum(parts[1:], parts[0])
                half = torch.finfo(dtype).eps / 2 * (1 + 1e-6)  # of an ulp: either way at a tie
                assert ((tensor.double() - expected).abs() <= half * expected.abs()).all(), key
                expected = tensor
            assert torch.equal(tensor, expected) and torch.equal(tensor, soup.state_dict[key]), key


@memory.told
def test_making_a_soup_holds_neither_it_nor_an_ingredient(tmp_path):
    """Three ingredients of 12 MB make a soup of 12 MB (factors) or 36 MB (exact). Of a matrix they are kept."""
    lora = {"target_modules": ["q_proj"], "r": 512, "lora_alpha": 512}
    for i in range(3):
        tiny_adapter(
            tmp_path / str(i), tiny_llama(hidden_size=1024, intermediate_size=8, num_hidden_layers=3), seed=i, **lora
        )
    one_start([tmp_path / str(i) for i in range(3)])  # of others Δ is multiplied out, to tell how far from exact it is
    code = f"""
import sys, warnings
sys.path.insert(0, "{HELPERS}")
from memory import growth
import rsoups, rsoups.soups.soup
warnings.simplefilter("ignore")
folders = [f"{tmp_path}/{{i}}" for i in range(3)]
rsoups.interpolate(folders[:1]).save_pretrained("{tmp_path}/soup0")
exact = lambda: rsoups.interpolate(folders, [.2, .3, .5])
print(growth(lambda: exact().save_pretrained("{tmp_path}/soup1")))
print(growth(lambda: rsoups.interpolate(folders, method="factors").save_pretrained("{tmp_path}/soup2")))
print(growth(lambda: exact().state_dict))
matrix = rsoups.interpolate(folders, [[.2, .3, .5]] * 2)
print(growth(lambda: [soup.save_pretrained(f"{tmp_path}/soup{{i + 3}}") for i, soup in enumerate(matrix)]))
"""
    environment = os.environ | memory.GIVEN_BACK
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert (tmp_path / "soup3" / "adapter_model.safetensors").stat().st_size > 36 * 2**20
    exact, factors, held, matrix = map(float, run.stdout.splitlines())
    assert max(exact, factors, matrix) < 28 < 36 < held, run.stdout


def test_live_models_are_read_as_their_files_are(two):
    model = PeftModel.from_pretrained(tiny_llama(), two[0], adapter_name="first")
    model.load_adapter(two[1], adapter_name="second")
    live = rsoups.interpolate([(model, "first"), (model, "second")], [0.3, 0.7])
    files = rsoups.interpolate(two, [0.3, 0.7])
    assert all(torch.equal(live.state_dict[k], files.state_dict[k]) for k in files.state_dict)
    with pytest.raises(rsoups.AdapterError, match="third"):
        rsoups.interpolate([(model, "third")])
