"""A base after a soup was on it: bit for bit what it was, whatever the adapter's kind and however it ends."""

import pytest
import torch
from tiny import tiny_adapter, tiny_llama
from tiny_bases import IDS

import rsoups


def with_biases(**more):
    return tiny_llama(attention_bias=True, mlp_bias=True, **more)


KINDS = {
    "plain": (tiny_llama, {}),
    "all biases": (with_biases, {"bias": "all"}),
    "biases of adapted layers": (with_biases, {"bias": "lora_only"}),
    "whole head": (tiny_llama, {"modules_to_save": ["lm_head"]}),
    "whole norms": (tiny_llama, {"modules_to_save": ["norm", "input_layernorm"]}),
    "adapted embeddings with the base's own": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tokens": (tiny_llama, {"trainable_token_indices": [3, 9]}),
}


def looks(model):
    """All that a context may change: tensors and their bits, trainability, modes, hooks, modules, config."""
    tensors = {name: (id(t), t.detach().clone(), t.requires_grad) for name, t in model.named_parameters()}
    modules = {name: (id(m), m.training, len(m._forward_hooks), set(vars(m))) for name, m in model.named_modules()}
    return tensors, modules, model.config.to_dict()


def assert_as_before(model, before):
    tensors, modules, config = looks(model)
    assert modules == before[1] and config == before[2] and tensors.keys() == before[0].keys()
    for name, (place, values, trainable) in tensors.items():
        there, old, was_trainable = before[0][name]
        assert (place, trainable) == (there, was_trainable) and torch.equal(values, old), name


def leaves(soup, base):
    with soup.attached(base) as model:
        model(IDS)


def raises(soup, base):
    with pytest.raises(KeyboardInterrupt), soup.attached(base) as model:
        model.eval()
        raise KeyboardInterrupt


def unloads_inside(soup, base):
    with soup.attached(base) as model:
        model.unload()


def trains_inside(soup, base):
    with soup.attached(base) as model:
        model.train()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.get_base_model().register_forward_hook(lambda *_: None)
        model.half()


def merges_inside(soup, base):
    for name in ("merge_adapter", "merge_and_unload"):
        with soup.attached(base) as model, pytest.raises(rsoups.AdapterError, match=r"use Soup.merge"):
            getattr(model, name)()


def is_abandoned(soup, base):
    context = soup.attached(base)
    context.__enter__()
    context.gen.close()


@pytest.mark.parametrize("ending", [leaves, raises, unloads_inside, trains_inside, merges_inside, is_abandoned])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_comes_back(tmp_path_factory, kind, ending, soups):
    make, _ = KINDS[kind]
    base = make()
    base.lm_head.weight.requires_grad_(False)
    base.model.layers[0].train()
    before = looks(base)
    ending(soups(kind), base)
    assert_as_before(base, before)


@pytest.fixture(scope="module")
def soups(tmp_path_factory):
    made = {}

    def soup(kind):
        if kind not in made:
            make, lora = KINDS[kind]
            made[kind] = rsoups.interpolate([tiny_adapter(tmp_path_factory.mktemp("a") / "a", make(), **lora)])
        return made[kind]

    return soup


@pytest.mark.parametrize("kind", ["all biases", "whole head", "adapted embeddings with the base's own"])
def test_a_refused_base_is_as_it_was(tmp_path, soups, monkeypatch, kind):
    make, _ = KINDS[kind]
    soup = soups(kind)
    deeper = make(num_hidden_layers=3)
    before = looks(deeper)
    for refused in (soup.load, lambda base: soup.merge(base, tmp_path / "out")):
        with pytest.raises(rsoups.AdapterError, match="deeper"):
            refused(deeper)
        assert_as_before(deeper, before)
    base = make()
    before = looks(base)
    monkeypatch.setattr("rsoups.soups.attach.set_peft_model_state_dict", lambda *_: None)  # what PEFT might not load
    with pytest.raises(rsoups.AdapterError, match="PEFT did not load"):
        soup.load(base)
    assert_as_before(base, before)
    assert not (tmp_path / "out").exists()
