"""The config of a soup: whatever the ingredients' patterns and targets are, PEFT loads what was meant."""

import json

import pytest
import torch
from edited import edit, retouch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import assert_is_sum, tiny_adapter, tiny_llama

import rsoups
from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.adapters.layer_names import PREFIX
from rsoups.soups.config import faithful_config

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
