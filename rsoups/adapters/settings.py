"""PEFT's config of a LoRA as plain fields: adapters are read and written without PEFT, whose import takes seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.adapters.filenames import CONFIG_FILE

if TYPE_CHECKING:
    from peft import LoraConfig


@cache
def _peft_version() -> str:
    return version("peft")


@dataclass
class LoraSettings:
    """The fields that PEFT writes of a `LoraConfig`, with its defaults; `target_modules` and `exclude_modules` are sets.

    Fields that no soup acts on are kept as they were found.
    """

    task_type: str | None = None
    peft_type: str = "LORA"
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    target_modules: Any = None
    exclude_modules: Any = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    megatron_config: Any = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self.peft_version = self.peft_version or _peft_version()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))

    @classmethod
    def of(cls, config: LoraConfig) -> LoraSettings:
        """The fields of PEFT's config."""
        values = {each.name: getattr(config, each.name) for each in fields(cls)}
        return cls(**{name: getattr(value, "value", value) for name, value in values.items()})  # enums are texts

    def config(self) -> LoraConfig:
        """PEFT's config.

        Raises:
            TypeError, ValueError: PEFT refuses a field.
        """
        from peft import LoraConfig

        return LoraConfig(**deepcopy(vars(self)))

    def save(self, folder: Path) -> None:
        """Write adapter_config.json, byte for byte as PEFT does, but sets in the order of their names."""
        data = {name: sorted(value) if isinstance(value, set) else value for name, value in asdict(self).items()}
        (folder / CONFIG_FILE).write_text(json.dumps(data, indent=2, sort_keys=True), encoding="utf-8")

    def targets(self, path: str) -> bool:
        """Whether PEFT puts an adapter on a module.

        Raises:
            re.error: A pattern is no regular expression.
        """
        if self.exclude_modules or self.layers_to_transform is not None or self.modules_to_save:
            from peft.tuners.tuners_utils import check_target_module_exists

            return bool(check_target_module_exists(self, path))
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, path) is not None
        return any(f".{path}".endswith(f".{name}") for name in self.target_modules or ())


def by_pattern(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """A module's rank or alpha, by PEFT's rule: the first pattern that fits the end of its path."""
    pattern = pattern or {}
    key = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", path)), path)
    return pattern.get(key, default)
