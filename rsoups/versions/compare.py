"""Compare two adapters layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.adapters.lineage import Manifest, manifest_of, parents_of
from rsoups.common.errors import LineageError
from rsoups.versions.inspect import ALL_LAYERS, layer_of


@dataclass
class Change:
    """Sums over the weights of a layer, or of all layers, for two changes Δ and Δ'.

    Attributes:
        one, other: Squared norms of Δ and Δ'.
        product: ⟨Δ, Δ'⟩.
        difference: ‖Δ' - Δ‖².
        conflicts: Number of weights where Δ and Δ' have opposite signs.
        weights: Number of weights.
    """

    one: float = 0.0
    other: float = 0.0
    product: float = 0.0
    difference: float = 0.0
    conflicts: int = 0
    weights: int = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add the weights of a module."""
        self.one += float(a.square().sum())
        self.other += float(b.square().sum())
        self.product += float((a * b).sum())
        self.difference += float((b - a).square().sum())
        self.conflicts += int((a * b < 0).sum())
        self.weights += a.numel()

    @property
    def relative(self) -> float:
        """‖Δ' - Δ‖ / ‖Δ‖."""
        return math.sqrt(self.difference / self.one) if self.one else math.inf if self.difference else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of Δ and Δ'; NaN if one of them is 0."""
        norms = math.sqrt(self.one * self.other)
        return self.product / norms if norms else math.nan

    @property
    def conflict(self) -> float:
        """Share of the weights that Δ and Δ' move in opposite directions."""
        return self.conflicts / self.weights if self.weights else 0.0


@dataclass
class Difference:
    """How two adapters or soups differ.

    Attributes:
        layers: The change of each layer, and of all of them under `ALL_LAYERS`.
        ingredients: Lines about ingredients, λ and method that differ.
    """

    layers: dict[str, Change] = field(default_factory=dict)
    ingredients: list[str] = field(default_factory=list)

    @property
    def overall(self) -> Change:
        """The change over all layers."""
        return self.layers[ALL_LAYERS]

    def to_text(self) -> str:
        """A table of the layers, then the ingredients that differ."""
        width = max(map(len, self.layers))
        lines = [f"{'':{width}}      ‖Δ‖     ‖Δ'‖   change   cosine  opposite signs"]
        for layer, change in self.layers.items():
            norms = f"{math.sqrt(change.one):8.4g} {math.sqrt(change.other):8.4g}"
            lines.append(
                f"{layer:{width}} {norms} {change.relative:8.2%} {change.cosine:+8.3f} {change.conflict:15.1%}"
            )
        return "\n".join([*lines, "", *(self.ingredients or ["the same ingredients at the same λ"])])


def diff(one: str | Path, other: str | Path) -> Difference:
    """Tell how two adapters or soups of one base differ.

    Args:
        one, other: Folders or Hub ids.

    Raises:
        AdapterError: As `read_adapter`.
        LineageError: A module has two shapes, so the bases differ.
    """
    return Difference(compare(read_adapter(one), read_adapter(other)), _changed(manifest_of(one), manifest_of(other)))


def compare(one: Adapter, other: Adapter) -> dict[str, Change]:
    """Return the change of each layer, and of all of them under `ALL_LAYERS`. Δ is made module by module, in float64."""
    changes: dict[str, Change] = {}
    total = Change()
    for path, a, b in _deltas(one, other):
        changes.setdefault(layer_of(path), Change()).add(a, b)
        total.add(a, b)
    return changes | {ALL_LAYERS: total}


def _deltas(one: Adapter, other: Adapter) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Δ of each module, and the whole parameters, in both; zeros where only one of them has it."""
    readers: dict[str, Callable[[Adapter, str], Tensor | None]] = dict.fromkeys([*one.modules, *other.modules], _delta)
    readers |= dict.fromkeys([*one.full, *other.full], _whole)
    for path, read in readers.items():
        a, b = read(one, path), read(other, path)
        a = torch.zeros_like(b) if a is None and b is not None else a
        b = torch.zeros_like(a) if b is None and a is not None else b
        assert a is not None and b is not None
        if a.shape != b.shape:
            raise LineageError(
                f"{path} is {tuple(a.shape)} in {one.source} and {tuple(b.shape)} in {other.source}: the bases differ"
            )
        yield path, a, b


def _delta(adapter: Adapter, path: str) -> Tensor | None:
    module = adapter.modules.get(path)
    if module is None:
        return None
    factors = module.factors(adapter.tensor(module.A).double(), adapter.tensor(module.B).double())
    return module.scaling * torch.stack([b @ a for a, b in factors])


def _whole(adapter: Adapter, name: str) -> Tensor | None:
    return adapter.tensor(name).double() if name in adapter.full else None


def _changed(one: Manifest | None, other: Manifest | None) -> list[str]:
    """Lines about ingredients (or parents) that only one has, whose weights differ, or whose λ does."""
    if one is None or other is None:
        manifests = {"the first": one, "the second": other}
        return [f"{name} has no manifest" for name, manifest in manifests.items() if manifest is None]

    first, second = ({p["name"]: p for p in parents_of(manifest)} for manifest in (one, other))
    lines = [f"- {name} {_weight(first[name])}".rstrip() for name in first if name not in second]
    lines += [f"+ {name} {_weight(second[name])}".rstrip() for name in second if name not in first]
    for name in first.keys() & second.keys():
        a, b = first[name], second[name]
        if a["sha256"] != b["sha256"]:
            lines.append(f"~ {name}: other weights, {a['sha256'][:12]} → {b['sha256'][:12]}")
        if a.get("lambda") != b.get("lambda"):
            lines.append(f"~ {name}: {_weight(a)} → {_weight(b)}")
    if one.get("method") != other.get("method"):
        lines.append(f"~ method: {one.get('method')} → {other.get('method')}")
    return sorted(lines)


def _weight(parent: Mapping[str, Any]) -> str:
    return f"λ {parent['lambda']:.4g}" if "lambda" in parent else ""
