"""Inspect adapters: ranks, norms, distances, and whether they can be souped (`rsoups inspect A B ...`)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor

from rsoups.adapters.adapter import Adapter
from rsoups.bases.weights import BaseWeights, of_one_base
from rsoups.common.errors import RsoupsError
from rsoups.fronts.barriers import barriers
from rsoups.fronts.front import Front
from rsoups.soups.interpolation import interpolate
from rsoups.soups.methods import ONE_START, check_factors, cosines_of_starts, inner

LAYER = re.compile(r"(.*?\.\d+)\.")
ALL_LAYERS = "all layers"
_CONFLICT = (
    "{a} and {b} start from different initializations (cosine of A {cosine:+.2f}). Method factors mixes directions that do not "
    "belong together: use exact or svd; or train both from one adapter (--adapter_name_or_path, or one adapter_init_seed). "
    "Permutation alignment does not help a LoRA: the order of its rank's directions does not change B·A, and the base, "
    "whose neurons it would permute, is the same for all."
)


@dataclass(frozen=True)
class Inspection:
    """Properties of N adapters, alone and in pairs.

    Attributes:
        adapters: The adapters by name.
        products: For each layer ⟨Δi, Δj⟩ in the Frobenius sense, N × N; the diagonal holds squared norms.
        starts: Cosine of the A factors, N × N: near 1 for two that were trained from one initialization, near 0 otherwise.
        refusals: For the methods ``exact`` and ``factors``, why these adapters cannot be souped so; None if they can.
    """

    adapters: dict[str, Adapter]
    products: dict[str, list[list[float]]]
    starts: list[list[float]]
    refusals: dict[str, str | None]

    def norm(self, name: str, layer: str | None = None) -> float:
        """‖Δ‖ of one adapter, of one layer or of all."""
        return math.sqrt(max(0.0, self._product(name, name, layer)))

    def cosine(self, one: str, other: str, layer: str | None = None) -> float:
        """Cosine of the Δ of two adapters, of one layer or of all; NaN if one of them does not change it."""
        norms = self.norm(one, layer) * self.norm(other, layer)
        return self._product(one, other, layer) / norms if norms else math.nan

    def _product(self, one: str, other: str, layer: str | None) -> float:
        i, j = (list(self.adapters).index(name) for name in (one, other))
        matrices = self.products.values() if layer is None else [self.products[layer]]
        return math.fsum(matrix[i][j] for matrix in matrices)

    def conflicts(self, front: Front | None = None) -> list[str]:
        """Reasons against a soup of these adapters, each with its remedy.

        Args:
            front: Front of soups of them, if they were evaluated: barriers show in rewards alone.
        """
        conflicts = [
            _CONFLICT.format(a=a, b=b, cosine=self.starts[i][j])
            for (i, a), (j, b) in combinations(enumerate(self.adapters), 2)
            if self.starts[i][j] < ONE_START
        ]
        return conflicts + (barriers(front) if front is not None else [])

    def to_text(self) -> str:
        """For people: what each adapter is, then each pair, then the soups that can be made of them."""
        lines = [line for name, adapter in self.adapters.items() for line in (*_description(name, adapter), "")]
        names = list(self.adapters)
        pairs = list(combinations(names, 2))
        width = max(map(len, [*self.products, ALL_LAYERS]))
        heads = [f"‖Δ‖ {name}" for name in names] + [f"cos {a}, {b}" for a, b in pairs]
        lines.append(" ".join([" " * width, *heads]))
        for layer in (*self.products, None):
            norms = [f"{self.norm(name, layer):.4g}" for name in names]
            cosines = [f"{self.cosine(a, b, layer):+.3f}" for a, b in pairs]
            cells = [cell.rjust(len(head)) for cell, head in zip(norms + cosines, heads, strict=True)]
            lines.append(" ".join([(layer or ALL_LAYERS).ljust(width), *cells]))

        if pairs:
            lines.append("")
        for a, b in pairs:
            start = self.starts[names.index(a)][names.index(b)]
            kind = "one initialization" if start > ONE_START else "different initializations"
            lines.append(f"{a}, {b}: {kind} (cosine of A {start:+.3f})")
        for method, reason in self.refusals.items():
            if pairs or reason is not None:
                lines.append(f"method {method}: {'yes' if reason is None else f'no: {reason}'}")
        return "\n".join(lines)


def inspect_adapters(
    adapters: Mapping[str, Adapter], base: Any = None, *, allow_base_mismatch: bool = False
) -> Inspection:
    """Compare adapters, and see whether `rsoups.interpolate` takes them.

    Args:
        adapters: The adapters by name.
        base, allow_base_mismatch: As `interpolate` takes them.

    Raises:
        AdapterError: A tensor that is not finite.
    """
    for adapter in adapters.values():
        adapter.check_values()
    named = of_one_base(adapters, BaseWeights(base) if base is not None else None)
    several = list(named.values())

    def check_exact() -> None:
        interpolate(named, base=base, allow_base_mismatch=allow_base_mismatch).check_loads()

    refusals = {"exact": _refusal(check_exact)}
    refusals["factors"] = refusals["exact"] or _refusal(lambda: check_factors(several))
    return Inspection(named, _products(several), cosines_of_starts(several), refusals)


def _refusal(check: Callable[[], None]) -> str | None:
    try:
        check()
    except RsoupsError as error:
        return str(error)
    return None


def layer_of(path: str) -> str:
    """The layer of a module; the module itself if it is outside of the layers."""
    match = LAYER.match(path)
    return match[1] if match else path


def _products(adapters: list[Adapter]) -> dict[str, list[list[float]]]:
    products: dict[str, list[list[float]]] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.modules):
        matrix = products.setdefault(layer_of(path), [[0.0] * len(adapters) for _ in adapters])
        factors = [_scaled(adapter, path) if path in adapter.modules else None for adapter in adapters]
        for i, one in enumerate(factors):
            for j, other in enumerate(factors[: i + 1]):
                if one and other and _shapes(one) == _shapes(other):
                    value = math.fsum(inner(a, b) for a, b in zip(one, other, strict=True))
                    matrix[i][j] += value
                    matrix[j][i] += value * (i != j)
    return products


def _scaled(adapter: Adapter, path: str) -> list[tuple[Tensor, Tensor]]:
    """A and B of each expert, scaled."""
    module = adapter.modules[path]
    return module.factors(adapter.tensor(module.A), adapter.tensor(module.B).double() * module.scaling)


def _shapes(factors: list[tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
    return [(b.shape[0], a.shape[1]) for a, b in factors]


def _description(name: str, adapter: Adapter) -> list[str]:
    config = adapter.settings
    ranks = Counter(module.rank for module in adapter.modules.values())
    targets = Counter(module.parameter or path.rsplit(".", 1)[-1] for path, module in adapter.modules.items())
    parameters = sum(tensor.numel() for tensor in adapter.layout.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.layout.values()) / 1e6
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in adapter.layout.values()})
    base = config.base_model_name_or_path or "not recorded"
    kind = "rsLoRA" if config.use_rslora else "LoRA"
    return [
        f"{name}: {kind} of {base}{'@' + config.revision if config.revision else ''}",
        f"  source   {adapter.source}{'@' + adapter.revision if adapter.revision else ''}",
        f"  rank     {', '.join(f'{rank} ({count} modules)' for rank, count in sorted(ranks.items()))}; "
        f"alpha {config.lora_alpha}{', patterns' if config.alpha_pattern else ''}{', lora_bias' if config.lora_bias else ''}",
        f"  targets  {', '.join(f'{leaf} x{count}' for leaf, count in sorted(targets.items()))}",
        *([f"  whole    {', '.join(adapter.full)}"] if adapter.full else []),
        f"  size     {parameters:,} numbers, {size:.1f} MB, {', '.join(dtypes)}",
        f"  sha256   {adapter.sha256}",
    ]
