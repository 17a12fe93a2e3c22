"""What `rsoups inspect` tells, against dense float64 changes."""

import math

import pytest
import torch
from dense import dense, one_start
from edited import edit, retouch
from tiny import tiny_adapter, tiny_llama, tiny_mixtral

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.layer_names import PREFIX
from rsoups.cli.main import main
from rsoups.versions.inspect import inspect_adapters


def test_norms_and_cosines_are_those_of_the_dense_changes(tmp_path):
    folders = {
        "a": tiny_adapter(tmp_path / "a", seed=1),
        "b": tiny_adapter(tmp_path / "b", seed=2, r=2, use_rslora=True),
        "c": tiny_adapter(tmp_path / "c", seed=3, target_modules=["q_proj"], layers_to_transform=[1]),
    }
    found = inspect_adapters({name: read_adapter(folder) for name, folder in folders.items()})
    changes = {name: dense(folder) for name, folder in folders.items()}
    assert list(found.products) == ["model.layers.0", "model.layers.1"]
    for layer in (*found.products, None):
        vectors = {
            name: torch.cat(
                [
                    change.get(path, torch.zeros(32, 32, dtype=torch.float64)).flatten()
                    for path in changes["a"]
                    if layer is None or path.startswith(layer + ".")
                ]
            )
            for name, change in changes.items()
        }
        for one, x in vectors.items():
            assert found.norm(one, layer) == pytest.approx(float(x.norm()), rel=1e-9, abs=1e-12)
            for other, y in vectors.items():
                if x.norm() and y.norm():
                    expected = float(x @ y / x.norm() / y.norm())
                    assert found.cosine(one, other, layer) == pytest.approx(expected, abs=1e-9)
                else:
                    assert math.isnan(found.cosine(one, other, layer))
    assert found.refusals["exact"] is None and "use 'exact'" in found.refusals["factors"]


def test_it_tells_whether_two_started_alike(tmp_path):
    folders = [tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]

    def look():
        return inspect_adapters({str(i): read_adapter(folder) for i, folder in enumerate(folders)})

    assert abs(look().starts[0][1]) < 0.3 and "different initializations" in look().to_text()
    one_start(folders)
    assert look().starts[0][1] > 0.9 and "one initialization" in look().to_text()


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
HEAD = {"modules_to_save": ["lm_head"]}
# What makes a second adapter beside a plain one, what is done to its files, and part of the reason against their soup.
BESIDE = {
    "other ranks and targets": ({"r": 2, "use_rslora": True, "target_modules": "all-linear"}, None, None),
    "a wrapped one": ({}, lambda folder: renamed(folder, lambda name: f"module._orig_mod.{name}"), None),
    "a LoRA of the head": ({"target_modules": ["lm_head", "q_proj"]}, None, None),
    "a head": (HEAD, None, "lm_head.weight was trained as a whole in only one of"),
    "a part of a head": (HEAD, lambda folder: retouch(folder, cut_head), "has no elements"),
    "tokens": ({"trainable_token_indices": [3]}, None, "in only one of"),
    "DoRA": ({"use_dora": True}, None, "use_dora is set"),
    "a residual start": ({}, lambda folder: edit(folder, init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "another base": (
        {},
        lambda folder: edit(folder, base_model_name_or_path="u/other"),
        "base_model_name_or_path differs",
    ),
    "another revision": ({}, lambda folder: edit(folder, revision="v2"), "revision differs"),
    "names of no model": ({}, lambda folder: renamed(folder, lambda name: f"policy.{name}"), "does not start with"),
    "old names, perhaps": ({}, lambda folder: renamed(folder, as_in_old_llava), "they may be the same layers"),
    "NaN": ({}, lambda folder: retouch(folder, lambda tensors: next(iter(tensors.values())).fill_(math.nan)), "NaN"),
    "a wider base": ({"base": lambda: tiny_llama(hidden_size=48)}, None, "has shape"),
}


def renamed(folder, rename):
    def change(tensors):
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    retouch(folder, change)


def as_in_old_llava(name):
    return name.replace(f"{PREFIX}model.", f"{PREFIX}language_model.model.")


def cut_head(tensors):
    tensors[f"{PREFIX}lm_head.weight"] = torch.empty(0)


@pytest.mark.parametrize("kind", BESIDE)
def test_it_tells_what_interpolate_does(tmp_path, capsys, kind):
    lora, change, reason = BESIDE[kind]
    base = (lora := dict(lora)).pop("base", tiny_llama)
    folders = [tiny_adapter(tmp_path / "a", seed=1), tiny_adapter(tmp_path / "b", base(), seed=2, **lora)]
    for folder in folders:
        edit(folder, base_model_name_or_path="u/base", revision="v1")
    if change:
        change(folders[1])
    agree(tmp_path, capsys, folders, reason)


def test_it_tells_of_experts_what_interpolate_does(tmp_path, capsys):
    folders = [
        tiny_adapter(tmp_path / n, tiny_mixtral(), target_parameters=[p]) for n, p in zip("ab", EXPERTS, strict=True)
    ]
    agree(tmp_path, capsys, folders, None)


def agree(tmp_path, capsys, folders, reason):
    """Both commands take the adapters, or both refuse them for one reason; and they mean the same modules and ranks."""
    words = [str(folder) for folder in folders]
    code = main(["interpolate", *words, "--out", str(tmp_path / "soup")])
    refusal = capsys.readouterr().err.strip()
    looked = main(["inspect", *words])
    told = capsys.readouterr()
    assert (code, (tmp_path / "soup").exists()) == ((0, True) if reason is None else (2, False)), refusal

    if reason is not None:
        assert reason in refusal
        if looked:
            assert (looked, told.err.strip()) == (2, refusal)
        else:
            with pytest.raises(rsoups.AdapterError) as e:
                rsoups.interpolate(folders)
            assert f"method exact: no: {e.value}" in told.out
        return
    assert looked == 0 and "method exact: yes" in told.out
    found = inspect_adapters({folder.name: read_adapter(folder) for folder in folders})
    ranks = {}
    for adapter in found.adapters.values():
        for path, module in adapter.modules.items():
            ranks[path] = ranks.get(path, 0) + module.rank
    soup = read_adapter(tmp_path / "soup")
    assert {path: module.rank for path, module in soup.modules.items()} == ranks
