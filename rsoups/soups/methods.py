"""The ways to interpolate: `exact` stacks the ingredients' factors, `svd` truncates the stack, `factors` averages them.

What comes out are `Blend`s: tensors that are made piece by piece when they are asked for, from the ingredients' files, so
that a soup can be saved without being held.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsoups.adapters.adapter import Adapter
from rsoups.adapters.layer_names import PREFIX, written_name
from rsoups.adapters.lora_modules import LoraModule
from rsoups.adapters.tensor_files import is_finite
from rsoups.common.errors import AdapterError
from rsoups.soups import low_rank
from rsoups.soups.config import faithful_config, stacked_config

_PIECE = 2**18  # numbers that are summed at once
_ONE_START = 0.5  # cosine of two ingredients' A above which they are taken to share their initialization
_SUM_TOLERANCE = 1e-6  # λ in single precision still count as summing to 1
Kept = list[tuple[Adapter, float]]  # what a soup is made of: adapters that differ, with weights that are not 0


class Part(NamedTuple):
    """A tensor of an ingredient, and the factor that it is multiplied by."""

    adapter: Adapter
    name: str
    factor: float = 1.0

    def tensor(self, rows: slice = slice(None)) -> Tensor:
        return self.adapter.tensor(self.name, rows)

    def times(self, rows: slice = slice(None)) -> Tensor:
        """The tensor, or some rows of it, times its factor, in float64."""
        return self.tensor(rows).to(torch.float64, copy=True).mul_(self.factor)


@dataclass(frozen=True)
class Blend:
    """One tensor of a soup, and how it is made.

    Attributes:
        how: `_below`, `_beside` or `_summed`.
        parts: Tensors of the ingredients.
        shape: Shape of the soup's tensor.
        dtype: Type of the soup's tensor.
        experts: Number of groups of rows, each of which holds rows of all parts.
    """

    how: Callable[[Blend], Tensor]
    parts: list[Part]
    shape: tuple[int, ...]
    dtype: torch.dtype
    experts: int = 1

    @property
    def bound(self) -> float:
        """No magnitude in the tensor is larger, except by rounding."""
        return math.fsum(abs(part.factor) * part.adapter.largest for part in self.parts)

    def tensor(self) -> Tensor:
        """The tensor. Products and sums are in float64, rounded once."""
        return self.how(self)


def tensor_of(tensor: Blend | Tensor) -> Tensor:
    return tensor.tensor() if isinstance(tensor, Blend) else tensor


def _below(blend: Blend) -> Tensor:
    """Parts one below the other, for each expert; their factors are 1."""
    tensors = [part.tensor().to(blend.dtype) for part in blend.parts]
    if len(tensors) == 1:
        return tensors[0]
    if blend.experts == 1:
        return torch.cat(tensors)
    return torch.cat([tensor.unflatten(0, (blend.experts, -1)) for tensor in tensors], dim=1).flatten(0, 1)


def _beside(blend: Blend) -> Tensor:
    """Parts side by side, along the second dimension, each times its factor."""
    return torch.cat([part.times().to(blend.dtype) for part in blend.parts], dim=1)


def _summed(blend: Blend) -> Tensor:
    """The sum of all parts, each times its factor; 0 if there are none."""
    total = torch.zeros(blend.shape, dtype=blend.dtype)
    if not blend.parts:
        return total
    if total.numel() <= _PIECE:
        return _sum(blend.parts, slice(None)).to(blend.dtype)

    # A whole parameter may be as large as an embedding: float64 holds some rows of it at a time.
    step = max(1, _PIECE // math.prod(blend.shape[1:]))
    for start in range(0, len(total), step):
        rows = slice(start, min(start + step, len(total)))
        total[rows] = _sum(blend.parts, rows)
    return total


def _sum(parts: list[Part], rows: slice) -> Tensor:
    first, *others = parts
    total = first.times(rows)
    for part in others:
        total.add_(part.tensor(rows).double(), alpha=part.factor)
    return total


def alone(adapter: Adapter, dtype: torch.dtype | None) -> dict[str, Any]:
    """An adapter as it is."""
    tensors = {
        written_name(key, adapter.modules): Blend(_below, [Part(adapter, key)], tuple(like.shape), dtype or like.dtype)
        for key, like in adapter.layout.items()
    }
    return {"tensors": fitting(tensors), "config": faithful_config(adapter)}


def exact(kept: Kept, dtype: torch.dtype | None, base: Adapter | None = None) -> dict[str, Any]:
    """Δ = Σ λi·si·Bi·Ai as one pair of stacked factors per module, λi·si in B."""
    dtype = dtype or torch.float32
    modules, tensors = _stacked(kept, dtype)
    tensors |= _full(kept, dtype, base, modules)
    return {"tensors": fitting(tensors), "config": stacked_config([adapter for adapter, _ in kept], modules)}


def _stacked(kept: Kept, dtype: torch.dtype) -> tuple[dict[str, LoraModule], dict[str, Blend]]:
    """The modules of a soup, and their factors."""
    with_bias = any(adapter.config.lora_bias for adapter, _ in kept)
    modules, tensors = {}, {}
    for path in dict.fromkeys(path for adapter, _ in kept for path in adapter.modules):
        parts = [(adapter, adapter.modules[path], weight) for adapter, weight in kept if path in adapter.modules]
        rank = sum(module.rank for _, module, _ in parts)
        soup = modules[path] = _named_module(path, rank, _best_told(parts), with_bias)
        rows = rank * soup.experts
        below = [Part(adapter, module.A) for adapter, module, _ in parts]
        tensors[soup.A] = Blend(_below, below, (rows, *soup.shape[1:]), dtype, soup.experts)
        scaled = [Part(adapter, module.B, weight * module.scaling) for adapter, module, weight in parts]
        shape = (soup.shape[0], rows, *(1 for _ in soup.shape[2:]))
        tensors[soup.B] = Blend(_beside, scaled, shape, dtype)
        if soup.bias:
            biases = [Part(a, m.bias, weight * m.scaling) for a, m, weight in parts if m.bias]
            tensors[soup.bias] = Blend(_summed, biases, soup.shape[:1], dtype)
    return modules, tensors


def _best_told(parts: Sequence[tuple[Adapter, LoraModule, float]]) -> LoraModule:
    """The module of the ingredient that tells which parameter it is, if one does."""
    return max((module for _, module, _ in parts), key=lambda module: bool(module.parameter))


def svd(kept: Kept, rank: int | float | None, dtype: torch.dtype | None, base: Adapter | None = None) -> dict[str, Any]:
    """The exact Δ, truncated to a rank, by default the largest among the ingredients, or within a relative error."""
    dtype = dtype or torch.float32
    if rank is None:
        rank = max((module.rank for adapter, _ in kept for module in adapter.modules.values()), default=1)
    modules, stacked = _stacked(kept, torch.float64)
    tensors: dict[str, Blend | Tensor] = {}
    errors, all_lost, all_total = {}, 0.0, 0.0
    for path, module in modules.items():
        a, b = stacked[module.A].tensor(), stacked[module.B].tensor()
        A, B, lost, total = low_rank.truncate_all(module.factors(a, b), rank)
        tensors[module.A] = A.flatten(0, 1).reshape(-1, *a.shape[1:]).to(dtype)
        tensors[module.B] = B.permute(1, 2, 0).reshape(len(b), -1, *b.shape[2:]).to(dtype)
        if module.bias:
            tensors[module.bias] = replace(stacked[module.bias], dtype=dtype)
        modules[path] = replace(module, rank=A.shape[1])
        errors[path] = math.sqrt(lost / total) if total else 0.0
        all_lost, all_total = all_lost + lost, all_total + total
    tensors |= _full(kept, dtype, base, modules)
    return {
        "tensors": fitting(tensors),
        "config": stacked_config([adapter for adapter, _ in kept], modules),
        "svd_errors": errors,
        "svd_error": math.sqrt(all_lost / all_total) if all_total else 0.0,
    }


def factors(rows: list[Kept], dtype: torch.dtype | None) -> list[dict[str, Any]]:
    """Σ λi·Ai and Σ λi·Bi; the scaling that all ingredients share stays in the config."""
    made = []
    adapters = list(dict.fromkeys(adapter for kept in rows for adapter, _ in kept))
    starts = cosines_of_starts(adapters) if len(adapters) > 1 else []
    for kept in rows:
        tensors = _sums(kept, dtype or torch.float32)
        distance = None
        places = [adapters.index(adapter) for adapter, _ in kept]
        if any(starts[i][j] < _ONE_START for i, j in combinations(places, 2)):
            distance = _distance(kept, tensors)
            warnings.warn(
                f"these ingredients do not start from one initialization: Δ of method 'factors' is {distance:.0%} of the exact "
                "Δ away from it; use method 'exact' or 'svd'",
                stacklevel=3,
            )
        config = faithful_config(kept[0][0])
        made.append({"tensors": fitting(tensors), "config": config, "factors_distance": distance})
    return made


def cosines_of_starts(adapters: Sequence[Adapter]) -> list[list[float]]:
    """Cosine between the A of each two adapters, over the modules that both have; training from one start leaves it near 1."""
    count = len(adapters)
    products, squares = torch.zeros(count, count), torch.zeros(count, count)  # squares[i, j]: of i, over what j has too
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.modules):
        names = {i: adapter.modules[path].A for i, adapter in enumerate(adapters) if path in adapter.modules}
        shapes = {i: tuple(adapters[i].layout[name].shape) for i, name in names.items()}
        for shape in set(shapes.values()):
            those = [i for i in names if shapes[i] == shape]
            rows = torch.stack([adapters[i].tensor(names[i]).reshape(-1).float() for i in those])
            gram = rows @ rows.T
            grid = torch.meshgrid(torch.tensor(those), torch.tensor(those), indexing="ij")
            products[grid] += gram
            squares[grid] += gram.diagonal()[:, None]
    norms = (squares * squares.T).sqrt()
    return torch.where(norms > 0, products / norms, 0.0).tolist()


def _distance(kept: Kept, tensors: Mapping[str, Blend]) -> float:
    """‖B·A - Σ λi·Bi·Ai‖ / ‖Σ λi·Bi·Ai‖ of all modules, B and A being the averages in `tensors`."""
    apart = total = 0.0
    for path, module in kept[0][0].modules.items():
        parts = [
            module.factors(adapter.tensor(adapter.modules[path].A), adapter.tensor(adapter.modules[path].B))
            for adapter, _ in kept
        ]
        averages = module.factors(tensors[module.A].tensor(), tensors[module.B].tensor())
        scale = module.scaling**2
        for (a, b), *experts in zip(averages, *parts, strict=True):
            A = torch.cat([one.double() for one, _ in experts])
            B = torch.cat([w * one.double() for (_, one), (_, w) in zip(experts, kept, strict=True)], dim=1)
            difference = (torch.cat([A, a.double()]), torch.cat([B, -b.double()], dim=1))
            apart += scale * low_rank.inner(difference, difference)
            total += scale * low_rank.inner((A, B), (A, B))
    return math.sqrt(max(apart, 0) / total) if total else 0.0


def _sums(kept: Kept, dtype: torch.dtype) -> dict[str, Blend]:
    """Σ λi·Ti of each tensor."""
    first = kept[0][0]
    return {
        written_name(name, first.modules): Blend(
            _summed, [Part(adapter, name, weight) for adapter, weight in kept], tuple(like.shape), dtype
        )
        for name, like in first.layout.items()
    }


def _full(kept: Kept, dtype: torch.dtype, base: Adapter | None, modules: Mapping[str, LoraModule]) -> dict[str, Blend]:
    """Σ λi·θi of each whole parameter, and of the base's own where an ingredient lacks it, or where Σλ is not 1."""
    names = dict.fromkeys(name for adapter, _ in kept for name in adapter.full)
    return {written_name(name, modules): _whole(kept, name, dtype, base) for name in names}


def _whole(kept: Kept, name: str, dtype: torch.dtype, base: Adapter | None) -> Blend:
    parts = [Part(adapter, name, weight) for adapter, weight in kept if name in adapter.layout]
    like = parts[0].adapter.layout[name]
    rest = 1 - math.fsum(part.factor for part in parts)
    if abs(rest) > _SUM_TOLERANCE and base is not None:
        parts.append(Part(base, name, rest))
    elif abs(rest) > _SUM_TOLERANCE:
        first, *others = (part.adapter.tensor(name) for part in parts)
        own = all(name in part.adapter.copies for part in parts)
        if own and all(torch.equal(first, other) for other in others):  # the base's, whatever λ are
            return Blend(_below, [parts[0]._replace(factor=1.0)], tuple(like.shape), like.dtype)
        raise AdapterError(
            f"{name} was saved as a whole, and the weights of the ingredients that have it sum to {1 - rest:g}, not 1: the "
            "rest is the base's own, pass base= (--base)"
        )
    return Blend(_summed, parts, tuple(like.shape), dtype)


def fitting(tensors: Mapping[str, Blend | Tensor]) -> Mapping[str, Blend | Tensor]:
    """The tensors of a soup, whose ingredients are finite, if they are too: if their dtype is wide enough.

    Of a blend that is made only where the magnitudes of its parts leave it open.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Blend) and tensor.bound <= torch.finfo(tensor.dtype).max:
            continue
        if not is_finite(tensor_of(tensor)):
            raise AdapterError(f"the soup's tensor {name} does not fit into {tensor.dtype}: choose a wider dtype")
    return tensors


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
    return replace(like, A=f"{start}A{suffix}", B=f"{start}B{suffix}", bias=bias, rank=rank, scaling=1.0)
