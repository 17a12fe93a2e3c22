"""Soups: what they are made of, saved as, and attached to."""

import json
import shutil

import pytest
import torch
from dense import delta_of, dense, logits, merged_logits, one_start
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_adapter, tiny_llama
from tiny_bases import IDS

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.layer_names import PREFIX


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


def test_a_soup_tells_what_it_is_in_one_line(two, tmp_path):
    soup = rsoups.interpolate({"helpful": two[0], "<b>": two[1]}, [0.3, 0.7], method="svd", rank=3)
    assert repr(soup) == f"Soup(0.3 helpful, 0.7 <b>; svd, rank 3, error {soup.svd_error:.2%}, of no recorded base)"
    page = soup._repr_html_()
    assert "<td>helpful</td><td>0.3</td><td>a</td>" in page and "<td>&lt;b&gt;</td><td>0.7</td>" in page
    soup.save_pretrained(tmp_path / "soup")
    again = rsoups.Soup.from_pretrained(tmp_path / "soup")
    assert (repr(again), again._repr_html_()) == (repr(soup), page)


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
