"""Pair the factors of an adapter, and check them against each other and the config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from rsoups.adapters.config import by_pattern
from rsoups.adapters.filenames import CONFIG_FILE
from rsoups.adapters.layer_names import PREFIX
from rsoups.common.errors import AdapterError

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.(?P<kind>weight|bias))?")
# PEFT tells the parameters of one module apart by how their wrappers are nested: the first one defined is innermost.
_DEFINED = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias")


@dataclass(frozen=True)
class LoraModule:
    """The change of one module, Δ = scaling · B @ A.

    Attributes:
        A: Name of a tensor of shape (r, in), or (r, in / groups, ...) for a convolution.
        B: Name of a tensor of shape (out, r), or (out, r, 1, ...).
        rank: r.
        shape: Shape of the base's weight: (out, in, ...).
        scaling: alpha / r, or alpha / √r for rsLoRA.
        bias: Name of the bias that `lora_bias` adds (times `scaling`), shape (out,), or None.
        embedding: Whether the module is an embedding.
        experts: Number of weights of this shape in one parameter, each with its own change. Then A is (experts · r, in), one
            expert below the other, and B is (out, r · experts), with the experts of each rank side by side.
        parameter: Name of the parameter in the module, if PEFT's `target_parameters` names it; "" if several are possible.
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
        """A (r, in) and B (out, r) of each expert; dimensions of a convolution are flattened into `in`."""
        a, b = a.flatten(1), b.flatten(1)
        if self.experts == 1:
            return [(a, b)]
        return list(zip(a.unflatten(0, (self.experts, -1)), b.unflatten(1, (-1, self.experts)).unbind(2), strict=True))


def read_modules(
    source: str, config: LoraConfig, layout: Mapping[str, Tensor], old_paths: Mapping[str, str] | None = None
) -> dict[str, LoraModule]:
    """Pair the factors, and check them against each other and the config.

    Args:
        source: Name of the adapter, for errors.
        config: Config of the adapter.
        layout: Tensors by name; only shapes are used.
        old_paths: Paths that the config may use for modules that were renamed.

    Returns:
        The modules by their path in the base; parameters of other names than "weight" by their own names.

    Raises:
        AdapterError: A factor is missing, or the config does not target a module, or has other ranks.
    """
    parts: dict[str, dict[str, str]] = {}
    for key in layout:
        if match := FACTOR.fullmatch(key):
            path = match["module"].removeprefix(PREFIX)
            parts.setdefault(path, {})[match["factor"] + (".bias" if match["kind"] == "bias" else "")] = key
    modules = {}
    try:
        for path, factors in parts.items():
            if not {"A", "B"} <= set(factors) or not set(factors) <= {"A", "B", "B.bias"}:
                raise AdapterError(f"{source}: module {path} has factors {sorted(factors)}, must have A and B")
            wrappers = sum(unwrapped(other) == unwrapped(path) for other in parts) if config.target_parameters else 1
            settings = _settings_of(
                source, config, path, wrappers, layout[factors["A"]].shape, (old_paths or {}).get(path, path)
            )
            parameter = settings.parameter
            name = f"{unwrapped(path)}.{parameter}".removesuffix(".weight") if parameter else path
            if name in modules:
                raise AdapterError(
                    f"{source}: {unwrapped(path)} has factors for {wrappers} parameters, and {CONFIG_FILE} targets "
                    f"{parameter} alone of it"
                )
            modules[name] = _module(source, config, layout, path, factors, settings)
    except re.error as error:
        raise AdapterError(f"{source}: a pattern in {CONFIG_FILE} is no regular expression: {error}") from None
    _check_experts(source, modules)
    return modules


class _Settings(NamedTuple):
    """Settings of one module in the config."""

    rank: int
    alpha: float
    parameter: str | None


def _settings_of(
    source: str, config: LoraConfig, path: str, wrappers: int, shape: Sequence[int], old_path: str
) -> _Settings:
    """Rank, alpha and parameter of a module in `wrappers` nested wrappers, found as PEFT finds them.

    Raises:
        AdapterError: The config does not target it, or the file does not tell which parameter it is.
    """
    names = _parameters(config, path, wrappers)
    if not names:
        both = list(dict.fromkeys((path, old_path)))
        any_path = config.target_modules in (None, "all-linear")
        if not any_path and not any(check_target_module_exists(config, name) for name in both):
            raise AdapterError(f"{source}: tensors for module {path}, which {CONFIG_FILE} does not target")
        ranks, alphas = ([by_pattern(p, name, d) for name in both] for p, d in _patterns(config))
        if alphas[0] != alphas[-1]:
            raise AdapterError(
                f"{source}: alpha_pattern gives {alphas[-1]} for {old_path}, which transformers calls {path} today, and "
                f"{alphas[0]} for that, which PEFT would scale by: write today's names into {CONFIG_FILE}"
            )
        return _Settings(ranks[-1] if shape[:1] == (ranks[-1],) else ranks[0], alphas[0], None)
    paths = [f"{unwrapped(path)}.{name}" for name in names]
    pairs = [tuple(by_pattern(p, one, d) for p, d in _patterns(config)) for one in paths]
    if any(one != pairs[0] for one in pairs):
        raise AdapterError(
            f"{source}: {CONFIG_FILE} gives {names} unlike ranks or alphas, and the file does not tell which of them {path} "
            "is"
        )
    rank, alpha = pairs[0]
    return _Settings(rank, alpha, names[0] if len(names) == 1 else "")


def _patterns(config: LoraConfig) -> tuple[tuple[Any, int], tuple[Any, int]]:
    return (config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha)


def _parameters(config: LoraConfig, path: str, wrappers: int) -> list[str]:
    """Names of the parameters that the wrapper at `path` may hold; none if the whole module is targeted."""
    module = unwrapped(path)
    if not config.target_parameters or (path == module and wrappers == 1 and _is_plain(config, path)):
        return []
    targets = [target.rpartition(".") for target in sorted(config.target_parameters)]
    fitting = [(place, name) for place, _, name in targets if f".{module}".endswith(f".{place}" if place else "")]
    # A target without a path fits every module. But PEFT's names for parameters of experts do not mean a module that another
    # target names with its path.
    if not module.endswith("experts") and any(place for place, _ in fitting):
        fitting = [(place, name) for place, name in fitting if place or name not in _DEFINED]
    names = list(dict.fromkeys(name for _, name in fitting))
    if len(names) == wrappers and set(names) <= set(_DEFINED):
        depth = path.removeprefix(module).count(".base_layer")
        return [sorted(names, key=_DEFINED.index)[wrappers - 1 - depth]]
    return names


def _is_plain(config: LoraConfig, path: str) -> bool:
    if config.target_modules == "all-linear":
        return not path.endswith("experts")
    return config.target_modules is not None and bool(check_target_module_exists(config, path))


def unwrapped(path: str) -> str:
    """Path of the module whose parameters are wrapped."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def holder_of(name: str, module: LoraModule) -> str:
    """Path of the module whose weight, or parameter, is adapted.

    Args:
        name: Name of the module, as `read_modules` gives it.
        module: The module.
    """
    return name.removesuffix(f".{module.parameter}") if module.parameter else unwrapped(name)


def wrapper_paths(modules: Mapping[str, LoraModule]) -> dict[str, str]:
    """Path of each module in an adapter that has all of them: wrappers of one module's parameters are nested.

    Raises:
        AdapterError: The file would not tell the parameters of a module apart.
    """
    by_holder: dict[str, dict[str, str]] = {}
    for name, module in modules.items():
        if module.parameter:
            by_holder.setdefault(holder_of(name, module), {})[module.parameter] = name
    paths = {name: name for name in modules}
    for holder, names in by_holder.items():
        if len(names) > 1 and (unknown := sorted(names.keys() - set(_DEFINED))):
            raise AdapterError(
                f"the adapters change {sorted(names)} of {holder}: PEFT nests them in the order in which the base defines "
                f"them, and rsoups does not know it for {unknown[0]!r}, so that no one adapter can be written"
            )
        inner_first = sorted(names, key=_DEFINED.index) if len(names) > 1 else list(names)
        for depth, parameter in enumerate(reversed(inner_first)):
            paths[names[parameter]] = holder + depth * ".base_layer"
    return paths


def _module(
    source: str,
    config: LoraConfig,
    layout: Mapping[str, Tensor],
    path: str,
    factors: dict[str, str],
    settings: _Settings,
) -> LoraModule:
    a, b = layout[factors["A"]].shape, layout[factors["B"]].shape
    experts = a[0] // int(settings.rank) if settings.parameter is not None and a else 1
    rank = settings.rank * experts
    if len(a) < 2 or len(b) != len(a) or a[0] != rank or b[1] != rank or any(size != 1 for size in b[2:]):
        raise AdapterError(
            f"{source}: module {path} has A {tuple(a)} and B {tuple(b)}, but {CONFIG_FILE} says rank {settings.rank}"
        )
    bias = factors.get("B.bias")
    if (bias is not None) != bool(config.lora_bias) or (bias and tuple(layout[bias].shape) != (b[0],)):
        raise AdapterError(f"{source}: module {path} and lora_bias={config.lora_bias} in {CONFIG_FILE} disagree")
    return LoraModule(
        factors["A"],
        factors["B"],
        int(settings.rank),
        shape=(b[0], *a[1:]),
        scaling=settings.alpha / (math.sqrt(settings.rank) if config.use_rslora else settings.rank),
        bias=bias,
        embedding="lora_embedding_" in factors["A"],
        experts=experts,
        parameter=settings.parameter,
    )


def _check_experts(source: str, modules: Mapping[str, LoraModule]) -> None:
    """Refuse parameters of one module with different numbers of experts: they were mistaken for one another."""
    counts: dict[str, int] = {}
    for name, module in modules.items():
        holder = holder_of(name, module)
        if (module.parameter or "").endswith("_bias"):  # a matrix, with one row for each expert
            continue
        if module.parameter is not None and counts.setdefault(holder, module.experts) != module.experts:
            raise AdapterError(f"{source}: the parameters of {holder} do not have the ranks of {CONFIG_FILE}")
