"""Every adapter that cannot be part of an exact soup is refused, with the file, tensor or field named."""

import hashlib
import struct
import warnings

import pytest
import torch
from edited import edit, retouch
from safetensors.torch import load_file
from tiny import assert_is_sum, tiny_adapter
from transformers import GPT2Config, GPT2LMHeadModel

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.layer_names import PREFIX


@pytest.fixture
def adapter(tmp_path):
    return tiny_adapter(tmp_path / "adapter")


def refuses(folder, words):
    with pytest.raises(rsoups.AdapterError, match=words):
        rsoups.interpolate([folder])


def test_an_adapter_is_read_as_it_was_saved(adapter):
    read = read_adapter(adapter)
    assert len(read.modules) == 4
    module = read.modules["model.layers.0.self_attn.q_proj"]
    assert (module.rank, module.shape, module.scaling) == (4, (32, 32), 2.0)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert read.full == [] and read.layout.keys() == saved.keys()
    assert all(torch.equal(read.tensor(name), saved[name]) for name in saved)
    assert read.sha256 == hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


DAMAGE = {
    "truncated": lambda data: data[:-7],
    "cut in the header": lambda data: data[:20],
    "empty": lambda data: b"",
    "trailing garbage": lambda data: data + b"garbage",
    "a huge header": lambda data: struct.pack("<Q", 2**62) + data[8:],
    "a header beyond the file": lambda data: struct.pack("<Q", len(data) * 2) + data[8:],
    "a header that is not JSON": lambda data: data[:8] + b"[" + data[9:],
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_files_are_refused_by_name(adapter, damage):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    refuses(adapter, r"adapter_model\.safetensors is corrupt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_named(adapter, value):
    retouch(adapter, lambda tensors: tensors[sorted(tensors)[2]].view(-1).__setitem__(3, value))
    refuses(adapter, r"q_proj|v_proj.* NaN or infinity")


def test_a_pickle_is_never_opened(adapter, tmp_path):
    trace = tmp_path / "opened"

    class Bomb:
        def __reduce__(self):
            return (trace.touch, ())

    torch.save(Bomb(), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    refuses(adapter, "rsoups convert .* --out adapter-safetensors")
    assert not trace.exists()


def test_missing_files_are_named(adapter, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    refuses(adapter, r"holds no adapter_model\.safetensors")
    (adapter / "adapter_config.json").unlink()
    refuses(adapter, r"holds no adapter_config\.json")
    refuses(tmp_path / "nowhere", "no adapter folder")


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not valid JSON"), ("[]", "not an object"), ("\xff", "peft_type|JSON")]
)
def test_configs_that_are_not_objects(adapter, text, words):
    (adapter / "adapter_config.json").write_text(text, encoding="latin-1")
    refuses(adapter, words)


FIELDS = [
    ({"peft_type": "IA3"}, "'IA3'.*LORA adapters only"),
    ({"peft_type": "SOMETHING_NEW"}, "LORA adapters only"),
    ({"peft_type": None}, "LORA adapters only"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"r": 0}, "r is 0"),
    ({"r": -4}, "r is -4"),
    ({"r": True}, "r is True"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0"),
    ({"alpha_pattern": [1]}, "alpha_pattern is"),
    ({"r": 8}, "rank 8"),
    ({"target_modules": ["k_proj"]}, "does not target"),
    ({"layers_to_transform": [0], "layers_pattern": "layers"}, "layers.1.*does not target"),
    ({"lora_bias": True}, "lora_bias=True"),
    ({"use_dora": True}, "use_dora is set"),
    ({"init_lora_weights": "pissa"}, "pissa.*convert"),
    ({"init_lora_weights": "olora"}, "olora"),
    ({"init_lora_weights": "corda"}, "corda"),
    ({"init_lora_weights": "loftq", "loftq_config": {}}, "loftq"),
    ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    ({"init_lora_weights": "orthogonal"}, "orthogonal"),
    ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
    ({"megatron_config": {"a": 1}}, "megatron_config is set"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is set .* no tensor holds"),
    ({"trainable_token_indices": ["a"]}, "trainable_token_indices.0 is 'a': input should be a valid integer"),
    ({"target_parameters": "experts"}, "target_parameters is 'experts': input should be a valid (list|array)"),
    ({"ensure_weight_tying": "no"}, "ensure_weight_tying is 'no': input should be a valid boolean"),
    ({"auto_mapping": "Llama"}, "auto_mapping is 'Llama': input should be an object"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"field_of_tomorrow": 3}, "field_of_tomorrow.*upgrade"),
]


@pytest.mark.filterwarnings("ignore:.init_lora_weights. is 'corda' but")
@pytest.mark.parametrize(("fields", "words"), FIELDS, ids=lambda v: str(v)[:40])
def test_fields_are_named(adapter, fields, words):
    edit(adapter, **fields)
    refuses(adapter, words)


def test_tensors_and_config_must_agree(adapter):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    retouch(adapter, lambda tensors: tensors.pop(key))
    refuses(adapter, r"model\.layers\.0\.self_attn\.q_proj has factors \['B'\]")
    retouch(adapter, lambda tensors: tensors.update({key: torch.zeros(4, 32, dtype=torch.int8)}))
    refuses(adapter, "q_proj.lora_A.weight is not floating-point")
    retouch(adapter, lambda tensors: tensors.update({key: torch.zeros(4, 32), PREFIX + "stray.weight": torch.zeros(1)}))
    refuses(adapter, "stray.weight is one that adapter_config.json does not account for")


@pytest.mark.parametrize("part", ["lora_A", "lm_head"])
def test_tensors_without_elements_are_refused(tmp_path, part):
    """ZeRO-3 leaves them behind: of factors, and of modules that were trained as a whole."""
    folder = tiny_adapter(tmp_path / "a", modules_to_save=["lm_head"])
    retouch(folder, lambda tensors: tensors.update({key: torch.empty(0) for key in tensors if part in key}))
    refuses(folder, rf"{part}.* has no elements.*save it again with the parameters gathered")


def test_an_adapter_in_a_folder_of_its_name_is_hinted_at(tmp_path):
    tiny_adapter(tmp_path / "checkpoint-10" / "policy")
    refuses(tmp_path / "checkpoint-10", r"holds no adapter_config\.json: the adapter is in .*checkpoint-10/policy")


def test_a_flag_for_tied_layers_that_ties_none_is_fine(tmp_path, adapter):
    """PEFT's flag does nothing to an adapter of other layers."""
    edit(adapter, ensure_weight_tying=True)
    assert rsoups.interpolate([adapter]).config.ensure_weight_tying is False
    folder = tiny_adapter(tmp_path / "head", target_modules=["embed_tokens", "q_proj"])
    edit(folder, ensure_weight_tying=True)
    refuses(folder, "ensure_weight_tying is set, and adapters that are shared by tied layers")


def test_fan_in_fan_out_is_what_peft_makes_of_it(tmp_path):
    """A config tells it of the last layer that PEFT wrapped; PEFT corrects it, layer by layer, when it loads."""

    config = {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 16,
        "tie_word_embeddings": False,
    }
    config |= {"bos_token_id": 1, "eos_token_id": 2}

    def base():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**config)).eval()

    attention = tiny_adapter(tmp_path / "attention", base(), target_modules=["c_attn"], fan_in_fan_out=True)
    head = tiny_adapter(tmp_path / "head", base(), seed=1, target_modules=["lm_head"])
    assert rsoups.interpolate([attention]).config.fan_in_fan_out != rsoups.interpolate([head]).config.fan_in_fan_out
    for folders in ([attention, head], [head, attention]):
        with warnings.catch_warnings(action="ignore"):  # PEFT tells that it corrects
            rsoups.interpolate(folders, [0.4, 0.6]).save_pretrained(tmp_path / "soup")
            assert_is_sum(tmp_path / "soup", base, folders, [0.4, 0.6])


def test_a_config_without_tensors(adapter):
    retouch(adapter, lambda tensors: tensors.clear())
    refuses(adapter, "no tensors")


@pytest.mark.parametrize("name", ["../../no-such", "/no/such/folder", "user/na me", "a/../b", "a/b/../c", "user/name@"])
def test_names_that_are_neither_folders_nor_hub_ids(name):
    with pytest.raises(rsoups.AdapterError, match="no adapter folder"):
        read_adapter(name)


def test_a_hub_id_that_is_not_cached_says_so_when_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(rsoups.HubError, match="not in the cache"):
        read_adapter("no-such-user/no-such-adapter")
    with pytest.raises(rsoups.HubError, match="not in the cache"):
        read_adapter("no-such-user/no-such-front/lambda-0.3@v1")


def test_a_broken_ingredient_is_refused_at_any_weight(adapter, tmp_path):
    whole = tiny_adapter(tmp_path / "whole", seed=1)
    retouch(adapter, lambda tensors: tensors[sorted(tensors)[-1]].view(-1).__setitem__(-1, float("nan")))
    for row in ([0.0, 1.0], [0.5, 0.5], [[0.0, 1.0], [0.0, 1.0]]):
        with pytest.raises(rsoups.AdapterError, match="NaN or infinity"):
            rsoups.interpolate([adapter, whole], row)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(adapter):
    read = read_adapter(adapter)
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(rsoups.AdapterError, match="corrupt"):
        for name in read.layout:
            read.tensor(name)
