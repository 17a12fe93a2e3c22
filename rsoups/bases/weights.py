"""Read parameters of a base, one at a time, to compare and blend an adapter's whole parameters with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from rsoups.adapters.adapter import TOKENS, Adapter, reading, trained_tokens
from rsoups.adapters.layer_names import PREFIX, path_of, skeleton
from rsoups.adapters.tensor_files import Scan, TensorFile, largest
from rsoups.bases.compatibility import in_one_naming
from rsoups.bases.load import base_config
from rsoups.common.assets import resolve
from rsoups.common.errors import AdapterError, CheckpointError
from rsoups.common.files import READING, from_hub

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class BaseWeights:
    """A base by folder, Hub id or ``rsoups/...``, or a loaded one; its tensors are read when they are asked for.

    Attributes:
        source: Name of the base, for errors.
        model: The loaded base, or a skeleton of it on the meta device.
    """

    def __init__(self, base: Any):
        """Open a base.

        Raises:
            CheckpointError: The config cannot be read, or transformers has no class for it.
        """
        if isinstance(base, PeftModel):
            base = base.get_base_model()
        self.loaded = isinstance(base, PreTrainedModel)
        self.source = base.name_or_path or type(base).__name__ if self.loaded else str(base)
        if self.loaded:
            self.model: PreTrainedModel = base
            return
        config = base_config(self.source)
        name = (getattr(config, "architectures", None) or [""])[0]
        if (model := skeleton(name, config)) is None:
            raise CheckpointError(
                f"the base {self.source!r} is a {name or 'model without architectures'}, which transformers does not have"
            )
        self.model = model

    def tensor(self, name: str) -> Tensor:
        """Read a parameter, by its name in the loaded base.

        Raises:
            AdapterError: The base does not have the parameter, or it is quantized.
            CheckpointError: The file cannot be read.
        """
        tensor = self._loaded(name) if self.loaded else self._stored(name)
        if tensor is None:
            raise AdapterError(f"the base {self.source} has no parameter {name}")
        if not tensor.is_floating_point():
            raise AdapterError(f"the base {self.source} holds {name} quantized: give it in full precision")
        return tensor

    def _loaded(self, name: str) -> Tensor | None:
        path, _, last = name.rpartition(".")
        try:
            tensor = getattr(self.model.get_submodule(path), last, None)
        except AttributeError:
            return None
        return tensor.detach().cpu() if isinstance(tensor, Tensor) else None

    def _stored(self, name: str) -> Tensor | None:
        tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        names = [name, tied.get(name), *(other for other, source in tied.items() if source == name)]
        place = next((self._places[other] for other in names if other in self._places), None)
        if place is None:
            return None
        file, stored = place
        try:
            return file.read(stored)
        except OSError as error:
            raise CheckpointError(f"cannot read {stored} of {self.source}: {error}") from None

    @cached_property
    def _places(self) -> dict[str, tuple[TensorFile, str]]:
        """File and stored name of each parameter, by its name in the loaded base."""
        renamings = [one for one in get_model_conversion_mapping(self.model) if isinstance(one, WeightRenaming)]
        state = self.model.state_dict()
        places = {}
        for file in self._files():
            for stored in file.layout:
                name, _ = rename_source_key(stored, renamings, [], self.model.base_model_prefix, state)
                places[stored if stored in state else name] = file, stored
        return places

    def _files(self) -> list[TensorFile]:
        folder = Path(resolve(self.source)).expanduser()
        if not folder.is_dir():
            if (fetched := from_hub(self.source, (_ONE_FILE, _INDEX, "model-*.safetensors"))) is None:
                raise CheckpointError(f"no model folder {self.source!r}, and it is no Hub id (user/name) either")
            folder = fetched[0]
        try:
            names = {_ONE_FILE}
            if (folder / _INDEX).is_file():
                names = set(json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values())
            if any(Path(name).name != name for name in names):
                raise CheckpointError(f"{folder / _INDEX} names files of other folders")
            return [TensorFile(folder / name) for name in sorted(names)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the safetensors of {self.source!r}: {error}") from None

    def like(self, configs: Mapping[str, LoraConfig]) -> Adapter:
        """The base's values of whole parameters of adapters, as an adapter.

        Args:
            configs: Config of an adapter for each of its tensors; it tells the tokens of single rows.
        """
        tensors = {name: self._own(name, config) for name, config in configs.items()}

        def scan() -> Scan:
            return Scan("", max((largest(tensor) for tensor in tensors.values()), default=0.0), None)

        layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
        return Adapter(self.source, LoraConfig(), layout, reading(tensors), READING.submit(scan))

    def _own(self, name: str, config: LoraConfig) -> Tensor:
        path = name.removeprefix(PREFIX)
        if name.endswith(TOKENS):
            rows = trained_tokens(config, path_of(name)) or []
            weight = self.tensor(f"{path_of(name)}.weight")
            if max(rows, default=0) >= len(weight):
                raise AdapterError(
                    f"token {max(rows)} was trained, and the base {self.source} has {len(weight)} tokens"
                )
            return weight[rows]
        return self.tensor(path)


def of_one_base(adapters: Mapping[str, Adapter], base: BaseWeights | None = None) -> dict[str, Adapter]:
    """Rename the layers of adapters alike, and leave out copies of the base's embeddings and head that only some have.

    Args:
        adapters: Adapters by name.
        base: The base; by default the base that the adapters name, if it is on this disk.

    Raises:
        AdapterError: Two tensors would have the same name.
    """
    named = in_one_naming(adapters, base.model if base else None)
    some = {
        name
        for adapter in named.values()
        for name in adapter.copies
        if (base and base.loaded) or any(name not in other.layout for other in named.values())
    }
    if not some or (base := base or _named_base(named.values())) is None:
        return named
    return {key: _without_copies(adapter, some, base) for key, adapter in named.items()}


def _without_copies(adapter: Adapter, names: set[str], base: BaseWeights) -> Adapter:
    own = {name for name in names.intersection(adapter.copies) if _is_own(adapter.tensor(name), name, base)}
    return adapter.renamed({name: name for name in adapter.layout if name not in own}) if own else adapter


def _is_own(tensor: Tensor, name: str, base: BaseWeights) -> bool:
    own = base.tensor(name.removeprefix(PREFIX))
    return own.shape == tensor.shape and torch.equal(own, tensor.to(own.dtype))


def _named_base(adapters: Iterable[Adapter]) -> BaseWeights | None:
    """The base that adapters name, if it is a folder of this disk."""
    for adapter in adapters:
        name = adapter.config.base_model_name_or_path
        try:
            if name and Path(resolve(name), "config.json").is_file():
                return BaseWeights(name)
        except (OSError, CheckpointError, ValueError):
            continue
    return None
