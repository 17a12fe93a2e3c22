"""Compare two adapters layer by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.adapters.lineage import Manifest, manifest_of, parents_of
from rsoups.common.errors import LineageError

_LAYER = re.compile(r"(.*?\.\d+)\.")
ALL_LAYERS = "all layers"


@dataclass
class Change:
    """From one Δ to another, of a layer or of all: sums over its weights.

    Attributes:
        one, other: Squared norms.
        product: ⟨Δ, Δ'⟩.
        difference: ‖Δ' - Δ‖².
        conflicts, weights: Weights whose change has opposite signs in the two, of all weights.
    """

    one: float = 0.0
    other: float = 0.0
    product: float = 0.0
    difference: float = 0.0
    conflicts: int = 0
    weights: int = 0

    def add(self, a: Tensor, b: Tensor) -> None:
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
        norms = math.sqrt(self.one * self.other)
        return self.product / norms if norms else math.nan

    @property
    def conflict(self) -> float:
        """Share of the weights that the two move in opposite directions."""
        return self.conflicts / self.weights if self.weights else 0.0


@dataclass
class Difference:
    """Between two adapters or soups: by layer, and in what they were made of."""

    layers: dict[str, Change] = field(default_factory=dict)
    ingredients: list[str] = field(default_factory=list)

    @property
    def overall(self) -> Change:
        return self.layers[ALL_LAYERS]

    def to_text(self) -> str:
        """A table of the layers, and what was changed among the ingredients."""
        width = max(map(len, self.layers))
        lines = [f"{'':{width}}      ‖Δ‖     ‖Δ'‖   change   cosine  opposite signs"]
        for layer, change in self.layers.items():
            norms = f"{math.sqrt(change.one):8.4g} {math.sqrt(change.other):8.4g}"
            lines.append(
                f"{layer:{width}} {norms} {change.relative:8.2%} {change.cosine:+8.3f} {change.conflict:15.1%}"
            )
        return "\n".join([*lines, "", *(self.ingredients or ["the same ingredients at the same λ"])])


def diff(one: str | Path, other: str | Path) -> Difference:
    """How an adapter or a soup differs from another one of its base.

    Args:
        one, other: Folders or Hub ids.

    Raises:
        AdapterError: As `read_adapter`.
        LineageError: Modules of other shapes: they are of different bases.
    """
    return Difference(compare(read_adapter(one), read_adapter(other)), _changed(manifest_of(one), manifest_of(other)))


def compare(one: Adapter, other: Adapter) -> dict[str, Change]:
    """By layer, and of all of them under the last key. Δ is made module by module, in float64."""
    found: dict[str, Change] = {}
    total = Change()
    for path, a, b in _deltas(one, other):
        match = _LAYER.match(path)
        for change in (found.setdefault(match[1] if match else path, Change()), total):
            change.add(a, b)
    return found | {ALL_LAYERS: total}


def _deltas(one: Adapter, other: Adapter) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Δ of each module in both, and the whole parameters; zeros where only one of them has it."""
    readers: dict[str, Callable[[Adapter, str], Tensor | None]] = dict.fromkeys([*one.modules, *other.modules], _delta)
    readers |= dict.fromkeys([*one.full, *other.full], _whole)
    for path, read in readers.items():
        a, b = read(one, path), read(other, path)
        if a is not None and b is not None and a.shape != b.shape:
            raise LineageError(
                f"{path} is {tuple(a.shape)} in {one.source} and {tuple(b.shape)} in {other.source}: of different bases"
            )
        there = a if a is not None else b
        assert there is not None
        yield path, torch.zeros_like(there) if a is None else a, torch.zeros_like(there) if b is None else b


def _delta(adapter: Adapter, path: str) -> Tensor | None:
    if (module := adapter.modules.get(path)) is None:
        return None
    factors = module.factors(adapter.tensor(module.A).double(), adapter.tensor(module.B).double())
    return module.scaling * torch.stack([b @ a for a, b in factors])


def _whole(adapter: Adapter, name: str) -> Tensor | None:
    return adapter.tensor(name).double() if name in adapter.full else None


def _changed(one: Manifest | None, other: Manifest | None) -> list[str]:
    """Ingredients (or parents) that only one has, whose weights differ, or whose λ does."""
    if one is None or other is None:
        return [f"{which} has no manifest" for which, m in (("the first", one), ("the second", other)) if m is None]
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
