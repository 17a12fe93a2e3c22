"""Commands that make soups: interpolate, inspect, merge, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rsoups.common.errors import AdapterError


def interpolate(
    adapters: list[str],
    *,
    out: Path,
    lambdas: list[float] | None = None,
    method: Literal["exact", "factors", "svd"] = "exact",
    rank: float | None = None,
    normalize: bool = False,
    extrapolate: bool = False,
    base: str | None = None,
    allow_base_mismatch: bool = False,
) -> None:
    """Make one soup from several adapters.

    Example: `rsoups interpolate helpful=runs/helpful harmless=runs/harmless --lambdas 0.3 0.7 --out soup`

    Args:
        adapters: Folders or Hub ids (id@revision), each as SOURCE or NAME=SOURCE.
        out: Folder of the soup.
        lambdas: One weight for each adapter; uniform if left out.
        method: exact interpolates the changes of weights; factors interpolates A and B apart; svd is exact, cut to a rank.
        rank: Rank of an svd soup; a number below 1 is the largest relative error, which decides the rank.
        normalize: Divide the weights by their sum.
        extrapolate: Allow weights outside [0, 1], and any sum.
        base: Folder or Hub id of the base. Needed where only some adapters trained a parameter, or where layer names are old.
        allow_base_mismatch: Accept a base of another name than the adapters'; recorded in soup.json.
    """
    from rsoups.soups.interpolation import interpolate as interpolated

    soup = interpolated(
        _named(adapters),
        lambdas,
        method=method,
        rank=int(rank) if rank is not None and rank >= 1 and rank == int(rank) else rank,
        normalize=normalize,
        extrapolate=extrapolate,
        allow_base_mismatch=allow_base_mismatch,
        base=base,
    )
    soup.save_pretrained(out)
    print(out)


def inspect(
    adapters: list[str], *, records: Path | None = None, base: str | None = None, allow_base_mismatch: bool = False
) -> None:
    """Show ranks, norms and distances of adapters, and whether they can be interpolated.

    Example: `rsoups inspect runs/helpful runs/harmless`

    Args:
        adapters: Folders or Hub ids (id@revision), each as SOURCE or NAME=SOURCE.
        records: File records.jsonl of a sweep over them; the soups are then searched for barriers.
        base: Folder or Hub id of the base. Needed where only some adapters trained a parameter.
        allow_base_mismatch: Accept a base of another name than the adapters'.
    """
    from rsoups.adapters.adapter import read_adapter
    from rsoups.fronts.front import Front
    from rsoups.versions.inspect import inspect_adapters

    named = _named(adapters)
    sources = named if isinstance(named, dict) else {source: source for source in named}
    inspection = inspect_adapters(
        {name: read_adapter(source) for name, source in sources.items()},
        base,
        allow_base_mismatch=allow_base_mismatch,
    )
    print(inspection.to_text())
    for conflict in inspection.conflicts(Front.from_jsonl(records) if records else None):
        print(f"conflict: {conflict}")


def merge(
    adapter: str,
    *,
    out: Path,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    allow_base_mismatch: bool = False,
) -> None:
    """Write an adapter or a soup into its base: a whole model.

    Example: `rsoups merge soup --out model --dtype bfloat16`

    Args:
        adapter: Folder or Hub id (id@revision).
        out: Folder of the model.
        base: Folder or Hub id; the base that the adapter names if left out.
        dtype: Type of the weights; the base's if left out.
        allow_base_mismatch: Accept a base of another name than the adapter's; recorded in soup.json.
    """
    import torch

    from rsoups.soups.interpolation import interpolate as interpolated

    soup = interpolated([adapter], [1.0])
    source = base or soup.config.base_model_name_or_path
    if not source:
        raise AdapterError(f"{adapter} does not name its base: pass --base")

    soup.merge(source, out, getattr(torch, dtype) if dtype else None, allow_base_mismatch=allow_base_mismatch)
    print(out)


def convert(source: str, *, out: Path | None = None) -> None:
    """Convert pickled weights (.bin, .pt) of an adapter or a model to safetensors.

    Example: `rsoups convert user/old-reward-model`

    Args:
        source: Folder, file or Hub id (id@revision).
        out: New folder; the cache if left out, where every command finds the weights under the same name.
    """
    from rsoups.adapters.convert import convert as converted

    converted(source, out)


def _named(adapters: list[str]) -> list[str] | dict[str, str]:
    """Adapters by name where any name is given."""
    from rsoups.common.assets import named_sources

    if any("=" in adapter and not Path(adapter).exists() for adapter in adapters):
        return named_sources(adapters, "adapters")
    return adapters
