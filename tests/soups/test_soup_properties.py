"""Properties of interpolation over random adapters: shapes, ranks, kinds, dtypes and λ drawn by hypothesis."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import rsoups
from rsoups.adapters.layer_names import PREFIX

EPS = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


class Toy(nn.Module):
    """One layer of each kind that a LoRA can be put on."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(11, width)
        self.dense = nn.Linear(width, 2 * width)
        self.across = nn.Conv1d(width, width, 3, padding=1)
        self.over = nn.Conv2d(1, 2, (3, 2), padding=1)
        self.whole = nn.Linear(width, 3)

    def forward(self, ids):
        hidden = self.tokens(ids)
        hidden = hidden + self.across(hidden.transpose(1, 2)).transpose(1, 2)
        hidden = hidden + self.over(hidden.unsqueeze(1))[:, :, : hidden.shape[1], : hidden.shape[2]].mean(1)
        return self.dense(hidden).sum(-1) + self.whole(hidden).sum(-1)


KINDS = ("tokens", "dense", "across", "over")
IDS = torch.tensor([[1, 5, 9, 3, 7], [1, 2, 10, 0, 4]])


@st.composite
def ingredients(draw):
    """Widths, LoRA settings of one to four ingredients, and weights that sum to 1."""
    whole = draw(st.booleans())
    bias = draw(st.booleans())
    settings_of = []
    for _ in range(draw(st.integers(1, 4))):
        kinds = [kind for kind in KINDS if not (bias and kind == "tokens")]
        targets = draw(st.lists(st.sampled_from(kinds), min_size=1, unique=True))
        settings_of.append(
            {
                "target_modules": targets,
                "r": draw(st.integers(1, 5)),
                "lora_alpha": draw(st.integers(1, 20)),
                "use_rslora": draw(st.booleans()),
                "rank_pattern": {draw(st.sampled_from(targets)): draw(st.integers(1, 6))}
                if draw(st.booleans())
                else {},
                "alpha_pattern": {draw(st.sampled_from(targets)): draw(st.integers(1, 9))}
                if draw(st.booleans())
                else {},
                "modules_to_save": ["whole"] if whole else None,
                "lora_bias": bias and draw(st.booleans()),
            }
        )
    raw = [draw(st.floats(0, 1)) for _ in settings_of]
    weights = [w / math.fsum(raw) for w in raw] if math.fsum(raw) > 0.01 else [1 / len(raw)] * len(raw)
    return (
        draw(st.sampled_from([4, 6])),
        settings_of,
        weights,
        draw(st.sampled_from(list(EPS))),
        draw(st.integers(0, 99)),
    )


def saved(folder, width, lora, dtype, seed):
    model = get_peft_model(Toy(width), LoraConfig(**lora))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def changes(folder):
    """Δ of each module and its bias, and whole parameters, in float64, read as PEFT's documentation says."""
    tensors = {k.removeprefix(PREFIX): v.double() for k, v in load_file(folder / "adapter_model.safetensors").items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for key, a in tensors.items():
        if ".lora_A.weight" not in key and not key.endswith("lora_embedding_A"):
            if ".lora_" not in key:
                found[key] = a
            continue
        path = key.split(".lora_")[0]
        rank = a.shape[0]
        name = next((n for n in config["alpha_pattern"] if path == n or path == n.strip("^").replace("\\", "")), None)
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        b = tensors[key.replace("_A", "_B")]
        found[path] = scale * b.flatten(1) @ a.flatten(1)
        if f"{path}.lora_B.bias" in tensors:
            found[f"{path}:bias"] = scale * tensors[f"{path}.lora_B.bias"]
    return found


@settings(max_examples=60, deadline=None)
@given(ingredients())
@pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias", "ignore:.*tied weights")
def test_a_soup_is_the_weighted_sum_whatever_its_ingredients(drawn):
    width, kinds, weights, dtype, seed = drawn
    with tempfile.TemporaryDirectory() as root:
        folders = [saved(Path(root) / str(i), width, lora, dtype, seed + i) for i, lora in enumerate(kinds)]
        soup = rsoups.interpolate(folders, weights)
        soup.save_pretrained(Path(root) / "soup")
        ours = changes(Path(root) / "soup")
        each = [changes(folder) for folder in folders]
        live = [i for i, weight in enumerate(weights) if weight]
        assert {key for key in ours if ":bias" not in key} == {k for i in live for k in each[i] if ":bias" not in k}
        for key, found in ours.items():
            parts = [weights[i] * each[i][key] for i in live if key in each[i]]
            expected = sum(parts) if parts else torch.zeros_like(found)
            bound = 4 * EPS[torch.float32] * max(sum(part.abs().max() for part in parts), 1) * 8
            assert (found - expected).abs().max() <= bound, key

        order = torch.randperm(len(folders), generator=torch.Generator().manual_seed(seed)).tolist()
        turned = rsoups.interpolate([folders[i] for i in order], [weights[i] for i in order])
        turned.save_pretrained(Path(root) / "turned")
        for key, found in changes(Path(root) / "turned").items():
            assert torch.allclose(found, ours[key], atol=1e-5), key

        loaded = PeftModel.from_pretrained(Toy(width), Path(root) / "soup").eval()
        mine = soup.load(Toy(width)).eval()
        with torch.no_grad():
            assert torch.equal(loaded(IDS), mine(IDS))
            by_hand = Toy(width).double()
            if kinds[0]["modules_to_save"]:
                by_hand.whole.weight.zero_()
                by_hand.whole.bias.zero_()
            for i in live:
                for key, change in each[i].items():
                    path, _, kind = key.partition(":")
                    name = path if path.startswith("whole") else f"{path}.{kind or 'weight'}"
                    target = by_hand.get_parameter(name)
                    target += weights[i] * (change.T if path == "tokens" else change).reshape(target.shape)
            assert torch.allclose(mine(IDS).double(), by_hand(IDS), rtol=1e-4, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(ingredients(), st.integers(0, 3))
@pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias", "ignore:.*tied weights")
def test_one_hot_and_doubled_ingredients_come_back_bit_for_bit(drawn, index):
    width, kinds, _, dtype, seed = drawn
    index %= len(kinds)
    with tempfile.TemporaryDirectory() as root:
        folders = [saved(Path(root) / str(i), width, lora, dtype, seed + i) for i, lora in enumerate(kinds)]
        original = load_file(folders[index] / "adapter_model.safetensors")
        hot = rsoups.interpolate(folders, [float(i == index) for i in range(len(kinds))])
        twice = rsoups.interpolate([folders[index]] * 3, [0.2, 0.5, 0.3])
        for soup in (hot, twice):
            assert soup.state_dict.keys() == original.keys()
            assert all(torch.equal(soup.state_dict[key], value) for key, value in original.items())
            assert {tensor.dtype for tensor in soup.state_dict.values()} == {dtype}


@settings(max_examples=40, deadline=None)
@given(ingredients(), st.integers(1, 8))
@pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias", "ignore:.*tied weights")
def test_svd_is_as_near_as_a_rank_allows(drawn, rank):
    width, kinds, weights, dtype, seed = drawn
    with tempfile.TemporaryDirectory() as root:
        folders = [saved(Path(root) / str(i), width, lora, dtype, seed + i) for i, lora in enumerate(kinds)]
        soup = rsoups.interpolate(folders, weights, method="svd", rank=rank)
        soup.save_pretrained(Path(root) / "soup")
        each = [changes(folder) for folder in folders]
        for path, error in soup.svd_errors.items():
            full = sum(w * c[path] for w, c in zip(weights, each, strict=True) if w and path in c)
            best = torch.linalg.svdvals(full)
            lost = best[rank:].norm() / best.norm() if best.norm() else torch.zeros(())
            assert error == pytest.approx(float(lost), abs=1e-6)
            distance = (changes(Path(root) / "soup")[path] - full).norm()
            assert float(distance) <= float(lost * best.norm()) + 1e-5 * max(1.0, float(best.norm()))
