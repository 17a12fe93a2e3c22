"""Files of merged models: the names of tensors that the base's own files have, its config, its tokenizer, its kind of model."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_adapter, tiny_llama, tiny_tokenizer
from tiny_bases import IDS, gpt2
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import rsoups
from rsoups.cli.main import main

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2, initializer_range=0.2)).eval()


def llava():
    torch.manual_seed(0)
    sizes = {
        key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32)
    text = LlamaConfig(**SMALL, initializer_range=0.2)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    ).eval()


def as_in_old_llavas(name):
    new = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    new |= {"model.vision_tower.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector."}
    return next((old + name.removeprefix(start) for start, old in new.items() if name.startswith(start)), name)


def with_what_is_not_read(tensors):
    """A stored copy of the tied head, and a buffer that transformers computes anew."""
    return tensors | {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }


def same(tensors):
    return tensors


# The model, LoRA's settings, and how its file is written otherwise than transformers writes it today.
BASES = {
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), {}, same),
    "a copy of the tied head": (lambda: tiny_llama(tie_word_embeddings=True), {}, with_what_is_not_read),
    "experts": (mixtral, {}, same),
    "vision": (llava, {}, same),
    "vision, old names": (llava, {}, lambda found: {as_in_old_llavas(name): t for name, t in found.items()}),
    "body without its prefix": (
        gpt2,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        lambda found: {name.removeprefix("transformer."): tensor for name, tensor in found.items()},
    ),
}


def saved(folder, make, rewritten=same):
    make().save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in rewritten(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("given", ["folder", "loaded"])
@pytest.mark.parametrize("kind", BASES)
def test_the_file_has_the_names_of_its_base_and_the_weights_of_pefts_merge(tmp_path, kind, given):
    make, lora, rewritten = BASES[kind]
    base, made = saved(tmp_path / "base", make, rewritten), type(make())
    adapter = tiny_adapter(tmp_path / "a", made.from_pretrained(base), **lora)
    soup = rsoups.interpolate([adapter])
    soup.merge(base if given == "folder" else made.from_pretrained(base), tmp_path / "out")
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    config, before = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", base))
    assert config == before, "older versions of transformers read the words of their time"
    peft = PeftModel.from_pretrained(made.from_pretrained(base).double(), adapter).merge_and_unload().eval()
    merged, loading = made.from_pretrained(tmp_path / "out", dtype=torch.float64, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    expected, found, plain = peft.state_dict(), merged.state_dict(), made.from_pretrained(base).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(tensor, expected[name], atol=1e-7) for name, tensor in found.items())
    assert any(not torch.allclose(tensor, plain[name].double(), atol=1e-3) for name, tensor in found.items())
    mean = rsoups.interpolate_checkpoints([base, tmp_path / "out"], [0.5, 0.5], tmp_path / "mean", progress=False)
    for name, tensor in load_file(mean / "model.safetensors").items():
        assert torch.allclose(tensor, (ours[name] + theirs[name]) / 2, atol=1e-7), name


def test_an_old_config_stays_in_its_words(tmp_path):
    base = saved(tmp_path / "base", tiny_llama)
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_theta": 5e5, "torch_dtype": "float32", "_name_or_path": "/home/someone/base"}
    (base / "config.json").write_text(json.dumps(config))
    soup = rsoups.interpolate([tiny_adapter(tmp_path / "a")])
    soup.merge(base, tmp_path / "out", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {key: value for key, value in config.items() if key != "_name_or_path"} | {
        "torch_dtype": "bfloat16"
    }
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 5e5


@pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias", "ignore:.lora_bias=True. was passed")
def test_a_bias_is_added_where_the_kind_of_model_can_have_one(tmp_path):
    """And its siblings that the same switch of the config brings, which are 0."""
    targets = {"lora_bias": True, "target_modules": ["q_proj", "up_proj"]}
    base = saved(tmp_path / "base", tiny_llama)
    soup = rsoups.interpolate([tiny_adapter(tmp_path / "a", tiny_llama(), **targets)])
    soup.merge(base, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.1.self_attn.q_proj.bias"].any() and tensors["model.layers.1.mlp.up_proj.bias"].any()
    assert not tensors["model.layers.1.self_attn.v_proj.bias"].any()
    merged, loading = type(tiny_llama()).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["unexpected_keys"] and not loading["missing_keys"]
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, soup.load(tiny_llama())(IDS).logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias", "ignore:.lora_bias=True. was passed")
def test_a_bias_that_no_config_can_switch_on_is_refused(tmp_path):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL))
    soup = rsoups.interpolate([tiny_adapter(tmp_path / "a", model, lora_bias=True)])
    with pytest.raises(rsoups.AdapterError, match="a MistralForCausalLM has none there.*load the soup instead"):
        soup.merge(MistralForCausalLM(MistralConfig(**SMALL)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_reward_model_is_merged_as_one(tmp_path):
    """Its base is a language model on the disk, without the head that the adapter brings."""
    base = saved(tmp_path / "base", tiny_llama)

    def make():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).eval()

    soup = rsoups.interpolate([tiny_adapter(tmp_path / "a", make(), task_type="SEQ_CLS")])
    with torch.no_grad():
        expected = soup.load(make())(IDS).logits
    for name, given in (("folder", base), ("loaded", make())):
        soup.merge(given, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"]
        assert "lm_head.weight" not in load_file(tmp_path / name / "model.safetensors")
        merged, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / name, output_loading_info=True)
        assert merged.config.num_labels == 1 and not loading["missing_keys"]
        with torch.no_grad():
            assert torch.allclose(merged.eval()(IDS).logits, expected, atol=1e-5)


def test_a_head_that_nobody_has_is_not_drawn_at_random(tmp_path):
    base = saved(tmp_path / "base", tiny_llama)
    folder = tiny_adapter(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"task_type": "SEQ_CLS"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(rsoups.AdapterError, match="neither the base .* nor the soup holds score.weight"):
        rsoups.interpolate([folder]).merge(base, tmp_path / "out")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_merged(tmp_path, bias):
    def make():
        return tiny_llama(attention_bias=True)

    folders = [tiny_adapter(tmp_path / str(i), make(), seed=i, bias=bias) for i in range(2)]
    soup = rsoups.interpolate(folders, [0.3, 0.7])
    soup.merge(make(), tmp_path / "out")
    with torch.no_grad():
        merged = type(make()).from_pretrained(tmp_path / "out").eval()(IDS).logits
        assert torch.allclose(merged, soup.load(make())(IDS).logits, atol=2e-5)


def test_a_base_that_is_not_found_is_told_in_one_line(tmp_path, capsys):
    assert main(["merge", str(tiny_adapter(tmp_path / "a")), "--base", "user/none", "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rsoups: cannot load the base 'user/none'") and error.count("\n") == 1


# --- new tokens ------------------------------------------------------------------------------------------------------

NEW = torch.tensor([[1, 65, 9, 66]])


@pytest.fixture
def grown(tmp_path):
    """A base of 64 tokens, and two adapters that were trained with 4 more, with the tokenizer that has them."""
    saved(tmp_path / "base", tiny_llama)
    tiny_tokenizer([f"w{i}" for i in range(60)]).save_pretrained(tmp_path / "base")

    def resized():
        model = type(tiny_llama()).from_pretrained(tmp_path / "base")
        torch.manual_seed(1)
        model.resize_token_embeddings(68, mean_resizing=False)
        return model.eval()

    for seed, name in enumerate("ab"):
        whole = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}
        model = get_peft_model(resized(), LoraConfig(r=4, init_lora_weights=False, **whole))
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "modules_to_save" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        with pytest.warns(UserWarning, match="has been resized"):
            model.save_pretrained(tmp_path / name)  # as PEFT does it: each of the tables three times
        tiny_tokenizer([f"w{i}" for i in range(60)] + list("pqrs")).save_pretrained(tmp_path / name)
    return [tmp_path / "a", tmp_path / "b"], tmp_path / "base", resized


def test_new_tokens_are_loaded_merged_and_keep_their_tokenizer(grown, tmp_path):
    folders, base, resized = grown
    soup = rsoups.interpolate(folders, [0.3, 0.7])
    soup.save_pretrained(tmp_path / "soup")
    assert AutoTokenizer.from_pretrained(tmp_path / "soup").get_vocab()["s"] == 67
    again = rsoups.Soup.from_pretrained(tmp_path / "soup")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(resized(), tmp_path / "soup").eval()(NEW).logits
        assert torch.equal(soup.load(resized())(NEW).logits, expected)
        small = tiny_llama()
        assert torch.equal(again.load(small, resize=True).eval()(NEW).logits, expected)
        for name, given in (("folder", base), ("resized", resized()), ("small", tiny_llama())):
            again.merge(given, tmp_path / name)
            merged = type(tiny_llama()).from_pretrained(tmp_path / name).eval()
            assert merged.config.vocab_size == 68 and torch.allclose(merged(NEW).logits, expected, atol=2e-5)
            assert AutoTokenizer.from_pretrained(tmp_path / name).get_vocab()["s"] == 67


def test_a_base_that_was_resized_for_a_while_has_its_own_tokens_again(grown):
    folders, *_ = grown
    soup, base = rsoups.interpolate(folders), tiny_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(rsoups.AdapterError, match=r"\(68, 32\) in the soup, the base needs \(64, 32\).*resize=True"):
        soup.load(base)
    with soup.attached(base, resize=True) as model:
        assert model.config.vocab_size == 68
    after = base.state_dict()
    assert base.config.vocab_size == base.get_input_embeddings().num_embeddings == base.lm_head.out_features == 64
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_tokens_that_are_not_the_same_in_two_ingredients_are_refused(grown):
    folders, *_ = grown
    tiny_tokenizer([f"w{i}" for i in range(60)] + list("qprs")).save_pretrained(folders[1])
    with pytest.raises(rsoups.AdapterError, match=r"tokenizers that came with .* differ: 'p' is 64 and 65"):
        rsoups.interpolate(folders)


def test_no_code_no_pickle_and_nothing_from_elsewhere_goes_with_a_tokenizer(grown, tmp_path):
    folders, *_ = grown
    Path(folders[0], "tokenizer_x.py").write_text("raise SystemExit")
    Path(folders[0], "vocab.bin").write_bytes(b"\x80")
    Path(tmp_path, "secret.txt").write_text("secret")
    Path(folders[0], "vocab.txt").symlink_to(tmp_path / "secret.txt")
    settings = Path(folders[0], "tokenizer_config.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"name_or_path": "/home/someone/x"}))
    rsoups.interpolate(folders).save_pretrained(tmp_path / "soup")
    names = {path.name for path in (tmp_path / "soup").iterdir()}
    assert "tokenizer.json" in names and not names & {"tokenizer_x.py", "vocab.bin", "vocab.txt"}
    assert "/home/someone" not in (tmp_path / "soup" / "tokenizer_config.json").read_text()
