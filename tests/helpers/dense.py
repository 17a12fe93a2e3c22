"""Δ computed from the files alone, in float64."""

import json
import math

import torch
from safetensors.torch import load_file, save_file
from tiny_bases import IDS
from torch import nn

from rsoups.adapters.layer_names import PREFIX


def dense(folder):
    """Each module's Δ in float64, from the files alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    out = {}
    for key in tensors:
        if not key.endswith("lora_A.weight"):
            continue
        path = key.removesuffix(".lora_A.weight")
        name = path.removeprefix(PREFIX)
        leaf = name.rsplit(".", 1)[1]
        rank = config["rank_pattern"].get(leaf, config["r"])
        alpha = config["alpha_pattern"].get(leaf, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        out[name] = scale * tensors[f"{path}.lora_B.weight"].double() @ tensors[key].double()
    return out


VARIETIES = {
    "plain": ({}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True, "r": 2}),
    "ranks and alphas": ({"r": 2, "lora_alpha": 5}, {"r": 8, "lora_alpha": 3}),
    "rslora and not": ({"use_rslora": True}, {"lora_alpha": 16}),
    "targets": ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "down_proj"]}),
    "patterns": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"rank_pattern": {"v_proj": 6}, "target_modules": ["v_proj", "q_proj"]},
    ),
    "some layers": ({"layers_to_transform": [1]}, {}),
}


def one_start(folders):
    """Give all adapters the A of the first, a little moved, as training from one initialization does."""
    first = load_file(folders[0] / "adapter_model.safetensors")
    for i, folder in enumerate(folders):
        tensors = load_file(folder / "adapter_model.safetensors")
        for key in tensors:
            if "lora_A" in key:
                tensors[key] = first[key] * (1 + 0.01 * i) + 0.01 * tensors[key]
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def delta_of(soup):
    state = soup.state_dict
    paths = [key.removesuffix(".lora_A.weight") for key in state if key.endswith("lora_A.weight")]
    return {
        path.removeprefix(PREFIX): state[f"{path}.lora_B.weight"].double() @ state[f"{path}.lora_A.weight"].double()
        for path in paths
    }


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
