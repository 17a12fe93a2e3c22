"""The config of a soup: whatever the ingredients' patterns and targets are, PEFT loads what was meant."""

import json

import pytest
import torch
from edited import edit, retouch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import assert_is_sum, tiny_adapter, tiny_llama
from transformers import AutoModel, AutoModelForSequenceClassification

import rsoups
from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.adapters.layer_names import PREFIX
from rsoups.soups.config import faithful_config
from rsoups.versions.inspect import inspect_adapters

IDS = torch.tensor([[1, 5, 9, 30, 7]])


@pytest.mark.parametrize("method", ["exact", "factors", "svd"])
def test_patterns_do_not_depend_on_their_order(tmp_path, method):
    """PEFT takes the first pattern that fits, and sorts them when it saves."""
    patterns = {"q_proj": 3, r"model\.layers\.1\..*": 5}
    lora = {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": patterns, "init_lora_weights": False}
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, **lora)).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        model.save_pretrained(tmp_path / "by PEFT")
        assert not torch.allclose(PeftModel.from_pretrained(tiny_llama(), tmp_path / "by PEFT")(IDS).logits, expected)
        rsoups.interpolate([model], method=method).save_pretrained(tmp_path / "soup")
        assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path / "soup")(IDS).logits, expected)


SELECTIONS = {
    "lists": ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "down_proj"]}),
    "a list and a pattern": ({"target_modules": ["q_proj"]}, {"target_modules": r".*\.(v|k)_proj"}),
    "all linear layers": ({"target_modules": ["q_proj"]}, {"target_modules": "all-linear"}),
    "layers": ({"layers_to_transform": [0]}, {}),
    "exceptions": ({"exclude_modules": ["0.self_attn.q_proj"]}, {}),
    "names that end alike": (
        {"target_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["1.self_attn.q_proj"]},
    ),
}


@pytest.mark.parametrize("kind", SELECTIONS)
def test_targets_of_all_are_targets_of_the_soup(tmp_path, kind):
    folders = [tiny_adapter(tmp_path / str(i), seed=i, r=2 + i, **lora) for i, lora in enumerate(SELECTIONS[kind])]
    soup = rsoups.interpolate(folders, [0.3, 0.7])
    soup.save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", tiny_llama, folders, [0.3, 0.7])
    soup.load(tiny_llama())  # refuses a base with more targets than tensors
    targets = json.loads((tmp_path / "soup" / "adapter_config.json").read_text())["target_modules"]
    assert targets == "all-linear" or targets == sorted(targets)  # the file is the same, whatever a set's order


def test_a_soup_that_peft_would_not_load_as_a_whole_is_not_written(tmp_path):
    soup = rsoups.interpolate([tiny_adapter(tmp_path / "a")])
    soup.config.target_modules = {"q_proj"}
    with pytest.raises(rsoups.AdapterError, match=r"the soup: tensors for module model\.layers\.0\.self_attn\.v_proj"):
        soup.save_pretrained(tmp_path / "soup")
    soup.config.target_modules, soup.config.rank_pattern = {"q_proj", "v_proj"}, {"layers.1.self_attn.q_proj": 3}
    with pytest.raises(rsoups.AdapterError, match=r"layers\.1\.self_attn\.q_proj has A .* says rank 3"):
        soup.check_loads()
    assert not (tmp_path / "soup").exists()


ODD = {
    "a wrapper of the policy": lambda name: name.replace(PREFIX, f"{PREFIX}policy."),
    "a wrapper inside": lambda name: name.replace(".model.layers", ".model.module.layers"),
    "a layer that the base lacks": lambda name: name.replace(".self_attn.", ".attention."),
}


@pytest.mark.parametrize("kind", ODD)
def test_names_of_another_model_are_refused_where_the_base_is_known(tmp_path, kind):
    """PEFT passes over a tensor whose layer the base does not have, with a warning."""
    tiny_llama().save_pretrained(tmp_path / "base")
    folders = [tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    for folder in folders:
        edit(folder, base_model_name_or_path=str(tmp_path / "base"))
    rsoups.interpolate(folders).save_pretrained(tmp_path / "soup")

    path = folders[1] / "adapter_model.safetensors"
    save_file({ODD[kind](name): tensor for name, tensor in load_file(path).items()}, path)
    for several in (folders, folders[1:]):
        found = inspect_adapters({folder.name: read_adapter(folder) for folder in several})
        with pytest.raises(rsoups.AdapterError, match="the base LlamaForCausalLM has no layer .* save_pretrained") as e:
            rsoups.interpolate(several).save_pretrained(tmp_path / "odd")
        assert found.refusals["exact"] == str(e.value) and not (tmp_path / "odd").exists()


@pytest.mark.parametrize("kind", ["a classifier's", "the body's"])
def test_other_classes_of_a_base_have_its_layers(tmp_path, kind):
    """The base on the disk is a language model; the adapter was trained on another class of it."""
    tiny_llama().save_pretrained(tmp_path / "base")
    auto = AutoModelForSequenceClassification if kind == "a classifier's" else AutoModel
    folder = tiny_adapter(tmp_path / "a", auto.from_pretrained(tmp_path / "base"), task_type=None)
    edit(folder, base_model_name_or_path=str(tmp_path / "base"), auto_mapping=None)
    rsoups.interpolate([folder]).save_pretrained(tmp_path / "soup")


def test_a_config_that_tells_its_adapter_is_left_as_it_is(tmp_path):
    lora = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    adapter = read_adapter(tiny_adapter(tmp_path / "a", **lora))
    config = faithful_config(adapter)
    assert (config.rank_pattern, config.alpha_pattern, config.r) == ({"q_proj": 2}, {"v_proj": 3}, 4)
    assert config.target_modules == {"q_proj", "v_proj"} and config.use_rslora
    assert isinstance(adapter, Adapter) and adapter.config.rank_pattern == config.rank_pattern


def test_targets_that_are_not_in_the_list_are_still_refused(tmp_path):
    folder = tiny_adapter(tmp_path / "a")
    extra = {f"{PREFIX}model.layers.0.mlp.up_proj.lora_{f}.weight": torch.zeros(4, 4) for f in "AB"}
    retouch(folder, lambda tensors: tensors.update(extra))
    with pytest.raises(rsoups.AdapterError, match="up_proj, which adapter_config.json does not target"):
        rsoups.interpolate([folder])
    edit(folder, target_modules=["q_proj", "v_proj", "up_proj"])
    assert rsoups.interpolate([folder]).state_dict.keys() >= extra.keys()
