"""One naming: adapters under old names of layers, and under prefixes of wrappers, are what PEFT makes of them, or refused."""

import json
import shutil

import pytest
import torch
from edited import edit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import assert_is_sum, tiny_adapter, tiny_llama
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.layer_names import PREFIX
from rsoups.versions.inspect import inspect_adapters

TEXT: dict = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"vocab_size": 64, "num_key_value_heads": 2, "initializer_range": 0.2}
EYE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
EYE |= {"image_size": 16, "patch_size": 8}
TARGETS = r".*(layers|blocks)\.\d+\.(self_attn\.(q_proj|v_proj)|attn\.qkv)"


def llava():
    config = {"text_config": LlamaConfig(**TEXT), "vision_config": CLIPVisionConfig(**EYE), "image_token_index": 63}
    return LlavaForConditionalGeneration(LlavaConfig(**config))


def gemma3():
    config = {"text_config": Gemma3TextConfig(**TEXT, head_dim=8), "vision_config": SiglipVisionConfig(**EYE)}
    return Gemma3ForConditionalGeneration(Gemma3Config(**config, mm_tokens_per_image=4))


def qwen2_vl():
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2]}
    eye = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=TEXT | {"rope_scaling": rope}, vision_config=eye))


LLAVA = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model."}
QWEN = {"model.language_model.": "model.", "model.visual.": "visual."}
FAMILIES = {"llava": (llava, LLAVA), "gemma3": (gemma3, LLAVA), "qwen2_vl": (qwen2_vl, QWEN)}


def renamed(folder, to, rename):
    """A copy of an adapter with other names of its tensors."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "adapter_model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, to / "adapter_model.safetensors")
    return to


def old_names(pairs):
    def rename(name):
        for new, old in pairs.items():
            if name.startswith(PREFIX + new):
                return PREFIX + old + name.removeprefix(PREFIX + new)
        raise AssertionError(name)

    return rename


def same_tensors(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """How to make the base, an adapter with today's names, one with old names, one with other ranks."""
    make, pairs = FAMILIES[request.param]

    def base():
        torch.manual_seed(0)
        return make().eval()

    new = tiny_adapter(tmp_path / "new", base(), seed=1, target_modules=TARGETS, task_type=None)
    other = tiny_adapter(tmp_path / "other", base(), seed=2, r=2, target_modules=TARGETS, task_type=None)
    return base, new, renamed(new, tmp_path / "old", old_names(pairs)), other


def test_old_names_of_layers_are_todays(family, tmp_path):
    base, new, old, other = family
    soup = rsoups.interpolate([old, other], [0.3, 0.7])
    assert same_tensors(soup.state_dict, rsoups.interpolate([new, other], [0.3, 0.7]).state_dict)
    soup.save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", base, [new, other], [0.3, 0.7])
    assert same_tensors(
        soup.load(base()).state_dict(), PeftModel.from_pretrained(base(), tmp_path / "soup").state_dict()
    )
    found = inspect_adapters({"old": read_adapter(old), "new": read_adapter(new)})
    assert found.cosine("old", "new") == pytest.approx(1, abs=1e-9) and found.refusals["exact"] is None


def test_where_no_adapter_tells_its_base_the_base_does(family, tmp_path):
    base, new, old, other = family
    for folder in (new, old, other):
        edit(folder, auto_mapping=None)
    with pytest.raises(rsoups.AdapterError, match=r"layers were renamed.*pass base="):
        rsoups.interpolate([old, other])
    assert "layers were renamed" in inspect_adapters({n: read_adapter(n) for n in (old, other)}).refusals["exact"]
    base().save_pretrained(tmp_path / "base")
    expected = rsoups.interpolate([new, other], [0.3, 0.7]).state_dict
    for given in (tmp_path / "base", base()):
        soup = rsoups.interpolate([old, other], [0.3, 0.7], base=given)
        assert same_tensors(soup.state_dict, expected)
    alone = rsoups.interpolate([old]).load(base())  # the base at hand tells it too
    assert same_tensors(alone.state_dict(), rsoups.interpolate([new]).load(base()).state_dict())
    edit(other, base_model_name_or_path=str(tmp_path / "base"))
    edit(old, base_model_name_or_path=str(tmp_path / "base"))
    assert same_tensors(rsoups.interpolate([old, other], [0.3, 0.7]).state_dict, expected)


def test_a_live_soup_has_one_naming_too(family):
    base, new, old, other = family
    loaded = base()
    ids = torch.tensor([[1, 5, 9, 30, 7]])
    live = rsoups.LiveSoup(loaded, [old, other])
    with torch.no_grad(), live.at([0.3, 0.7]):
        found = loaded(ids).logits
    with torch.no_grad():
        expected = rsoups.interpolate([new, other], [0.3, 0.7]).load(base())(ids).logits
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("known", [True, False])
def test_other_ranks_and_targets_under_old_names(tmp_path, known):
    def base():
        torch.manual_seed(0)
        return llava().eval()

    rename = old_names(LLAVA)
    ranks = tiny_adapter(tmp_path / "ranks", base(), target_modules=TARGETS, rank_pattern={"q_proj": 2}, task_type=None)
    targets = tiny_adapter(
        tmp_path / "targets", base(), seed=1, target_modules=r".*language_model.*\.k_proj", task_type=None
    )
    old = [renamed(folder, tmp_path / f"old {folder.name}", rename) for folder in (ranks, targets)]
    for folder in old if not known else ():  # their soup keeps the old names, and its config is right for today's too
        edit(folder, auto_mapping=None)
    rsoups.interpolate(old, [0.4, 0.6]).save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", base, old, [0.4, 0.6])


def test_patterns_that_name_layers_of_the_past(tmp_path):
    """Training took the alpha of a pattern; PEFT, which compares today's names with it, would take the other."""
    torch.manual_seed(0)
    new = tiny_adapter(tmp_path / "new", llava(), target_modules=r".*language_model.*q_proj", task_type=None)
    old = renamed(new, tmp_path / "old", old_names(LLAVA))
    edit(old, alpha_pattern={"language_model.model.layers.0.self_attn.q_proj": 3})
    with pytest.raises(rsoups.AdapterError, match=r"alpha_pattern gives 3 for language_model.*write today's names"):
        rsoups.interpolate([old])
    edit(old, alpha_pattern={}, target_modules=["language_model.model.layers.0.self_attn.q_proj", "1.self_attn.q_proj"])
    rsoups.interpolate([old]).save_pretrained(tmp_path / "soup")  # PEFT loads this, and not the ingredient
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(llava(), tmp_path / "soup").state_dict()
    torch.manual_seed(0)
    assert same_tensors(loaded, PeftModel.from_pretrained(llava(), new).state_dict())


WRAPPERS = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "the base compiled": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "the base in DDP": lambda name: name.replace(PREFIX, f"{PREFIX}module."),
    "layers compiled": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "FSDP": lambda name: name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
    "activation checkpointing": lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "PEFT twice": lambda name: PREFIX + name,
    "all of them": lambda name: f"module.{PREFIX}_fsdp_wrapped_module.{name.replace('.q_proj', '._orig_mod.q_proj')}",
    "the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "a compiled run of PEFT twice": lambda name: f"module._orig_mod.{PREFIX}_orig_mod.module.{name}",
    "FSDP around checkpointing": lambda name: name.replace(
        ".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_prefixes_of_wrappers_are_stripped(tmp_path, wrapper):
    plain = tiny_adapter(tmp_path / "plain")
    wrapped = renamed(plain, tmp_path / "wrapped", WRAPPERS[wrapper])
    assert (
        load_file(wrapped / "adapter_model.safetensors").keys() != load_file(plain / "adapter_model.safetensors").keys()
    )
    assert same_tensors(rsoups.interpolate([wrapped]).state_dict, rsoups.interpolate([plain]).state_dict)
    other = tiny_adapter(tmp_path / "other", seed=1)
    rsoups.interpolate([wrapped, other], [0.3, 0.7]).save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", tiny_llama, [plain, other], [0.3, 0.7])


UNKNOWN = {
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "half of it": lambda name: name.replace(PREFIX, "base_model.", 1).replace("model.layers", "layers"),
    "a wrapper that nobody knows": lambda name: f"pretrained_model.{name}",
    "another adapter's name": lambda name: name.replace(".weight", ".policy.weight"),
}


@pytest.mark.parametrize("wrapper", UNKNOWN)
def test_names_that_peft_reads_nothing_of_are_refused(tmp_path, wrapper):
    folder = renamed(tiny_adapter(tmp_path / "plain"), tmp_path / "wrapped", UNKNOWN[wrapper])
    with pytest.raises(rsoups.AdapterError, match=r"does not start with 'base_model|no LoRA tensors among"):
        rsoups.interpolate([folder])


def test_two_names_of_one_tensor_are_refused(tmp_path):
    folder = tiny_adapter(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {f"module.{name}": tensors[name] + 1}, folder / "adapter_model.safetensors")
    with pytest.raises(rsoups.AdapterError, match=rf"tensors .*module\.{name}.* are both {name}"):
        rsoups.interpolate([folder])


def test_whole_parameters_lose_their_wrappers_and_copies(tmp_path):
    folder = tiny_adapter(tmp_path / "a", modules_to_save=["lm_head"])
    expected = rsoups.interpolate([folder]).state_dict
    name = f"{PREFIX}lm_head.weight"
    for more in (".modules_to_save.weight", ".modules_to_save.default.weight"):
        odd = renamed(
            folder, tmp_path / f"odd{more}", lambda n, more=more: n.replace("lm_head.weight", f"lm_head{more}")
        )
        assert same_tensors(rsoups.interpolate([odd]).state_dict, expected)
    tensors = load_file(folder / "adapter_model.safetensors")
    copies = {f"{PREFIX}lm_head.{which}.weight": tensors[name] + 1 for which in ("modules_to_save", "original_module")}
    save_file(tensors | copies, folder / "adapter_model.safetensors")  # as PEFT 0.21 does with new tokens
    assert same_tensors(rsoups.interpolate([folder]).state_dict, expected)


def test_encoder_and_decoder_are_two_places(tmp_path):
    """They hold layers of one shape, and are no two names of the same layers."""
    folders = [
        tiny_adapter(tmp_path / place, target_modules=["q_proj"], seed=i)
        for i, place in enumerate(("encoder", "decoder"))
    ]
    both = [
        renamed(folder, tmp_path / f"{folder.name}s", lambda n, f=folder: n.replace(".layers.", f".{f.name}.layers."))
        for folder in folders
    ]
    assert len(rsoups.interpolate(both).state_dict) == 8
    config = json.loads((both[0] / "adapter_config.json").read_text())
    assert config["auto_mapping"] is None and not config["base_model_name_or_path"]
