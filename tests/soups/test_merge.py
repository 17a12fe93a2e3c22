"""Soups written into whole models, against the base with the soup attached and against float64 sums."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_adapter, tiny_llama, tiny_tokenizer
from tiny_bases import IDS, gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import rsoups

KINDS = {
    "llama": (tiny_llama, {}),
    "gpt2, transposed and tied": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "embeddings": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embeddings": (
        lambda: tiny_llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "q_proj"]},
    ),
    "bias": (lambda: tiny_llama(attention_bias=True), {"lora_bias": True}),
    "whole head": (tiny_llama, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings(
    "ignore:.*invalid shape.*lora_B.bias", "ignore:.*tie_word_embeddings", "ignore:Model has .tie_word_embeddings"
)
def test_a_merged_soup_says_what_the_base_says_with_it(tmp_path, kind):
    make, lora = KINDS[kind]
    folders = [tiny_adapter(tmp_path / str(i), make(), seed=i, **lora) for i in range(2)]
    soup = rsoups.interpolate(folders, [0.3, 0.7])
    base = make()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    soup.merge(base, tmp_path / "merged")
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = soup.load(make()).eval()(IDS).logits
        found = merged(IDS).logits
        assert torch.allclose(found, expected, atol=2e-5)
        assert not torch.allclose(found, make()(IDS).logits, atol=1e-3)
    assert json.loads((tmp_path / "merged" / "soup.json").read_text())["merged"]


def test_a_half_precision_base_is_rounded_once(tmp_path):
    folders = [tiny_adapter(tmp_path / str(i), seed=i) for i in range(2)]
    soup = rsoups.interpolate(folders, [0.3, 0.7])
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer([f"w{i}" for i in range(60)])
    tokenizer.save_pretrained(tmp_path / "base")
    soup.merge(tmp_path / "base", tmp_path / "bf16")
    soup.merge(tmp_path / "base", tmp_path / "fp32", dtype=torch.float32)
    base, half, whole = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "bf16", "fp32"))
    name = "model.layers.1.self_attn.v_proj"
    a, b = (soup.state_dict[f"base_model.model.{name}.lora_{f}.weight"].double() for f in "AB")
    exact = base[f"{name}.weight"].double() + b @ a
    assert torch.allclose(whole[f"{name}.weight"].double(), exact, atol=1e-7)
    assert torch.equal(half[f"{name}.weight"], whole[f"{name}.weight"].to(torch.bfloat16))
    assert torch.equal(half["lm_head.weight"], base["lm_head.weight"])
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert AutoTokenizer.from_pretrained(tmp_path / "fp32").get_vocab() == tokenizer.get_vocab()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16


def test_a_quantised_base_is_read_again_in_full_precision(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    folder = tiny_adapter(tmp_path / "a", tiny_llama(hidden_size=64, intermediate_size=128))
    soup = rsoups.interpolate([folder])
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.float32
    )
    with pytest.warns(UserWarning, match="does not fit into quantized weights: the base is read again"):
        soup.merge(base, tmp_path / "merged")
    soup.merge(tmp_path / "base", tmp_path / "direct", dtype=torch.bfloat16)
    merged, direct = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "direct"))
    assert all(torch.equal(merged[key], direct[key]) for key in direct)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_bases_that_no_soup_can_be_merged_into(tmp_path):
    soup = rsoups.interpolate([tiny_adapter(tmp_path / "a")])
    with pytest.raises(rsoups.AdapterError, match="cannot load the base"):
        soup.merge(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(rsoups.AdapterError, match="deeper"):
        soup.merge(tiny_llama(num_hidden_layers=3), tmp_path / "out")
    tiny_llama().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    for change, words in ((quantized, "quantized weights only"), ({"architectures": ["Nothing"]}, "no class")):
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(rsoups.AdapterError, match=words):
            soup.merge(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
