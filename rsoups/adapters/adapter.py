"""Read and check LoRA adapters from a folder, a Hub id or a live PeftModel.

Only safetensors are read, never a pickle. An adapter that cannot be part of an exact soup is refused here with the reason.
Tensors are read one at a time, so that a soup of many large adapters needs little memory.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rsoups.adapters.config import check_kind, check_linear, read_config
from rsoups.adapters.filenames import CONFIG_FILE, WEIGHTS_FILE
from rsoups.adapters.layer_names import current_names, path_of, plain_names, recorded_base
from rsoups.adapters.lora_modules import FACTOR, LoraModule, read_modules
from rsoups.adapters.settings import LoraSettings
from rsoups.adapters.tensor_files import Scan, TensorFile, largest
from rsoups.common.errors import AdapterError
from rsoups.common.files import READING, from_hub
from rsoups.common.pickles import converted, holds_only_pickles, remedy

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

BASE_EMBEDDING = ".base_layer.weight"  # weights of an adapted embedding, which PEFT saves beside its factors
EMBEDDINGS = (".embed_tokens.weight", ".lm_head.weight")  # PEFT saves them if the vocabulary was resized
TOKENS = ".token_adapter.trainable_tokens_delta"  # trained rows of an embedding (not their changes)
_COPY = re.compile(r"\.(modules_to_save|original_module)(?=\.)")


def is_copy(name: str, names: Collection[str]) -> bool:
    """Whether a tensor is a copy that PEFT writes beside a module that was trained as a whole."""
    return _COPY.sub("", name) != name and _COPY.sub("", name) in names


@dataclass(frozen=True, eq=False)
class Adapter:
    """A checked LoRA; its tensors are read when they are asked for.

    Attributes:
        source: Folder or Hub id.
        settings: Fields of PEFT's config.
        layout: Meta tensor for each name.
        revision: Commit on the Hub; None for a folder.
    """

    source: str
    settings: LoraSettings
    layout: dict[str, Tensor]
    _read: Callable[[str, slice], Tensor]
    _scan: Future[Scan]
    revision: str | None = None
    _file: tuple[Path, os.stat_result] | None = None  # of the weights, and its status when it was opened
    _names: Mapping[str, str] = field(default_factory=dict)  # names of tensors in the file, if they differ
    _old_paths: Mapping[str, str] = field(default_factory=dict)  # paths of modules in the config, if they differ

    @cached_property
    def config(self) -> LoraConfig:
        """PEFT's config."""
        return self.settings.config()

    @property
    def folder(self) -> Path | None:
        """Folder of the files; None for a live model."""
        return self._file[0].parent if self._file else None

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, or of names, shapes and values of a live model."""
        return self._scan.result().sha256

    def tensor(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or some rows of it, on the CPU, in the file's type. `check_values` tells whether it is finite.

        Raises:
            AdapterError: The file was cut short.
        """
        return self._read(self._names.get(name, name), rows)

    def check_values(self) -> None:
        """Wait until every tensor is read and checked.

        Raises:
            AdapterError: A tensor is not finite, or the file has changed.
        """
        name = self._scan.result().not_finite
        if name is not None:
            raise AdapterError(f"{self.source}: tensor {name} holds NaN or infinity: the run that made it diverged")
        self.check_unchanged()

    @property
    def largest(self) -> float:
        """Largest magnitude of all values."""
        return self._scan.result().largest

    def check_unchanged(self) -> None:
        """Check that nobody has written to the file since it was opened. (A deleted or replaced file can still be read.)

        Raises:
            AdapterError: The file has changed.
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
        """Adapted modules by their path in the base."""
        return read_modules(self.source, self.settings, self.layout, self._old_paths)

    @cached_property
    def full(self) -> list[str]:
        """Names of whole parameters: trained ones (`modules_to_save`, biases), and `copies`."""
        return [name for name in self.layout if not FACTOR.fullmatch(name)]

    @cached_property
    def copies(self) -> list[str]:
        """Names of the base's own embeddings and head, which PEFT saved too and training left unchanged."""
        trained = tuple(f"{name}.weight" for name in self.settings.modules_to_save or ())
        weights = [name for name in self.full if name.endswith(".weight") and not name.endswith(trained)]
        return [name for name in weights if name.endswith(EMBEDDINGS) or path_of(name) in self.modules]

    def renamed(self, names: Mapping[str, str]) -> Adapter:
        """The adapter with other names of tensors.

        Args:
            names: New name -> present name of each tensor; other tensors are left out.
        """
        if all(new == name for new, name in names.items()) and len(names) == len(self.layout):
            return self
        old = {path_of(new): path_of(name) for new, name in names.items() if path_of(new) != path_of(name)}
        return replace(
            self,
            layout={new: self.layout[name] for new, name in names.items()},
            _names={new: self._names.get(name, name) for new, name in names.items()},
            _old_paths=old | {path: self._old_paths[there] for path, there in old.items() if there in self._old_paths},
        )


def read_adapter(source: Any, hold: bool = False) -> Adapter:
    """Open an adapter and check it. Its values are read in another thread: `Adapter.check_values` waits for them.

    Args:
        source: Folder, Hub id (``user/name``, ``user/name@revision``, ``user/name/subfolder@revision``), PeftModel (its active
            adapter), or a tuple ``(PeftModel, adapter name)``.
        hold: Keep the tensors in memory, if they are needed several times.

    Raises:
        AdapterError: Files are missing, corrupt or contradictory, or no exact soup can hold this kind of adapter.
        HubError: The Hub cannot be reached or refuses.
    """
    if isinstance(source, tuple) and len(source) == 2 and is_peft_model(source[0]):
        adapter = _from_model(*source)
    elif is_peft_model(source):
        adapter = _from_model(source, source.active_adapter)
    elif isinstance(source, (str, Path)):
        adapter = _from_files(str(source), hold)
    else:
        raise AdapterError(f"an adapter is a folder, a Hub id or a PeftModel, not {type(source).__name__}")
    return checked(adapter)


def is_peft_model(source: Any) -> bool:
    """Whether a value is a PeftModel; without importing PEFT, which has been imported where there is one."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(source, peft.PeftModel)


def checked(adapter: Adapter) -> Adapter:
    """Rename the layers as transformers names them today, and check everything except the values.

    Raises:
        AdapterError: As `read_adapter`.
    """
    adapter = adapter.renamed(plain_names(adapter.source, adapter.layout))
    base = recorded_base(adapter.settings)
    if base is not None:
        adapter = named_as(adapter, base)
    _check(adapter)
    return adapter


def named_as(adapter: Adapter, base: Any) -> Adapter:
    """Rename the layers as a model, or a skeleton of it, names them.

    Raises:
        AdapterError: Two tensors would have the same name.
    """
    try:
        names = current_names(base, adapter.layout)
    except AdapterError as error:
        raise AdapterError(f"{adapter.source}: {error}") from None
    return adapter.renamed(names)


def _from_model(model: PeftModel, name: str) -> Adapter:
    if name not in model.peft_config:
        raise AdapterError(f"the model has no adapter {name!r}; it has {sorted(model.peft_config)}")
    from peft import LoraConfig, get_peft_model_state_dict

    config = model.peft_config[name]
    check_kind(f"adapter {name!r}", config.peft_type)
    assert isinstance(config, LoraConfig)
    settings = LoraSettings.of(config)
    if settings.task_type is None:  # PEFT does the same when it saves
        kind = type(model.get_base_model())
        settings.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    embeddings = any("lora_embedding_" in key for key, _ in model.named_parameters())
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
    tensors = {key: tensor.detach().cpu().clone() for key, tensor in state.items()}
    return adapter_of(f"adapter {name!r} of a live model", settings, tensors)


def adapter_of(source: str, settings: LoraSettings, tensors: dict[str, Tensor]) -> Adapter:
    """An adapter from tensors in memory."""

    def scan() -> Scan:
        total, top, not_finite = hashlib.sha256(), 0.0, None
        for key in sorted(tensors):
            tensor = tensors[key].contiguous()
            total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.view(-1).view(torch.uint8).numpy().data)
            magnitude = largest(tensor) if tensor.is_floating_point() else 0.0
            top = max(top, magnitude)
            if not_finite is None and not math.isfinite(magnitude):
                not_finite = key
        return Scan(total.hexdigest(), top, not_finite)

    layout = {key: tensor.to("meta") for key, tensor in tensors.items()}

    adapter = Adapter(source, settings, layout, reading(tensors), READING.submit(scan))
    return adapter.renamed(plain_names(source, layout))


def reading(tensors: Mapping[str, Tensor]) -> Callable[[str, slice], Tensor]:
    """A function that reads tensors, or some rows of them, from memory."""
    return lambda name, rows: tensors[name] if rows == slice(None) else tensors[name][rows]


def _from_files(source: str, hold: bool) -> Adapter:
    folder, revision = Path(source).expanduser(), None
    if not folder.is_dir():
        fetched = from_hub(source, (CONFIG_FILE, WEIGHTS_FILE))
        if fetched is None:
            raise AdapterError(
                f"no adapter folder {source!r}, and it is no Hub id (user/name, user/name/subfolder, user/name@revision) either"
            )
        folder, revision = fetched
    settings = read_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        copy = converted(source)
        if copy is None:
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

    return Adapter(source, settings, file.layout, read, READING.submit(scan), revision, (weights, file.found_as))


def _check(adapter: Adapter) -> None:
    source, config = adapter.source, adapter.settings
    check_linear(source, config)
    if not adapter.layout:
        raise AdapterError(f"{source}: {WEIGHTS_FILE} holds no tensors")
    for key, tensor in adapter.layout.items():
        if not tensor.dtype.is_floating_point:  # the tensor's own method waits for the thread that reads the file
            raise AdapterError(f"{source}: tensor {key} is not floating-point")
        if not tensor.numel():
            raise AdapterError(
                f"{source}: tensor {key} has no elements: its parts were on several processes (DeepSpeed ZeRO-3, FSDP) when it "
                "was saved; save it again with the parameters gathered (accelerator.get_state_dict, or zero_to_fp32)"
            )
    if not adapter.modules:
        raise AdapterError(f"{source}: no LoRA tensors among {sorted(adapter.layout)[:3]}")
    _check_full(adapter)
    if config.ensure_weight_tying and any(f".{path_of(key)}.weight".endswith(EMBEDDINGS) for key in adapter.layout):
        raise AdapterError(
            f"{source}: ensure_weight_tying is set, and adapters that are shared by tied layers are not supported: it cannot "
            "be part of a soup"
        )


def _check_full(adapter: Adapter) -> None:
    """Check that the config accounts for every whole parameter."""
    source, config = adapter.source, adapter.settings
    # PEFT takes every module whose path ends with a name: "norm" means all norms.
    saved = tuple(f"{name}." for name in config.modules_to_save or ())
    for key in adapter.full:
        accounted = key in adapter.copies or any(name in key for name in saved)
        accounted |= config.bias != "none" and key.endswith(".bias")
        if key.endswith(TOKENS) and (tokens := trained_tokens(config, path_of(key))) is not None:
            accounted = True
            if len(adapter.layout[key]) != len(tokens):
                raise AdapterError(
                    f"{source}: {key} has {len(adapter.layout[key])} rows, but trainable_token_indices names {len(tokens)}"
                )
        if not accounted:
            raise AdapterError(f"{source}: {CONFIG_FILE} does not account for tensor {key}")

    if config.trainable_token_indices and not any(key.endswith(TOKENS) for key in adapter.layout):
        raise AdapterError(f"{source}: trainable_token_indices is set in {CONFIG_FILE}, and no tensor holds their rows")


def holds_tokens(names: Iterable[str]) -> bool:
    """Whether an adapter has embeddings or a head among its tensors."""
    return any(name.endswith((BASE_EMBEDDING, TOKENS, *EMBEDDINGS)) for name in names)


def trained_tokens(config: LoraSettings, path: str) -> list[int] | None:
    """Ids of the tokens whose rows of the embedding at `path` were trained; None if there are none."""
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        return next((ids for name, ids in tokens.items() if f".{path}".endswith(f".{name}")), None)
    return tokens
