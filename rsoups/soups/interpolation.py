"""Interpolate adapters: θ(λ) = θ0 + Σ λi·Δi (Rewarded soups, arXiv 2306.04488, equation 1), as one PEFT adapter.

soup = rsoups.interpolate({"helpful": "user/helpful-lora", "harmless": "./harmless-lora"}, [0.3, 0.7])
soup.save_pretrained("soup")        # peft.PeftModel.from_pretrained(base, "soup") loads it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsoups.adapters.adapter import Adapter, adapter_of, is_peft_model, read_adapter
from rsoups.common.errors import AdapterError, LambdasError
from rsoups.soups import methods
from rsoups.soups.lambdas import weights_of
from rsoups.soups.soup import Soup, soups_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Options(TypedDict, total=False):
    """Keywords of `interpolate`, for its overloads."""

    method: str
    rank: int | float | None
    normalize: bool
    extrapolate: bool
    dtype: torch.dtype | None
    allow_base_mismatch: bool
    base: str | Path | PreTrainedModel | None


_Adapters = Sequence[Any] | Mapping[str, Any]


@overload
def interpolate(adapters: _Adapters, lambdas: Sequence[float] | None = None, **options: Unpack[_Options]) -> Soup: ...
@overload
def interpolate(adapters: _Adapters, lambdas: Sequence[Sequence[float]], **options: Unpack[_Options]) -> list[Soup]: ...
@overload
def interpolate(adapters: _Adapters, lambdas: NDArray[Any] | Tensor, **options: Unpack[_Options]) -> Any: ...
def interpolate(
    adapters: _Adapters,
    lambdas: Any = None,
    *,
    method: str = "exact",
    rank: int | float | None = None,
    normalize: bool = False,
    extrapolate: bool = False,
    dtype: torch.dtype | None = None,
    allow_base_mismatch: bool = False,
    base: str | Path | PreTrainedModel | None = None,
) -> Soup | list[Soup]:
    """Interpolate adapters of one base.

    Args:
        adapters: N folders, Hub ids, PeftModels, tuples (PeftModel, adapter name) or Soups; or a dict of them by name. A
            Soup stands for its ingredients (one of method ``factors`` only in a soup of that method: elsewhere it is an
            adapter of its own).
        lambdas: N weights, or a K × N matrix for a list of K soups. (Every ingredient is then read once, and kept in memory as
            long as one of them is, unless it has more than 1 GiB.) Uniform by default.
        method: ``exact``: Σ λi·si·Bi·Ai as one LoRA of rank Σ ri. ``factors``: Σ λi·Ai and Σ λi·Bi apart, as the paper's
            code did: the rank stays, and it is right only for adapters from one initialization (of others it warns). ``svd``:
            the best approximation of exact at `rank` (Eckart-Young), its relative error recorded.
        rank: Rank of an svd soup: an int, or a float below 1 that bounds each module's relative error (.01: 1%). The largest
            rank among the ingredients by default.
        normalize: Divide the weights by their sum.
        extrapolate: Allow weights outside [0, 1] and sums other than 1 (task arithmetic: θ0 + Σ λi·Δi still).
        dtype: Dtype of the soup's tensors. By default float32, and for a soup of one ingredient (λ one-hot, or an adapter
            given several times) that adapter's own tensors, bit for bit.
        allow_base_mismatch: Interpolate although the ingredients name different bases; recorded in the lineage.
        base: Folder or Hub id of the base, or the loaded base. It is needed where only some ingredients hold a parameter that
            was trained as a whole (a head, embeddings, biases), or where λ do not sum to 1: the rest is the base's own; and
            where nothing else tells old names of layers from new ones.

    Returns:
        A Soup, or a list of them for a matrix.

    Raises:
        AdapterError: As `read_adapter`; for tensors that are not finite, or no longer are in `dtype`; and for
            ingredients that do not fit together.
        LambdasError: Not one finite weight per adapter, not summing to 1, or outside [0, 1]; an unknown method, or a rank
            that the method does not use.
    """
    methods.check_method(method, rank)
    named = named_adapters(adapters)
    named, rows = _flattened(named, weights_of(lambdas, len(named), normalize, extrapolate), method)
    soups = soups_of(opened(named, hold=len(rows) > 1), rows, method, rank, dtype, allow_base_mismatch, base)
    return soups if lambdas is not None and np.ndim(lambdas) == 2 else soups[0]


def named_adapters(adapters: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Name the adapters that `interpolate` takes.

    Raises:
        AdapterError: One adapter, not a list or a dict.
        LambdasError: No adapters.
    """
    if isinstance(adapters, (str, Path, Adapter, Soup)) or is_peft_model(adapters):
        raise AdapterError("interpolate takes a list or a dict of adapters, this is one adapter")
    if not adapters:
        raise LambdasError("no adapters to interpolate")
    if isinstance(adapters, Mapping):
        return dict(adapters)
    names = [Path(s).name if isinstance(s, (str, Path)) else f"adapter {i}" for i, s in enumerate(adapters)]
    if len(set(names)) < len(names):
        names = [f"{name} {i}" for i, name in enumerate(names)]
    return dict(zip(names, adapters, strict=True))


def opened(named: Mapping[str, Any], hold: bool = False) -> dict[str, Adapter]:
    """Read adapters, unless they are read already; `hold` as of `read_adapter`."""
    return {name: each if isinstance(each, Adapter) else read_adapter(each, hold) for name, each in named.items()}


def _flattened(named: dict[str, Any], rows: list[list[float]], method: str) -> tuple[dict[str, Any], list[list[float]]]:
    """Soups among the ingredients replaced by their own ingredients; one that is in several soups is there once."""
    out: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    from_soups: dict[str, str] = {}  # hash -> name

    def add(name: str, adapter: Any, column: Any) -> None:
        out.setdefault(name, adapter)
        columns[name] = columns.get(name, 0) + column

    for (name, source), column in zip(named.items(), np.array(rows).T, strict=True):
        if not isinstance(source, Soup):
            add(name, source, column)
        elif source._file is not None:  # it was read: its ingredients are not at hand
            add(name, source._file, column)
        elif source.method == "factors" and method != "factors":
            add(name, adapter_of(f"soup {name!r}", source.settings, source.state_dict), column)
        else:
            parts = zip(source.ingredients, source._adapters.values(), source.lambdas, strict=True)
            for ingredient, adapter, weight in parts:
                unused = ingredient.name
                while unused in named or unused in out:
                    unused = f"{name}/{unused}"
                add(from_soups.setdefault(ingredient.sha256, unused), adapter, weight * column)
    return out, np.stack(list(columns.values()), axis=1).tolist()
