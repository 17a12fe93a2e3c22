"""Rebuild soups from their ingredients: check a soup against its manifest, add an ingredient, take one out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.adapters.lineage import Ingredient, parents_of, pinned
from rsoups.common.errors import LambdasError, LineageError
from rsoups.common.files import is_hub_id
from rsoups.soups.interpolation import interpolate
from rsoups.soups.soup import Soup
from rsoups.versions.compare import compare
from rsoups.versions.inspect import ALL_LAYERS

_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # relative, of Δ: the rounding of the soup's own tensors
_FLOAT_TOLERANCE = 1e-5


def verify(
    source: str | Path, ingredients: Mapping[str, str | Path] | None = None, base: str | Path | None = None
) -> str:
    """Make a soup again from its ingredients, and compare.

    Args:
        source: Folder or Hub id of the soup.
        ingredients: Folder or Hub id of some ingredients, by name. The others are where the manifest says: on the Hub at
            their commit, or in a folder below the current one.
        base: As `interpolate`, for a soup that was made with it.

    Returns:
        The result, in a line.

    Raises:
        LineageError: The weights are not those of the manifest, an ingredient is not found or is not the one that went in, or
            the soup is not what its ingredients give.
    """
    soup = Soup.from_pretrained(source)
    own, recorded = soup.as_adapter(), soup.lineage.get("sha256")
    if recorded not in (None, own.sha256):
        raise LineageError(f"{source}: its weights are {own.sha256[:12]}, soup.json was written for {recorded[:12]}")

    method = "factors" if soup.method == "factors" else "exact"
    adapters = locate(soup, ingredients)
    again = interpolate(
        adapters,
        soup.lambdas,
        method=method,
        extrapolate=True,
        allow_base_mismatch=soup.base_mismatch,
        base=base,
    )
    ours, theirs = soup.state_dict, again.state_dict
    if ours.keys() == theirs.keys() and all(torch.equal(theirs[key].to(ours[key].dtype), ours[key]) for key in ours):
        return f"{source}: bit for bit what its {len(soup.ingredients)} ingredients give"

    changes = compare(again.as_adapter(), own)
    distance, expected = changes[ALL_LAYERS].relative, soup.svd_error or 0.0
    tolerance = _TOLERANCE.get(next(iter(ours.values())).dtype, _FLOAT_TOLERANCE) + expected / 100
    if not abs(distance - expected) <= tolerance:
        raise LineageError(
            f"{source}: Δ is {distance:.2e} away from what its ingredients give, not {expected:.2e}: it is another soup"
        )
    cut = f", as its truncation to rank {soup.lineage.get('rank')} leaves it" if soup.svd_error else ""
    return f"{source}: what its {len(soup.ingredients)} ingredients give, to {distance:.1e} of Δ{cut}"


def locate(soup: Soup, given: Mapping[str, str | Path] | None = None) -> dict[str, Adapter]:
    """Read the ingredients of a soup that was read, and check each against the hash in the manifest.

    Args:
        soup: The soup.
        given: As `verify`'s `ingredients`.

    Raises:
        LineageError: An ingredient is not found, or has other weights; or `given` has the name of no ingredient.
    """
    given = given or {}
    if unknown := sorted(given.keys() - set(soup.names)):
        raise LineageError(f"the soup has no ingredient {unknown[0]!r}; it has {soup.names}")
    adapters = {}
    for ingredient in soup.ingredients:
        source = given.get(ingredient.name) or _recorded_place(ingredient)
        adapter = read_adapter(source)
        if adapter.sha256 != ingredient.sha256:
            raise LineageError(
                f"{source} is not the {ingredient.name!r} that went into the soup: its weights are {adapter.sha256[:12]}, "
                f"not {ingredient.sha256[:12]}"
            )
        adapters[ingredient.name] = adapter
    return adapters


def _recorded_place(ingredient: Ingredient) -> str | Path:
    """The place of an ingredient by the manifest, which may come from anyone: a path must lead down from here."""
    remedy = f"say --ingredient {ingredient.name}=FOLDER"
    if ingredient.revision:
        source = pinned(ingredient.source, ingredient.revision)
        if not is_hub_id(source) or Path(source).exists():
            raise LineageError(f"ingredient {ingredient.name!r} ({source}) is no Hub id: {remedy}")
        return source
    place = (Path.cwd() / ingredient.source).resolve()
    if not (place.is_relative_to(Path.cwd()) and place.is_dir()):
        raise LineageError(f"ingredient {ingredient.name!r} ({ingredient.source}) is not here: {remedy}")
    return place


def patch(
    soup: Soup,
    adapter: str | Path,
    weight: float,
    name: str | None = None,
    *,
    allow_base_mismatch: bool = False,
    base: str | Path | None = None,
) -> Soup:
    """Add one ingredient: (1 - λ)·soup + λ·adapter, so that the others keep their ratio. They are not needed.

    Args:
        soup: Soup that was read. A ``factors`` soup stays one, with an adapter of its start; others become ``exact``.
        adapter: Folder or Hub id of the new ingredient.
        weight: λ of the new ingredient, in [0, 1].
        name: Name of the new ingredient; its folder's by default.
        allow_base_mismatch, base: As `interpolate`.

    Raises:
        LambdasError: λ is outside [0, 1], or the name is taken.
        AdapterError: As `interpolate`.
    """
    if not 0 <= weight <= 1:
        raise LambdasError(f"λ of the new ingredient is {weight}, must be in [0, 1]")
    name = name or Path(str(adapter).partition("@")[0]).name
    if name in soup.names:
        raise LambdasError(f"the soup has an ingredient {name!r} already: give the new one another name")

    method = "factors" if soup.method == "factors" else "exact"
    patched = interpolate(
        {"soup": soup.as_adapter(), name: read_adapter(adapter)},
        [1 - weight, weight],
        method=method,
        allow_base_mismatch=allow_base_mismatch or soup.base_mismatch,
        base=base,
    )
    if soup.svd_error:  # no ingredient has what was cut off, so the soup itself is an ingredient
        return patched

    manifest, before = patched.lineage, soup.lineage
    old = [ingredient | {"lambda": ingredient["lambda"] * (1 - weight)} for ingredient in parents_of(before)]
    history = before.get("history", {}) | manifest["history"]
    history.pop(before.get("sha256"), None)  # the soup is replaced by its own ingredients
    manifest |= {"ingredients": [*old, manifest["ingredients"][1]], "history": history}
    lambdas = tuple(ingredient["lambda"] for ingredient in manifest["ingredients"])
    return replace(patched, lambdas=lambdas, _manifest=manifest, _adapters={}, _file=patched.as_adapter())


def revert(
    soup: Soup, name: str, ingredients: Mapping[str, str | Path] | None = None, base: str | Path | None = None
) -> Soup:
    """Set an ingredient's λ to 0, so that the others keep their ratio. The soup is made again from the ingredients.

    Args:
        soup: Soup that was read.
        name: Name of the ingredient.
        ingredients, base: As `verify`.

    Raises:
        LineageError: As `verify`; or there is no such ingredient, or nothing is left without it.
    """
    if name not in soup.names:
        raise LineageError(f"the soup has no ingredient {name!r}; it has {soup.names}")
    lambdas = [0.0 if other == name else weight for other, weight in zip(soup.names, soup.lambdas, strict=True)]
    total = math.fsum(lambdas)
    if abs(total) < 1e-9:
        raise LineageError(f"nothing is left of the soup without {name!r}: the λ of the others are {lambdas}")
    return interpolate(
        locate(soup, ingredients),
        [weight / total for weight in lambdas],
        method=soup.method,
        rank=soup.lineage.get("rank") if soup.method == "svd" else None,
        extrapolate=True,
        allow_base_mismatch=soup.base_mismatch,
        base=base,
    )
