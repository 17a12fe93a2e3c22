"""Write a soup into its base: one whole model that needs no PEFT."""

from __future__ import annotations

import json
import re
import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.pytorch_utils import Conv1D

from rsoups.adapters.filenames import SOUP_FILE
from rsoups.bases.files import PROCESSOR_FILES, TOKENIZER_FILES, BaseFiles, copy_files, tokenizer_folder
from rsoups.bases.load import from_safetensors, why_not
from rsoups.bases.names import check_base
from rsoups.common.assets import resolve
from rsoups.common.errors import AdapterError
from rsoups.common.files import check_replaceable, whole_folder
from rsoups.common.published import published
from rsoups.soups.attach import output_scale

if TYPE_CHECKING:
    from rsoups.soups.soup import Soup

# What heads of their own are called in transformers' classes, by PEFT's name of the task.
_HEADS = {
    "SEQ_CLS": ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("ForTokenClassification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
}


@dataclass(frozen=True)
class _Merged:
    """A model that is to be written.

    Attributes:
        state: Tensors by their names in memory.
        config: Config of the merged model, with its architecture.
        is_other: Whether it is built otherwise than its base: new biases, or tables of tokens that are no longer tied.
    """

    state: dict[str, Tensor]
    config: PreTrainedConfig
    is_other: bool


def merge(
    soup: Soup,
    base: str | Path | PreTrainedModel,
    out: str | Path,
    dtype: torch.dtype | None = None,
    *,
    allow_base_mismatch: bool = False,
) -> None:
    """Write the whole model, θ0 + Σ λi·Δi, with the names of tensors that the base's own files have.

    The tokenizer is the one that came with the adapter, or else the base's.

    Args:
        soup: The soup.
        base: Hub id or folder, or a loaded model, which is left as it was. A model in 4 or 8 bit cannot hold Δ: its
            full-precision weights are read again from where it came.
        out: Folder of the model.
        dtype: Dtype of the result; the base's own by default. Sums are in float32, rounded once.
        allow_base_mismatch: Accept a base of another name than the adapters'; recorded in the model's soup.json.

    Raises:
        AdapterError: The soup does not fit the base, or the base's kind of model cannot hold what the soup changes.
        OutputError: The folder holds something other than a merged soup, or cannot be written.
    """
    check_base(soup.named_configs, base, allow_base_mismatch)
    check_replaceable(Path(out), SOUP_FILE)  # before the base is loaded
    model = base if isinstance(base, PreTrainedModel) else None
    source = str(model.name_or_path) if model is not None else resolve(str(base))
    if model is not None and getattr(model, "is_quantized", False):
        warnings.warn(
            f"a change does not fit into quantized weights: the base is read again from {source}", stacklevel=3
        )
        model, dtype = None, dtype or torch.bfloat16
    given = model is not None
    if model is None:
        model = _load(source, soup)

    merged = _merged(soup, model, dtype)
    state = _as_on_disk(merged.state, model, dtype)
    manifest = soup.lineage | {"merged": True}
    if allow_base_mismatch:
        manifest |= {"base_mismatch_allowed": True, "merged_into": published(source) if source else None}
    with whole_folder(out, SOUP_FILE) as partial:
        save_torch_state_dict(state, str(partial))
        config = BaseFiles.of(model).config(merged.config, str(dtype or model.dtype).removeprefix("torch."))
        _write_json(partial / "config.json", config)
        _save_generation_config(model, partial, given)
        _save_tokenizer(soup, source, partial)
        _write_json(partial / SOUP_FILE, manifest)
        if merged.is_other:
            _check_loads(merged, model, partial)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- the base --------------------------------------------------------------------------------------------------------


def _load(source: str, soup: Soup) -> PreTrainedModel:
    """A model in its own precision and class, or in that of the soup's task, whose head the soup brings."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot load the base {source!r}: {error}") from None
    if getattr(config, "quantization_config", None):
        raise AdapterError(
            f"{source} holds quantized weights only, which a change does not fit into: load the soup on it"
        )

    architecture = (config.architectures or [""])[0]
    task = getattr(soup.config.task_type, "value", soup.config.task_type)
    ending, auto = _HEADS.get(str(task), ("", ""))
    if auto and not architecture.endswith(ending):
        kind = getattr(transformers, auto)
        config.num_labels = _labels(soup) or config.num_labels
    else:
        kind = getattr(transformers, architecture, None)
    if kind is None:
        raise AdapterError(f"transformers has no class {config.architectures} for the base {source!r}")

    try:
        # Exactly as it is stored: the merged model keeps each tensor's type, so `dtype_of` is not asked.
        model, about = from_safetensors(
            kind.from_pretrained, source, config=config, dtype="auto", output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot load the base {source!r}: {why_not(source) or error}") from None
    if lacking := sorted(set(about["missing_keys"]) - set(soup.whole)):
        raise AdapterError(
            f"neither the base {source!r} nor the soup holds {lacking[0]}, which {type(model).__name__} needs"
        )
    return model


def _labels(soup: Soup) -> int | None:
    """Number of classes of the soup's own head."""
    tables = {name: tensor.shape for name, tensor in soup.whole.items() if len(tensor.shape) == 2}
    return min((shape[0] for name, shape in tables.items() if "score" in name or "classifier" in name), default=None)


# --- the sum ---------------------------------------------------------------------------------------------------------


def _merged(soup: Soup, model: PreTrainedModel, dtype: torch.dtype | None) -> _Merged:
    """The parameters of the model with the soup on it, by the names of the plain model."""
    tied = _tied_names(model)
    written = {_plain_name(name) for name in soup.whole}
    with soup.attached(model, resize=True, allow_base_mismatch=True) as attached:
        state = {name: t.clone() if name in written else t for name, t in _plain_state(model).items()}
        changes = _changes(attached)
        config = deepcopy(model.config)
    config.architectures = [type(model).__name__]

    added = changes.keys() - state.keys()
    like = {name: tensor.dtype for name, tensor in state.items()}
    for name, tensor in (state | changes).items():
        kind = dtype or like.get(name, model.dtype)
        state[name] = tensor.to(kind) if tensor.is_floating_point() else tensor

    untied = _tie(state, tied)
    if untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    if added:
        _add_biases(model, config, state, added)
    return _Merged(state, config, untied or bool(added))


def _tied_names(model: PreTrainedModel) -> list[list[str]]:
    """Names of parameters that are one tensor, a list for each such tensor."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


_INSIDE = re.compile(r"(\.base_layer|\.modules_to_save\.default|\.token_adapter)+(?=\.|$)")


def _plain_name(name: str) -> str:
    """The base's name of a parameter, without the names of PEFT's wrappers."""
    return _INSIDE.sub("", name)


def _plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of a model with an adapter on it: whole parameters as they were trained, adapted ones without their change."""
    others = (".original_module.", ".lora_", ".trainable_tokens_")
    state = model.state_dict()
    return {_plain_name(name): tensor for name, tensor in state.items() if not any(part in name for part in others)}


@torch.no_grad()
def _changes(attached: Any) -> dict[str, Tensor]:
    """θ0 + Δ of each adapted parameter, in float32. Δ is PEFT's own, because it depends on the kind of layer."""
    parameters: dict[str, Tensor] = {}
    model = attached.get_base_model()
    for path, module in model.named_modules():
        plain = _plain_name(path)
        if isinstance(module, ParamWrapper):
            name = f"{plain}.{module.parameter_name}"
            parameters[name] = (
                parameters.get(name, module.get_param().float()) + module.get_delta_weight("default").float()
            )
        elif isinstance(module, LoraLayer):
            layer: Any = module
            base = layer.get_base_layer()
            _check_kind(base, path, model)
            parameters[f"{plain}.weight"] = base.weight.float() + layer.get_delta_weight("default").float()
            if layer.lora_bias.get("default"):
                bias = layer.lora_B["default"].bias.float() * layer.scaling["default"]
                parameters[f"{plain}.bias"] = bias if base.bias is None else base.bias.float() + bias
        elif isinstance(module, TrainableTokensLayer):
            parameters[f"{plain}.weight"] = module.get_merged_weights(["default"])
    return parameters


def _check_kind(layer: nn.Module, path: str, model: nn.Module) -> None:
    if isinstance(layer, (nn.Linear, Conv1D, nn.Embedding)):
        output_scale(layer, path, model)
    elif not isinstance(layer, _ConvNd):
        raise AdapterError(
            f"{path} is a {type(layer).__name__}, which no change can be merged into: load the soup instead"
        )


def _tie(state: dict[str, Tensor], tied: list[list[str]]) -> bool:
    """Let parameters that were one tensor be one again if they are still equal; returns whether some no longer are."""
    untied = False
    for first, *others in tied:
        for name in others:
            if torch.equal(state[first], state[name]):
                state[name] = state[first]
            else:
                untied = True
    return untied


# --- a model that is built otherwise ---------------------------------------------------------------------------------


def _add_biases(model: PreTrainedModel, config: PreTrainedConfig, state: dict[str, Tensor], added: set[str]) -> None:
    """Switch on the biases in the config that the soup needs; other biases that come with them are 0.

    Raises:
        AdapterError: This kind of model has no bias there.
    """
    shapes = _shapes(model, config)
    for holder in {id(c): c for c in (config, config.get_text_config())}.values():
        for flag in [name for name, value in vars(holder).items() if "bias" in name and value is False]:
            setattr(holder, flag, True)
            more = _shapes(model, config)
            gained = more.keys() - shapes.keys()
            if gained & added and all(name.endswith(".bias") for name in gained) and not shapes.keys() - more.keys():
                shapes = more
            else:
                setattr(holder, flag, False)
    if lacking := sorted(added - shapes.keys()):
        raise AdapterError(
            f"the soup adds the bias {lacking[0]}, and a {type(model).__name__} has none there whatever its config says: "
            "load the soup instead of merging it"
        )
    for name in shapes.keys() - state.keys():
        if name.endswith(".bias"):
            state[name] = torch.zeros(shapes[name], dtype=state[sorted(added)[0]].dtype)


def _shapes(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Parameters of a model of this kind, by a config."""
    with torch.device("meta"):
        skeleton = type(model)(deepcopy(config))
    return {name: parameter.shape for name, parameter in skeleton.named_parameters(remove_duplicate=False)}


def _check_loads(merged: _Merged, model: PreTrainedModel, folder: Path) -> None:
    """Read the model that was written, and compare.

    Raises:
        AdapterError: transformers makes another model of it.
    """
    again = type(model).from_pretrained(folder, dtype="auto").state_dict()
    for name, tensor in merged.state.items():
        if name in again and not torch.equal(again[name], tensor.to(again[name].device, again[name].dtype)):
            raise AdapterError(
                f"a {type(model).__name__} cannot hold {name} as the soup has it (it is tied to another parameter, whatever "
                "the config says): load the soup instead of merging it"
            )


# --- on the disk -----------------------------------------------------------------------------------------------------


def _as_on_disk(state: dict[str, Tensor], model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors by the names that the base's own files have, or else by those that transformers saves them under.

    Files may name tensors without the prefix of the model's body, and hold copies of tied parameters, buffers that are computed
    anew, and layers that transformers does not read. The last two are copied as they are.
    """
    once = remove_tied_weights_from_state_dict(dict(state), model)
    written = {name: _on_its_own(tensor) for name, tensor in revert_weight_conversion(model, once).items()}
    files = BaseFiles.of(model)
    stored = files.tensors()
    rest = {name: path for name, path in stored.items() if name not in written}

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    for name in list(rest):
        inside, _ = rename_source_key(name, renamings, [], model.base_model_prefix, state)
        if inside in state:
            (other,) = revert_weight_conversion(model, {inside: state[inside]})
            own = None if other in stored else written.pop(other, None)
            written[name] = state[inside].clone() if own is None else own  # a copy of a tied parameter, or another name
            del rest[name]
    if files.architectures() == [type(model).__name__]:
        for name, tensor in files.read(rest):
            written[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    return written


def _on_its_own(tensor: Tensor) -> Tensor:
    """A tensor that is no part of a larger one, as the experts of a fused layer are."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if whole else tensor.contiguous().clone()


def _save_generation_config(model: PreTrainedModel, folder: Path, given: bool) -> None:
    """The base's file as it is, or what a loaded model says."""
    path = BaseFiles.of(model).path("generation_config.json")
    if path is not None and not given:
        (folder / path.name).write_bytes(path.read_bytes())
    elif model.can_generate():
        try:
            model.generation_config.save_pretrained(folder)
        except ValueError as error:  # some contradict themselves, and transformers does not write them
            warnings.warn(f"the base's generation config is left out: {error}", stacklevel=5)


def _save_tokenizer(soup: Soup, source: str, folder: Path) -> None:
    """The tokenizer that came with the adapter, or else the base's, and the base's processor."""
    own = soup.tokenizer_folder()
    base = tokenizer_folder(source) if source else None
    if (place := own or base) is not None:
        copy_files(place, TOKENIZER_FILES, folder)
    if base is not None:
        copy_files(base, PROCESSOR_FILES, folder)
