"""Interpolation against references computed another way: dense float64 deltas merged into the base, and PEFT."""

import json
import math
import shutil

import pytest
import torch
from dense import VARIETIES, delta_of, dense, one_start
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_adapter, tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.layer_names import PREFIX

IDS = torch.tensor([[1, 5, 9, 30, 7], [1, 2, 40, 41, 42]])


def merged_logits(base, folders, lambdas):
    """Logits of the base with Σ λi·Δi added to its weights, all in float64."""
    model = base.double()
    with torch.no_grad():
        for folder, weight in zip(folders, lambdas, strict=True):
            for path, delta in dense(folder).items():
                target = model.get_submodule(path)
                target.weight += weight * (delta if isinstance(target, nn.Linear) else delta.T)
        return model(IDS).logits


def logits(base, soup):
    model = soup.load(base.double())
    with torch.no_grad():
        out = model(IDS).logits
    model.unload()
    return out


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


def test_a_saved_soup_is_an_ordinary_peft_adapter(two, tmp_path):
    soup = rsoups.interpolate(two, [0.3, 0.7])
    soup.save_pretrained(tmp_path / "soup")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "soup")
    with torch.no_grad():
        ours = soup.load(tiny_llama())(IDS).logits
        assert torch.equal(loaded(IDS).logits, ours)
    lineage = json.loads((tmp_path / "soup" / "soup.json").read_text())
    assert [i["lambda"] for i in lineage["ingredients"]] == [0.3, 0.7]
    assert [i["sha256"] for i in lineage["ingredients"]] == [read_adapter(f).sha256 for f in two]
    assert all(i["source"] == i["name"] for i in lineage["ingredients"]), "an absolute path was published"
    again = rsoups.interpolate([tmp_path / "soup", two[0]], [0.5, 0.5])  # a soup is an ingredient like any other
    expected = merged_logits(tiny_llama(), two, [0.65, 0.35])
    assert (logits(tiny_llama(), again) - expected).abs().max() < 2e-6


@pytest.mark.parametrize("method", ["exact", "factors", "svd"])
def test_one_hot_gives_the_adapters_own_tensors(two, method):
    for i, row in enumerate(([1, 0], [0, 1])):
        soup = rsoups.interpolate(two, row, method=method)
        original = load_file(two[i] / "adapter_model.safetensors")
        assert soup.state_dict.keys() == original.keys()
        assert all(torch.equal(soup.state_dict[key], original[key]) for key in original)
        assert soup.config.r == 4 and soup.config.lora_alpha == 8


def test_a_soup_tells_what_it_is_in_one_line(two, tmp_path):
    soup = rsoups.interpolate({"helpful": two[0], "<b>": two[1]}, [0.3, 0.7], method="svd", rank=3)
    assert repr(soup) == f"Soup(0.3 helpful, 0.7 <b>; svd, rank 3, error {soup.svd_error:.2%}, of no recorded base)"
    page = soup._repr_html_()
    assert "<td>helpful</td><td>0.3</td><td>a</td>" in page and "<td>&lt;b&gt;</td><td>0.7</td>" in page
    soup.save_pretrained(tmp_path / "soup")
    again = rsoups.Soup.from_pretrained(tmp_path / "soup")
    assert (repr(again), again._repr_html_()) == (repr(soup), page)


def test_the_same_adapter_twice_is_itself(two):
    soup = rsoups.interpolate([two[0], two[0]], [0.4, 0.6])
    original = load_file(two[0] / "adapter_model.safetensors")
    assert all(torch.equal(soup.state_dict[key], original[key]) for key in original)


def test_one_file_with_two_alphas_is_two_adapters(tmp_path, two):
    """Their weights have one hash, their changes differ."""
    louder = shutil.copytree(two[0], tmp_path / "louder")
    config = json.loads((louder / "adapter_config.json").read_text()) | {"lora_alpha": 80}
    (louder / "adapter_config.json").write_text(json.dumps(config))
    soup = rsoups.interpolate([two[0], louder], [0.5, 0.5])
    once, expected = delta_of(soup), {path: 5.5 * delta for path, delta in dense(two[0]).items()}  # (8 + 80) / 2 / 8
    assert all(torch.allclose(once[path], delta, rtol=1e-5, atol=1e-7) for path, delta in expected.items())


def test_ranks_of_unlike_ingredients(tmp_path):
    """The default of svd is the largest rank among the ingredients, the lineage tells the largest of the soup's modules."""
    small = tiny_adapter(tmp_path / "small", seed=1, r=2, target_modules=["q_proj"])
    large = tiny_adapter(tmp_path / "large", seed=2, r=4, target_modules=["v_proj", "q_proj"])
    assert rsoups.interpolate([small, large], [0.5, 0.5], method="svd").config.r == 4
    exact = rsoups.interpolate([small, large], [0.5, 0.5])
    assert exact.lineage["rank"] == 6  # of q_proj, 2 + 4; v_proj has 4


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


def test_a_soup_is_truncated_from_its_ingredients(two):
    exact = rsoups.interpolate(two, [1.3, -0.3], extrapolate=True)
    for soup in (exact, exact.truncate(2)):
        cut = soup.truncate(3)
        assert (cut.method, cut.lambdas, cut.ingredients) == ("svd", (1.3, -0.3), exact.ingredients)
        direct = rsoups.interpolate(two, [1.3, -0.3], method="svd", rank=3, extrapolate=True)
        assert cut.svd_error == direct.svd_error > 0
        assert all(torch.equal(cut.state_dict[key], direct.state_dict[key]) for key in direct.state_dict)
    one_start(two)
    with pytest.raises(rsoups.AdapterError, match="truncate an 'exact' one"):
        rsoups.interpolate(two, method="factors").truncate(2)


def test_soups_of_soups_are_soups_of_their_ingredients(tmp_path, two):
    third = tiny_adapter(tmp_path / "c", seed=2, r=2)
    first = rsoups.interpolate({"a": two[0], "b": two[1]}, [0.2, 0.8], method="svd", rank=1)
    second = rsoups.interpolate({"b": two[1], "c": third}, [0.5, 0.5])
    soup = rsoups.interpolate({"first": first, "second": second, "a": two[0]}, [0.4, 0.5, 0.1])
    assert [i.name for i in soup.ingredients] == ["first/a", "b", "c", "a"]
    assert soup.lambdas == pytest.approx((0.08, 0.57, 0.25, 0.1))
    direct = rsoups.interpolate([two[0], two[1], third], [0.18, 0.57, 0.25])
    for path, delta in delta_of(direct).items():
        assert torch.allclose(delta_of(soup)[path], delta, atol=1e-7)
    one_start(two)
    averaged = rsoups.interpolate(two, [0.5, 0.5], method="factors")
    again = rsoups.interpolate([averaged, two[0]], [0.5, 0.5], method="factors")
    assert again.lambdas == (0.25, 0.25, 0.5)
    stacked = rsoups.interpolate(
        [averaged, third], [0.5, 0.5]
    )  # an adapter of its own: its Δ is not the ingredients' sum
    assert stacked.lambdas == (0.5, 0.5) and stacked.ingredients[0].source == "soup 'adapter 0'"
    for path, delta in delta_of(stacked).items():
        assert torch.allclose(delta, delta_of(averaged)[path] * 2 * 0.5 + 0.5 * dense(third)[path], atol=1e-7)


def test_what_does_not_fit_the_dtype_is_refused(tmp_path):
    folder = tiny_adapter(tmp_path / "large")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {key: tensor * (1e6 if "lora_B" in key else 1) for key, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for method in ("exact", "svd", "factors"):
        with pytest.raises(rsoups.AdapterError, match="does not fit into torch.float16"):
            rsoups.interpolate([folder], [1.0], method=method, dtype=torch.float16)
    rsoups.interpolate([folder], [1.0], dtype=torch.bfloat16)


def test_whole_parameters_are_interpolated_where_all_have_them(tmp_path, two):
    folders = [tiny_adapter(tmp_path / f"whole{i}", seed=i, modules_to_save=["lm_head"]) for i in range(2)]
    soup = rsoups.interpolate(folders, [0.3, 0.7])
    key = f"{PREFIX}lm_head.weight"
    first, second = (load_file(f / "adapter_model.safetensors")[key].double() for f in folders)
    assert torch.allclose(soup.state_dict[key].double(), 0.3 * first + 0.7 * second, rtol=1e-6, atol=1e-9)
    assert not torch.equal(first, second)
    base = tiny_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with soup.attached(base) as model:
        assert torch.equal(model.get_base_model().lm_head.modules_to_save["default"].weight, soup.state_dict[key])
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())
    with pytest.raises(rsoups.AdapterError, match=r"lm_head.weight was trained as a whole in only one"):
        rsoups.interpolate([folders[0], two[0]])


def test_embeddings_saved_whole_for_a_larger_vocabulary(tmp_path, two):
    """PEFT saves them beside a LoRA where the vocabulary was resized, without a word in the config."""
    folders = []
    for i in range(2):
        model = get_peft_model(
            tiny_llama(vocab_size=70, initializer_range=0.1 * (i + 1)), LoraConfig(target_modules=["q_proj"], r=2)
        )
        folders.append(tmp_path / f"wide{i}")
        model.save_pretrained(folders[-1], save_embedding_layers=True)
    soup = rsoups.interpolate(folders, [0.25, 0.75])
    expected = sum(
        w * load_file(f / "adapter_model.safetensors")[f"{PREFIX}lm_head.weight"].double()
        for w, f in zip((0.25, 0.75), folders, strict=True)
    )
    base = tiny_llama(vocab_size=70)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with soup.attached(base) as model:
        assert not torch.equal(model.get_base_model().lm_head.weight, before["lm_head.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    loaded = soup.load(base)
    assert torch.allclose(loaded.get_base_model().lm_head.weight.double(), expected, atol=1e-7)
    with pytest.raises(rsoups.AdapterError, match=r"\(70, 32\) in the soup, the base needs \(64, 32\)"):
        soup.load(tiny_llama())


def test_a_matrix_of_lambdas_gives_a_soup_for_each_row(two):
    rows = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    soups = rsoups.interpolate({"x": two[0], "y": two[1]}, rows)
    assert [soup.lambdas for soup in soups] == [tuple(row) for row in rows]
    assert [i.name for i in soups[0].ingredients] == ["x", "y"]
    uniform = rsoups.interpolate(two)
    assert uniform.lambdas == (0.5, 0.5)
    assert all(torch.equal(soups[1].state_dict[k], uniform.state_dict[k]) for k in uniform.state_dict)


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    order=st.permutations([0, 1, 2]),
)
def test_order_does_not_matter_and_the_change_is_linear(tmp_path_factory, weights, order):
    folders = shared_three(tmp_path_factory)
    total = sum(weights)
    weights = [w / total for w in weights]
    straight = delta_of(rsoups.interpolate(folders, weights, normalize=True))
    permuted = delta_of(rsoups.interpolate([folders[i] for i in order], [weights[i] for i in order], normalize=True))
    singles = [dense(folder) for folder in folders]
    for path in straight:
        expected = sum(w * single[path] for w, single in zip(weights, singles, strict=True) if path in single)
        assert torch.allclose(straight[path], expected, atol=1e-7)
        assert torch.allclose(straight[path], permuted[path], atol=1e-7)


_three: list = []


def shared_three(factory):
    if not _three:
        root = factory.mktemp("three")
        _three.extend(tiny_adapter(root / str(i), seed=i, r=i + 2) for i in range(3))
    return _three


BAD_LAMBDAS = [
    ([0.5], "shape"),
    ([0.2, 0.3, 0.5], "shape"),
    ([0.5, 0.6], "sum to 1.1"),
    ([0.5, 0.501], "sum to 1.001"),
    ([float("nan"), 1.0], "NaN"),
    ([float("inf"), 0.0], "NaN or infinity"),
    ([1.5, -0.5], "extrapolate"),
    ([[0.5, 0.5], [1.0]], "numbers"),
    ([], "shape"),
    ("half", "numbers"),
]


@pytest.mark.parametrize(("lambdas", "words"), BAD_LAMBDAS)
def test_lambdas_are_refused(two, lambdas, words):
    with pytest.raises(rsoups.LambdasError, match=words):
        rsoups.interpolate(two, lambdas)


def test_opting_in(two):
    assert rsoups.interpolate(two, [1, 3], normalize=True).lambdas == (0.25, 0.75)
    soup = rsoups.interpolate(two, [1.5, -0.5], extrapolate=True)
    assert (logits(tiny_llama(), soup) - merged_logits(tiny_llama(), two, [1.5, -0.5])).abs().max() < 2e-6
    with pytest.raises(rsoups.LambdasError, match="no adapters"):
        rsoups.interpolate([])
    with pytest.raises(rsoups.AdapterError, match="one adapter"):
        rsoups.interpolate(str(two[0]))
    with pytest.raises(rsoups.LambdasError, match="method"):
        rsoups.interpolate(two, method="linear")
    for rank, method in ((4, "exact"), (0, "svd"), (1.5, "svd"), (-0.1, "svd")):
        with pytest.raises(rsoups.LambdasError, match="rank"):
            rsoups.interpolate(two, method=method, rank=rank)


def test_load_leaves_the_base_as_it_was_found(two):
    base = tiny_llama()
    with torch.no_grad():
        before = base(IDS).logits
        for soup in rsoups.interpolate(two, [[1, 0], [0.5, 0.5], [0, 1]]) * 2:
            model = soup.load(base)
            alone = soup.load(tiny_llama())
            assert torch.equal(model(IDS).logits, alone(IDS).logits)
            model.unload()
            assert torch.equal(base(IDS).logits, before)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"num_hidden_layers": 3}, "deeper"),
        ({"num_hidden_layers": 1}, "no module"),
        ({"hidden_size": 64}, r"the base needs"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_and_left_alone(two, shape, words):
    base = tiny_llama(**shape)
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(rsoups.AdapterError, match=words):
        rsoups.interpolate(two).load(base)
    assert [name for name, _ in base.named_modules()] == names


def test_bases_of_other_names_need_a_word(tmp_path, two):
    for folder, name in zip(two, ("x/one", "x/two"), strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    with pytest.raises(rsoups.AdapterError, match="allow_base_mismatch"):
        rsoups.interpolate(two)
    soup = rsoups.interpolate(two, allow_base_mismatch=True)
    assert soup.lineage["base_mismatch_allowed"]


def test_bases_of_other_shapes_are_refused(tmp_path, two):
    wide = tiny_adapter(tmp_path / "wide", tiny_llama(hidden_size=64))
    with pytest.raises(rsoups.AdapterError, match=r"\(32, 32\).*\(64, 64\)"):
        rsoups.interpolate([two[0], wide])
    vocabularies = [
        tiny_adapter(tmp_path / f"v{size}", tiny_llama(vocab_size=size), modules_to_save=["lm_head"])
        for size in (64, 65)
    ]
    with pytest.raises(rsoups.AdapterError, match=r"\(64, 32\).*\(65, 32\).*vocabular"):
        rsoups.interpolate(vocabularies)


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
