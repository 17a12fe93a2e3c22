"""Models as software: what differs between two, is a soup what its manifest says, add an ingredient, take one out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from rsoups.adapters.adapter import Adapter, adapter_of, read_adapter
from rsoups.adapters.lineage import parents_of, pinned
from rsoups.common.errors import LambdasError, LineageError
from rsoups.common.files import is_hub_id
from rsoups.hub.push import read_soup
from rsoups.soups.compare import ALL_LAYERS, compare
from rsoups.soups.soup import Soup, interpolate

_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of Δ, relative; rounding of the soup's own tensors
_FLOAT = 1e-5


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
    found = compare(adapter_of("what its ingredients give", made.config, made.state_dict), soup._file)[
        ALL_LAYERS
    ].relative
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
