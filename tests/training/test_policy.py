"""Fused LoRA layers against PEFT's own forward."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from trl import ModelConfig

from rsoups.training.policy import adapter_in_base, fuse_lora, load_policy

# PEFT warns of biases that cannot be merged, and of heads that are tied.
pytestmark = pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed", "ignore:Model has .tie_word_embeddings")
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "biases": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
}


def policy(**settings):
    """A float64 Llama with an adapter whose factors are not 0."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(tiny_llama(), lora).double()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def outcome(model):
    """Logits and the adapter's gradients."""
    torch.manual_seed(2)  # of dropout
    model.zero_grad()
    ids = torch.arange(4, 24).view(2, 10)
    logits = model(input_ids=ids).logits
    logits.sin().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_pefts(kind):
    model = policy(**KINDS[kind]).train()
    expected = outcome(model)
    fuse_lora(model)
    found = outcome(model)
    assert len(found) == len(expected) > 14
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_adapters_that_are_off_merged_or_several_at_once():
    model = policy()
    model.add_adapter("other", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".other." in name:
            torch.nn.init.normal_(parameter.data.double(), std=0.3)

    def states():
        with torch.no_grad():
            ids = torch.arange(4, 14).view(1, 10)
            yield model(input_ids=ids).logits
            with model.disable_adapter():
                yield model(input_ids=ids).logits
            model.set_adapter("other")
            yield model(input_ids=ids).logits
            model.base_model.set_adapter(["default", "other"])
            yield model(input_ids=ids).logits
            model.set_adapter("default")
            model.merge_adapter()
            yield model(input_ids=ids).logits
            model.unmerge_adapter()

    expected = list(states())
    fuse_lora(model)
    for a, b in zip(states(), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(expected[0], expected[1])


def test_plain_layers_do_not_take_pefts_way():
    model = policy()
    fuse_lora(model)
    called = []
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(lambda *_: called.append(1))
    outcome(model)
    assert not called


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_the_output_has_the_bases_rounding(base):
    """Against the float64 model: no worse than PEFT's forward by more than bfloat16's rounding."""
    exact = policy()
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        expected = exact(input_ids=ids).logits
        model = policy().float()
        if base == torch.bfloat16:
            for parameter in model.parameters():
                parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            peft = (model(input_ids=ids).logits - expected).abs().mean()
            fuse_lora(model)
            logits = model(input_ids=ids).logits
    fused = (logits - expected).abs().mean()
    assert 0 < fused < 1.2 * peft


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_includes_the_adapter_gives_the_same_logits_and_comes_back(kind):
    model = policy(**KINDS[kind]).float().eval()
    fuse_lora(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with adapter_in_base(model):
            found = model(input_ids=ids).logits
            moved = any(not torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        with pytest.raises(KeyboardInterrupt), adapter_in_base(model):
            raise KeyboardInterrupt
    assert torch.allclose(found, expected, atol=2e-5)
    assert moved is (kind not in ("biases", "dora"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_tied_embeddings_do_not_get_the_heads_adapter():
    lora = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM", ensure_weight_tying=False)
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    fuse_lora(model)
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with adapter_in_base(model):
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=2e-5)


@pytest.mark.parametrize("published", [torch.float32, torch.float16, torch.bfloat16])
def test_an_open_dtype_keeps_a_base_in_bfloat16_as_it_is(tmp_path, published):
    tiny_llama().to(published).save_pretrained(tmp_path)
    for dtype, expected in ((None, torch.bfloat16 if published == torch.bfloat16 else torch.float32),
                            ("float32", torch.float32), ("bfloat16", torch.bfloat16)):  # fmt: skip
        base, _ = load_policy(ModelConfig(model_name_or_path=str(tmp_path), dtype=dtype))
        assert base.dtype == expected


def test_no_base_in_half_precision_includes_the_adapter():
    """A change that is smaller than the weight's rounding would be lost."""
    model = policy().bfloat16()
    fuse_lora(model)
    before = model.state_dict()["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"].clone()
    with adapter_in_base(model):
        inside = model.state_dict()["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"]
        assert torch.equal(inside, before)
