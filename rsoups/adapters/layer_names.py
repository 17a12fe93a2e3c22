"""Rename layers: strip the prefixes of wrappers, and replace old layer names by those that transformers has today.

PEFT converts an adapter's names when it loads it, so adapters of one base may have different names. Here the same conversion
is done on names alone, with a skeleton of the base without weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rsoups.adapters.settings import LoraSettings
from rsoups.common.errors import AdapterError
from rsoups.common.files import hub_file, is_hub_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
# Classes whose layers never had other names, and the names of their layers: for these, transformers need not be imported,
# which takes seconds.
NEVER_RENAMED = {
    f"{family}For{head}"
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2")
    for head in ("CausalLM", "SequenceClassification")
}
PLAIN_LAYERS = {f"model.layers.#.self_attn.{name}_proj" for name in "qkvo"}
PLAIN_LAYERS |= {f"model.layers.#.mlp.{name}_proj" for name in ("gate", "up", "down")}
# torch.compile, FSDP (of torch and fairscale), activation checkpointing, Lightning, Opacus: anywhere in a name.
_WRAPPER = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module|_forward_module|_module)\."
)
_PARALLEL = re.compile(
    r"^(module\.)+|(?<=^base_model\.model\.)(module\.)+"
)  # DDP and DeepSpeed: around the whole model
# PEFT leaves the adapter's name out of a file; of this one it also reads names that hold it.
_ADAPTER_NAME = re.compile(r"(\.lora_(?:embedding_)?[AB]|\.modules_to_save|\.trainable_tokens_delta)\.default(?=\.|$)")
# Parts of names that PEFT would not have given, or that stand for another tensor.
_ODD = (
    "._",
    ".default",
    ".modules_to_save.",
    ".original_module.",
    ".base_layer.",
    *(f"{PREFIX}{p}." for p in ("base_model", "module")),
)
EXPERT = re.compile(r"\.experts\.\d+\.")  # PEFT itself fuses adapters of single experts when it loads them
_WHOLE = re.compile(r"\.base_layer(\.(?:weight|bias))$")  # beside the factors of an adapted module
_PART = re.compile(r"\.(lora_|base_layer\.|token_adapter\.).*")  # what follows a module's path in the name of a tensor


def plain_names(source: str, names: Iterable[str]) -> dict[str, str]:
    """Map the name that PEFT would have given each tensor to its name in the file.

    Copies that PEFT (0.21) writes beside a module that was trained as a whole are left out.

    Raises:
        AdapterError: PEFT would ignore a name, or two names mean one tensor.
    """
    names = list(names)
    text = "\n".join(names)
    if all(name.startswith(PREFIX) for name in names) and not any(part in text for part in _ODD):  # as in most files
        return dict(zip(names, names, strict=True))
    in_file: dict[str, str] = {}
    for name in names:
        plain = _plain(name)
        if not plain.startswith(PREFIX):
            raise AdapterError(
                f"{source}: the name of tensor {name} does not start with {PREFIX!r}, so PEFT reads nothing of it: save the "
                "adapter again with PEFT's save_pretrained, from the model without its wrappers"
            )
        if (other := in_file.setdefault(plain, name)) != name:
            raise AdapterError(f"{source}: tensors {other} and {name} are both {plain} without the names of wrappers")
    for name in list(in_file):
        trained, frozen = name.replace(".modules_to_save.", "."), name.replace(".original_module.", ".")
        if trained != name:
            in_file.setdefault(trained, in_file[name])
        if trained != name or (frozen != name and frozen in in_file):
            del in_file[name]
    return _without_base_layers(source, in_file)


def _without_base_layers(source: str, names: dict[str, str]) -> dict[str, str]:
    """Give whole parameters of adapted modules the base's names; `written_name` undoes it."""
    in_file: dict[str, str] = {}
    for name, there in names.items():
        plain = _WHOLE.sub(r"\1", name)
        if (other := in_file.setdefault(plain, there)) != there:
            raise AdapterError(f"{source}: tensors {other} and {there} are both {plain} of the base")
    return in_file


def written_name(name: str, adapted: Container[str]) -> str:
    """The name that PEFT gives a whole parameter.

    Args:
        name: Name of any tensor, as `plain_names` gives it.
        adapted: Paths of the modules that have factors.
    """
    if path_of(name) not in adapted or _PART.search(name):
        return name
    return f"{PREFIX}{path_of(name)}.base_layer.{name.rpartition('.')[2]}"


def _plain(name: str) -> str:
    plain = _ADAPTER_NAME.sub(r"\1", _WRAPPER.sub("", name))
    while True:  # a prefix that is gone may show another
        shorter = _PARALLEL.sub("", plain)
        shorter = shorter.removeprefix(PREFIX) if shorter.startswith(2 * PREFIX) else shorter
        if shorter == plain:
            return plain
        plain = shorter


def path_of(name: str) -> str:
    """Path in the base of the module that an adapter's tensor belongs to."""
    path = name.removeprefix(PREFIX)
    return _PART.sub("", path) if _PART.search(path) else path.rpartition(".")[0]


def current_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Map names in a model to the given names. Old names are converted as transformers does when it loads.

    Raises:
        AdapterError: Two names become one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    known = {without_numbers(path) for path, _ in model.named_modules()}
    given_names: dict[str, str] = {}
    for name in names:
        new = name
        if not EXPERT.search(name) and without_numbers(path_of(name)) not in known:
            new = PREFIX + rename_source_key(name.removeprefix(PREFIX), renamings, [])[0]
        if (other := given_names.setdefault(new, name)) != name:
            raise AdapterError(f"tensors {other} and {name} are both {new} in {type(model).__name__}")
    return given_names


def as_loaded(
    base: PreTrainedModel, settings: LoraSettings, layout: Mapping[str, Tensor]
) -> tuple[LoraSettings, dict[str, Tensor]]:
    """Convert a config and its tensors for a base, as PEFT does when it loads.

    Raises:
        AdapterError: PEFT cannot convert them.
    """
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
        convert_peft_config_for_transformers,
    )
    from transformers.conversion_mapping import get_model_conversion_mapping

    config = settings.config()
    try:
        convert_peft_config_for_transformers(config, base, get_model_conversion_mapping(base))
        tensors = convert_peft_adapter_state_dict_for_transformers(base, config, dict(layout))
        return LoraSettings.of(config), tensors
    except (ValueError, KeyError, RuntimeError) as error:
        raise AdapterError(f"PEFT cannot convert the adapter for {type(base).__name__}: {error}") from None


def without_numbers(path: str) -> str:
    """A path with # for each number: the same for all layers and experts."""
    return re.sub(r"\d+", "#", path)


def recorded_base(settings: LoraSettings, only_renamed: bool = True) -> PreTrainedModel | None:
    """A skeleton of the base that an adapter names; None if the base is not known here; `only_renamed` as of `skeleton`."""
    name = _recorded_class(settings)
    if not name or (only_renamed and name in NEVER_RENAMED):
        return None
    return skeleton(name, _local_config(settings), only_renamed)


def has_plain_layers(settings: LoraSettings, paths: Iterable[str]) -> bool:
    """Whether the class of the base is known to have all of these layers under these names; heads are not looked at."""
    known = _recorded_class(settings) in NEVER_RENAMED
    return known and all(path in PLAIN_LAYERS or "#" not in path for path in map(without_numbers, paths))


def tells_class(settings: LoraSettings) -> bool:
    """Whether the class of the base is known, from the adapter or from the base on this disk."""
    name = _recorded_class(settings)
    return name in NEVER_RENAMED or (bool(name) and _class(name) is not None)


def _recorded_class(settings: LoraSettings) -> str:
    """Name of the base's class; "" if neither the adapter nor a base on this disk tells it."""
    mapping = settings.auto_mapping or {}
    if str(mapping.get("parent_library", "")).startswith("transformers.models."):
        return str(mapping.get("base_model_class", ""))
    path = _local_file(settings)
    try:
        named = json.loads(path.read_text("utf-8")).get("architectures") if path else None
        name = str(named[0]) if named else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    # A config that transformers does not read tells nothing.
    return name if not name or name in NEVER_RENAMED or _local_config(settings) is not None else ""


def _local_file(settings: LoraSettings) -> Path | None:
    """config.json of the base, on this disk or in the Hub's cache."""
    name = settings.base_model_name_or_path or ""
    try:
        if name and (path := Path(name, "config.json")).is_file():
            return path
        return hub_file(name, "config.json", settings.revision) if is_hub_name(name) else None
    except (OSError, ValueError):
        return None


def _local_config(settings: LoraSettings) -> Any:
    """Config of a base on this disk or in the Hub's cache."""
    try:
        path = _local_file(settings)
        return _read(path, path.stat().st_mtime_ns) if path else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@lru_cache(maxsize=32)
def _read(path: Path, written: int) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)


def skeleton(name: str, config: Any, only_renamed: bool = False) -> PreTrainedModel | None:
    """Build a model of transformers on the meta device, without weights.

    Args:
        name: Name of the class.
        config: Config of the model. If it is of another class, the class's default config is used.
        only_renamed: Return None for a class whose layers never had other names.

    Returns:
        The model; None if transformers has no such class.
    """
    if (kind := _class(name)) is None:
        return None
    if not isinstance(config, kind.config_class):
        config = None
    if only_renamed and not was_renamed(kind):
        return None
    return _built(kind, "" if config is None else json.dumps(config.to_dict(), default=str, sort_keys=True))


def _class(name: str) -> Any:
    """A class of models in transformers; None if there is none."""
    import transformers

    kind: Any = getattr(transformers, name, None) if name.isidentifier() else None
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if is_model and kind.config_class else None


def was_renamed(kind: Any) -> bool:
    """Whether a class of models may have had other names of layers."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    names = kind.__name__, kind.config_class.model_type
    return bool(kind.config_class.sub_configs) or any(
        get_checkpoint_conversion_mapping(name) is not None for name in names
    )


@lru_cache(maxsize=8)
def _built(kind: Any, config: str) -> PreTrainedModel | None:
    try:
        with _quiet(), torch.device("meta"):
            return kind(kind.config_class.from_dict(json.loads(config)) if config else kind.config_class())
    except Exception:  # an unusual config can cause any error; then the base counts as unknown
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
