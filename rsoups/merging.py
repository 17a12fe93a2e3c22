"""Write a soup into its base: one whole model that needs no PEFT."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from rsoups._errors import AdapterError
from rsoups._files import whole_folder
from rsoups._resources import resolve
from rsoups.adapters import BASE_EMBEDDING, PREFIX
from rsoups.soup import SOUP_FILE, Soup


def merge(soup: Soup, base: str | Path | PreTrainedModel, out: str | Path, dtype: torch.dtype | None = None) -> None:
    """See `Soup.merge`."""
    model = base if isinstance(base, PreTrainedModel) else None
    source = str(model.name_or_path) if model is not None else resolve(str(base))
    if model is not None and getattr(model, "is_quantized", False):
        warnings.warn(
            f"a change does not fit into quantised weights: the base is read again from {source}", stacklevel=3
        )
        model, dtype = None, dtype or torch.bfloat16
    if model is None:
        model = _load(source)
    with whole_folder(out, SOUP_FILE) as partial:
        state, untied = _merged(soup, model, dtype)
        save_torch_state_dict(state, str(partial))
        config = deepcopy(model.config)
        config.dtype = dtype or model.dtype
        if untied:
            config.tie_word_embeddings = False
        config.save_pretrained(partial)
        if model.can_generate():
            model.generation_config.save_pretrained(partial)
        _save_tokenizer(source, partial)
        (partial / SOUP_FILE).write_text(json.dumps(soup.lineage | {"merged": True}, indent=2) + "\n", encoding="utf-8")


def _load(source: str) -> PreTrainedModel:
    """The base in its own class and precision."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot load the base {source!r}: {error}") from None
    if getattr(config, "quantization_config", None):
        raise AdapterError(
            f"{source} holds quantised weights only, which a change does not fit into: load the soup on it"
        )
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise AdapterError(f"transformers has no class {config.architectures} for the base {source!r}")
    return kind.from_pretrained(source, dtype="auto", use_safetensors=True)


def _merged(soup: Soup, model: PreTrainedModel, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], bool]:
    """The base's state with Δ in it, and whether its input embeddings had to be separated from its output's."""
    changed = _whole(soup)
    with soup.attached(model) as attached:
        changed |= _changes(attached)
    state = {}
    for name, tensor in model.state_dict().items():
        new = changed.pop(name, tensor)
        if new.shape != tensor.shape:
            raise AdapterError(f"{name} is {tuple(new.shape)} in the soup and {tuple(tensor.shape)} in the base")
        state[name] = new.to(dtype or tensor.dtype) if tensor.is_floating_point() else new
    if changed:
        raise AdapterError(f"the base has no parameter {sorted(changed)[0]}")
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return state, tied and any(not torch.equal(state[a], state[b]) for a, b in _tied(model, state))


def _whole(soup: Soup) -> dict[str, Tensor]:
    """Whole parameters of the soup, by the base's names."""
    names = [key for key in soup.state_dict if ".lora_" not in key and not key.endswith(BASE_EMBEDDING)]
    return {name.removeprefix(PREFIX): soup.state_dict[name] for name in names}


@torch.no_grad()
def _changes(attached: Any) -> dict[str, Tensor]:
    """θ0 + Δ of each adapted module, float32, PEFT's own Δ for its kind of layer."""
    found: dict[str, Tensor] = {}
    for path, module in attached.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            base = layer.get_base_layer()
            found[f"{path}.weight"] = base.weight.float() + layer.get_delta_weight("default").float()
            if layer.lora_bias.get("default"):
                found[f"{path}.bias"] = (
                    base.bias.float() + layer.lora_B["default"].bias.float() * layer.scaling["default"]
                )
    return found


def _tied(model: PreTrainedModel, state: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of names that are one tensor in the base."""
    pointers: dict[int, str] = {}
    pairs = []
    for name, tensor in model.state_dict().items():
        first = pointers.setdefault(tensor.data_ptr(), name)
        if first != name and name in state:
            pairs.append((first, name))
    return pairs


def _save_tokenizer(source: str, folder: Path) -> None:
    try:
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    except (OSError, ValueError):
        return  # a base that was made from a config has none
