"""Read and check LoRA adapters: a folder, a Hub id or a live PeftModel in, an `Adapter` out; every refusal is here.

Only safetensors are read, never a pickle. What cannot be part of an exact soup is refused with the reason, so that
`rsoups.soup` is left with nothing but the maths. Tensors are read one at a time, so that a soup of many large adapters
needs no memory for them.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError
from torch import Tensor

from rsoups._errors import AdapterError
from rsoups._files import READING, from_hub
from rsoups.adapter_config import CONFIG_FILE, by_pattern, check_kind, check_linear, read_config
from rsoups.base_files import check_vocabularies
from rsoups.bases import OVERRIDE, same_base
from rsoups.convert import converted, holds_only_pickles, remedy
from rsoups.layer_names import (
    EXPERT,
    PREFIX,
    as_loaded,
    current_names,
    path_of,
    plain_names,
    recorded_base,
    tells_class,
)
from rsoups.lineage import pinned
from rsoups.tensor_files import Scan, TensorFile, largest, rows_of_pieces

WEIGHTS_FILE = "adapter_model.safetensors"
BASE_EMBEDDING = ".base_layer.weight"  # PEFT saves an adapted embedding's own weights beside its factors
EMBEDDINGS = tuple(f".{name}.weight" for name in EMBEDDING_LAYER_NAMES)  # saved whole where the vocabulary was resized
TOKENS = ".token_adapter.trainable_tokens_delta"  # rows of an embedding that were trained alone, as they are afterwards
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.(?P<kind>weight|bias))?")
# PEFT tells the parameters of one module apart by how their wrappers are nested: the first one defined is innermost.
_DEFINED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_Read = Callable[[str, slice], Tensor]  # some rows of a tensor, or with slice(None) all of it


_COPY = re.compile(r"\.(modules_to_save|original_module)(?=\.)")


def is_copy(name: str, names: Collection[str]) -> bool:
    """Whether a tensor is one of those that PEFT writes beside a whole trained one of the same name: a copy, or the base's."""
    return _COPY.sub("", name) != name and _COPY.sub("", name) in names


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
        experts: How many weights of this shape one parameter holds, each with its own change. Then A is (experts · r, in),
            one expert below the other, and B (out, r · experts), one direction beside the other.
        parameter: Its name in the module, where PEFT's `target_parameters` names it; "" where several would do.
    """

    A: str
    B: str
    rank: int
    shape: tuple[int, ...]
    scaling: float
    bias: str | None = None
    embedding: bool = False
    experts: int = 1
    parameter: str | None = None

    def factors(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The (r, in) and (out, r) of each expert, of all that a convolution multiplies flattened."""
        a, b = a.flatten(1), b.flatten(1)
        if self.experts == 1:
            return [(a, b)]
        return list(zip(a.unflatten(0, (self.experts, -1)), b.unflatten(1, (-1, self.experts)).unbind(2), strict=True))


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

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's dtype, as it is: `check_values` looks whether it is finite.

        Raises:
            AdapterError: The file is not what it was.
        """
        return self._read(self._names.get(name, name), slice(None))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor, as `tensor` gives it."""
        return self._read(self._names.get(name, name), slice(start, stop))

    def pieces(self, name: str, rows: int | None = None) -> Iterator[Tensor]:
        """One tensor as `tensor` gives it, some rows at a time, as many as `rows_of_pieces` says by default."""
        shape = self.layout[name].shape
        rows = rows or rows_of_pieces(shape)
        if not shape or rows >= shape[0]:
            yield self.tensor(name).view(shape or (1,))
            return
        for start in range(0, shape[0], rows):
            yield self.rows(name, start, min(start + rows, shape[0]))

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
        return [name for name in self.layout if not _FACTOR.fullmatch(name)]

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
    return adapter if all(new == name for new, name in names.items()) else adapter.renamed(names)


def in_one_naming(adapters: Mapping[str, Adapter], base: Any = None) -> dict[str, Adapter]:
    """Adapters of one base, their layers named as that base names them.

    Args:
        adapters: By name.
        base: The loaded base or a skeleton of it; by default what one of the adapters records.
    """
    if base is None:
        base = next((found for a in adapters.values() if (found := recorded_base(a.config)) is not None), None)
    if base is None:
        return dict(adapters)
    named = {name: named_as(adapter, base) for name, adapter in adapters.items()}
    return {name: fused(adapter, base) for name, adapter in named.items()} if _need_fusing(named.values()) else named


def fused(adapter: Adapter, base: Any) -> Adapter:
    """The adapter with the factors of single experts fused, as PEFT fuses them when it loads them on a base.

    Raises:
        AdapterError: PEFT cannot.
    """
    if not any(EXPERT.search(path) for path in adapter.modules):
        return adapter
    try:
        config, tensors = as_loaded(base, adapter.config, {name: adapter.tensor(name) for name in adapter.layout})
    except AdapterError as error:
        raise AdapterError(f"{adapter.source}: {error}") from None
    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    return replace(adapter, config=config, layout=layout, _read=lambda name, rows: tensors[name][rows], _names={})


def _need_fusing(adapters: Iterable[Adapter]) -> bool:
    """Whether adapters of single experts stand beside fused ones, or beside those of other experts."""
    adapters = list(adapters)
    targets = {frozenset(filter(EXPERT.search, adapter.modules)) for adapter in adapters} - {frozenset()}
    return len(targets) > 1 or (bool(targets) and any(map(_parameters_of, adapters)))


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
        if not tensor.is_floating_point():
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
            f"{source}: ensure_weight_tying is set, and adapters that are shared by tied layers are not supported: it cannot be "
            "part of a soup"
        )


def _check_full(adapter: Adapter) -> None:
    """Every whole parameter is one that the config accounts for."""
    source, config = adapter.source, adapter.config
    saved = tuple(
        f"{name}." for name in config.modules_to_save or ()
    )  # PEFT takes what ends with the name: "norm" is all norms
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


def trained_tokens(config: LoraConfig, path: str) -> list[int] | None:
    """Ids of the tokens whose rows in the embedding at a path were trained alone; None where it has none."""
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        return next((ids for name, ids in tokens.items() if f".{path}".endswith(f".{name}")), None)
    return tokens


def read_modules(
    source: str, config: LoraConfig, layout: Mapping[str, Tensor], old_paths: Mapping[str, str] | None = None
) -> dict[str, LoraModule]:
    """Pair the factors, and check them against each other and the config.

    Args:
        source: Where they are from, for errors.
        config: The config.
        layout: Tensors, of which shapes are looked at.
        old_paths: The names that the config may have for modules, where they were renamed.

    Raises:
        AdapterError: A factor without its other, or one that the config does not tell of.
    """
    parts: dict[str, dict[str, str]] = {}
    for key in layout:
        if match := _FACTOR.fullmatch(key):
            path = match["module"].removeprefix(PREFIX)
            parts.setdefault(path, {})[match["factor"] + (".bias" if match["kind"] == "bias" else "")] = key
    modules = {}
    try:
        for path, found in parts.items():
            if not {"A", "B"} <= set(found) or not set(found) <= {"A", "B", "B.bias"}:
                raise AdapterError(f"{source}: module {path} has factors {sorted(found)}, must have A and B")
            wrappers = sum(unwrapped(other) == unwrapped(path) for other in parts) if config.target_parameters else 1
            told = _told(source, config, path, wrappers, layout[found["A"]].shape, (old_paths or {}).get(path, path))
            modules[path] = _module(source, config, layout, path, found, told)
    except re.error as error:
        raise AdapterError(f"{source}: a pattern in {CONFIG_FILE} is no regular expression: {error}") from None
    _check_experts(source, modules)
    return modules


class _Told(NamedTuple):
    """What the config tells of a module."""

    rank: int
    alpha: float
    parameter: str | None


def _told(source: str, config: LoraConfig, path: str, wrappers: int, shape: Sequence[int], old_path: str) -> _Told:
    """Rank, alpha and parameter of a module of some wrappers, found as PEFT finds them.

    Raises:
        AdapterError: The config does not target it, or the file does not tell which parameter it is.
    """
    names = _parameters(config, path, wrappers)
    if not names:
        any_path = config.target_modules in (None, "all-linear")
        if not any_path and not any(check_target_module_exists(config, name) for name in (path, old_path)):
            raise AdapterError(f"{source}: tensors for module {path}, which {CONFIG_FILE} does not target")
        ranks, alphas = ([by_pattern(p, name, d) for name in (path, old_path)] for p, d in _patterns(config))
        if alphas[0] != alphas[1]:
            raise AdapterError(
                f"{source}: alpha_pattern gives {alphas[1]} for {old_path}, which transformers calls {path} today, and "
                f"{alphas[0]} for that, which PEFT would scale by: write today's names into {CONFIG_FILE}"
            )
        return _Told(ranks[1] if shape[:1] == (ranks[1],) else ranks[0], alphas[0], None)
    told = [[by_pattern(p, f"{unwrapped(path)}.{name}", d) for p, d in _patterns(config)] for name in names]
    if any(one != told[0] for one in told):
        raise AdapterError(
            f"{source}: {CONFIG_FILE} gives {names} unlike ranks or alphas, and the file does not tell which of them {path} is"
        )
    return _Told(*told[0], names[0] if len(names) == 1 else "")


def _patterns(config: LoraConfig) -> tuple[tuple[Any, int], tuple[Any, int]]:
    return (config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha)


def _parameters(config: LoraConfig, path: str, wrappers: int) -> list[str]:
    """Names of the parameters that the wrapper at a path may be of; none of a module that is targeted as a whole."""
    module = unwrapped(path)
    if not config.target_parameters or (path == module and wrappers == 1 and _is_plain(config, path)):
        return []
    targets = [target.rpartition(".") for target in sorted(config.target_parameters)]
    names = list(
        dict.fromkeys(name for place, _, name in targets if f".{module}".endswith(f".{place}" if place else ""))
    )
    if len(names) == wrappers and set(names) <= set(_DEFINED):
        depth = path.removeprefix(module).count(".base_layer")
        return [sorted(names, key=_DEFINED.index)[wrappers - 1 - depth]]
    return names


def _is_plain(config: LoraConfig, path: str) -> bool:
    if config.target_modules == "all-linear":
        return not path.endswith("experts")
    return config.target_modules is not None and bool(check_target_module_exists(config, path))


def unwrapped(path: str) -> str:
    """The path of the module whose parameters are wrapped."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def _module(
    source: str, config: LoraConfig, layout: Mapping[str, Tensor], path: str, found: dict[str, str], told: _Told
) -> LoraModule:
    a, b = layout[found["A"]].shape, layout[found["B"]].shape
    experts = a[0] // int(told.rank) if told.parameter is not None and a else 1
    rank = told.rank * experts
    if len(a) < 2 or len(b) != len(a) or a[0] != rank or b[1] != rank or any(size != 1 for size in b[2:]):
        raise AdapterError(
            f"{source}: module {path} has A {tuple(a)} and B {tuple(b)}, but {CONFIG_FILE} says rank {told.rank}"
        )
    bias = found.get("B.bias")
    if (bias is not None) != bool(config.lora_bias) or (bias and tuple(layout[bias].shape) != (b[0],)):
        raise AdapterError(f"{source}: module {path} and lora_bias={config.lora_bias} in {CONFIG_FILE} disagree")
    return LoraModule(
        found["A"],
        found["B"],
        int(told.rank),
        shape=(b[0], *a[1:]),
        scaling=told.alpha / (math.sqrt(told.rank) if config.use_rslora else told.rank),
        bias=bias,
        embedding="lora_embedding_" in found["A"],
        experts=experts,
        parameter=told.parameter,
    )


def _check_experts(source: str, modules: Mapping[str, LoraModule]) -> None:
    """All parameters of a module are of equally many experts, or they were taken for one another."""
    counts: dict[str, int] = {}
    for path, module in modules.items():
        if module.parameter is not None and counts.setdefault(unwrapped(path), module.experts) != module.experts:
            raise AdapterError(f"{source}: the parameters of {unwrapped(path)} do not have the ranks of {CONFIG_FILE}")


def holds_tokens(names: Iterable[str]) -> bool:
    """Whether there are rows of the base's embeddings or head among an adapter's tensors, as they were trained."""
    return any(name.endswith((BASE_EMBEDDING, TOKENS, *EMBEDDINGS)) for name in names)


def check_compatible(adapters: Iterable[Adapter], allow_base_mismatch: bool = False, with_base: bool = False) -> None:
    """Refuse adapters that are not of one base.

    Args:
        adapters: In one naming, as `in_one_naming` gives them.
        allow_base_mismatch: Take bases of other names.
        with_base: Whether the base is at hand, for whole parameters that not all of them hold.

    Raises:
        AdapterError: Bases of other names, revisions or shapes; whole parameters that not all of them hold; what PEFT cannot
            hold in one adapter.
    """
    adapters = list(adapters)
    if not allow_base_mismatch:
        check_one_base(adapters)
    for one, other in combinations(adapters, 2):
        _check_modules(one, other)
        _check_whole(one, other, with_base)
        if not with_base and not any(tells_class(adapter.config) for adapter in (one, other)):
            _check_one_naming(one, other)
    with_tokens = [adapter for adapter in adapters if holds_tokens(adapter.layout)]
    if len(with_tokens) > 1:
        check_vocabularies(pinned(adapter.source, adapter.revision) for adapter in with_tokens)


def check_one_base(adapters: Iterable[Adapter]) -> None:
    """Refuse adapters that name different bases, or revisions of one.

    Raises:
        AdapterError: Two names or revisions.
    """
    first, *others = adapters
    same = {"base_model_name_or_path": same_base, "revision": lambda one, two: not one or not two or one == two}
    for other in others:
        for name, are_same in same.items():
            ours, theirs = getattr(first.config, name), getattr(other.config, name)
            if not are_same(ours, theirs):
                raise AdapterError(
                    f"{name} differs: {ours!r} ({first.source}) and {theirs!r} ({other.source}); adapters of different bases "
                    f"do not add up. {OVERRIDE}"
                )


def _check_modules(one: Adapter, other: Adapter) -> None:
    for a, b in ((one, other), (other, one)):
        if _parameters_of(b) and (single := next(filter(EXPERT.search, a.modules), None)):
            raise AdapterError(
                f"{a.source} has factors of single experts ({single}), those of {b.source} are fused: pass base= (--base), so that "
                "they are fused as PEFT does"
            )
    if (theirs := _parameters_of(other)) and (ours := _parameters_of(one)):
        for path in ours.keys() & theirs.keys():
            if ours[path] != theirs[path]:
                raise AdapterError(
                    f"target_parameters of {path} differ: {sorted(ours[path])} ({one.source}) and {sorted(theirs[path])} "
                    f"({other.source}); PEFT tells the parameters of a module apart by their order, so no one adapter can hold "
                    "both"
                )
    for path in one.modules.keys() & other.modules.keys():
        a, b = one.modules[path], other.modules[path]
        if (a.shape, a.embedding, a.experts) != (b.shape, b.embedding, b.experts):
            raise AdapterError(
                f"module {path} has shape {_size(a)} in the base of {one.source} and {_size(b)} in the base of {other.source}"
            )


def _size(module: LoraModule) -> tuple[int, ...]:
    return module.shape if module.experts == 1 else (module.experts, *module.shape)


def _parameters_of(adapter: Adapter) -> dict[str, set[str]]:
    """Names of the adapted parameters of each module of which they, not the module, are targeted."""
    found: dict[str, set[str]] = {}
    for path, module in adapter.modules.items():
        if module.parameter is not None:
            names = {module.parameter} if module.parameter else set(adapter.config.target_parameters)
            found.setdefault(unwrapped(path), set()).update(names)
    return found


def _check_one_naming(one: Adapter, other: Adapter) -> None:
    """Refuse names that may be the old and the new ones of the same layers, where nothing tells the base."""
    ours, theirs = _by_place(one), _by_place(other)
    for here in ours.keys() - theirs.keys():
        for there in theirs.keys() - ours.keys():
            both = ours[here].keys() & theirs[there].keys()
            halves = here.replace("encoder", "decoder") == there.replace(
                "encoder", "decoder"
            )  # of one base, not names of one
            if both and not halves and all(ours[here][inside] == theirs[there][inside] for inside in both):
                raise AdapterError(
                    f"{one.source} has layers in {here}, {other.source} has such layers in {there}: they may be the same layers of a "
                    "base whose layers were renamed, and neither adapter tells its base's class: pass base= (--base)"
                )


def _by_place(adapter: Adapter) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of modules in layers, by the path to all layers, and then by a layer's number and the names after it."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, module in adapter.modules.items():
        if match := re.fullmatch(r"(.*?)(\.\d+\..*)", path):
            found.setdefault(match[1], {})[match[2]] = module.shape
    return found


def _check_whole(one: Adapter, other: Adapter, with_base: bool) -> None:
    for key in one.full:
        if key in other.layout and (ours := tuple(one.layout[key].shape)) != (theirs := tuple(other.layout[key].shape)):
            raise AdapterError(
                f"{key} has shapes {ours} in {one.source} and {theirs} in {other.source}: "
                "of bases (or vocabularies) of different sizes"
            )
        if key.endswith(TOKENS) and key in other.layout:
            path = path_of(key)
            if trained_tokens(one.config, path) != trained_tokens(other.config, path):
                raise AdapterError(
                    f"trainable_token_indices differ between {one.source} and {other.source}: one adapter has one row for each "
                    "token, so only the same tokens in the same order can be interpolated"
                )
    for a, b in ((one, other), (other, one)):
        for key in set(a.full) - set(a.copies):
            if path_of(key) in b.modules and key.endswith(".weight"):  # biases stay beside factors
                raise AdapterError(
                    f"{path_of(key)} was trained as a whole in {a.source} and has factors in {b.source}: PEFT cannot hold both in "
                    "one adapter"
                )
    own = {key for adapter in (one, other) for key in adapter.copies if path_of(key) in adapter.modules}
    if not with_base and (difference := (set(one.full) ^ set(other.full)) - own):
        raise AdapterError(
            f"{sorted(difference)[0]} was trained as a whole in only one of {one.source} and {other.source}: whole parameters "
            "are interpolated where every ingredient has them, or with the base's own: pass base= (--base)"
        )
