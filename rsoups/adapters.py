"""Read and check LoRA adapters: a folder, a Hub id or a live PeftModel in, an `Adapter` out; every refusal is here.

Only safetensors are read, never a pickle. What cannot be part of an exact soup is refused with the reason, so that
`rsoups.soup` is left with nothing but the maths.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rsoups._errors import AdapterError, HubError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_EMBEDDING = ".base_layer.weight"  # PEFT saves an adapted embedding's own weights beside its factors
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.(?P<kind>weight|bias))?")

# Fields that make an adapter more than θ0 + s·B·A, and why no soup can be made of it.
_REFUSED = {
    "use_dora": "DoRA rescales the columns of the base's weights, so its change is not linear in the adapter",
    "use_qalora": "QA-LoRA pools its inputs by quantisation group",
    "use_bdlora": "block-diagonal LoRA is not a plain B·A",
    "kasa_config": "KaSA also changes the base's weights",
    "velora_config": "VeLoRA is not a plain B·A",
    "monteclora_config": "Monte Carlo LoRA samples its factors",
    "arrow_config": "Arrow routes between adapters token by token",
    "alora_invocation_tokens": "an activated LoRA is switched on by its prompt",
    "trainable_token_indices": "single trained token embeddings are not supported",
    "layer_replication": "layer replication changes the shape of the base",
    "target_parameters": "adapters on bare parameters are not supported",
    "megatron_config": "Megatron's parallel layers are not supported",
}
# Initialisations that subtract the adapter's start from the base: B·A is then not the change from the published base.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The change of one module, Δ = scaling · B @ A.

    Attributes:
        A: Shape (r, in) or, of a convolution, (r, in, ...).
        B: Shape (out, r) or (out, r, 1, ...).
        scaling: alpha / r, or alpha / √r for rsLoRA.
        bias: Shape (out,), what `lora_bias` adds (times `scaling`), or None.
        embedding: Whether A and B are those of an embedding.
    """

    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None = None
    embedding: bool = False


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA, read and checked.

    Attributes:
        source: Where it was read from.
        config: PEFT's config.
        tensors: As in the file, on the CPU, in the file's dtypes.
        sha256: Of the file's bytes, or of names, shapes and values for a live model.
        revision: The Hub commit, None for a folder.
    """

    source: str
    config: LoraConfig
    tensors: dict[str, Tensor]
    sha256: str
    revision: str | None = None

    @cached_property
    def modules(self) -> dict[str, LoraModule]:
        """The adapted modules by their path in the base."""
        return _modules(self.source, self.config, self.tensors)

    @cached_property
    def full(self) -> dict[str, Tensor]:
        """Whole parameters that were trained beside the LoRA (`modules_to_save`, biases), or saved with it."""
        return {key: tensor for key, tensor in self.tensors.items() if not _FACTOR.fullmatch(key)}


def read_adapter(source: Any) -> Adapter:
    """Read an adapter and check that it can be part of a soup.

    Args:
        source: A folder, a Hub id (``user/name`` or ``user/name@revision``), a PeftModel (its active adapter), or a
            tuple ``(PeftModel, adapter name)``.

    Raises:
        AdapterError: Missing, corrupt or contradictory files, or a kind of adapter that no exact soup can hold.
        HubError: The Hub cannot be reached or refuses.
    """
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], PeftModel):
        adapter = _from_model(*source)
    elif isinstance(source, PeftModel):
        adapter = _from_model(source, source.active_adapter)
    else:
        adapter = _from_files(str(source))
    _check(adapter)
    return adapter


def _from_model(model: PeftModel, name: str) -> Adapter:
    if name not in model.peft_config:
        raise AdapterError(f"the model has no adapter {name!r}; it has {sorted(model.peft_config)}")
    config = model.peft_config[name]
    _check_kind(f"adapter {name!r}", config.peft_type)
    assert isinstance(config, LoraConfig)
    embeddings = any("lora_embedding_" in key for key, _ in model.named_parameters())
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
    tensors = {key: tensor.detach().cpu().clone() for key, tensor in state.items()}
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return Adapter(f"adapter {name!r} of a live model", config, tensors, digest.hexdigest())


def _from_files(source: str) -> Adapter:
    folder, revision = Path(source).expanduser(), None
    if not folder.is_dir():
        folder, revision = _download(source)
    config = _read_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise AdapterError(
            f"{folder} holds no {WEIGHTS_FILE}"
            + (
                ", only adapter_model.bin, a pickle, which rsoups never opens: where you trust it, load it with PEFT and "
                "save it again with model.save_pretrained(folder, safe_serialization=True)"
                if pickled
                else ": is this the folder of a PEFT adapter?"
            )
        )
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{weights} is corrupt or not a safetensors file ({error}); copy it again") from None
    with weights.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Adapter(source, config, tensors, sha256, revision)


def _download(source: str) -> tuple[Path, str]:
    """The two files of a Hub repository, and the commit they are of."""
    if not _HUB_ID.fullmatch(source):
        raise AdapterError(
            f"no adapter folder {source!r}, and it is no Hub id (user/name or user/name@revision) either"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = source.partition("@")
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE])
    except LocalEntryNotFoundError:
        raise HubError(f"no folder {source!r}; as a Hub id it is not in the cache and the Hub is not reached") from None
    except HfHubHTTPError as error:
        raise HubError(f"cannot fetch {source!r} from the Hub: {error}") from None
    return Path(folder), Path(folder).name  # the cache keeps each commit in a folder of its name


def _read_config(path: Path) -> LoraConfig:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} holds no {CONFIG_FILE}: is this the folder of a PEFT adapter?") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds a {type(data).__name__}, not an object of fields")
    _check_kind(str(path), data.get("peft_type"))
    known = {field.name for field in fields(LoraConfig)}
    if unknown := sorted(key for key in set(data) - known if data[key]):
        raise AdapterError(f"{path}: unknown field(s) {unknown}, perhaps of a newer PEFT: upgrade rsoups and PEFT")
    _check_numbers(path, data)
    try:
        return LoraConfig(**{key: value for key, value in data.items() if key in known})
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{path}: {error}") from None


def _check_kind(where: str, peft_type: Any) -> None:
    kind = getattr(peft_type, "value", peft_type)
    if kind != "LORA":
        raise AdapterError(f"{where}: peft_type is {kind!r}; a soup can be made of LORA adapters only")


def _check_numbers(path: Path, data: dict[str, Any]) -> None:
    """Ranks are whole numbers above 0 and alphas are finite; PEFT loads an alpha of NaN without a word."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

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


def _check(adapter: Adapter) -> None:
    source, config = adapter.source, adapter.config
    for field, reason in _REFUSED.items():
        if getattr(config, field, None):
            raise AdapterError(f"{source}: {field} is set, and {reason}: it cannot be part of a soup")
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        raise AdapterError(
            f"{source}: init_lora_weights is {start!r}, which also changes the base's weights; convert it to a plain LoRA "
            "first (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    if not adapter.tensors:
        raise AdapterError(f"{source}: {WEIGHTS_FILE} holds no tensors")
    for key, tensor in adapter.tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"{source}: tensor {key} is {tensor.dtype}, must be floating-point")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{source}: tensor {key} holds NaN or infinity: the run that made it diverged")
    if not adapter.modules:
        raise AdapterError(f"{source}: no LoRA tensors among {sorted(adapter.tensors)[:3]}")
    strange = sorted(key for key in adapter.full if not key.endswith(BASE_EMBEDDING))
    if strange and not config.modules_to_save and config.bias == "none":
        raise AdapterError(f"{source}: tensors that {CONFIG_FILE} does not account for: {strange[:3]}")


def _modules(source: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, LoraModule]:
    """Pair the factors, and check them against each other and the config."""
    parts: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    for key, tensor in tensors.items():
        if not (match := _FACTOR.fullmatch(key)):
            continue
        path = match["module"].removeprefix(PREFIX)
        parts.setdefault(path, {})[match["factor"] + (".bias" if match["kind"] == "bias" else "")] = tensor
        if match["embedding"]:
            embeddings.add(path)
    modules = {}
    for path, found in parts.items():
        if not {"A", "B"} <= set(found) or not set(found) <= {"A", "B", "B.bias"}:
            raise AdapterError(f"{source}: module {path} has factors {sorted(found)}, must have A and B")
        a, b = found["A"], found["B"]
        rank = _by_pattern(config.rank_pattern, path, config.r)
        if a.dim() < 2 or b.dim() < 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterError(
                f"{source}: module {path} has A {tuple(a.shape)} and B {tuple(b.shape)}, but {CONFIG_FILE} says rank {rank}"
            )
        if config.target_modules not in (None, "all-linear") and not check_target_module_exists(config, path):
            raise AdapterError(f"{source}: tensors for module {path}, which {CONFIG_FILE} does not target")
        if ("B.bias" in found) != bool(config.lora_bias):
            raise AdapterError(f"{source}: module {path} and lora_bias={config.lora_bias} in {CONFIG_FILE} disagree")
        alpha = _by_pattern(config.alpha_pattern, path, config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        modules[path] = LoraModule(a, b, scaling, found.get("B.bias"), path in embeddings)
    return modules


def _by_pattern(pattern: Any, path: str, default: int) -> int:
    """A module's rank or alpha, found as PEFT finds it."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), path), default)


def check_compatible(adapters: Iterable[Adapter], allow_base_mismatch: bool = False) -> None:
    """Refuse adapters that are not of one base.

    Raises:
        AdapterError: Bases of other names, revisions or shapes, or whole parameters that not all of them hold.
    """
    first, *others = adapters
    for other in others:
        for field in () if allow_base_mismatch else ("base_model_name_or_path", "revision"):
            ours, theirs = getattr(first.config, field), getattr(other.config, field)
            if ours and theirs and ours != theirs:
                raise AdapterError(
                    f"{field} differs: {ours!r} ({first.source}) and {theirs!r} ({other.source}); adapters of different bases "
                    "do not add up. If they are the same weights, say allow_base_mismatch=True"
                )
        for path in first.modules.keys() & other.modules.keys():
            ours, theirs = _base_shape(first.modules[path]), _base_shape(other.modules[path])
            if ours != theirs:
                raise AdapterError(
                    f"module {path} has shape {ours} in the base of {first.source} and {theirs} in the base of {other.source}"
                )
        if first.config.fan_in_fan_out != other.config.fan_in_fan_out:
            raise AdapterError(f"fan_in_fan_out differs between {first.source} and {other.source}")
        if difference := first.full.keys() ^ other.full.keys():
            raise AdapterError(
                f"{sorted(difference)[0]} was trained as a whole in only one of {first.source} and {other.source}: "
                "whole parameters are interpolated only where every ingredient has them"
            )
        for key in first.full:
            if first.full[key].shape != other.full[key].shape:
                raise AdapterError(
                    f"{key} has shapes {tuple(first.full[key].shape)} in {first.source} and "
                    f"{tuple(other.full[key].shape)} in {other.source}: of bases (or vocabularies) of different sizes"
                )


def _base_shape(module: LoraModule) -> tuple[int, ...]:
    return (module.B.shape[0], *module.A.shape[1:])
