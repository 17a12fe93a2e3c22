"""The fields of PEFT's config, which are read and written without PEFT."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from tiny import tiny_adapter

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.config import read_config
from rsoups.adapters.layer_names import NEVER_RENAMED, PLAIN_LAYERS, was_renamed, without_numbers
from rsoups.adapters.settings import LoraSettings, by_pattern

PATHS = [f"{a}layers.{n}.{b}" for a in ("", "model.") for n in (0, 1, 12) for b in ("q_proj", "mlp.up_proj", "aq_proj")]
NAMES = st.sampled_from(["q_proj", "up_proj", "mlp", "mlp.up_proj", "layers.1.q_proj", "model.layers.0.q_proj", "1"])
REGEXES = [
    r".*\.q_proj",
    r"(model\.)?layers\.1\d?\..*",
    "q_proj",
    "^layers.0.q_proj",
    r"layers\.(0|1)\.mlp\.up_proj",
    "",
]


def test_the_fields_are_those_that_peft_writes():
    assert asdict(LoraSettings()) == LoraConfig().to_dict()
    assert LoraSettings.of(LoraConfig(task_type="CAUSAL_LM")).task_type == "CAUSAL_LM"
    assert type(LoraSettings.of(LoraConfig(task_type="CAUSAL_LM")).peft_type) is str
    assert LoraSettings().config() == LoraConfig()


def test_a_config_is_read_and_written_as_peft_does(tmp_path):
    lora = {"target_modules": ["v_proj"], "rank_pattern": {"x": 2}, "lora_dropout": 0.1, "modules_to_save": ["score"]}
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, task_type="SEQ_CLS", revision="main", **lora)
    config.save_pretrained(tmp_path)
    written = (tmp_path / "adapter_config.json").read_bytes()
    settings = read_config(tmp_path / "adapter_config.json")
    assert settings == LoraSettings.of(config) and settings.config() == config
    settings.save(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == written


ODD = [
    {"eva_config": {"rho": 3.0}, "init_lora_weights": "eva"},
    {"init_lora_weights": "gaussian"},
    {"megatron_core": "other"},
    {"loftq_config": {"loftq_bits": 4}},
    {"layers_to_transform": [0]},
]


@pytest.mark.filterwarnings("ignore:.*loftq_config")
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: next(iter(odd)))
def test_unusual_fields_are_what_peft_makes_of_them(tmp_path, odd):
    config = LoraConfig(target_modules=["q_proj"], **odd)
    data = {**config.to_dict(), **odd, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(data))
    settings = read_config(tmp_path / "adapter_config.json")
    assert settings == LoraSettings.of(config) and settings.config() == config


REFUSED = {
    "layers_to_transform": {"target_modules": "q_proj", "layers_to_transform": [0]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    "task type": {"task_type": "CAUSAL"},
    "lora_bias": {"lora_bias": True, "init_lora_weights": "gaussian"},
    "lora_bias=True": {"lora_bias": True, "init_lora_weights": None},
    "EvaConfig": {"eva_config": [1]},
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_peft_refuses_is_refused(tmp_path, told):
    with pytest.raises((ValueError, TypeError)):
        LoraConfig(**REFUSED[told])
    folder = tiny_adapter(tmp_path / "a")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **REFUSED[told]}))
    with pytest.raises(rsoups.AdapterError, match=told):
        read_adapter(folder)


@given(
    st.one_of(st.lists(NAMES, max_size=3), st.sampled_from(REGEXES)),
    st.lists(NAMES, max_size=1),
    st.sampled_from([None, 1, [0, 12]]),
    st.sampled_from([None, ["mlp"], ["q_proj"]]),
    st.sampled_from(PATHS),
)
def test_modules_are_targeted_as_peft_does(targets, excluded, layers, saved, path):
    layers = layers if isinstance(targets, list) else None
    lora = {"target_modules": targets, "exclude_modules": excluded, "modules_to_save": saved}
    config = LoraConfig(**lora, layers_to_transform=layers)
    assert LoraSettings.of(config).targets(path) == bool(check_target_module_exists(config, path))


@given(st.dictionaries(st.one_of(NAMES, st.sampled_from(REGEXES)), st.integers(1, 9)), st.sampled_from(PATHS))
def test_patterns_are_matched_as_peft_does(pattern, path):
    assert by_pattern(pattern, path, 0) == pattern.get(get_pattern_key(pattern, path), 0)


def test_classes_that_need_no_conversion_have_none_and_the_layers_that_we_know():
    for name in sorted(NEVER_RENAMED):
        kind = getattr(transformers, name)
        assert not was_renamed(kind), name
        config = kind.config_class(num_hidden_layers=1, vocab_size=8, pad_token_id=0)
        with torch.device("meta"):
            modules = dict(kind(config).named_modules())
        assert {without_numbers(path) for path in modules} >= PLAIN_LAYERS, name


def test_changes_of_a_soups_config_are_written(two, tmp_path):
    soup = rsoups.interpolate(two)
    soup.config.base_model_name_or_path = "some/base"
    soup.save_pretrained(tmp_path / "soup")
    assert soup.lineage["base"]["model"] == "some/base"
    assert LoraConfig.from_pretrained(tmp_path / "soup") == soup.config
    assert Path(tmp_path / "soup" / "soup.json").is_file() and {f.name for f in fields(soup.settings)} <= set(
        vars(soup.config)
    )
