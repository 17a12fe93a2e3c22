"""Parameters beside the factors: heads, embeddings, single tokens, biases; where not all hold them, and with any Σλ."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import assert_is_sum, tiny_adapter, tiny_llama, tiny_qwen

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.layer_names import PREFIX
from rsoups.versions.inspect import inspect_adapters

IDS = torch.tensor([[1, 5, 9, 30, 7]])
HEAD = f"{PREFIX}lm_head.weight"
COPY = f"{PREFIX}lm_head.base_layer.weight"


def tied():
    return tiny_llama(tie_word_embeddings=True)


# What one ingredient trains beside its factors, and the base.
WHOLE = {
    "a head": ({"modules_to_save": ["lm_head"]}, tiny_llama),
    "embeddings": ({"modules_to_save": ["embed_tokens"]}, tiny_llama),
    "a head that the base ties": ({"modules_to_save": ["lm_head"]}, tied),
    "single tokens": ({"trainable_token_indices": [9, 3]}, tiny_llama),
    "all biases": ({"bias": "all"}, tiny_qwen),
    "biases of adapted modules": ({"bias": "lora_only"}, tiny_qwen),
}


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings are no longer tied"
)
@pytest.mark.parametrize("kind", WHOLE)
def test_what_one_ingredient_holds_is_blended_with_the_bases_own(tmp_path, kind):
    lora, base = WHOLE[kind]
    base().save_pretrained(tmp_path / "base")
    one = tiny_adapter(tmp_path / "one", base(), seed=1, target_modules=["q_proj"], **lora)
    other = tiny_adapter(tmp_path / "other", base(), seed=2, r=2, target_modules=["v_proj"])
    with pytest.raises(rsoups.AdapterError, match=r"in only one of .*pass base="):
        rsoups.interpolate([one, other])
    found = {folder.name: read_adapter(folder) for folder in (one, other)}
    assert "pass base=" in inspect_adapters(found).refusals["exact"]
    assert inspect_adapters(found, tmp_path / "base").refusals["exact"] is None

    for given, lambdas in ((tmp_path / "base", [0.3, 0.7]), (base(), [1.2, 0.5])):
        soup = rsoups.interpolate([one, other], lambdas, base=given, extrapolate=True)
        soup.save_pretrained(tmp_path / "soup")
        assert_is_sum(tmp_path / "soup", base, [one, other], lambdas)
    loaded = base()
    before = loaded(IDS).logits
    with torch.no_grad(), soup.attached(loaded) as model:
        assert (model(IDS).logits - before).abs().max() > 1e-2
    assert torch.equal(loaded(IDS).logits, before)


def test_sums_other_than_one(tmp_path):
    """Task arithmetic: θ0 + Σ λi·Δi, whatever λ sum to."""
    folders = [tiny_adapter(tmp_path / str(i), seed=i, r=2 + i) for i in range(2)]
    with pytest.raises(rsoups.LambdasError, match=r"sum to 1\.6, not 1.*extrapolate=True takes them as they are"):
        rsoups.interpolate(folders, [0.9, 0.7])
    soup = rsoups.interpolate(folders, [0.9, 0.7], extrapolate=True)
    soup.save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", tiny_llama, folders, [0.9, 0.7])
    exact = soup.truncate(4 + 1)
    assert exact.lambdas == (0.9, 0.7) and exact.svd_error < 1e-12
    nothing = rsoups.interpolate(folders, [0, 0], extrapolate=True)
    assert all(not tensor.any() for name, tensor in nothing.state_dict.items() if "lora_B" in name)
    with pytest.raises(rsoups.LambdasError, match="method 'factors' would scale A and B by it each"):
        rsoups.interpolate([folders[0]] * 2, [0.9, 0.7], extrapolate=True, method="factors")
    live = rsoups.LiveSoup(tiny_llama(), folders)
    with torch.no_grad(), live.at([0.9, 0.7], extrapolate=True) as model:
        assert (model(IDS).logits - soup.load(tiny_llama())(IDS).logits).abs().max() < 1e-5

    whole = [tiny_adapter(tmp_path / f"whole{i}", seed=i, modules_to_save=["lm_head"]) for i in range(2)]
    with pytest.raises(rsoups.AdapterError, match=r"lm_head\.weight .* sum to 1\.6, not 1.*pass base="):
        rsoups.interpolate(whole, [0.9, 0.7], extrapolate=True)
    rsoups.interpolate(whole, [0.9, 0.7], extrapolate=True, base=tiny_llama()).save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", tiny_llama, whole, [0.9, 0.7])


def test_single_tokens_are_taken_where_they_agree(tmp_path):
    folders = [tiny_adapter(tmp_path / str(i), seed=i, r=2 + i, trainable_token_indices=[9, 3]) for i in range(2)]
    rsoups.interpolate(folders, [0.3, 0.7]).save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", tiny_llama, folders, [0.3, 0.7])
    for tokens in ([3, 9], [9, 4]):
        other = tiny_adapter(tmp_path / f"{tokens}", seed=3, trainable_token_indices=tokens)
        with pytest.raises(
            rsoups.AdapterError, match="trainable_token_indices differ.*the same tokens in the same order"
        ):
            rsoups.interpolate([folders[0], other])


BOTH = {"embed_tokens": [9, 3], "lm_head": [9, 3]}
TOKENS = {
    "a list and both layers": ([9, 3], BOTH),
    "both layers and a list": (BOTH, [9, 3]),
    "one layer each": ({"embed_tokens": [9, 3]}, {"lm_head": [5]}),
    "paths and names": (BOTH, {"model.embed_tokens": [9, 3], "lm_head": [9, 3]}),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_single_tokens_of_other_layers_are_blended_with_the_bases_own(tmp_path, kind):
    folders = [
        tiny_adapter(tmp_path / str(i), seed=i, trainable_token_indices=tokens) for i, tokens in enumerate(TOKENS[kind])
    ]
    rsoups.interpolate(folders, [0.3, 0.7], base=tiny_llama()).save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", tiny_llama, folders, [0.3, 0.7])


def test_single_tokens_of_tied_layers_are_refused_where_ingredients_train_others(tmp_path):
    """PEFT applies the tokens of one layer to the other that is tied to it, if that has none of its own."""
    tied().save_pretrained(tmp_path / "base")
    tokens = {"embed_tokens": [9, 3]}, {"lm_head": [9, 3]}
    folders = [tiny_adapter(tmp_path / str(i), tied(), trainable_token_indices=one) for i, one in enumerate(tokens)]
    with pytest.raises(rsoups.AdapterError, match=r"tokens of other layers, and .* ties them: train the same ones"):
        rsoups.interpolate(folders, base=tmp_path / "base")


BESIDE = {
    "factors": ({"target_modules": ["embed_tokens"]}, "at single tokens in .* and has factors in"),
    "whole": ({"modules_to_save": ["embed_tokens"]}, "as a whole in .* and has single trained tokens in"),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", BESIDE)
def test_single_tokens_beside_other_changes_of_their_layer_are_refused(tmp_path, kind, order):
    lora, reason = BESIDE[kind]
    folders = [tiny_adapter(tmp_path / "a", trainable_token_indices=[9, 3]), tiny_adapter(tmp_path / "b", **lora)]
    with pytest.raises(rsoups.AdapterError, match=rf"embed_tokens was trained {reason}.*PEFT cannot hold both"):
        rsoups.interpolate(folders[::order], base=tiny_llama())


@pytest.fixture
def with_copy(tmp_path):
    """An adapter of the head: PEFT saves the base's own head with it."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "with copy", save_embedding_layers=True)
    assert torch.equal(
        load_file(tmp_path / "with copy" / "adapter_model.safetensors")[COPY], tiny_llama().lm_head.weight
    )
    return tmp_path / "with copy"


def test_the_copy_of_a_bases_head_is_no_training(tmp_path, with_copy):
    plain = tiny_adapter(tmp_path / "plain", seed=1)
    tiny_llama().save_pretrained(tmp_path / "base")
    for given in (None, tmp_path / "base", tiny_llama()):
        soup = rsoups.interpolate([with_copy, plain], [0.3, 0.7], base=given)
        assert (COPY in soup.state_dict) == (given is None)  # without the base nobody knows that it is its own
        soup.save_pretrained(tmp_path / "soup")
        assert_is_sum(tmp_path / "soup", tiny_llama, [with_copy, plain], [0.3, 0.7])
    live = rsoups.LiveSoup(tiny_llama(), [with_copy, plain])
    with torch.no_grad(), live.at([0.3, 0.7]) as model:
        assert (model(IDS).logits - soup.load(tiny_llama())(IDS).logits).abs().max() < 1e-5
    assert inspect_adapters({"a": read_adapter(with_copy), "b": read_adapter(plain)}).refusals["exact"] is None
    rsoups.interpolate([with_copy] * 2, [1.5, 0.7], extrapolate=True).save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", tiny_llama, [with_copy] * 2, [1.5, 0.7])


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings are no longer tied"
)
def test_a_copy_that_one_layer_has_and_another_lacks(tmp_path):
    """PEFT would save copies of both tables; the base's own copy of the head is left out."""
    lora = {"target_modules": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens"]}
    folders = [tiny_adapter(tmp_path / str(i), tied(), seed=i, **one) for i, one in enumerate(lora)]
    table, own = COPY.replace("lm_head", "model.embed_tokens"), tied().lm_head.weight.detach().clone()
    for folder, copies in zip(folders, ([table, COPY], [table]), strict=True):
        tensors = load_file(folder / "adapter_model.safetensors")
        factors = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
        save_file(factors | {name: own.clone() for name in copies}, folder / "adapter_model.safetensors")
    tied().save_pretrained(tmp_path / "base")
    soup = rsoups.interpolate(folders, [0.3, 0.7], base=tmp_path / "base")
    assert COPY not in soup.state_dict and table in soup.state_dict
    soup.save_pretrained(tmp_path / "soup")
    with torch.no_grad():
        loaded = soup.load(tied())(IDS).logits
        assert torch.equal(loaded, PeftModel.from_pretrained(tied(), tmp_path / "soup")(IDS).logits)


def test_a_head_that_is_not_the_bases_own_is_kept(tmp_path, with_copy):
    path = with_copy / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {COPY: tensors[COPY] + 0.1}, path)
    plain = tiny_adapter(tmp_path / "plain", seed=1)
    soup = rsoups.interpolate([with_copy, plain], [0.3, 0.7], base=tiny_llama())
    own = tiny_llama().lm_head.weight
    assert torch.allclose(soup.state_dict[COPY], own + 0.03, atol=1e-6)
    soup.save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", tiny_llama, [with_copy, plain], [0.3, 0.7])
    with pytest.raises(
        rsoups.AdapterError, match="was trained as a whole: LiveSoup cannot mix fully trained parameters"
    ):
        rsoups.LiveSoup(tiny_llama(), [with_copy, plain])


def test_a_head_is_trained_whole_or_has_factors(tmp_path, with_copy):
    whole = tiny_adapter(tmp_path / "whole", modules_to_save=["lm_head"])
    with pytest.raises(
        rsoups.AdapterError, match="lm_head was trained as a whole in .* and has factors in .*PEFT cannot hold both"
    ):
        rsoups.interpolate([whole, with_copy], base=tiny_llama())


def test_biases_are_named_as_the_soup_adapts_their_modules(tmp_path):
    """PEFT calls a bias otherwise where its module has factors; each ingredient adapts others."""
    one = tiny_adapter(tmp_path / "one", tiny_qwen(), seed=1, target_modules=["q_proj"], bias="all")
    other = tiny_adapter(tmp_path / "other", tiny_qwen(), seed=2, target_modules=["v_proj"], bias="all")
    rsoups.interpolate([one, other], [0.3, 0.7]).save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", tiny_qwen, [one, other], [0.3, 0.7])


def test_a_base_that_cannot_give_what_is_missing_is_refused(tmp_path):
    head = tiny_adapter(tmp_path / "head", modules_to_save=["lm_head"])
    plain = tiny_adapter(tmp_path / "plain", seed=1)
    wider = tiny_llama(vocab_size=70)
    with pytest.raises(
        rsoups.AdapterError, match=r"lm_head\.weight is \(64, 32\) in .*head and \(70, 32\) in the base"
    ):
        rsoups.interpolate([head, plain], base=wider)
    assert f"{PREFIX}lm_head.weight" in rsoups.interpolate([head, plain], base=tiny_llama()).truncate(2).state_dict
    with pytest.raises(rsoups.CheckpointError, match="no such"):
        rsoups.interpolate([head, plain], base=tmp_path / "no such")
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(rsoups.CheckpointError, match="cannot read the safetensors of"):
        rsoups.interpolate([head, plain], base=tmp_path / "base")


def test_a_base_in_several_files(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    head = tiny_adapter(tmp_path / "head", modules_to_save=["lm_head"])
    plain = tiny_adapter(tmp_path / "plain", seed=1)
    rsoups.interpolate([head, plain], [0.3, 0.7], base=tmp_path / "base").save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", tiny_llama, [head, plain], [0.3, 0.7])
