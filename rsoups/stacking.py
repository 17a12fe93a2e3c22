"""The two ways to interpolate: `exact` stacks the ingredients' factors, `factors` averages them.

Module by module, each tensor read once however many soups are made, so that memory holds the soups and one module of each
ingredient.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from rsoups import low_rank
from rsoups._errors import AdapterError
from rsoups.adapters import PREFIX, Adapter, LoraModule, for_inference, is_finite

_ONE_START = 0.5  # cosine of two ingredients' A above which they are taken to share their initialisation
Kept = list[tuple[Adapter, float]]  # what a soup is made of: adapters that differ, with weights that are not 0


def exact(rows: list[Kept], truncated: bool, rank: int | float | None, dtype: torch.dtype | None) -> list[dict]:
    """Δ = Σ λi·si·Bi·Ai of each row as one pair of stacked factors per module, λi·si in B; or truncated to `rank`."""
    dtype = dtype or torch.float32
    made = [_Stack(kept, torch.float64 if truncated else dtype, whole=not truncated) for kept in rows]
    if truncated and rank is None:
        rank = max((m.rank for kept in rows for adapter, _ in kept for m in adapter.modules.values()), default=1)
    for path in dict.fromkeys(path for kept in rows for adapter, _ in kept for path in adapter.modules):
        read: dict[Adapter, tuple[Tensor, Tensor, Tensor | None]] = {}
        for stack in made:
            stack.add(path, read)
            if truncated and path in stack.modules:
                stack.truncate(path, rank or 1, dtype)
    return [stack.finish(full, dtype) for stack, full in zip(made, _full(rows, dtype), strict=True)]


class _Stack:
    """The stacked factors of one soup, filled module by module."""

    def __init__(self, kept: Kept, dtype: torch.dtype, whole: bool):
        self.kept = kept
        self.dtype = dtype
        self.with_bias = any(adapter.config.lora_bias for adapter, _ in kept)
        self.modules: dict[str, LoraModule] = {}
        for path in dict.fromkeys(path for adapter, _ in kept for path in adapter.modules):
            parts = [adapter.modules[path] for adapter, _ in kept if path in adapter.modules]
            self.modules[path] = _named_module(path, sum(part.rank for part in parts), parts[0], self.with_bias)
        self.config = _config([adapter for adapter, _ in kept], self.modules)
        self.state = low_rank.empty(self._shapes(self.modules), dtype) if whole else {}
        self.lost: dict[str, tuple[float, float]] = {}  # squared norms: of what was cut off, and of all

    def _shapes(self, paths: Any) -> dict[str, tuple[int, ...]]:
        """Of the factors of some modules, by their names."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            module = self.modules[path]
            shapes[module.A] = (module.rank, *module.shape[1:])
            shapes[module.B] = (module.shape[0], module.rank, *(1 for _ in module.shape[2:]))
            if module.bias:
                shapes[module.bias] = (module.shape[0],)
        return shapes

    def add(self, path: str, read: dict[Adapter, tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """Fill one module; `read` holds what has been read of it for other soups."""
        if path not in self.modules:
            return
        module, parts = self.modules[path], []
        if module.A not in self.state:
            self.state |= {key: torch.empty(shape, dtype=self.dtype) for key, shape in self._shapes([path]).items()}
        bias = torch.zeros(module.shape[0], dtype=torch.float64)
        for adapter, weight in self.kept:
            if (part := adapter.modules.get(path)) is None:
                continue
            if adapter not in read:
                read[adapter] = (
                    adapter.tensor(part.A),
                    adapter.tensor(part.B),
                    adapter.tensor(part.bias) if part.bias else None,
                )
            a, b, own_bias = read[adapter]
            parts.append((a, b, weight * part.scaling))
            if own_bias is not None:
                bias += weight * part.scaling * own_bias.double()
        low_rank.stack(parts, self.state[module.A], self.state[module.B])
        for name in (module.A, module.B):
            finite(name, self.state[name], (adapter for adapter, _ in self.kept))
        if module.bias:
            finite(module.bias, self.state[module.bias].copy_(bias), (adapter for adapter, _ in self.kept))

    def truncate(self, path: str, rank: int | float, dtype: torch.dtype) -> None:
        module = self.modules[path]
        a, b = self.state[module.A], self.state[module.B]
        A, B, lost, total = low_rank.truncate(a.flatten(1), b.flatten(1), rank)
        self.lost[path] = lost, total
        self.state[module.A] = finite(module.A, A.reshape(len(A), *a.shape[1:]), (), dtype)
        self.state[module.B] = finite(module.B, B.reshape(len(b), -1, *b.shape[2:]), (), dtype)
        self.modules[path] = replace(module, rank=len(A))

    def finish(self, full: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        state = {key: tensor.to(dtype) for key, tensor in self.state.items()} | full
        found: dict[str, Any] = {"state_dict": state, "config": self.config}
        if self.lost:
            found["config"] = _config([adapter for adapter, _ in self.kept], self.modules)
            found["svd_errors"] = {
                path: math.sqrt(lost / all_) if all_ else 0.0 for path, (lost, all_) in self.lost.items()
            }
            lost, total = (sum(pair[i] for pair in self.lost.values()) for i in (0, 1))
            found["svd_error"] = math.sqrt(lost / total) if total else 0.0
        return found


def factors(rows: list[Kept], dtype: torch.dtype | None) -> list[dict]:
    """Σ λi·Ai and Σ λi·Bi; the scaling that all ingredients share stays in the config."""
    made = []
    names = list(rows[0][0][0].layout) if rows else []
    adapters = list(dict.fromkeys(adapter for kept in rows for adapter, _ in kept))
    starts = cosines_of_starts(adapters) if len(adapters) > 1 else []
    for kept, state in zip(rows, _sums(rows, names, dtype or torch.float32), strict=True):
        distance = None
        places = [adapters.index(adapter) for adapter, _ in kept]
        if any(starts[i][j] < _ONE_START for i, j in combinations(places, 2)):
            distance = _distance(kept, state)
            warnings.warn(
                f"these ingredients do not start from one initialisation: Δ of method 'factors' is {distance:.0%} of the exact "
                "Δ away from it; use method 'exact' or 'svd'",
                stacklevel=3,
            )
        config = for_inference(kept[0][0].config)
        made.append({"state_dict": state, "config": config, "factors_distance": distance})
    return made


def cosines_of_starts(adapters: Sequence[Adapter]) -> list[list[float]]:
    """Cosine between the A of each two adapters, over the modules that both have; training from one start leaves it near 1."""
    pairs = [(i, j) for i in range(len(adapters)) for j in range(i + 1)]
    sums = {pair: [0.0, 0.0, 0.0] for pair in pairs}  # product, and both squared norms
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.modules):
        read = [a.tensor(a.modules[path].A).float().flatten() if path in a.modules else None for a in adapters]
        squares = [float(torch.dot(a, a)) if a is not None else 0.0 for a in read]
        for i, j in pairs:
            a, b = read[i], read[j]
            if a is not None and b is not None and a.shape == b.shape:
                found = squares[i] if i == j else float(torch.dot(a, b))
                sums[i, j] = [x + y for x, y in zip(sums[i, j], (found, squares[i], squares[j]), strict=True)]
    cosines = [[0.0] * len(adapters) for _ in adapters]
    for (i, j), (product, one, other) in sums.items():
        cosines[i][j] = cosines[j][i] = product / math.sqrt(one * other) if one and other else 0.0
    return cosines


def _distance(kept: Kept, state: dict[str, Tensor]) -> float:
    """‖B·A - Σ λi·Bi·Ai‖ / ‖Σ λi·Bi·Ai‖ of all modules, B and A being the averages in `state`."""
    apart = total = 0.0
    for path, module in kept[0][0].modules.items():
        parts = [
            (adapter.tensor(adapter.modules[path].A), adapter.tensor(adapter.modules[path].B)) for adapter, _ in kept
        ]
        A = torch.cat([a.flatten(1).double() for a, _ in parts])
        B = torch.cat([w * b.flatten(1).double() for (_, b), (_, w) in zip(parts, kept, strict=True)], dim=1)
        a, b = state[module.A].flatten(1).double(), state[module.B].flatten(1).double()
        difference = (torch.cat([A, a]), torch.cat([B, -b], dim=1))
        scale = module.scaling**2
        apart += scale * low_rank.inner(difference, difference)
        total += scale * low_rank.inner((A, B), (A, B))
    return math.sqrt(max(apart, 0) / total) if total else 0.0


def _sums(rows: list[Kept], names: list[str], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Σ λi·Ti of each named tensor, in float64, rounded once."""
    if not rows:
        return []
    states = [low_rank.empty({n: tuple(kept[0][0].layout[n].shape) for n in names}, dtype) for kept in rows]
    for name in names:
        read: dict[Adapter, Tensor] = {}
        for kept, state in zip(rows, states, strict=True):
            read |= {adapter: adapter.tensor(name) for adapter, _ in kept if adapter not in read}
            (first, weight), *rest = kept
            total = read[first].double().mul_(weight)
            for adapter, weight in rest:
                total.add_(read[adapter].double(), alpha=weight)
            finite(name, state[name].copy_(total), (adapter for adapter, _ in kept))
    return states


def _full(rows: list[Kept], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    return _sums(rows, rows[0][0][0].full, dtype) if rows and rows[0][0][0].full else [{} for _ in rows]


def finite(name: str, tensor: Tensor, adapters: Iterable[Adapter], dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a soup, in `dtype`; where it is not finite, either an ingredient is not, or the dtype is too narrow."""
    tensor = tensor if dtype is None else tensor.to(dtype)
    if not is_finite(tensor):
        for adapter in adapters:
            adapter.check_values()
        raise AdapterError(f"the soup's tensor {name} does not fit into {tensor.dtype}: choose a wider dtype")
    return tensor


def check_factors(adapters: list[Adapter]) -> None:
    first, *others = adapters
    for other in others:
        if first.layout.keys() != other.layout.keys():
            raise AdapterError(
                f"method 'factors' needs the same modules in all ingredients; "
                f"{first.source} and {other.source} differ: use 'exact'"
            )
        for path, module in first.modules.items():
            ranks = module.rank, other.modules[path].rank
            scalings = module.scaling, other.modules[path].scaling
            if ranks[0] != ranks[1] or scalings[0] != scalings[1]:
                raise AdapterError(
                    f"method 'factors' needs one rank and one alpha; module {path} has ranks {ranks} and scalings {scalings} "
                    f"in {first.source} and {other.source}: use 'exact'"
                )


def _named_module(path: str, rank: int, like: LoraModule, with_bias: bool) -> LoraModule:
    """A module by PEFT's names of its factors, scaled by 1."""
    if with_bias and like.embedding:
        raise AdapterError(f"module {path}: PEFT has no lora_bias for embeddings, so no one adapter can hold this soup")
    kind, suffix = ("lora_embedding_", "") if like.embedding else ("lora_", ".weight")
    start = f"{PREFIX}{path}.{kind}"
    bias = f"{start}B.bias" if with_bias else None
    return LoraModule(f"{start}A{suffix}", f"{start}B{suffix}", rank, like.shape, 1.0, bias, like.embedding)


def _config(adapters: list[Adapter], modules: dict[str, LoraModule]) -> LoraConfig:
    """A config of the stacked factors: alpha equal to the rank, so that PEFT scales by 1, module by module."""
    config = for_inference(adapters[0].config)
    ranks = {path: module.rank for path, module in modules.items()}
    config.r = config.lora_alpha = Counter(ranks.values()).most_common(1)[0][0]
    config.rank_pattern = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora = False
    config.lora_bias = any(module.bias is not None for module in modules.values())
    config.lora_dropout = 0.0
    selection = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    if any(getattr(a.config, name) != getattr(config, name) for a in adapters for name in selection):
        config.target_modules = "|".join(re.escape(path) for path in modules)  # PEFT matches a string as a whole
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config
