"""Models as software: what differs between two, is a soup what its manifest says, add an ingredient, take one out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsoups._errors import LambdasError, LineageError
from rsoups._files import is_hub_id
from rsoups.adapters import Adapter, adapter_of, read_adapter
from rsoups.hub import read_soup
from rsoups.lineage import Manifest, manifest_of, parents_of, pinned
from rsoups.soup import Soup, interpolate

_LAYER = re.compile(r"(.*?\.\d+)\.")
_ALL = "all layers"
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of Δ, relative; rounding of the soup's own tensors
_FLOAT = 1e-5


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
        return self.layers[_ALL]

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
    return found | {_ALL: total}


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


def verify(
    source: str | Path, ingredients: Mapping[str, str | Path] | None = None, base: str | Path | None = None
) -> str:
    """Make a soup again from its ingredients, and compare.

    Args:
        source: Folder or Hub id of the soup.
        ingredients: Where some of them are, by name; the others from where the manifest says: the Hub at its commit, or a
            folder below this one.
        base: As `interpolate`, of a soup that was made with it.

    Returns:
        What was found, in a line.

    Raises:
        LineageError: The weights are not those of the manifest, an ingredient is not found or is not the one that went in, or
            the soup is not what its ingredients give.
    """
    soup = read_soup(source)
    assert soup._file is not None
    recorded = soup.lineage.get("sha256")
    if recorded not in (None, soup._file.sha256):
        raise LineageError(
            f"{source}: its weights are {soup._file.sha256[:12]}, soup.json was written for {recorded[:12]}"
        )
    method = "factors" if soup.method == "factors" else "exact"
    made = _made(locate(soup, ingredients), soup, list(soup.lambdas), method, base=base)
    if made.state_dict.keys() == soup.state_dict.keys() and all(
        torch.equal(tensor.to(soup.state_dict[key].dtype), soup.state_dict[key])
        for key, tensor in made.state_dict.items()
    ):
        return f"{source}: bit for bit what its {len(soup.ingredients)} ingredients give"
    found = compare(adapter_of("what its ingredients give", made.config, made.state_dict), soup._file)[_ALL].relative
    expected = soup.svd_error or 0.0
    dtype = next(iter(soup.state_dict.values())).dtype
    if not abs(found - expected) <= _TOLERANCE.get(dtype, _FLOAT) + expected / 100:
        raise LineageError(
            f"{source}: Δ is {found:.2e} away from what its ingredients give, {expected:.2e} would be right: it is another soup"
        )
    told = f", as its truncation to rank {soup.lineage.get('rank')} leaves it" if soup.svd_error else ""
    return f"{source}: what its {len(soup.ingredients)} ingredients give, to {found:.1e} of Δ{told}"


def locate(soup: Soup, given: Mapping[str, str | Path] | None = None) -> dict[str, Adapter]:
    """The ingredients of a soup that was read, each checked against the hash in the manifest.

    Raises:
        LineageError: One is not found, or has other weights; a name in `given` that is none of them.
    """
    given = given or {}
    if unknown := sorted(given.keys() - {ingredient.name for ingredient in soup.ingredients}):
        raise LineageError(f"the soup has no ingredient {unknown[0]!r}; it has {[i.name for i in soup.ingredients]}")
    found = {}
    for ingredient in soup.ingredients:
        name, source = ingredient.name, given.get(ingredient.name)
        if source is None and ingredient.revision:
            source = pinned(ingredient.source, ingredient.revision)
            if not is_hub_id(source) or Path(source).exists():
                raise LineageError(f"ingredient {name!r} ({source}) is no Hub id: say --ingredient {name}=FOLDER")
        elif source is None:
            # A path that comes from a file leads nowhere but down from here.
            here, place = Path.cwd(), (Path.cwd() / ingredient.source).resolve()
            if not (place.is_relative_to(here) and place.is_dir()):
                raise LineageError(
                    f"ingredient {name!r} ({ingredient.source}) is not here: say --ingredient {name}=FOLDER"
                )
            source = place
        adapter = read_adapter(source)
        if adapter.sha256 != ingredient.sha256:
            raise LineageError(
                f"{source} is not the {name!r} that went into the soup: its weights are {adapter.sha256[:12]}, not "
                f"{ingredient.sha256[:12]}"
            )
        found[name] = adapter
    return found


def _made(
    adapters: dict[str, Adapter],
    soup: Soup,
    lambdas: list[float],
    method: str,
    rank: int | None = None,
    allow_base_mismatch: bool = False,
    base: str | Path | None = None,
) -> Soup:
    allowed = allow_base_mismatch or soup.base_mismatch
    made = interpolate(
        adapters, lambdas, method=method, rank=rank, extrapolate=True, allow_base_mismatch=allowed, base=base
    )
    assert isinstance(made, Soup)
    return made


def patch(
    soup: Soup,
    adapter: str | Path,
    weight: float,
    name: str | None = None,
    *,
    allow_base_mismatch: bool = False,
    base: str | Path | None = None,
) -> Soup:
    """Add one ingredient: (1 - λ)·soup + λ·adapter, so that the others keep their ratio. Theirs are not needed.

    Args:
        soup: That was read. One of method ``factors`` stays one, with an adapter of its start; others become ``exact``.
        adapter: Folder or Hub id.
        weight: λ, in [0, 1].
        name: Of the new ingredient; its folder's by default.
        allow_base_mismatch, base: As `interpolate`.

    Raises:
        LambdasError: λ outside [0, 1], or a name that is taken.
        AdapterError: As `interpolate`.
    """
    if not 0 <= weight <= 1:
        raise LambdasError(f"λ of the new ingredient is {weight}, must be in [0, 1]")
    name = name or Path(str(adapter).partition("@")[0]).name
    if name in {ingredient.name for ingredient in soup.ingredients}:
        raise LambdasError(f"the soup has an ingredient {name!r} already: give the new one another name")
    method = "factors" if soup.method == "factors" else "exact"
    parts = {"soup": soup._file or adapter_of("soup", soup.config, soup.state_dict), name: read_adapter(adapter)}
    made = _made(parts, soup, [1 - weight, weight], method, None, allow_base_mismatch, base)
    if soup.svd_error:  # what was cut off is in none of the ingredients: the soup itself is one
        return made
    manifest, before = made.lineage, soup.lineage
    old = [ingredient | {"lambda": ingredient["lambda"] * (1 - weight)} for ingredient in parents_of(before)]
    history = before.get("history", {}) | manifest["history"]
    history.pop(before.get("sha256"), None)  # the soup is no ingredient: its own are
    manifest |= {"ingredients": [*old, manifest["ingredients"][1]], "history": history}
    lambdas = tuple(ingredient["lambda"] for ingredient in manifest["ingredients"])
    whole = adapter_of(f"soup with {name}", made.config, made.state_dict)
    return replace(made, lambdas=lambdas, _manifest=manifest, _adapters={}, _file=whole)


def revert(
    soup: Soup, name: str, ingredients: Mapping[str, str | Path] | None = None, base: str | Path | None = None
) -> Soup:
    """Set an ingredient's λ to 0; the others keep their ratio. Made again from the ingredients.

    Args:
        soup: That was read.
        name: Of the ingredient.
        ingredients, base: As `verify`.

    Raises:
        LineageError: As `verify`; no such ingredient, or nothing is left without it.
    """
    names = [ingredient.name for ingredient in soup.ingredients]
    if name not in names:
        raise LineageError(f"the soup has no ingredient {name!r}; it has {names}")
    kept = [0.0 if n == name else weight for n, weight in zip(names, soup.lambdas, strict=True)]
    if abs(math.fsum(kept)) < 1e-9:
        raise LineageError(f"nothing is left of the soup without {name!r}: the λ of the others are {kept}")
    kept = [weight / math.fsum(kept) for weight in kept]
    rank = soup.lineage.get("rank") if soup.method == "svd" else None
    return _made(locate(soup, ingredients), soup, kept, soup.method, rank, base=base)
