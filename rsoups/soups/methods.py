"""The ways to interpolate: `exact` stacks the ingredients' factors, `svd` truncates the stack, `factors` averages them.

This is where a λ becomes a tensor. The tensors are `Blend`s, which are made when they are asked for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product

import torch
from peft import LoraConfig
from torch import Tensor

from rsoups.adapters.adapter import TOKENS, Adapter
from rsoups.adapters.layer_names import PREFIX, written_name
from rsoups.adapters.lineage import SOUP_METHODS
from rsoups.adapters.lora_modules import LoraModule, wrapper_paths
from rsoups.adapters.tensor_files import is_finite
from rsoups.bases.weights import BaseWeights
from rsoups.common.errors import AdapterError, LambdasError
from rsoups.soups.blends import Blend, Part, one_below_another, side_by_side, summed, tensor_of
from rsoups.soups.config import faithful_config, stacked_config
from rsoups.soups.lambdas import SUM_TOLERANCE

ONE_START = 0.5  # cosine of two ingredients' A above which they are taken to share their initialization
Weighted = list[tuple[Adapter, float]]  # the ingredients of a soup with their λ: all different, none of λ 0


# --- methods ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Result of a method; the fields are those of `Soup`."""

    tensors: Mapping[str, Blend | Tensor]
    config: LoraConfig
    svd_error: float | None = None
    svd_errors: dict[str, float] = field(default_factory=dict)
    factors_distance: float | None = None

    def __post_init__(self) -> None:
        """Refuse a dtype that cannot hold the soup: the ingredients are finite, and so must be the soup."""
        for name, tensor in self.tensors.items():
            # A blend is made here only where the magnitudes of its parts leave it open.
            if isinstance(tensor, Blend) and tensor.bound <= torch.finfo(tensor.dtype).max:
                continue
            if not is_finite(tensor_of(tensor)):
                raise AdapterError(f"the soup's tensor {name} does not fit into {tensor.dtype}: choose a wider dtype")


def alone(adapter: Adapter, method: str, dtype: torch.dtype | None) -> Mixture:
    """An adapter as it is."""
    tensors = {
        written_name(key, adapter.modules): Blend(
            one_below_another, [Part(adapter, key)], tuple(like.shape), dtype or like.dtype
        )
        for key, like in adapter.layout.items()
    }
    return Mixture(tensors, faithful_config(adapter), svd_error=0.0 if method == "svd" else None)


def exact(weighted: Weighted, dtype: torch.dtype | None, base: Adapter | None) -> Mixture:
    """Δ = Σ λi·si·Bi·Ai as one pair of stacked factors per module, λi·si in B."""
    dtype = dtype or torch.float32
    modules, tensors = _stacked(weighted, dtype)
    tensors |= _whole_parameters(weighted, dtype, base, modules)
    return Mixture(tensors, stacked_config([adapter for adapter, _ in weighted], modules))


def svd(weighted: Weighted, rank: int | float | None, dtype: torch.dtype | None, base: Adapter | None) -> Mixture:
    """The exact Δ, truncated to a rank (the largest among the ingredients by default) or within a relative error."""
    dtype = dtype or torch.float32
    if rank is None:
        rank = max((module.rank for adapter, _ in weighted for module in adapter.modules.values()), default=1)
    modules, stacked = _stacked(weighted, torch.float64)

    tensors: dict[str, Blend | Tensor] = {}
    errors, all_lost, all_total = {}, 0.0, 0.0
    for path, module in modules.items():
        a, b = stacked[module.A].tensor(), stacked[module.B].tensor()
        A, B, lost, total = _truncated_to_one_rank(module.factors(a, b), rank)
        tensors[module.A] = A.flatten(0, 1).reshape(-1, *a.shape[1:]).to(dtype)
        tensors[module.B] = B.permute(1, 2, 0).reshape(len(b), -1, *b.shape[2:]).to(dtype)
        if module.bias:
            tensors[module.bias] = replace(stacked[module.bias], dtype=dtype)
        modules[path] = replace(module, rank=A.shape[1])
        errors[path] = math.sqrt(lost / total) if total else 0.0
        all_lost, all_total = all_lost + lost, all_total + total

    tensors |= _whole_parameters(weighted, dtype, base, modules)
    config = stacked_config([adapter for adapter, _ in weighted], modules)
    return Mixture(tensors, config, math.sqrt(all_lost / all_total) if all_total else 0.0, errors)


def factors(weighted: Weighted, dtype: torch.dtype | None, starts: Mapping[tuple[Adapter, Adapter], float]) -> Mixture:
    """Σ λi·Ai and Σ λi·Bi; the scaling that all ingredients share stays in the config.

    Args:
        weighted: Ingredients and λ.
        dtype: Dtype of the tensors.
        starts: Cosine of the A of each two ingredients.
    """
    first, distance = weighted[0][0], None
    tensors = {
        written_name(name, first.modules): Blend(
            summed,
            [Part(adapter, name, weight) for adapter, weight in weighted],
            tuple(like.shape),
            dtype or torch.float32,
        )
        for name, like in first.layout.items()
    }
    if any(starts[pair] < ONE_START for pair in combinations([adapter for adapter, _ in weighted], 2)):
        distance = _distance(weighted, tensors)
        warnings.warn(
            f"these ingredients do not start from one initialization: Δ of method 'factors' is {distance:.0%} of the exact "
            "Δ away from it; use method 'exact' or 'svd'",
            stacklevel=3,
        )
    return Mixture(tensors, faithful_config(first), factors_distance=distance)


def check_method(method: str, rank: int | float | None) -> None:
    """Refuse an unknown method, and a rank that it does not use.

    Raises:
        LambdasError: As `interpolate`.
    """
    if method not in SOUP_METHODS:
        raise LambdasError(f"method is {method!r}, must be one of {list(SOUP_METHODS)}")
    if rank is not None and (method != "svd" or not (0 < rank < 1 or (rank >= 1 and rank == int(rank)))):
        raise LambdasError(
            f"rank={rank} with method={method!r}: rank is that of an svd soup, at least 1, or an error below 1"
        )


def check_factors(adapters: Sequence[Adapter], rows: Iterable[Sequence[float]] = ()) -> None:
    """Refuse what method ``factors`` has no meaning for.

    Raises:
        AdapterError: Adapters of other modules, ranks or scalings.
        LambdasError: A row of λ that does not sum to 1: it would scale both factors, and so a change by its square.
    """
    first, *others = adapters
    for other in others:
        pair = f"{first.source} and {other.source}"
        if first.layout.keys() != other.layout.keys() or first.modules.keys() != other.modules.keys():
            raise AdapterError(
                f"method 'factors' needs the same modules in all ingredients; {pair} differ: use 'exact'"
            )
        for path, module in first.modules.items():
            ranks = module.rank, other.modules[path].rank
            scalings = module.scaling, other.modules[path].scaling
            if ranks[0] != ranks[1] or scalings[0] != scalings[1]:
                raise AdapterError(
                    f"method 'factors' needs one rank and one alpha; module {path} has ranks {ranks} and scalings "
                    f"{scalings} in {pair}: use 'exact'"
                )
    for row in rows:
        if abs(math.fsum(row) - 1) > SUM_TOLERANCE:
            raise LambdasError(
                f"lambdas {list(row)} sum to {math.fsum(row):g}; method 'factors' would scale A and B by it each: use "
                "'exact' or 'svd'"
            )


def cosines_of_starts(adapters: Sequence[Adapter]) -> list[list[float]]:
    """Cosine of the A of each two adapters, over the modules that both have; near 1 if they were trained from one start."""
    count = len(adapters)
    products, squares = torch.zeros(count, count), torch.zeros(count, count)  # squares[i, j]: of i, over what j has too
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.modules):
        names = {i: adapter.modules[path].A for i, adapter in enumerate(adapters) if path in adapter.modules}
        shapes = {i: tuple(adapters[i].layout[name].shape) for i, name in names.items()}
        for shape in set(shapes.values()):
            alike = [i for i in names if shapes[i] == shape]
            rows = torch.stack([adapters[i].tensor(names[i]).flatten().float() for i in alike])
            gram = rows @ rows.T
            grid = torch.meshgrid(torch.tensor(alike), torch.tensor(alike), indexing="ij")
            products[grid] += gram
            squares[grid] += gram.diagonal()[:, None]
    norms = (squares * squares.T).sqrt()
    return torch.where(norms > 0, products / norms, 0.0).tolist()


def mixtures(
    adapters: list[Adapter],
    rows: list[list[float]],
    method: str,
    rank: int | float | None,
    dtype: torch.dtype | None,
    weights: BaseWeights | None,
) -> list[Mixture]:
    """Return the mixture for each row of λ.

    Args:
        adapters: The ingredients, in one naming of layers.
        rows: λ of each ingredient, for each mixture.
        method, rank, dtype: As `interpolate`.
        weights: The base, for whole parameters that not all ingredients hold.
    """
    first = _first_equals(adapters)
    weighted = [_weighted(adapters, first, row) for row in rows]
    several = list(dict.fromkeys(adapter for row in weighted if not _is_one(row, rank) for adapter, _ in row))
    base = _own_values(several, weights)
    starts: dict[tuple[Adapter, Adapter], float] = {}
    if method == "factors":
        cosines = cosines_of_starts(several)
        starts = {(several[i], several[j]): cosines[i][j] for i, j in product(range(len(several)), repeat=2)}

    def mixture(row: Weighted) -> Mixture:
        if _is_one(row, rank):
            return alone(row[0][0], method, dtype)
        if method == "factors":
            return factors(row, dtype, starts)
        if method == "svd":
            return svd(row, rank, dtype, base)
        return exact(row, dtype, base)

    return [mixture(row) for row in weighted]


def _is_one(weighted: Weighted, rank: int | float | None) -> bool:
    """Whether the soup is one of its ingredients, as it is."""
    return rank is None and len(weighted) == 1 and math.isclose(weighted[0][1], 1, abs_tol=1e-12)


def _first_equals(adapters: list[Adapter]) -> list[int]:
    """For each adapter the index of the first one that equals it."""
    known = [(a.sha256, {path: module.scaling for path, module in a.modules.items()}) for a in adapters]
    return [known.index(one) for one in known]


def _weighted(adapters: list[Adapter], first: list[int], row: Sequence[float]) -> Weighted:
    """Adapters of non-zero weight, each once: an adapter given twice is itself with the sum of its weights."""
    totals = {i: math.fsum(w for j, w in zip(first, row, strict=True) if j == i) for i in dict.fromkeys(first)}
    weighted = [(adapters[i], total) for i, total in totals.items() if total]
    return weighted or [(adapters[0], 0.0)]


def _own_values(adapters: list[Adapter], base: BaseWeights | None) -> Adapter | None:
    """The base's own values of all whole parameters of some adapters; None if there are none, or no base."""
    names = {name: adapter for adapter in adapters for name in adapter.full}
    if base is None or not names:
        return None
    layers = {frozenset(name for name in adapter.full if name.endswith(TOKENS)) for adapter in adapters} - {frozenset()}
    if len(layers) > 1 and base.model.config.get_text_config().tie_word_embeddings:
        raise AdapterError(
            f"the ingredients train tokens of other layers, and the base {base.source} ties them: train the same ones in all"
        )
    own = base.like({name: adapter.config for name, adapter in names.items()})
    for name, adapter in names.items():
        ours, theirs = tuple(own.layout[name].shape), tuple(adapter.layout[name].shape)
        if ours != theirs:
            raise AdapterError(f"{name} is {theirs} in {adapter.source} and {ours} in the base {base.source}")
    return own


# --- parts of the methods --------------------------------------------------------------------------------------------


def _stacked(weighted: Weighted, dtype: torch.dtype) -> tuple[dict[str, LoraModule], dict[str, Blend]]:
    """The modules of a soup, and their factors."""
    with_bias = any(adapter.config.lora_bias for adapter, _ in weighted)
    paths = wrapper_paths({name: module for adapter, _ in weighted for name, module in adapter.modules.items()})
    modules, tensors = {}, {}
    for name, path in paths.items():
        parts = [(adapter, adapter.modules[name], weight) for adapter, weight in weighted if name in adapter.modules]
        rank = sum(module.rank for _, module, _ in parts)
        soup = modules[name] = _named_module(path, rank, parts[0][1], with_bias)

        rows = rank * soup.experts
        A = [Part(adapter, module.A) for adapter, module, _ in parts]
        tensors[soup.A] = Blend(one_below_another, A, (rows, *soup.shape[1:]), dtype, soup.experts)
        B = [Part(adapter, module.B, weight * module.scaling) for adapter, module, weight in parts]
        tensors[soup.B] = Blend(side_by_side, B, (soup.shape[0], rows, *(1 for _ in soup.shape[2:])), dtype)
        if soup.bias:
            biases = [Part(adapter, m.bias, weight * m.scaling) for adapter, m, weight in parts if m.bias]
            tensors[soup.bias] = Blend(summed, biases, soup.shape[:1], dtype)
    return modules, tensors


def _named_module(path: str, rank: int, like: LoraModule, with_bias: bool) -> LoraModule:
    """A module with PEFT's names of its factors, scaled by 1."""
    if with_bias and like.embedding:
        raise AdapterError(f"module {path}: PEFT has no lora_bias for embeddings, so no one adapter can hold this soup")
    kind, suffix = ("lora_embedding_", "") if like.embedding else ("lora_", ".weight")
    start = f"{PREFIX}{path}.{kind}"
    bias = f"{start}B.bias" if with_bias else None
    return replace(like, A=f"{start}A{suffix}", B=f"{start}B{suffix}", bias=bias, rank=rank, scaling=1.0)


def _whole_parameters(
    weighted: Weighted, dtype: torch.dtype, base: Adapter | None, modules: Mapping[str, LoraModule]
) -> dict[str, Blend]:
    """Σ λi·θi of each whole parameter, and of the base's own where an ingredient lacks it, or where Σλ is not 1."""
    names = dict.fromkeys(name for adapter, _ in weighted for name in adapter.full)
    return {written_name(name, modules): _whole_parameter(weighted, name, dtype, base) for name in names}


def _whole_parameter(weighted: Weighted, name: str, dtype: torch.dtype, base: Adapter | None) -> Blend:
    parts = [Part(adapter, name, weight) for adapter, weight in weighted if name in adapter.layout]
    like = parts[0].adapter.layout[name]
    rest = 1 - math.fsum(part.factor for part in parts)
    if abs(rest) <= SUM_TOLERANCE:
        return Blend(summed, parts, tuple(like.shape), dtype)
    if base is not None:
        return Blend(summed, [*parts, Part(base, name, rest)], tuple(like.shape), dtype)

    first, *others = (part.adapter.tensor(name) for part in parts)
    are_copies = all(name in part.adapter.copies for part in parts)
    if are_copies and all(torch.equal(first, other) for other in others):  # the base's own, whatever λ are
        return Blend(one_below_another, [parts[0]._replace(factor=1.0)], tuple(like.shape), like.dtype)
    raise AdapterError(
        f"{name} was saved as a whole, and the weights of the ingredients that have it sum to {1 - rest:g}, not 1: the "
        "rest is the base's own, pass base="
    )


def _distance(weighted: Weighted, tensors: Mapping[str, Blend]) -> float:
    """‖B·A - Σ λi·Bi·Ai‖ / ‖Σ λi·Bi·Ai‖ over all modules; B and A are the averages in `tensors`."""
    apart = total = 0.0
    for path, module in weighted[0][0].modules.items():
        parts = [
            module.factors(adapter.tensor(adapter.modules[path].A), adapter.tensor(adapter.modules[path].B))
            for adapter, _ in weighted
        ]
        averages = module.factors(tensors[module.A].tensor(), tensors[module.B].tensor())
        scale = module.scaling**2
        for (a, b), *experts in zip(averages, *parts, strict=True):
            A = torch.cat([one.double() for one, _ in experts])
            B = torch.cat([w * one.double() for (_, one), (_, w) in zip(experts, weighted, strict=True)], dim=1)
            difference = (torch.cat([A, a.double()]), torch.cat([B, -b.double()], dim=1))
            apart += scale * inner(difference, difference)
            total += scale * inner((A, B), (A, B))
    return math.sqrt(max(apart, 0) / total) if total else 0.0


# --- low-rank maths: from the factors, never from the dense Δ --------------------------------------------------------


def truncated(A: Tensor, B: Tensor, rank: int | float) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation of B·A in the Frobenius norm (Eckart and Young 1936).

    QR of B and of Aᵀ leaves an SVD of a core of r × r.

    Args:
        A, B: float64 factors (r, in) and (out, r).
        rank: An int, the largest rank; or a float below 1, the largest relative error, which decides the rank.

    Returns:
        A and B of the approximation, and the squared norms of what was cut off and of B·A.
    """
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)

    # Squared norm of what is left out where k singular values are kept, k = 0, 1, ...
    lost = torch.cat([(s**2).flip(0).cumsum(0).flip(0), s.new_zeros(1)])
    total = float(lost[0])
    k = int(rank) if rank >= 1 else int((lost > rank**2 * total).sum())
    k = max(1, min(k, len(s)))
    root = s[:k].sqrt()
    return root[:, None] * (vh[:k] @ q_a.T), (q_b @ u[:, :k]) * root, float(lost[k]), total


def _truncated_to_one_rank(
    experts: Sequence[tuple[Tensor, Tensor]], rank: int | float
) -> tuple[Tensor, Tensor, float, float]:
    """`truncated` of each expert, all to the largest rank that any of them needs: A (n, rank, in) and B (n, out, rank)."""
    results = [truncated(a, b, rank) for a, b in experts]
    largest = max(len(A) for A, *_ in results)
    if any(len(A) < largest for A, *_ in results):
        results = [truncated(a, b, largest) for a, b in experts]
    A, B, lost, total = zip(*results, strict=True)
    return torch.stack(A), torch.stack(B), sum(lost), sum(total)


def inner(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
    """⟨B1·A1, B2·A2⟩ in the Frobenius sense, in float64: Σ (B1ᵀ·B2) ∘ (A1·A2ᵀ)."""
    (a1, b1), (a2, b2) = ((a.flatten(1).double(), b.flatten(1).double()) for a, b in (one, two))
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())
