"""Soups by each method, against dense float64 deltas that are merged into the base."""

import math

import pytest
import torch
from dense import VARIETIES, delta_of, dense, logits, merged_logits, one_start
from safetensors.torch import load_file, save_file
from tiny import tiny_adapter, tiny_llama
from tiny_bases import IDS
from transformers import GPT2Config, GPT2LMHeadModel

import rsoups
from rsoups.adapters.layer_names import PREFIX


@pytest.mark.parametrize("variety", VARIETIES)
def test_exact_is_the_sum_of_the_weighted_changes(tmp_path, variety):
    folders = [tiny_adapter(tmp_path / str(i), seed=i, **lora) for i, lora in enumerate(VARIETIES[variety])]
    soup = rsoups.interpolate(folders, [0.3, 0.7])
    expected = merged_logits(tiny_llama(), folders, [0.3, 0.7])
    assert (logits(tiny_llama(), soup) - expected).abs().max() < 2e-6
    assert (expected - tiny_llama().double()(IDS).logits).abs().max() > 1e-2  # the adapters do something


@pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias")  # PEFT takes every bias for a broken factor
def test_lora_bias_is_interpolated_too(tmp_path):
    def base():
        return tiny_llama(attention_bias=True)

    folders = [
        tiny_adapter(tmp_path / "with", base(), seed=1, lora_bias=True),
        tiny_adapter(tmp_path / "without", base(), seed=2),
    ]
    soup = rsoups.interpolate(folders, [0.25, 0.75])
    model = base()
    for key, tensor in load_file(folders[0] / "adapter_model.safetensors").items():
        if key.endswith(".lora_B.bias"):
            path = key.removesuffix(".lora_B.bias").removeprefix(PREFIX)
            model.get_submodule(path).bias.data += 0.25 * 2 * tensor
    expected = merged_logits(model, folders, [0.25, 0.75])
    assert (logits(base(), soup) - expected).abs().max() < 2e-6


def test_gpt2_and_embeddings(tmp_path):
    """Conv1D layers store their weights transposed; embeddings have factors of their own."""

    def base():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()

    lora = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    folders = [tiny_adapter(tmp_path / str(i), base(), seed=i, **lora) for i in range(2)]
    soup = rsoups.interpolate(folders, [0.4, 0.6])
    assert (logits(base(), soup) - merged_logits(base(), folders, [0.4, 0.6])).abs().max() < 2e-6

    folders = [tiny_adapter(tmp_path / f"e{i}", seed=i, target_modules=["embed_tokens", "q_proj"]) for i in range(2)]
    soup = rsoups.interpolate(folders, [0.4, 0.6])
    model = tiny_llama().double()
    expected = sum(
        weight
        * 2
        * (t[f"{PREFIX}model.embed_tokens.lora_embedding_B"] @ t[f"{PREFIX}model.embed_tokens.lora_embedding_A"])
        for weight, t in zip((0.4, 0.6), (load_file(f / "adapter_model.safetensors") for f in folders), strict=True)
    )
    before = model.get_input_embeddings().weight.clone()
    after = soup.load(model).merge_and_unload().get_input_embeddings().weight
    assert torch.allclose(after - before, expected.T.double(), atol=1e-7)


@pytest.mark.parametrize("method", ["exact", "factors", "svd"])
def test_one_hot_gives_the_adapters_own_tensors(two, method):
    for i, row in enumerate(([1, 0], [0, 1])):
        soup = rsoups.interpolate(two, row, method=method)
        original = load_file(two[i] / "adapter_model.safetensors")
        assert soup.state_dict.keys() == original.keys()
        assert all(torch.equal(soup.state_dict[key], original[key]) for key in original)
        assert soup.config.r == 4 and soup.config.lora_alpha == 8


def test_the_same_adapter_twice_is_itself(two):
    soup = rsoups.interpolate([two[0], two[0]], [0.4, 0.6])
    original = load_file(two[0] / "adapter_model.safetensors")
    assert all(torch.equal(soup.state_dict[key], original[key]) for key in original)


def test_half_precision_ingredients_are_summed_in_more(tmp_path):
    folders = [tiny_adapter(tmp_path / str(i), seed=i, dtype=torch.bfloat16) for i in range(2)]
    soup = rsoups.interpolate(folders, [0.3, 0.7])
    assert {tensor.dtype for tensor in soup.state_dict.values()} == {torch.float32}
    assert (logits(tiny_llama(), soup) - merged_logits(tiny_llama(), folders, [0.3, 0.7])).abs().max() < 2e-6
    half = rsoups.interpolate(folders, [0.3, 0.7], dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict.values()} == {torch.bfloat16}


def test_factors_averages_a_and_b_apart(two):
    one_start(two)
    soup = rsoups.interpolate(two, [0.3, 0.7], method="factors")
    assert soup.factors_distance is None
    first, second = (load_file(f / "adapter_model.safetensors") for f in two)
    for key, tensor in soup.state_dict.items():
        assert torch.allclose(tensor.double(), 0.3 * first[key].double() + 0.7 * second[key].double(), rtol=1e-6)
    assert soup.config.r == 4


def test_factors_of_unlike_starts_warns_with_the_distance_it_has_measured(two):
    with pytest.warns(UserWarning, match=r"do not start from one initialization.* \d+% of the exact"):
        soup = rsoups.interpolate(two, [0.3, 0.7], method="factors")
    first, second = map(dense, two)
    apart = total = 0.0
    for path, delta in delta_of(soup).items():
        exact = 0.3 * first[path] + 0.7 * second[path]
        apart, total = apart + float((2 * delta - exact).norm() ** 2), total + float(exact.norm() ** 2)
    assert soup.factors_distance == pytest.approx(math.sqrt(apart / total), rel=1e-6)
    assert soup.lineage["factors_distance"] == soup.factors_distance > 0.1


def test_the_distance_counts_scalings(tmp_path):
    """Modules that are scaled more weigh more in it."""
    folders = [tiny_adapter(tmp_path / str(i), seed=i, alpha_pattern={"v_proj": 40}) for i in range(2)]
    with pytest.warns(UserWarning, match="do not start from one"):
        soup = rsoups.interpolate(folders, [0.3, 0.7], method="factors")
    first, second = map(dense, folders)
    apart = total = 0.0
    for path, delta in delta_of(soup).items():
        exact = 0.3 * first[path] + 0.7 * second[path]
        scaling = 10 if "v_proj" in path else 2
        apart, total = apart + float((scaling * delta - exact).norm() ** 2), total + float(exact.norm() ** 2)
    assert soup.factors_distance == pytest.approx(math.sqrt(apart / total), rel=1e-6)


def test_a_module_that_did_not_change_keeps_one_rank(two):
    for folder in two:
        path = folder / "adapter_model.safetensors"
        still = {k: t * (not ("layers.0" in k and "lora_B" in k)) for k, t in load_file(path).items()}
        save_file(still, path, metadata={"format": "pt"})
    soup = rsoups.interpolate(two, [0.5, 0.5], method="svd", rank=0.1)
    ranks = {key: t.shape[0] for key, t in soup.state_dict.items() if "lora_A" in key}
    assert {rank for key, rank in ranks.items() if "layers.0" in key} == {1} and max(ranks.values()) > 1
    assert all(math.isfinite(error) for error in soup.svd_errors.values())


def test_factors_is_refused_where_it_has_no_meaning(tmp_path, two):
    for i, lora in enumerate(({"r": 2}, {"lora_alpha": 3}, {"target_modules": ["q_proj"]})):
        other = tiny_adapter(tmp_path / f"other{i}", **lora)
        with pytest.raises(rsoups.AdapterError, match="use 'exact'"):
            rsoups.interpolate([two[0], other], method="factors")


def test_svd_is_the_best_approximation(two):
    full = rsoups.interpolate(two, [0.3, 0.7], method="svd", rank=8)
    assert full.svd_error < 1e-12
    assert (logits(tiny_llama(), full) - merged_logits(tiny_llama(), two, [0.3, 0.7])).abs().max() < 2e-6

    soup = rsoups.interpolate(two, [0.3, 0.7], method="svd", rank=3)
    assert soup.config.r == soup.config.lora_alpha == 3
    first, second = map(dense, two)
    lost = total = 0.0
    for path in first:
        delta = 0.3 * first[path] + 0.7 * second[path]
        u, s, vh = torch.linalg.svd(delta)
        best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
        ours = soup.state_dict[f"{PREFIX}{path}.lora_B.weight"] @ soup.state_dict[f"{PREFIX}{path}.lora_A.weight"]
        assert torch.allclose(ours.double(), best, atol=1e-6)
        assert soup.svd_errors[path] == pytest.approx(float((delta - best).norm() / delta.norm()), rel=1e-6)
        lost, total = lost + float((delta - best).norm() ** 2), total + float(delta.norm() ** 2)
    assert soup.svd_error == pytest.approx(math.sqrt(lost / total), rel=1e-6)
    assert rsoups.interpolate(two, [0.3, 0.7], method="svd").config.r == 4


def test_svd_by_an_error_bound_takes_the_smallest_rank_that_keeps_it(two):
    bound = 0.4
    soup = rsoups.interpolate(two, [0.3, 0.7], method="svd", rank=bound)
    first, second = map(dense, two)
    ranks = set()
    for path in first:
        s = torch.linalg.svdvals(0.3 * first[path] + 0.7 * second[path])
        errors = [float(s[k:].norm() / s.norm()) for k in range(len(s) + 1)]
        rank = soup.state_dict[f"{PREFIX}{path}.lora_A.weight"].shape[0]
        assert errors[rank] <= bound < errors[rank - 1]
        assert soup.svd_errors[path] == pytest.approx(errors[rank], rel=1e-6)
        ranks.add(rank)
    assert max(ranks) < 8
    model = soup.load(tiny_llama())  # ranks that differ from module to module are in its config
    assert {m.r["default"] for m in model.modules() if hasattr(m, "lora_A")} == ranks


def test_what_does_not_fit_the_dtype_is_refused(tmp_path):
    folder = tiny_adapter(tmp_path / "large")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {key: tensor * (1e6 if "lora_B" in key else 1) for key, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for method in ("exact", "svd", "factors"):
        with pytest.raises(rsoups.AdapterError, match="does not fit into torch.float16"):
            rsoups.interpolate([folder], [1.0], method=method, dtype=torch.float16)
    rsoups.interpolate([folder], [1.0], dtype=torch.bfloat16)


def test_factor_names_are_matched_whole(tmp_path):
    """Layers 1 and 10 are different, whichever ingredient targets them."""
    base = tiny_llama(num_hidden_layers=11)
    folders = [
        tiny_adapter(tmp_path / "one", tiny_llama(num_hidden_layers=11), seed=1, r=2, layers_to_transform=[1]),
        tiny_adapter(tmp_path / "ten", tiny_llama(num_hidden_layers=11), seed=2, r=3, layers_to_transform=[10, 1]),
    ]
    soup = rsoups.interpolate(folders, [0.5, 0.5])
    expected = merged_logits(tiny_llama(num_hidden_layers=11), folders, [0.5, 0.5])
    assert (logits(base, soup) - expected).abs().max() < 2e-6


def test_what_fits_is_not_refused_for_its_parts(tmp_path):
    """2·B - 1·B is B, and no sum on the way is rounded to the narrow dtype."""
    folders = [tiny_adapter(tmp_path / str(i)) for i in range(2)]
    for i, folder in enumerate(folders):
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors = {key: torch.full_like(t, 60_000.0 + i * 16 * ("lora_A" in key)) for key, t in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    soup = rsoups.interpolate(folders, [2, -1], method="factors", dtype=torch.float16, extrapolate=True)
    assert all(torch.isfinite(tensor).all() for tensor in soup.state_dict.values())
    with pytest.raises(rsoups.AdapterError, match="does not fit into torch.float16"):
        rsoups.interpolate(folders, [2, -1], dtype=torch.float16, extrapolate=True)
