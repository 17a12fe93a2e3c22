"""The config of a soup: with it, PEFT loads every tensor of the soup, scaled as it was in the ingredients."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor
from transformers import PreTrainedModel

from rsoups.adapters.adapter import TOKENS, Adapter, trained_tokens
from rsoups.adapters.config import for_inference
from rsoups.adapters.layer_names import EXPERT, as_loaded, path_of, recorded_base, tells_class, without_numbers
from rsoups.adapters.lora_modules import LoraModule, holder_of, read_modules
from rsoups.common.errors import AdapterError

_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Paths of layers of models with images or sound before transformers moved them into one `model`.
_OLD_PATH = re.compile(r"(language_model|vision_tower|visual|audio_tower|multi_modal_projector)\.")
_BIASES = ("none", "lora_only", "all")


def faithful_config(adapter: Adapter) -> LoraConfig:
    """Return the config of an adapter that is written as it is.

    It is the adapter's own, unless PEFT would read that otherwise: patterns may depend on their order, which PEFT does not
    keep, and names may be old. Then it is one with the same meaning.
    """
    config = for_inference(adapter.config)
    if not _means(config, adapter.layout, adapter.modules):
        _select(config, [adapter], adapter.modules)
        alphas = {path: alpha_of(module, config.use_rslora) for path, module in adapter.modules.items()}
        _write_patterns(config, adapter.modules, alphas)
    return config


def alpha_of(module: LoraModule, rslora: bool | None) -> float:
    """The alpha that gives a module its scaling."""
    alpha = module.scaling * (module.rank**0.5 if rslora else module.rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


def stacked_config(adapters: Sequence[Adapter], modules: Mapping[str, LoraModule]) -> LoraConfig:
    """Return the config of stacked factors: alpha equals the rank of each module, so that PEFT scales by 1."""
    config = for_inference(adapters[0].config)
    configs = [adapter.config for adapter in adapters]
    config.use_rslora = False
    config.lora_bias = any(module.bias is not None for module in modules.values())
    config.lora_dropout = 0.0
    config.bias = max((one.bias or "none" for one in configs), key=_BIASES.index)
    saved = [name for one in configs for name in one.modules_to_save or ()]
    config.modules_to_save = list(dict.fromkeys(saved)) or None
    config.trainable_token_indices = _tokens(adapters)
    config.auto_mapping = next((one.auto_mapping for one in configs if one.auto_mapping), None)
    _write_patterns(config, modules, {path: module.rank for path, module in modules.items()})
    _select(config, adapters, modules)
    return config


def _tokens(adapters: Sequence[Adapter]) -> Any:
    """Trained tokens of all adapters, in the words of an adapter that has them all."""
    trained = {
        path_of(name): (adapter, trained_tokens(adapter.config, path_of(name)))
        for adapter in adapters
        for name in adapter.full
        if name.endswith(TOKENS)
    }
    for adapter, _ in trained.values():
        if trained.keys() == {path_of(name) for name in adapter.full if name.endswith(TOKENS)}:
            return adapter.config.trainable_token_indices
    return {path: tokens for path, (_, tokens) in trained.items()} or None


def _write_patterns(config: LoraConfig, modules: Mapping[str, LoraModule], alphas: Mapping[str, float]) -> None:
    """Write rank and alpha of each module: the most common ones, and patterns for the others; at most one fits a module."""
    of_experts = {(module.rank, alphas[path]) for path, module in modules.items() if EXPERT.search(path)}
    if len(of_experts) > 1:
        raise AdapterError(
            f"experts have different ranks, {sorted(rank for rank, _ in of_experts)}: PEFT, which fuses the factors of single "
            "experts when it loads them, needs one rank; pass base=, so that they are fused before"
        )
    values = {path: (module.rank, alphas[path]) for path, module in modules.items()}
    # PEFT warns about patterns for parameters of fused experts, so these decide what is common.
    fused = [values[path] for path, module in modules.items() if module.parameter is not None]
    common = Counter(fused or values.values()).most_common(1)[0][0]
    config.r, config.lora_alpha = next(iter(of_experts), common)  # type: ignore[assignment]  # PEFT takes any number

    may_be_old = not tells_class(config)
    patterns = {_pattern(modules, path, may_be_old): value for path, value in values.items()}
    config.rank_pattern = {pattern: rank for pattern, (rank, _) in patterns.items() if rank != config.r}
    config.alpha_pattern = {pattern: alpha for pattern, (_, alpha) in patterns.items() if alpha != config.lora_alpha}


def _pattern(modules: Mapping[str, LoraModule], path: str, may_be_old: bool) -> str:
    """A pattern of PEFT's that fits one module, or one parameter of it, or all of them where they have one rank."""
    module = modules[path]
    if module.parameter is None:
        return _whatever_its_name(path) if may_be_old and _OLD_PATH.match(path) else f"^{re.escape(path)}"
    holder = holder_of(path, module)
    if module.parameter:
        return f"^{re.escape(f'{holder}.{module.parameter}')}"
    if len({m.rank for other, m in modules.items() if holder_of(other, m) == holder}) > 1:
        raise AdapterError(
            f"the parameters of {holder} have different ranks, and the adapters do not tell which is which, so that no config "
            "can tell it"
        )
    return rf"^{re.escape(holder)}\.[^.]+"


def _whatever_its_name(path: str) -> str:
    """A pattern that fits an old path, and the path that PEFT makes of it when it loads the adapter on its base."""
    return re.sub(r"\\\.(model|vision_model)\\\.", r"\\.(?:\1\\.)?", re.escape(path))


def _select(config: LoraConfig, adapters: Sequence[Adapter], modules: Mapping[str, LoraModule]) -> None:
    """Target the modules of all adapters."""
    configs = [adapter.config for adapter in adapters]
    narrowed = any(getattr(one, name) for one in configs for name in _SELECTION[1:])
    parameters = [name for one in configs for name in one.target_parameters or ()]
    wrapped = [
        (holder_of(path, module), module.parameter) for path, module in modules.items() if module.parameter is not None
    ]
    if narrowed and all(name for _, name in wrapped):  # PEFT does not narrow parameters to some layers
        parameters = [f"{path}.{name}" for path, name in wrapped]
    config.target_parameters = list(dict.fromkeys(parameters)) or None
    paths = [path for path, module in modules.items() if module.parameter is None]
    alike = all(getattr(one, name) == getattr(config, name) for one in configs for name in _SELECTION)
    if alike and _selects(config, paths):
        return
    listed = all(not isinstance(one.target_modules, (str, type(None))) for one in configs)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.target_modules = sorted({name for one in configs for name in one.target_modules or ()}) if listed else []
    if not listed or narrowed or not _selects(config, paths):
        config.target_modules = sorted(paths)  # PEFT takes each name of a list for the end of a path
        if any(map(_OLD_PATH.match, paths)) and not tells_class(config):
            config.target_modules = f"(.*\\.)?({'|'.join(map(_whatever_its_name, sorted(paths)))})"


def _selects(config: LoraConfig, paths: Sequence[str]) -> bool:
    if config.target_modules == "all-linear":
        return True
    return (
        config.target_modules is None and not paths or all(check_target_module_exists(config, path) for path in paths)
    )


def _means(config: LoraConfig, layout: Mapping[str, Tensor], modules: Mapping[str, LoraModule]) -> bool:
    """Whether PEFT reads these modules, with their scalings, from a config."""
    try:
        read = read_modules("the soup", as_written(config), layout)
    except AdapterError:
        return False
    return read.keys() == modules.keys() and all(read[path].scaling == modules[path].scaling for path in modules)


def as_written(config: LoraConfig) -> LoraConfig:
    """Return a config as PEFT reads it back from its file, where all keys are sorted."""
    config = deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, dict):
            setattr(config, name, dict(sorted(value.items())))
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    return config


def check_written(config: LoraConfig, layout: Mapping[str, Any], modules: Mapping[str, LoraModule]) -> None:
    """Check by names and shapes that PEFT, when it converts a soup for its base, loads all tensors.

    Args:
        config: Config of the soup.
        layout: Names and shapes of its tensors.
        modules: Its modules, as `read_modules` reads them with this config.

    Raises:
        AdapterError: PEFT would pass over a tensor.
    """
    config = as_written(config)
    if (base := recorded_base(config, only_renamed=False)) is None:
        return
    try:
        config, layout = as_loaded(base, config, layout)
        modules = read_modules("the soup as PEFT converts it for its base", config, layout)
    except AdapterError as error:
        raise AdapterError(f"PEFT would not load all of this soup: {error}") from None
    parameters = {without_numbers(name) for name, _ in base.named_parameters()}
    layers = {without_numbers(name) for name, _ in base.named_modules()}
    for path, module in modules.items():
        holder = holder_of(path, module)
        if not _has_layer(base, layers, without_numbers(holder)):
            raise AdapterError(
                f"PEFT would not load all of this soup: the base {type(base).__name__} has no layer {holder}. Save the adapter "
                "again with PEFT's save_pretrained, from the model without its wrappers"
            )
        if module.parameter and without_numbers(f"{holder}.{module.parameter}") not in parameters:
            raise AdapterError(
                f"PEFT would not load all of this soup: it takes the targets for parameters of {type(base).__name__}, and "
                f"{holder} has none of them: train on other targets, or merge the adapters one by one"
            )


def _has_layer(base: PreTrainedModel, layers: set[str], path: str) -> bool:
    """Whether a base has a layer, also if the adapter was trained on the model inside of it, or with another head."""
    if "#" not in path:  # outside of the layers are heads, which differ between the classes of one base
        return True
    inside = path.partition(".")[2]
    body, rest = f"{base.base_model_prefix}.", (f".{path}", f".{inside}")
    return path in layers or path.removeprefix(body) in layers or any(name.endswith(rest) for name in layers)
