"""Read and check adapter_config.json: every field that PEFT would act on has a type and a value that it can have."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from rsoups.adapters.filenames import CONFIG_FILE
from rsoups.common.errors import AdapterError

_LONGEST_CONFIG = 2**24  # bytes; real ones have a few thousand

# Fields that make an adapter more than θ0 + s·B·A, and why no soup can be made of it.
_REFUSED = {
    "use_dora": "DoRA rescales the columns of the base's weights, so its change is not linear in the adapter",
    "use_qalora": "QA-LoRA pools its inputs by quantization group",
    "use_bdlora": "block-diagonal LoRA is not a plain B·A",
    "kasa_config": "KaSA also changes the base's weights",
    "velora_config": "VeLoRA is not a plain B·A",
    "monteclora_config": "Monte Carlo LoRA samples its factors",
    "arrow_config": "Arrow routes between adapters token by token",
    "alora_invocation_tokens": "an activated LoRA is switched on by its prompt",
    "layer_replication": "layer replication changes the shape of the base",
    "megatron_config": "Megatron's parallel layers are not supported",
}
# Initializations that subtract the adapter's start from the base: B·A is then not the change from the published base.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal", "mica")


def read_config(path: Path) -> LoraConfig:
    """PEFT's config of an adapter.

    Raises:
        AdapterError: No file, no JSON, another kind of adapter, or a field that PEFT would misread.
    """
    try:
        if path.stat().st_size > _LONGEST_CONFIG:
            raise AdapterError(f"{path} has {path.stat().st_size} bytes: that is no adapter's config")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} holds no {CONFIG_FILE}: {_hint(path.parent)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds a {type(data).__name__}, not an object of fields")
    check_kind(str(path), data.get("peft_type"))
    known = {field.name for field in fields(LoraConfig)}
    if unknown := sorted(key for key in set(data) - known if data[key]):
        raise AdapterError(f"{path}: unknown field(s) {unknown}, perhaps of a newer PEFT: upgrade rsoups and PEFT")
    _check_numbers(path, data)
    _check_types(path, data)
    try:
        return LoraConfig(**{key: value for key, value in data.items() if key in known})
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{path}: {error}") from None


def _hint(folder: Path) -> str:
    """Where the adapters are: PEFT saves one that is not called "default" in a folder of its name."""
    try:
        inside = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG_FILE}"))
    except OSError:
        inside = []
    return f"the adapter is in {' or '.join(inside)}" if inside else "is this the folder of a PEFT adapter?"


def check_kind(where: str, peft_type: Any) -> None:
    """Refuse an adapter that is not a LoRA."""
    kind = getattr(peft_type, "value", peft_type)
    if kind != "LORA":
        raise AdapterError(f"{where}: peft_type is {kind!r}; a soup can be made of LORA adapters only")


def _check_numbers(path: Path, data: dict[str, Any]) -> None:
    """Ranks are whole numbers above 0 and alphas are finite; PEFT loads an alpha of NaN without a word."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300

    ranks = {"r": data.get("r", 8)}
    alphas = {"lora_alpha": data.get("lora_alpha", 8)}
    for field, into in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        pattern = data.get(field) or {}
        if not isinstance(pattern, dict):
            raise AdapterError(f"{path}: {field} is {pattern!r}, must be an object of module names and numbers")
        into.update({f"{field}[{key!r}]": value for key, value in pattern.items()})
    for field, value in ranks.items():
        if not is_number(value) or value != int(value) or value <= 0:
            raise AdapterError(f"{path}: {field} is {value!r}, must be a whole number above 0")
    for field, value in alphas.items():
        if not is_number(value):
            raise AdapterError(f"{path}: {field} is {value!r}, must be a finite number")


def _check_types(path: Path, data: dict[str, Any]) -> None:
    """PEFT takes any type for a field and acts on it: the text "false" would switch rsLoRA on."""

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def mapping(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())

    def token_ids(value: Any) -> bool:
        return isinstance(value, list) and all(whole(item) and item >= 0 for item in value)

    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(
            (
                "use_rslora",
                "lora_bias",
                "fan_in_fan_out",
                "use_dora",
                "use_qalora",
                "inference_mode",
                "ensure_weight_tying",
            ),
            (lambda value: isinstance(value, bool), "true or false"),
        ),
        **dict.fromkeys(
            ("target_modules", "exclude_modules", "layers_pattern"),
            (lambda value: isinstance(value, str) or texts(value), "a text or a list of texts"),
        ),
        **dict.fromkeys(("modules_to_save", "target_parameters"), (texts, "a list of texts")),
        "trainable_token_indices": (
            lambda value: token_ids(value) or (isinstance(value, dict) and all(map(token_ids, value.values()))),
            "a list of token ids, or lists by the names of modules",
        ),
        "layers_to_transform": (
            lambda value: whole(value) or (isinstance(value, list) and all(map(whole, value))),
            "a whole number or a list of them",
        ),
        "auto_mapping": (mapping, "an object of texts"),
        "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
        "init_lora_weights": (lambda value: isinstance(value, (bool, str)), "true, false or a text"),
        **dict.fromkeys(
            ("base_model_name_or_path", "revision", "task_type"), (lambda value: isinstance(value, str), "a text")
        ),
    }
    for field, (fits, wanted) in kinds.items():
        if data.get(field) is not None and not fits(data[field]):
            raise AdapterError(f"{path}: {field} is {data[field]!r}, must be {wanted}")


def check_linear(source: str, config: LoraConfig) -> None:
    """Refuse an adapter whose change is not θ0 + s·B·A."""
    for field, reason in _REFUSED.items():
        if getattr(config, field, None):
            raise AdapterError(f"{source}: {field} is set, and {reason}: it cannot be part of a soup")
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        raise AdapterError(
            f"{source}: init_lora_weights is {start!r}, which also changes the base's weights; convert it to a plain LoRA "
            "first (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )


def by_pattern(pattern: Any, path: str, default: int) -> int:
    """A module's rank or alpha, found as PEFT finds it."""
    if not pattern:
        return default
    return pattern.get(get_pattern_key(list(pattern), path), default)


def for_inference(config: LoraConfig) -> LoraConfig:
    """A copy of a config as PEFT publishes it."""
    config = deepcopy(config)
    config.inference_mode = True
    config.ensure_weight_tying = False  # of an adapter that no tied layer shares (`read_adapter` refuses others)
    config.init_lora_weights = True  # whatever it was drawn from, its values are in the file
    return config
