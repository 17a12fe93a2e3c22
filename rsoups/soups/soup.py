"""Interpolate adapters: θ(λ) = θ0 + Σ λi·Δi (Rewarded soups, arXiv 2306.04488, equation 1), as one PEFT adapter.

soup = rsoups.interpolate({"helpful": "user/helpful-lora", "harmless": "./harmless-lora"}, [0.3, 0.7])
soup.save_pretrained("soup")        # peft.PeftModel.from_pretrained(base, "soup") loads it
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from rsoups.adapters import tensor_files
from rsoups.adapters.adapter import BASE_EMBEDDING, Adapter, adapter_of, holds_tokens, read_adapter
from rsoups.adapters.filenames import SOUP_FILE, WEIGHTS_FILE
from rsoups.adapters.layer_names import PREFIX
from rsoups.adapters.lineage import (
    Ingredient,
    command,
    history_of,
    parents_of,
    pinned,
    published,
    renamed_base,
    scrubbed,
)
from rsoups.adapters.lora_modules import LoraModule, read_modules
from rsoups.bases.compatibility import check_compatible
from rsoups.bases.files import TOKENIZER_FILES, copy_files, tokenizer_folder
from rsoups.bases.names import check_base, public_name, short_name
from rsoups.bases.weights import BaseWeights, of_one_base
from rsoups.common.errors import AdapterError, LambdasError
from rsoups.common.files import whole_folder
from rsoups.soups import attach as attaching
from rsoups.soups import methods as stacking
from rsoups.soups.config import as_written, check_written
from rsoups.soups.methods import Blend, Kept, check_factors, pieces_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rsoups.fronts.front import Front

from rsoups.soups.lambdas import SUM_TOLERANCE, weights_of

_INGREDIENT = ("name", "source", "revision", "sha256")
_A = re.compile(r"\.lora_(embedding_)?A")
METHODS = ("exact", "factors", "svd")


@dataclass(frozen=True, eq=False)
class Soup:
    """An interpolation of adapters: an ordinary LoRA with its lineage.

    Its tensors are made from the ingredients when they are asked for: by `save_pretrained` piece by piece, so that a soup that
    is only saved is never held; by `state_dict` all at once.

    Attributes:
        config: PEFT's config.
        lambdas: One weight for each ingredient.
        method: ``exact``, ``factors`` or ``svd``.
        base_mismatch: Whether `allow_base_mismatch` let ingredients of differently named bases in.
        svd_error: Relative Frobenius error of Δ, of the whole soup; None unless the method is ``svd``.
        svd_errors: The same for each module.
        factors_distance: ‖Δ of ``factors`` - exact Δ‖ / ‖exact Δ‖, measured where the ingredients of a ``factors`` soup
            do not share their initialization; None otherwise.
        tensors: How each tensor is made, by PEFT's names.
    """

    config: LoraConfig
    lambdas: tuple[float, ...]
    method: str
    base_mismatch: bool = False
    svd_error: float | None = None
    svd_errors: dict[str, float] = field(default_factory=dict)
    factors_distance: float | None = None
    tensors: Mapping[str, Blend | Tensor] = field(default_factory=dict, repr=False)
    _adapters: dict[str, Adapter] = field(default_factory=dict, repr=False)
    _manifest: dict[str, Any] | None = field(default=None, repr=False)  # of a soup that was read, not made
    _file: Adapter | None = field(default=None, repr=False)  # and its own adapter
    _base: Any = field(default=None, repr=False)  # that `interpolate` was given

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Soup:
        """A soup that was saved or published, with its lineage; from a folder or a Hub id, as `read_adapter` takes it.

        Raises:
            AdapterError, HubError: As `read_adapter`.
            LineageError: No soup.json, or one that is none.
        """
        from rsoups.hub.push import read_soup

        return read_soup(source)

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by PEFT's names, made when first asked for. What is changed in them is not what `save_pretrained` writes.

        Raises:
            AdapterError: An ingredient's file was written to since it was opened.
        """
        made = {key: tensor.tensor() if isinstance(tensor, Blend) else tensor for key, tensor in self.tensors.items()}
        self._check_unchanged()
        return made

    @cached_property
    def ingredients(self) -> tuple[Ingredient, ...]:
        """What was interpolated, one for each λ. (Their weights are hashed beside the other work: here it is waited for.)"""
        if self._manifest is not None:
            return tuple(Ingredient(**{f: p[f] for f in _INGREDIENT}) for p in parents_of(self._manifest))
        return tuple(_ingredient(name, adapter) for name, adapter in self._adapters.items())

    @property
    def mix(self) -> str:
        """In words: ``0.3 helpful, 0.7 harmless``."""
        return ", ".join(f"{weight:g} {i.name}" for i, weight in zip(self.ingredients, self.lambdas, strict=True))

    @property
    def lineage(self) -> dict[str, Any]:
        """What soup.json holds: base, ingredients with their hashes, λ and own manifests, method, rank, error, versions."""
        if self._manifest is not None:
            return self._manifest
        parents = [(adapter.source, adapter.revision, adapter.sha256) for adapter in self._adapters.values()]
        return {
            "kind": "soup",
            "base": {"model": short_name(self.config.base_model_name_or_path), "revision": self.config.revision},
            "base_mismatch_allowed": self.base_mismatch,
            "ingredients": [
                {**asdict(ingredient), "lambda": weight}
                for ingredient, weight in zip(self.ingredients, self.lambdas, strict=True)
            ],
            "method": self.method,
            "rank": max((module.rank for module in self._modules.values()), default=0),
            "svd_error": self.svd_error,
            "factors_distance": self.factors_distance,
            "versions": {"rsoups": version("rsoups"), "peft": peft.__version__, "torch": str(torch.__version__)},
            "command": command(),
            "history": scrubbed(history_of(parents)),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter_model.safetensors, adapter_config.json and soup.json, all or nothing.

        Where the soup holds embeddings of tokens, the tokenizer that came with the ingredients is copied too.

        Raises:
            OutputError: The folder holds something other than a soup, or cannot be written.
            AdapterError: An ingredient's file was written to since it was opened; PEFT would not load all tensors.
        """
        self.check_loads()
        order = sorted(self.tensors, key=lambda name: (-self.tensors[name].dtype.itemsize, name))  # safetensors' own
        layout = {name: (tensor_files.NAMES[self.tensors[name].dtype], self.tensors[name].shape) for name in order}
        with whole_folder(folder, SOUP_FILE) as partial:
            _, own = tensor_files.write(partial / WEIGHTS_FILE, layout, lambda name: pieces_of(self.tensors[name]))
            as_written(self.config).save_pretrained(str(partial))
            manifest = self.lineage | {"sha256": own}
            (partial / SOUP_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            if self.holds_tokens and (tokenizer := self.tokenizer_folder()) is not None:
                copy_files(tokenizer, TOKENIZER_FILES, partial)
            self._check_unchanged()

    @property
    def holds_tokens(self) -> bool:
        """Whether the soup holds rows of the base's embeddings or head as they were trained."""
        return holds_tokens(self.tensors)

    def published(self, base: str | None = None) -> Soup:
        """The soup as others may read of it: no path of this disk, and the base by a name.

        Args:
            base: Name of the base on the Hub. By default the config's, or the last part of its folder's path, with a warning.
        """
        config = deepcopy(self.config)
        config.base_model_name_or_path = public_name(config.base_model_name_or_path, base)
        names = {self.config.base_model_name_or_path, short_name(self.config.base_model_name_or_path)}
        manifest = renamed_base(scrubbed(self.lineage), names, config.base_model_name_or_path)
        return replace(self, config=config, _manifest=manifest)

    @cached_property
    def layout(self) -> dict[str, Tensor]:
        """Names, shapes and dtypes of the tensors."""
        return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in self.tensors.items()}

    @cached_property
    def _modules(self) -> dict[str, LoraModule]:
        return read_modules("the soup", as_written(self.config), self.layout)

    def check_loads(self) -> None:
        """Check by names and shapes that PEFT loads every tensor of the soup with its config.

        Raises:
            AdapterError: PEFT would pass over a tensor.
        """
        check_written(self.config, self.layout, self._modules)

    def _check_unchanged(self) -> None:
        for adapter in self._adapters.values():
            adapter.check_unchanged()

    def truncate(self, rank: int | float) -> Soup:
        """The best approximation of the soup at a rank, or within a relative error: see `interpolate`'s `rank`.

        Made from the ingredients, whatever an ``svd`` soup has lost of them.

        Raises:
            AdapterError: A ``factors`` soup, which is no larger than its ingredients.
        """
        if self.method == "factors":
            raise AdapterError("a soup of method 'factors' has its ingredients' rank: truncate an 'exact' one")
        soup = interpolate(
            self._adapters or [self._file],
            self.lambdas if self._adapters else [1.0],
            method="svd",
            rank=rank,
            extrapolate=True,
            allow_base_mismatch=self.base_mismatch,
            base=self._base,
        )
        assert isinstance(soup, Soup)
        return replace(soup, lambdas=self.lambdas) if self._adapters else soup

    def merge(
        self,
        base: str | Path | PreTrainedModel,
        out: str | Path,
        dtype: torch.dtype | None = None,
        *,
        allow_base_mismatch: bool = False,
    ) -> None:
        """Write the whole model, θ0 + Σ λi·Δi, with the names of tensors that the base's own files have.

        The tokenizer is the one that came with the adapter, or else the base's.

        Args:
            base: Hub id or folder, or a loaded model, which is left as it was found. One in 4 or 8 bit cannot take Δ
                in: its full-precision weights are read again from where it came.
            out: The folder.
            dtype: Of the result; the base's own by default. Sums are in float32, rounded once.
            allow_base_mismatch: Accept a base of another name than the adapters'; recorded in the model's soup.json.

        Raises:
            AdapterError: The soup does not fit the base, or the base's kind of model cannot hold what the soup changes.
            OutputError: The folder holds something other than a merged soup, or cannot be written.
        """
        from rsoups.soups.merge import merge

        merge(self, base, out, dtype, allow_base_mismatch)

    def load(self, base: PreTrainedModel, *, resize: bool = False, allow_base_mismatch: bool = False) -> PeftModel:
        """Attach the soup to its base; `attached` does so for a while.

        Every tensor is checked to have arrived: PEFT only warns where a base is deeper or a module is missing.

        Args:
            base: The loaded base. Where it is refused, it is as it was.
            resize: Give the base as many tokens as the soup has, if the soup holds the embeddings and the head of all of them.
            allow_base_mismatch: Accept a base of another name than the adapters'.

        Raises:
            AdapterError: `base` already carries an adapter, or lacks a module of the soup, or has more or other-shaped ones;
                or it is not the base that the adapters name.
        """
        return attaching.load(self, base, resize, allow_base_mismatch)

    def attached(
        self, base: PreTrainedModel, *, resize: bool = False, allow_base_mismatch: bool = False
    ) -> AbstractContextManager[PeftModel]:
        """A context in which the soup is on its base, which comes back exactly as it was, however the context ends.

        Args:
            base, resize, allow_base_mismatch: As `load`.

        Raises:
            AdapterError: As `load`; and within the context, where PEFT would merge the soup into the base.
        """
        return attaching.attached(self, base, resize, allow_base_mismatch)

    @property
    def whole(self) -> dict[str, Blend | Tensor]:
        """Whole parameters of the soup, by the base's names."""
        names = [key for key in self.tensors if ".lora_" not in key and not key.endswith(BASE_EMBEDDING)]
        return {name.removeprefix(PREFIX): self.tensors[name] for name in names}

    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer that came with the ingredients is; None where none brings one."""
        for adapter in self._read:
            if (found := tokenizer_folder(pinned(adapter.source, adapter.revision))) is not None:
                return found
        return None

    @property
    def named_configs(self) -> list[tuple[str, LoraConfig]]:
        """Where each ingredient is from, with its config; of a soup that was read, the soup's own."""
        return [(adapter.source, adapter.config) for adapter in self._read] or [("the soup", self.config)]

    @property
    def _read(self) -> list[Adapter]:
        """What the soup was made of, or read from."""
        return list(self._adapters.values()) or [adapter for adapter in [self._file] if adapter is not None]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        front: Front | str | Path | None = None,
        private: bool | None = None,
        license: str | None = None,
        base: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        dry_run: bool | str | Path = False,
        token: str | None = None,
    ) -> str:
        """Publish the soup with its card, and its front where there is one, in one commit: see `rsoups.hub.push.push`.

        Returns:
            The URL of the commit or the pull request; of a dry run the folder that would be pushed.
        """
        from rsoups.hub.push import push

        return push(
            self,
            repo_id,
            front=front,
            private=private,
            license=license,
            base=base,
            commit_message=commit_message,
            create_pr=create_pr,
            dry_run=dry_run,
            token=token,
        )


def interpolate(
    adapters: Sequence[Any] | Mapping[str, Any],
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
        rank: Of an svd soup: an int, or a float below 1 that bounds each module's relative error (.01: 1%). The largest
            rank among the ingredients by default.
        normalize: Divide the weights by their sum.
        extrapolate: Allow weights outside [0, 1] and sums other than 1 (task arithmetic: θ0 + Σ λi·Δi still).
        dtype: Of the soup's tensors. By default float32, and for a soup of one ingredient (λ one-hot, or an adapter
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
    if method not in METHODS:
        raise LambdasError(f"method is {method!r}, must be one of {list(METHODS)}")
    if rank is not None and (method != "svd" or not (0 < rank < 1 or (rank >= 1 and rank == int(rank)))):
        raise LambdasError(
            f"rank={rank} with method={method!r}: rank is that of an svd soup, at least 1, or an error below 1"
        )
    named = named_adapters(adapters)
    rows = weights_of(lambdas, len(named), normalize, extrapolate)
    named, rows = _flattened(named, rows, method)
    hold = len(rows) > 1
    read = {
        name: source if isinstance(source, Adapter) else read_adapter(source, hold) for name, source in named.items()
    }
    weights = BaseWeights(base) if base is not None else None
    if base is not None:
        check_base([(adapter.source, adapter.config) for adapter in read.values()], base, allow_base_mismatch)
    read = of_one_base(read, weights)
    check_compatible(read.values(), allow_base_mismatch, with_base=weights is not None)
    if method == "factors":
        check_factors(list(read.values()))
        _check_sums(rows)
    for adapter in read.values():
        adapter.check_values()  # those of weight 0 too
    same = _same(list(read.values()))
    kept = [_kept(list(read.values()), same, row) for row in rows]
    several = [row for row in kept if not _is_alone(row, rank)]
    made = iter(_made(several, method, rank, dtype, _own(several, weights)))
    parts = [_alone(row[0][0], method, dtype) if _is_alone(row, rank) else next(made) for row in kept]
    whole: dict[str, Any] = {"method": method, "base_mismatch": allow_base_mismatch, "_adapters": read, "_base": base}
    soups = [Soup(lambdas=tuple(row), **part, **whole) for row, part in zip(rows, parts, strict=True)]
    return soups if lambdas is not None and np.ndim(lambdas) == 2 else soups[0]


def named_adapters(adapters: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(adapters, (str, Path, PeftModel, Adapter, Soup)):
        raise AdapterError("interpolate takes a list or a dict of adapters, this is one adapter")
    if not adapters:
        raise LambdasError("no adapters to interpolate")
    if isinstance(adapters, Mapping):
        return dict(adapters)
    names = [Path(s).name if isinstance(s, (str, Path)) else f"adapter {i}" for i, s in enumerate(adapters)]
    if len(set(names)) < len(names):
        names = [f"{name} {i}" for i, name in enumerate(names)]
    return dict(zip(names, adapters, strict=True))


def _flattened(named: dict[str, Any], rows: list[list[float]], method: str) -> tuple[dict[str, Any], list[list[float]]]:
    """Soups among the ingredients exchanged for their own ingredients, one that is in several soups once."""
    out: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    from_soups: dict[str, str] = {}  # hash -> name
    for (name, source), column in zip(named.items(), np.array(rows).T, strict=True):
        if not isinstance(source, Soup):
            inner: list[tuple[str, Any, float]] = [(name, source, 1.0)]
        elif source._file is not None:  # it was read: its ingredients are not at hand
            inner = [(name, source._file, 1.0)]
        elif source.method == "factors" and method != "factors":
            inner = [(name, adapter_of(f"soup {name!r}", source.config, source.state_dict), 1.0)]
        else:
            inner = [
                (
                    from_soups.setdefault(ingredient.sha256, _unused(ingredient.name, name, {**named, **out})),
                    adapter,
                    weight,
                )
                for ingredient, adapter, weight in zip(
                    source.ingredients, source._adapters.values(), source.lambdas, strict=True
                )
            ]
        for key, adapter, weight in inner:
            out.setdefault(key, adapter)
            columns[key] = columns.get(key, 0) + weight * column
    return out, np.stack(list(columns.values()), axis=1).tolist()


def _unused(name: str, outer: str, taken: Mapping[str, Any]) -> str:
    while name in taken:
        name = f"{outer}/{name}"
    return name


def _same(adapters: list[Adapter]) -> list[int]:
    """For each adapter the first one that it equals."""
    known = [(a.sha256, {path: module.scaling for path, module in a.modules.items()}) for a in adapters]
    return [known.index(one) for one in known]


def _kept(adapters: list[Adapter], same: list[int], row: Sequence[float]) -> Kept:
    """Adapters of non-zero weight, each once: an adapter given twice is itself with the sum of its weights."""
    totals = {i: math.fsum(w for j, w in zip(same, row, strict=True) if j == i) for i in dict.fromkeys(same)}
    kept = [(adapters[i], total) for i, total in totals.items() if total]
    return kept or [(adapters[0], 0.0)]


def _is_alone(kept: Kept, rank: int | float | None) -> bool:
    """Whether the soup is one of its ingredients, as it is."""
    return len(kept) == 1 and math.isclose(kept[0][1], 1, abs_tol=1e-12) and rank is None


def _alone(adapter: Adapter, method: str, dtype: torch.dtype | None) -> dict[str, Any]:
    return stacking.alone(adapter, dtype) | {"svd_error": 0.0 if method == "svd" else None}


def _made(
    rows: list[Kept], method: str, rank: int | float | None, dtype: torch.dtype | None, base: Adapter | None
) -> list[dict[str, Any]]:
    if method == "factors":
        return stacking.factors(rows, dtype)
    if method == "svd":
        return [stacking.svd(row, rank, dtype, base) for row in rows]
    return [stacking.exact(row, dtype, base) for row in rows]


def _own(rows: list[Kept], base: BaseWeights | None) -> Adapter | None:
    """The base's own values of all whole parameters of some soups."""
    names = {name: adapter for kept in rows for adapter, _ in kept for name in adapter.full}
    if base is None or not names:
        return None
    config = max((a.config for a in names.values()), key=lambda config: bool(config.trainable_token_indices))
    own = base.like(names, config)
    for name, adapter in names.items():
        if (ours := tuple(own.layout[name].shape)) != (theirs := tuple(adapter.layout[name].shape)):
            raise AdapterError(
                f"{name} is {theirs} in {adapter.source} and {ours} in the base {base.source}: of other sizes"
            )
    return own


def _check_sums(rows: list[list[float]]) -> None:
    """Refuse sums that would scale both factors, and so a change by their square."""
    for row in rows:
        if abs(math.fsum(row) - 1) > SUM_TOLERANCE:
            raise LambdasError(
                f"lambdas {row} sum to {math.fsum(row):g}; method 'factors' would scale A and B by it each: use 'exact' "
                "or 'svd'"
            )


def _ingredient(name: str, adapter: Adapter) -> Ingredient:
    return Ingredient(name, published(adapter.source), adapter.revision, adapter.sha256)
