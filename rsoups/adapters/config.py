"""Read and check adapter_config.json: every field that PEFT would act on has a type and a value that it can have."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from rsoups.adapters.filenames import CONFIG_FILE
from rsoups.adapters.settings import LoraSettings
from rsoups.common.errors import AdapterError
from rsoups.common.schema import validated

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

# Fields that PEFT stores as they are. Values of all others are checked by PEFT itself, if they are not the defaults.
_STORED = set(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha lora_dropout "
    "target_modules exclude_modules target_parameters modules_to_save rank_pattern alpha_pattern fan_in_fan_out bias lora_bias "
    "use_rslora trainable_token_indices megatron_core qalora_group_size ensure_weight_tying".split()
)
_TASKS = (None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_NOT_WRITTEN = "runtime_config"  # a field of PEFT's config that it keeps out of files

_WholeNumber = Annotated[float, Field(gt=0, multiple_of=1)]
_Tokens = list[NonNegativeInt]


class _Fields(BaseModel):
    """Types of the fields that PEFT acts on. PEFT takes any: the text "false" would switch rsLoRA on."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    r: _WholeNumber = 8
    rank_pattern: dict[str, _WholeNumber] | None = None
    lora_alpha: float = 8
    alpha_pattern: dict[str, float] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_pattern: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    trainable_token_indices: _Tokens | dict[str, _Tokens] | None = None
    bias: Literal["none", "all", "lora_only"] | None = None
    init_lora_weights: bool | str | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    use_qalora: bool | None = None
    lora_bias: bool | None = None
    fan_in_fan_out: bool | None = None
    inference_mode: bool | None = None
    ensure_weight_tying: bool | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, str] | None = None


def read_config(path: Path) -> LoraSettings:
    """Read an adapter's config.

    Raises:
        AdapterError: There is no file, it is not JSON, it is of another kind of adapter, or PEFT would misread a field.
    """
    try:
        if path.stat().st_size > _LONGEST_CONFIG:
            raise AdapterError(f"{path} has {path.stat().st_size} bytes: real configs have a few thousand")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} holds no {CONFIG_FILE}: {_hint(path.parent)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds a {type(data).__name__}, not an object of fields")

    check_kind(str(path), data.get("peft_type"))
    known = {field.name for field in fields(LoraSettings)} | {_NOT_WRITTEN}
    unknown = sorted(key for key in set(data) - known if data[key])
    if unknown:
        raise AdapterError(f"{path}: unknown field(s) {unknown}, perhaps of a newer PEFT: upgrade rsoups and PEFT")

    validated(_Fields, data, str(path), AdapterError)
    data = {key: value for key, value in data.items() if key in known}
    if not _has_checked_fields(data):
        return LoraSettings(**data)
    from peft import LoraConfig

    try:
        return LoraSettings.of(LoraConfig(**data))
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{path}: {error}") from None


def _has_checked_fields(data: dict[str, Any]) -> bool:
    """Whether a field has a value that PEFT checks, or changes, when it makes its config."""
    usual = LoraSettings()
    odd = {key for key, value in data.items() if key not in _STORED and value != getattr(usual, key, None)}
    return bool(odd) or data.get("task_type") not in _TASKS


def _hint(folder: Path) -> str:
    """Folders of adapters inside: PEFT saves an adapter that is not called "default" in a folder of its name."""
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


def check_linear(source: str, config: LoraSettings) -> None:
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


def for_inference(config: LoraSettings) -> LoraSettings:
    """A copy of a config as PEFT publishes it."""
    config = deepcopy(config)
    config.inference_mode = True
    config.ensure_weight_tying = False  # `read_adapter` refuses adapters that tied layers share
    config.init_lora_weights = True  # the values are in the file, so how they were drawn no longer matters
    return config
