"""Read and check LoRA adapters: a folder, a Hub id or a live PeftModel in, an `Adapter` out; every refusal is here.

Only safetensors are read, never a pickle. What cannot be part of an exact soup is refused with the reason, so that
`rsoups.soups.soup` is left with nothing but the maths. Tensors are read one at a time, so that a soup of many large adapters
needs no memory for them.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError
from torch import Tensor

from rsoups.adapters.config import check_kind, check_linear, read_config
from rsoups.adapters.filenames import CONFIG_FILE, WEIGHTS_FILE
from rsoups.adapters.layer_names import PREFIX as PREFIX
from rsoups.adapters.layer_names import current_names, path_of, plain_names, recorded_base
from rsoups.adapters.lora_modules import FACTOR, LoraModule, read_modules
from rsoups.adapters.tensor_files import Scan, TensorFile, largest
from rsoups.common.errors import AdapterError
from rsoups.common.files import READING, from_hub
from rsoups.common.pickles import converted, holds_only_pickles, remedy

BASE_EMBEDDING = ".base_layer.weight"  # PEFT saves an adapted embedding's own weights beside its factors
EMBEDDINGS = tuple(f".{name}.weight" for name in EMBEDDING_LAYER_NAMES)  # saved whole where the vocabulary was resized
TOKENS = ".token_adapter.trainable_tokens_delta"  # rows of an embedding that were trained alone, as they are afterwards


_COPY = re.compile(r"\.(modules_to_save|original_module)(?=\.)")


def is_copy(name: str, names: Collection[str]) -> bool:
    """Whether a tensor is one of those that PEFT writes beside a whole trained one of the same name: a copy, or the base's."""
    return _COPY.sub("", name) != name and _COPY.sub("", name) in names


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
    _read: Callable[[str, slice], Tensor]
    _scan: Future[Scan]  # of all values, beside the other work
    revision: str | None = None
    _file: tuple[Path, os.stat_result] | None = None  # of the weights, as it was found
    _names: Mapping[str, str] = field(default_factory=dict)  # of tensors in the file, where they differ
    _old_paths: Mapping[str, str] = field(default_factory=dict)  # of modules in the config, where they differ

    @property
    def folder(self) -> Path | None:
        """Where its files are; None for a live model."""
        return self._file[0].parent if self._file else None

    @property
    def sha256(self) -> str:
        """Of the file's bytes, or of names, shapes and values for a live model."""
        return self._scan.result().sha256

    def tensor(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or some rows of it, on the CPU, in the file's type. `check_values` tells whether it is finite.

        Raises:
            AdapterError: The file is not what it was.
        """
        return self._read(self._names.get(name, name), rows)

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
        return read_modules(self.source, self.config, self.layout, self._old_paths)

    @cached_property
    def full(self) -> list[str]:
        """Names of whole parameters that were trained beside the LoRA (`modules_to_save`, biases), or saved with it."""
        return [name for name in self.layout if not FACTOR.fullmatch(name)]

    @cached_property
    def copies(self) -> list[str]:
        """Those of `full` that were saved with it: the base's own embeddings and head, which a LoRA leaves as they are."""
        trained = tuple(f"{name}.weight" for name in self.config.modules_to_save or ())
        weights = [name for name in self.full if name.endswith(".weight") and not name.endswith(trained)]
        return [name for name in weights if name.endswith(EMBEDDINGS) or path_of(name) in self.modules]

    def renamed(self, names: Mapping[str, str]) -> Adapter:
        """The adapter with other names of its tensors.

        Args:
            names: New name -> present name, of all tensors that it should have.
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
    return checked(adapter)


def checked(adapter: Adapter) -> Adapter:
    """The adapter with its layers named as transformers names them today, and all checked but its values.

    Raises:
        AdapterError: As `read_adapter`.
    """
    adapter = adapter.renamed(plain_names(adapter.source, adapter.layout))
    if (base := recorded_base(adapter.config)) is not None:
        adapter = named_as(adapter, base)
    _check(adapter)
    return adapter


def named_as(adapter: Adapter, base: Any) -> Adapter:
    """The adapter with its layers named as those of a model (or of a skeleton of it).

    Raises:
        AdapterError: Two names that lead to one.
    """
    try:
        names = current_names(base, adapter.layout)
    except AdapterError as error:
        raise AdapterError(f"{adapter.source}: {error}") from None
    return adapter.renamed(names)


def _from_model(model: PeftModel, name: str) -> Adapter:
    if name not in model.peft_config:
        raise AdapterError(f"the model has no adapter {name!r}; it has {sorted(model.peft_config)}")
    config = model.peft_config[name]
    check_kind(f"adapter {name!r}", config.peft_type)
    assert isinstance(config, LoraConfig)
    if config.task_type is None:  # as PEFT does where it saves
        kind = type(model.get_base_model())
        config = deepcopy(config)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
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

    adapter = Adapter(source, config, layout, reading(tensors), READING.submit(scan))
    return adapter.renamed(plain_names(source, layout))


def reading(tensors: Mapping[str, Tensor]) -> Callable[[str, slice], Tensor]:
    """A function that reads tensors, or some rows of them, from memory."""
    return lambda name, rows: tensors[name] if rows == slice(None) else tensors[name][rows]


def _from_files(source: str, hold: bool) -> Adapter:
    folder, revision = Path(source).expanduser(), None
    if not folder.is_dir():
        if (found := from_hub(source, (CONFIG_FILE, WEIGHTS_FILE))) is None:
            raise AdapterError(
                f"no adapter folder {source!r}, and it is no Hub id (user/name, user/name/subfolder, user/name@revision) either"
            )
        folder, revision = found
    config = read_config(folder / CONFIG_FILE)
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


def _check(adapter: Adapter) -> None:
    source, config = adapter.source, adapter.config
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
    """Every whole parameter is one that the config accounts for."""
    source, config = adapter.source, adapter.config
    saved = tuple(
        f"{name}." for name in config.modules_to_save or ()
    )  # PEFT takes what ends with a name: "norm" is all norms
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
            raise AdapterError(f"{source}: tensor {key} is one that {CONFIG_FILE} does not account for")

    if config.trainable_token_indices and not any(key.endswith(TOKENS) for key in adapter.layout):
        raise AdapterError(f"{source}: trainable_token_indices is set in {CONFIG_FILE}, and no tensor holds their rows")


def holds_tokens(names: Iterable[str]) -> bool:
    """Whether there are rows of the base's embeddings or head among an adapter's tensors, as they were trained."""
    return any(name.endswith((BASE_EMBEDDING, TOKENS, *EMBEDDINGS)) for name in names)


def trained_tokens(config: LoraConfig, path: str) -> list[int] | None:
    """Ids of the tokens whose rows in the embedding at a path were trained alone; None where it has none."""
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        return next((ids for name, ids in tokens.items() if f".{path}".endswith(f".{name}")), None)
    return tokens
