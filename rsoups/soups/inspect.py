"""What adapters are, how far apart, and whether they can be souped: `rsoups inspect A B ...`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rsoups.adapters.adapter import Adapter
from rsoups.bases.weights import BaseWeights, of_one_base
from rsoups.common.errors import RsoupsError
from rsoups.soups import low_rank
from rsoups.soups.methods import check_factors, cosines_of_starts
from rsoups.soups.soup import Soup, interpolate

_LAYER = re.compile(r"(.*?\.\d+)\.")
_ONE_START = 0.5


@dataclass(frozen=True)
class Inspection:
    """Of N adapters, by name.

    Attributes:
        adapters: What was read.
        products: For each layer ⟨Δi, Δj⟩ in the Frobenius sense, N × N; the diagonal holds squared norms.
        starts: Cosine of the A factors, N × N: near 1 where two were trained from one initialization, near 0 otherwise.
        refusals: For the methods ``exact`` and ``factors``, why these adapters cannot be souped so; None where they can.
    """

    adapters: dict[str, Adapter]
    products: dict[str, list[list[float]]]
    starts: list[list[float]]
    refusals: dict[str, str | None]

    def norm(self, name: str, layer: str | None = None) -> float:
        """‖Δ‖ of one adapter, of one layer or of all."""
        i = list(self.adapters).index(name)
        return math.sqrt(max(0.0, self._sum(i, i, layer)))

    def cosine(self, one: str, other: str, layer: str | None = None) -> float:
        """Cosine between the Δ of two adapters, of one layer or of all; NaN where one of them does not change it."""
        i, j = (list(self.adapters).index(name) for name in (one, other))
        norms = self.norm(one, layer) * self.norm(other, layer)
        return self._sum(i, j, layer) / norms if norms else math.nan

    def _sum(self, i: int, j: int, layer: str | None) -> float:
        chosen = self.products.values() if layer is None else [self.products[layer]]
        return math.fsum(matrix[i][j] for matrix in chosen)

    def to_text(self) -> str:
        """For people: what each is, then each pair, then what can be made of them."""
        lines = [line for name, adapter in self.adapters.items() for line in (*_about(name, adapter), "")]
        names = list(self.adapters)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        width = max(map(len, [*self.products, "all layers"]))
        heads = [f"‖Δ‖ {name}" for name in names] + [f"cos {a}, {b}" for a, b in pairs]
        lines.append(" ".join([" " * width, *heads]))
        for layer in (*self.products, None):
            norms = [f"{self.norm(name, layer):.4g}" for name in names]
            cosines = [f"{self.cosine(a, b, layer):+.3f}" for a, b in pairs]
            cells = [cell.rjust(len(head)) for cell, head in zip(norms + cosines, heads, strict=True)]
            lines.append(" ".join([(layer or "all layers").ljust(width), *cells]))
        if pairs:
            lines.append("")
        for a, b in pairs:
            start = self.starts[names.index(a)][names.index(b)]
            kind = "one initialization" if start > _ONE_START else "different initializations"
            lines.append(f"{a}, {b}: {kind} (cosine of A {start:+.3f})")
        for method, reason in self.refusals.items():
            if not pairs and reason is None:
                continue
            lines.append(f"method {method}: {'yes' if reason is None else f'no: {reason}'}")
        return "\n".join(lines)


def inspect_adapters(
    adapters: Mapping[str, Adapter], base: Any = None, *, allow_base_mismatch: bool = False
) -> Inspection:
    """Compare adapters that were read, and see whether `rsoups.interpolate` takes them.

    Args:
        adapters: By name.
        base, allow_base_mismatch: As `interpolate` takes them.

    Raises:
        AdapterError: A tensor that is not finite.
    """
    for adapter in adapters.values():
        adapter.check_values()
    named = of_one_base(adapters, BaseWeights(base) if base is not None else None)
    several = list(named.values())
    refusals = {"exact": _refusal(lambda: _try_out(named, base, allow_base_mismatch))}
    refusals["factors"] = refusals["exact"] or _refusal(lambda: check_factors(several))
    return Inspection(named, _products(several), cosines_of_starts(several), refusals)


def _refusal(check: Callable[[], None]) -> str | None:
    try:
        check()
    except RsoupsError as error:
        return str(error)
    return None


def _try_out(adapters: Mapping[str, Adapter], base: Any, allow_base_mismatch: bool) -> None:
    """Refuse what no uniform soup can be made of, or none that PEFT loads."""
    soup = interpolate(adapters, base=base, allow_base_mismatch=allow_base_mismatch)
    assert isinstance(soup, Soup)
    soup.check_loads()


def _products(adapters: list[Adapter]) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.modules):
        match = _LAYER.match(path)
        matrix = found.setdefault(match[1] if match else path, [[0.0] * len(adapters) for _ in adapters])
        factors = [_scaled(adapter, path) if path in adapter.modules else None for adapter in adapters]
        for i, one in enumerate(factors):
            for j, other in enumerate(factors[: i + 1]):
                if one and other and _shapes(one) == _shapes(other):
                    value = math.fsum(low_rank.inner(a, b) for a, b in zip(one, other, strict=True))
                    matrix[i][j] += value
                    matrix[j][i] += value * (i != j)
    return found


def _scaled(adapter: Adapter, path: str) -> list[tuple[Tensor, Tensor]]:
    """A and B of each expert, scaled."""
    module = adapter.modules[path]
    return module.factors(adapter.tensor(module.A), adapter.tensor(module.B).double() * module.scaling)


def _shapes(factors: list[tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
    return [(b.shape[0], a.shape[1]) for a, b in factors]


def _about(name: str, adapter: Adapter) -> list[str]:
    config = adapter.config
    ranks = Counter(module.rank for module in adapter.modules.values())
    leaves = Counter(module.parameter or path.rsplit(".", 1)[-1] for path, module in adapter.modules.items())
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
        f"  targets  {', '.join(f'{leaf} x{count}' for leaf, count in sorted(leaves.items()))}",
        *([f"  whole    {', '.join(adapter.full)}"] if adapter.full else []),
        f"  size     {parameters:,} numbers, {size:.1f} MB, {', '.join(dtypes)}",
        f"  sha256   {adapter.sha256}",
    ]
