"""Fused experts, and adapters of single experts that PEFT fuses when it loads them: against PEFT's own merge of each."""

import json

import pytest
import torch
from edited import edit
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import assert_is_sum, merged_by_peft, tiny_adapter, tiny_mixtral
from transformers import MixtralForCausalLM

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.layer_names import PREFIX
from rsoups.versions.inspect import inspect_adapters

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys did not match"
    ),  # PEFT's, of parameters: they do
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),  # PEFT fuses experts of all layers, or none
]
BOTH = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]}
IDS = torch.tensor([[1, 5, 9, 30, 7]])


def fused(folder, seed, **lora):
    return tiny_adapter(folder, tiny_mixtral(), seed=seed, **(BOTH | lora))


def single(folder, attention, seed, *, rank=2, layers=(0, 1), experts=("w1", "w2", "w3"), **config):
    """An adapter as PEFT saved it with transformers 4, where each expert was a module of its own."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        shapes = {f"self_attn.{name}": (32 if name == "q_proj" else 16, 32) for name in attention}
        for expert in range(3):
            for name in experts:
                shapes[f"block_sparse_moe.experts.{expert}.{name}"] = (32, 48) if name == "w2" else (48, 32)
        for path, (rows, columns) in shapes.items():
            name = f"{PREFIX}model.layers.{layer}.{path}.lora_"
            tensors[f"{name}A.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
            tensors[f"{name}B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"r": rank, "lora_alpha": 4, "target_modules": [*attention, *experts], "task_type": "CAUSAL_LM"}
    LoraConfig(**(settings | config)).save_pretrained(folder)
    return folder


def of_mixtral(folder):
    """Let an adapter tell the class of its base."""
    edit(
        folder, auto_mapping={"base_model_class": "MixtralForCausalLM", "parent_library": MixtralForCausalLM.__module__}
    )
    return folder


def assert_right(tmp_path, folders, lambdas, **options):
    soup = rsoups.interpolate(folders, lambdas, **options)
    soup.save_pretrained(tmp_path / "soup")
    assert_is_sum(tmp_path / "soup", tiny_mixtral, folders, lambdas)
    with torch.no_grad():
        loaded = soup.load(tiny_mixtral())(IDS).logits
        assert torch.equal(loaded, PeftModel.from_pretrained(tiny_mixtral(), tmp_path / "soup")(IDS).logits)
    return soup


FUSED = {
    "ranks, alphas, rsLoRA": ({}, {"r": 2, "lora_alpha": 3, "use_rslora": True}, [0.3, 0.7]),
    "a rank of one parameter": (
        {},
        {"rank_pattern": {r".*\.gate_up_proj": 6}, "alpha_pattern": {r".*\.gate_up_proj": 5}},
        [1.2, -0.2],
    ),
    "attention alone": (
        {"target_modules": []},
        {"target_parameters": None, "target_modules": ["q_proj", "v_proj"]},
        [0.5, 0.5],
    ),
    "one parameter": (
        {"target_parameters": ["down_proj"]},
        {"target_parameters": ["experts.down_proj"], "r": 3},
        [0.5, 0.5],
    ),
    "no sum of 1": ({}, {"r": 3}, [0.9, 0.8]),
    "a router beside experts with a rank of their own": (
        {"target_modules": ["q_proj", "gate", "w1", "w3", "w2"], "target_parameters": None},
        {"target_modules": ["gate", "w1", "w3", "w2"], "target_parameters": None, "r": 3},
        [0.3, 0.7],
    ),
}


@pytest.mark.parametrize("variety", FUSED)
def test_fused_experts_are_interpolated_exactly(tmp_path, variety):
    one, other, lambdas = FUSED[variety]
    folders = [fused(tmp_path / "a", 1, **one), fused(tmp_path / "b", 2, **other)]
    assert_right(tmp_path, folders, lambdas, extrapolate=True)


def test_fused_experts_merge_and_are_told_apart(tmp_path):
    folders = {name: fused(tmp_path / name, seed, r=seed) for seed, name in enumerate("ab", 2)}
    base = tmp_path / "base"
    tiny_mixtral().save_pretrained(base)
    soup = rsoups.interpolate(folders, [0.3, 0.7])
    soup.merge(base, tmp_path / "merged")
    soup.save_pretrained(tmp_path / "soup")
    expected = merged_by_peft(tiny_mixtral, tmp_path / "soup")
    merged = MixtralForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.allclose(merged[name].double(), expected[name], atol=1e-6) for name in expected)

    zero = {name: tensor.double() for name, tensor in tiny_mixtral().state_dict().items()}
    ends = {name: merged_by_peft(tiny_mixtral, folder) for name, folder in folders.items()}
    changes = {
        name: torch.cat([(end[key] - zero[key]).flatten() for key in zero if ".layers.1." in key])
        for name, end in ends.items()
    }
    found = inspect_adapters({name: read_adapter(folder) for name, folder in folders.items()})
    assert found.norm("a", "model.layers.1") == pytest.approx(float(changes["a"].norm()), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(changes["a"], changes["b"], dim=0)
    assert found.cosine("a", "b", "model.layers.1") == pytest.approx(float(cosine), abs=1e-6)
    assert found.refusals["exact"] is None
    with pytest.raises(rsoups.AdapterError, match=r"fused experts.*rsoups\.interpolate"):
        rsoups.LiveSoup(tiny_mixtral(), folders)


def test_svd_truncates_each_expert(tmp_path):
    folders = [fused(tmp_path / name, seed) for seed, name in enumerate("ab", 1)]
    assert_right(tmp_path, folders, [0.3, 0.7], method="svd", rank=8)
    zero = {name: tensor.double() for name, tensor in tiny_mixtral().state_dict().items()}
    ends = [merged_by_peft(tiny_mixtral, folder) for folder in folders]
    soup = rsoups.interpolate(folders, [0.3, 0.7], method="svd", rank=3)
    soup.save_pretrained(tmp_path / "small")
    found = merged_by_peft(tiny_mixtral, tmp_path / "small")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for expert in range(3):
        delta = (0.3 * ends[0][name] + 0.7 * ends[1][name] - zero[name])[expert]
        u, s, vh = torch.linalg.svd(delta)
        best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
        assert torch.allclose((found[name] - zero[name])[expert], best, atol=1e-6)
    assert soup.lineage["rank"] == 3 and 0 < soup.svd_error < 1


UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
UNLIKE = {
    "one each": ([UP], [DOWN]),
    "both and one": ([UP, DOWN], [UP]),
    "both and the other": ([DOWN], [UP, DOWN]),
    "of one layer": ([f"layers.0.{UP}"], [f"layers.0.{DOWN}", f"layers.1.{DOWN}"]),
}


@pytest.mark.parametrize("method", [{}, {"method": "svd", "rank": 32}], ids=["exact", "svd"])
@pytest.mark.parametrize("kind", UNLIKE)
def test_unlike_parameters_are_one_adapter(tmp_path, kind, method):
    """PEFT nests the wrappers of a module's parameters: an ingredient's tensors have other names than the soup's."""
    folders = [fused(tmp_path / str(n), n, target_parameters=names, r=n + 2) for n, names in enumerate(UNLIKE[kind])]
    soup = assert_right(tmp_path, folders, [0.3, 0.7], **method)
    found = inspect_adapters({folder.name: read_adapter(folder) for folder in folders})
    assert found.refusals["exact"] is None
    assert soup._modules.keys() == found.adapters["0"].modules.keys() | found.adapters["1"].modules.keys()
    saved = rsoups.Soup.from_pretrained(tmp_path / "soup")
    assert all(torch.equal(saved.state_dict[name], tensor) for name, tensor in soup.state_dict.items())


def test_a_soup_of_some_ingredients_has_their_own_names(tmp_path):
    folders = [fused(tmp_path / str(n), n, target_parameters=names) for n, names in enumerate([[UP], [DOWN], [UP]])]
    for number, lambdas in enumerate(([1, 0, 0], [0.4, 0, 0.6], [0.2, 0.3, 0.5])):
        (tmp_path / f"{number}-soup").mkdir()
        assert_right(tmp_path / f"{number}-soup", folders, lambdas)


def test_parameters_that_one_adapter_cannot_hold_are_refused(tmp_path):
    one = fused(tmp_path / "one", 2, target_parameters=["mlp.experts.gate_up_proj"])
    edit(one, r=3)
    with pytest.raises(rsoups.AdapterError, match=r"says rank 3|do not have the ranks"):
        rsoups.interpolate([one])

    both = fused(tmp_path / "both", 1)
    edit(both, target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(rsoups.AdapterError, match=r"factors for 2 parameters, and .* targets gate_up_proj alone"):
        rsoups.interpolate([both])

    parameter = fused(tmp_path / "parameter", 1, target_modules=[], target_parameters=["q_proj.weight"])
    layer = fused(tmp_path / "layer", 2, target_modules=["q_proj"], target_parameters=None)
    with pytest.raises(rsoups.AdapterError, match=r"q_proj is among the target_modules of .*layer.*cannot hold both"):
        rsoups.interpolate([parameter, layer])


SINGLE = {
    "targets": ({}, {"attention": ["q_proj", "v_proj"], "rank": 4}),
    "attention alone": ({}, {"experts": ()}),
    "a pattern and a list": ({"target_modules": r".*\.(q_proj|w1|w2|w3)"}, {"attention": ["v_proj"]}),
}


@pytest.mark.parametrize("variety", SINGLE)
def test_adapters_of_single_experts(tmp_path, variety):
    folders = [
        single(tmp_path / str(seed), seed=seed, **({"attention": ["q_proj"]} | settings))
        for seed, settings in enumerate(SINGLE[variety])
    ]
    assert_right(tmp_path, folders, [0.3, 0.7])
    config = json.loads((tmp_path / "soup" / "adapter_config.json").read_text())
    assert not isinstance(config["target_modules"], str)  # PEFT would drop the experts


MIXED = {
    "fused ones": lambda path: fused(path, 1, r=3),
    "experts of one layer": lambda path: single(path, ["v_proj"], 1, layers=(0,), layers_to_transform=[0]),
}


@pytest.mark.parametrize("kind", MIXED)
def test_single_experts_beside_others_are_fused_as_peft_does(tmp_path, kind):
    folders = [single(tmp_path / "single", ["q_proj"], 2), MIXED[kind](tmp_path / "other")]
    tiny_mixtral().save_pretrained(tmp_path / "base")
    with pytest.raises(rsoups.AdapterError, match=r"pass base="):
        rsoups.interpolate(folders)
    assert_right(tmp_path, folders, [0.3, 0.7], base=tmp_path / "base")
    of_mixtral(folders[0])
    assert_right(tmp_path, folders, [0.3, 0.7])


def test_what_peft_would_not_load_is_not_saved(tmp_path):
    """PEFT fuses w1 and w3, so that it takes both or none."""
    folders = [of_mixtral(single(tmp_path / str(seed), ["q_proj"], seed, experts=("w1",))) for seed in range(2)]
    soup = rsoups.interpolate(folders)
    with pytest.raises(rsoups.AdapterError, match=r"PEFT would not load all.*w1 without also targeting w3"):
        soup.save_pretrained(tmp_path / "soup")
    assert not (tmp_path / "soup").exists()
    found = inspect_adapters({name.name: read_adapter(name) for name in folders})
    assert "PEFT would not load all" in found.refusals["exact"]


def test_a_dense_layer_beside_experts_that_peft_would_drop(tmp_path):
    """PEFT takes every target of the experts' names for theirs, and passes over modules that are called alike."""
    folder = of_mixtral(single(tmp_path / "a", ["q_proj"], 1))
    tensors = load_file(folder / "adapter_model.safetensors")
    for factor in "AB":
        name = f"{PREFIX}model.layers.0.dense.w2.lora_{factor}.weight"
        tensors[name] = tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{factor}.weight"].clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(rsoups.AdapterError, match="PEFT would not load all of this soup"):
        rsoups.interpolate([folder]).save_pretrained(tmp_path / "soup")
