"""Read and check LoRA adapters: a folder, a Hub id or a live PeftModel in, an `Adapter` out; every refusal is here.

Only safetensors are read, never a pickle. What cannot be part of an exact soup is refused with the reason, so that
`rsoups.soup` is left with nothing but the maths. Tensors are read one at a time, so that a soup of many large adapters
needs no memory for them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import Tensor

from rsoups._errors import AdapterError
from rsoups._files import READING, from_hub
from rsoups.convert import converted, holds_only_pickles, remedy
from rsoups.tensor_files import Scan, TensorFile, largest, rows_of_pieces

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_EMBEDDING = ".base_layer.weight"  # PEFT saves an adapted embedding's own weights beside its factors
EMBEDDINGS = tuple(f".{name}.weight" for name in EMBEDDING_LAYER_NAMES)  # saved whole where the vocabulary was resized
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.(?P<kind>weight|bias))?")
_LONGEST_CONFIG = 2**24  # bytes; real ones have a few thousand
_Read = Callable[[str, slice], Tensor]  # some rows of a tensor, or with slice(None) all of it

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
    "ensure_weight_tying": "adapters that are shared by tied layers are not supported",
}
# Initialisations that subtract the adapter's start from the base: B·A is then not the change from the published base.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal", "mica")


@dataclass(frozen=True)
class LoraModule:
    """The change of one module, Δ = scaling · B @ A, as the adapter's file describes it.

    Attributes:
        A: Name of a tensor of shape (r, in) or, of a convolution, (r, in / groups, ...).
        B: Name of a tensor of shape (out, r) or (out, r, 1, ...).
        rank: r.
        shape: Of the base's weight as far as the factors tell it: (out, in, ...).
        scaling: alpha / r, or alpha / √r for rsLoRA.
        bias: Name of what `lora_bias` adds (times `scaling`), shape (out,), or None.
        embedding: Whether A and B are those of an embedding.
    """

    A: str
    B: str
    rank: int
    shape: tuple[int, ...]
    scaling: float
    bias: str | None = None
    embedding: bool = False


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA, checked, its tensors where they are.

    Attributes:
        source: Where it is read from.
        config: PEFT's config.
        layout: Names, shapes and dtypes of its tensors (on the meta device, without values).
        revision: The Hub commit, None for a folder.
    """

    source: str
    config: LoraConfig
    layout: dict[str, Tensor]
    _read: _Read
    _scan: Future[Scan]  # of all values, beside the other work
    revision: str | None = None
    _file: tuple[Path, os.stat_result] | None = None  # of the weights, as it was found

    @property
    def folder(self) -> Path | None:
        """Where its files are; None for a live model."""
        return self._file[0].parent if self._file else None

    @property
    def sha256(self) -> str:
        """Of the file's bytes, or of names, shapes and values for a live model."""
        return self._scan.result().sha256

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype, as it is: `check_values` looks whether it is finite.

        Raises:
            AdapterError: The file is not what it was.
        """
        return self._read(name, slice(None))

    def pieces(self, name: str, rows: int | None = None) -> Iterator[Tensor]:
        """One tensor as `tensor` gives it, some rows at a time, as many as `rows_of_pieces` says by default."""
        shape = self.layout[name].shape
        rows = rows or rows_of_pieces(shape)
        if not shape or rows >= shape[0]:
            yield self.tensor(name).view(shape or (1,))
            return
        for start in range(0, shape[0], rows):
            yield self._read(name, slice(start, min(start + rows, shape[0])))

    def check_values(self) -> None:
        """Wait until every tensor was read.

        Raises:
            AdapterError: One is not finite, or the file has changed.
        """
        if (name := self._scan.result().not_finite) is not None:
            raise AdapterError(f"{self.source}: tensor {name} holds NaN or infinity: the run that made it diverged")
        self.check_unchanged()

    @property
    def largest(self) -> float:
        """The largest magnitude of all values."""
        return self._scan.result().largest

    def check_unchanged(self) -> None:
        """Whether all that was read so far is of the file that was opened.

        Raises:
            AdapterError: It was written to. (One that was deleted or replaced by another is read on as it was.)
        """
        if self._file is None:
            return
        path, before = self._file
        try:
            now = path.stat()
        except OSError:
            return
        if now.st_ino == before.st_ino and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise AdapterError(f"{path} was written to after it was opened for this soup: interpolate again")

    @cached_property
    def modules(self) -> dict[str, LoraModule]:
        """The adapted modules by their path in the base."""
        try:
            return _modules(self.source, self.config, self.layout)
        except re.error as error:
            raise AdapterError(f"{self.source}: a pattern in {CONFIG_FILE} is no regular expression: {error}") from None

    @cached_property
    def full(self) -> list[str]:
        """Names of whole parameters that were trained beside the LoRA (`modules_to_save`, biases), or saved with it."""
        return [name for name in self.layout if not _FACTOR.fullmatch(name)]


def read_adapter(source: Any, hold: bool = False) -> Adapter:
    """Open an adapter and check all but its values, which are being read meanwhile: `Adapter.check_values` waits for that.

    Args:
        source: A folder, a Hub id (``user/name``, ``user/name@revision``, ``user/name/subfolder@revision``), a PeftModel
            (its active adapter), or a tuple ``(PeftModel, adapter name)``.
        hold: Keep the tensors that are read, where they will be asked for again and again.

    Raises:
        AdapterError: Missing, corrupt or contradictory files, or a kind of adapter that no exact soup can hold.
        HubError: The Hub cannot be reached or refuses.
    """
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], PeftModel):
        adapter = _from_model(*source)
    elif isinstance(source, PeftModel):
        adapter = _from_model(source, source.active_adapter)
    elif isinstance(source, (str, Path)):
        adapter = _from_files(str(source), hold)
    else:
        raise AdapterError(f"an adapter is a folder, a Hub id or a PeftModel, not {type(source).__name__}")
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
    return adapter_of(f"adapter {name!r} of a live model", config, tensors)


def adapter_of(source: str, config: LoraConfig, tensors: dict[str, Tensor]) -> Adapter:
    """An adapter whose tensors are in memory."""

    def scan() -> Scan:
        total, top, not_finite = hashlib.sha256(), 0.0, None
        for key in sorted(tensors):
            tensor = tensors[key].contiguous()
            total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.view(-1).view(torch.uint8).numpy().data)
            top = max(top, found := largest(tensor) if tensor.is_floating_point() else 0.0)
            not_finite = not_finite or (None if math.isfinite(found) else key)
        return Scan(total.hexdigest(), top, not_finite)

    layout = {key: tensor.to("meta") for key, tensor in tensors.items()}

    def read(name: str, rows: slice) -> Tensor:
        return tensors[name] if rows == slice(None) else tensors[name][rows]

    return Adapter(source, config, layout, read, READING.submit(scan))


def _from_files(source: str, hold: bool) -> Adapter:
    folder, revision = Path(source).expanduser(), None
    if not folder.is_dir():
        if (found := from_hub(source, (CONFIG_FILE, WEIGHTS_FILE))) is None:
            raise AdapterError(
                f"no adapter folder {source!r}, and it is no Hub id (user/name, user/name/subfolder, user/name@revision) either"
            )
        folder, revision = found
    config = _read_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        if (copy := converted(source)) is None:
            why = remedy(source) if holds_only_pickles(source) else "is this the folder of a PEFT adapter?"
            raise AdapterError(f"{source} holds no {WEIGHTS_FILE}: {why}")
        weights = copy / WEIGHTS_FILE

    def corrupt(error: Exception) -> AdapterError:
        return AdapterError(f"{weights} is corrupt or not a safetensors file ({error}); copy it again")

    try:
        file = TensorFile(weights, hold)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise corrupt(error) from None

    def read(name: str, rows: slice) -> Tensor:
        try:
            return file.read(name, rows)
        except OSError as error:
            raise corrupt(error) from None

    def scan() -> Scan:
        try:
            return file.scan()
        except OSError as error:
            raise corrupt(error) from None

    return Adapter(source, config, file.layout, read, READING.submit(scan), revision, (weights, file.found_as))


def _read_config(path: Path) -> LoraConfig:
    try:
        if path.stat().st_size > _LONGEST_CONFIG:
            raise AdapterError(f"{path} has {path.stat().st_size} bytes: that is no adapter's config")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} holds no {CONFIG_FILE}: is this the folder of a PEFT adapter?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds a {type(data).__name__}, not an object of fields")
    _check_kind(str(path), data.get("peft_type"))
    known = {field.name for field in fields(LoraConfig)}
    if unknown := sorted(key for key in set(data) - known if data[key]):
        raise AdapterError(f"{path}: unknown field(s) {unknown}, perhaps of a newer PEFT: upgrade rsoups and PEFT")
    _check_numbers(path, data)
    _check_types(path, data)
    try:
        return LoraConfig(**{key: value for key, value in data.items() if key in known})
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{path}: {error}") from None


def _check_kind(where: str, peft_type: Any) -> None:
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

    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(
            ("use_rslora", "lora_bias", "fan_in_fan_out", "use_dora", "use_qalora", "inference_mode"),
            (lambda value: isinstance(value, bool), "true or false"),
        ),
        **dict.fromkeys(
            ("target_modules", "exclude_modules", "layers_pattern"),
            (lambda value: isinstance(value, str) or texts(value), "a text or a list of texts"),
        ),
        "modules_to_save": (texts, "a list of texts"),
        "layers_to_transform": (
            lambda value: whole(value) or (isinstance(value, list) and all(map(whole, value))),
            "a whole number or a list of them",
        ),
        "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
        "init_lora_weights": (lambda value: isinstance(value, (bool, str)), "true, false or a text"),
        **dict.fromkeys(
            ("base_model_name_or_path", "revision", "task_type"), (lambda value: isinstance(value, str), "a text")
        ),
    }
    for field, (fits, wanted) in kinds.items():
        if data.get(field) is not None and not fits(data[field]):
            raise AdapterError(f"{path}: {field} is {data[field]!r}, must be {wanted}")


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
    if not adapter.layout:
        raise AdapterError(f"{source}: {WEIGHTS_FILE} holds no tensors")
    for key, tensor in adapter.layout.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"{source}: tensor {key} is not floating-point")
    if not adapter.modules:
        raise AdapterError(f"{source}: no LoRA tensors among {sorted(adapter.layout)[:3]}")
    saved = tuple(f".{name}." for name in config.modules_to_save or ())
    for key in adapter.full:
        accounted = key.endswith((BASE_EMBEDDING, *EMBEDDINGS)) or any(name in f".{key}" for name in saved)
        if not accounted and not (config.bias != "none" and key.endswith(".bias")):
            raise AdapterError(f"{source}: tensor {key} is one that {CONFIG_FILE} does not account for")


def _modules(source: str, config: LoraConfig, layout: Mapping[str, Tensor]) -> dict[str, LoraModule]:
    """Pair the factors, and check them against each other and the config."""
    parts: dict[str, dict[str, str]] = {}
    embeddings = set()
    for key in layout:
        if not (match := _FACTOR.fullmatch(key)):
            continue
        path = match["module"].removeprefix(PREFIX)
        parts.setdefault(path, {})[match["factor"] + (".bias" if match["kind"] == "bias" else "")] = key
        if match["embedding"]:
            embeddings.add(path)
    modules = {}
    for path, found in parts.items():
        if not {"A", "B"} <= set(found) or not set(found) <= {"A", "B", "B.bias"}:
            raise AdapterError(f"{source}: module {path} has factors {sorted(found)}, must have A and B")
        a, b = layout[found["A"]].shape, layout[found["B"]].shape
        rank = _by_pattern(config.rank_pattern, path, config.r)
        if len(a) < 2 or len(b) != len(a) or a[0] != rank or b[1] != rank or any(size != 1 for size in b[2:]):
            raise AdapterError(
                f"{source}: module {path} has A {tuple(a)} and B {tuple(b)}, but {CONFIG_FILE} says rank {rank}"
            )
        if config.target_modules not in (None, "all-linear") and not check_target_module_exists(config, path):
            raise AdapterError(f"{source}: tensors for module {path}, which {CONFIG_FILE} does not target")
        bias = found.get("B.bias")
        if (bias is not None) != bool(config.lora_bias) or (bias and tuple(layout[bias].shape) != (b[0],)):
            raise AdapterError(f"{source}: module {path} and lora_bias={config.lora_bias} in {CONFIG_FILE} disagree")
        alpha = _by_pattern(config.alpha_pattern, path, config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        shape = (b[0], *a[1:])
        modules[path] = LoraModule(found["A"], found["B"], int(rank), shape, scaling, bias, path in embeddings)
    return modules


def _by_pattern(pattern: Any, path: str, default: int) -> int:
    """A module's rank or alpha, found as PEFT finds it."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), path), default)


def for_inference(config: LoraConfig) -> LoraConfig:
    """A copy of a config as PEFT publishes it."""
    config = deepcopy(config)
    config.inference_mode = True
    config.init_lora_weights = True  # whatever it was drawn from, its values are in the file
    return config


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
            one, two = first.modules[path], other.modules[path]
            if one.shape != two.shape or one.embedding != two.embedding:
                raise AdapterError(
                    f"module {path} has shape {one.shape} in the base of {first.source} and {two.shape} in the base of "
                    f"{other.source}"
                )
        if first.config.fan_in_fan_out != other.config.fan_in_fan_out:
            raise AdapterError(f"fan_in_fan_out differs between {first.source} and {other.source}")
        _check_full(first, other)


def _check_full(first: Adapter, other: Adapter) -> None:
    if difference := set(first.full) ^ set(other.full):
        raise AdapterError(
            f"{sorted(difference)[0]} was trained as a whole in only one of {first.source} and {other.source}: "
            "whole parameters are interpolated only where every ingredient has them"
        )
    for key in first.full:
        ours, theirs = tuple(first.layout[key].shape), tuple(other.layout[key].shape)
        if ours != theirs:
            raise AdapterError(
                f"{key} has shapes {ours} in {first.source} and {theirs} in {other.source}: "
                "of bases (or vocabularies) of different sizes"
            )
