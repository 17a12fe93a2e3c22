"""A soup: an interpolation of adapters that is an ordinary PEFT adapter, with its lineage.

soup = rsoups.Soup.from_pretrained("user/soup")
model = soup.load(base)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from html import escape
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from rsoups.adapters import tensor_files
from rsoups.adapters.adapter import BASE_EMBEDDING, Adapter, adapter_of, holds_tokens, read_adapter
from rsoups.adapters.filenames import SOUP_FILE, WEIGHTS_FILE
from rsoups.adapters.layer_names import PREFIX, written_name
from rsoups.adapters.lineage import Ingredient, history_of, manifest_of, parents_of, pinned, soup_ingredients
from rsoups.adapters.lora_modules import LoraModule, read_modules
from rsoups.adapters.settings import LoraSettings
from rsoups.bases.compatibility import check_compatible
from rsoups.bases.files import TOKENIZER_FILES, copy_files, tokenizer_folder
from rsoups.bases.names import check_base, short_name
from rsoups.bases.weights import BaseWeights, of_one_base
from rsoups.common.errors import AdapterError, LineageError
from rsoups.common.files import whole_folder
from rsoups.common.published import command, published, scrubbed
from rsoups.soups import methods
from rsoups.soups.blends import Blend, pieces_of, tensor_of
from rsoups.soups.config import as_written, check_written

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from rsoups.fronts.front import Front
    from rsoups.hub.push import PushOptions


@dataclass(frozen=True, eq=False, repr=False)
class Soup:
    """An interpolation of adapters: an ordinary LoRA with its lineage.

    `save_pretrained` makes its tensors piece by piece from the ingredients, so that a soup that is only saved is never held
    in memory; `state_dict` makes all of them at once.

    Attributes:
        lambdas: One weight for each ingredient.
        method: ``exact``, ``factors`` or ``svd``.
        base_mismatch: Whether `allow_base_mismatch` let ingredients of differently named bases in.
        svd_error: Relative Frobenius error of Δ, of the whole soup; None unless the method is ``svd``.
        svd_errors: The same for each module.
        factors_distance: ‖Δ of ``factors`` - exact Δ‖ / ‖exact Δ‖, measured where the ingredients of a ``factors`` soup
            do not share their initialization; None otherwise.
        tensors: How each tensor is made, by PEFT's names.
    """

    _settings: LoraSettings
    lambdas: tuple[float, ...]
    method: str
    base_mismatch: bool = False
    svd_error: float | None = None
    svd_errors: dict[str, float] = field(default_factory=dict)
    factors_distance: float | None = None
    tensors: Mapping[str, Blend | Tensor] = field(default_factory=dict)
    _adapters: dict[str, Adapter] = field(default_factory=dict)  # of a soup that was made
    _manifest: dict[str, Any] | None = None  # of a soup that was read
    _file: Adapter | None = None  # that it was read from
    _base: Any = None  # that `interpolate` was given

    def __repr__(self) -> str:
        rank = max([self.settings.r, *(self.settings.rank_pattern or {}).values()])
        error = f", error {self.svd_error:.2%}" if self.svd_error is not None else ""
        base = short_name(self.settings.base_model_name_or_path) or "no recorded base"
        return f"Soup({self.mix}; {self.method}, rank {rank}{error}, of {base})"

    def _repr_html_(self) -> str:
        """A table of the ingredients, for notebooks."""
        rows = [
            f"<tr><td>{escape(i.name)}</td><td>{weight:g}</td><td>{escape(pinned(i.source, i.revision))}</td></tr>"
            for i, weight in zip(self.ingredients, self.lambdas, strict=True)
        ]
        head = "<tr><th>ingredient</th><th>λ</th><th>source</th></tr>"
        return f"<p>{escape(repr(self))}</p><table>{head}{''.join(rows)}</table>"

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Soup:
        """Read a soup that was saved or published, with its lineage.

        Args:
            source: Folder or Hub id, as `read_adapter` takes it.

        Raises:
            AdapterError, HubError: As `read_adapter`.
            LineageError: There is no soup.json, or it is not that of a soup of adapters.
        """
        adapter, manifest = read_adapter(source), manifest_of(source)
        if manifest is None or "ingredients" not in manifest:
            raise LineageError(
                f"{source} holds no {SOUP_FILE}: rsoups.interpolate([{str(source)!r}], [1.0]) takes any adapter"
            )
        return cls(
            _settings=adapter.settings,
            lambdas=tuple(float(ingredient["lambda"]) for ingredient in soup_ingredients(source, manifest)),
            method=manifest["method"],
            base_mismatch=bool(manifest.get("base_mismatch_allowed")),
            svd_error=manifest.get("svd_error"),
            factors_distance=manifest.get("factors_distance"),
            tensors={written_name(name, adapter.modules): adapter.tensor(name) for name in adapter.layout},
            _manifest=manifest,
            _file=adapter,
        )

    @cached_property
    def config(self) -> LoraConfig:
        """PEFT's config. `save_pretrained` writes changes made to it."""
        return self._settings.config()

    @property
    def settings(self) -> LoraSettings:
        """Fields of PEFT's config."""
        return LoraSettings.of(self.config) if "config" in vars(self) else self._settings

    # --- what it is --------------------------------------------------------------------------------------------------

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by PEFT's names, made when first asked for. `save_pretrained` does not write changes made to them.

        Raises:
            AdapterError: An ingredient's file was written to since it was opened.
        """
        state = {key: tensor_of(tensor) for key, tensor in self.tensors.items()}
        self._check_unchanged()
        return state

    @cached_property
    def layout(self) -> dict[str, Tensor]:
        """Names, shapes and dtypes of the tensors."""
        return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in self.tensors.items()}

    @property
    def whole(self) -> dict[str, Blend | Tensor]:
        """Whole parameters of the soup, by the base's names."""
        names = [key for key in self.tensors if ".lora_" not in key and not key.endswith(BASE_EMBEDDING)]
        return {name.removeprefix(PREFIX): self.tensors[name] for name in names}

    @property
    def names(self) -> list[str]:
        """Names of the ingredients."""
        if self._manifest is not None:
            return [parent["name"] for parent in parents_of(self._manifest)]
        return list(self._adapters)

    @cached_property
    def ingredients(self) -> tuple[Ingredient, ...]:
        """One ingredient for each λ. This waits until their weights are hashed, which goes on beside other work."""
        if self._manifest is not None:
            parents = parents_of(self._manifest)
            return tuple(Ingredient(p["name"], p["source"], p["revision"], p["sha256"]) for p in parents)
        return tuple(
            Ingredient(name, published(adapter.source), adapter.revision, adapter.sha256)
            for name, adapter in self._adapters.items()
        )

    @property
    def sources(self) -> list[tuple[str, str | None]]:
        """Folder or Hub id, and commit, of each ingredient of a soup that was made; none of one that was read."""
        return [(adapter.source.partition("@")[0], adapter.revision) for adapter in self._adapters.values()]

    @property
    def mix(self) -> str:
        """In words: ``0.3 helpful, 0.7 harmless``."""
        return ", ".join(f"{weight:g} {name}" for name, weight in zip(self.names, self.lambdas, strict=True))

    @property
    def lineage(self) -> dict[str, Any]:
        """The content of soup.json: base, ingredients with their hashes, λ and own manifests, method, rank, error, versions."""
        if self._manifest is not None:
            return self._manifest
        parents = [(adapter.source, adapter.revision, adapter.sha256) for adapter in self._adapters.values()]
        return {
            "kind": "soup",
            "base": {"model": short_name(self.settings.base_model_name_or_path), "revision": self.settings.revision},
            "base_mismatch_allowed": self.base_mismatch,
            "ingredients": [
                {**asdict(ingredient), "lambda": weight}
                for ingredient, weight in zip(self.ingredients, self.lambdas, strict=True)
            ],
            "method": self.method,
            "rank": max((module.rank for module in self._modules.values()), default=0),
            "svd_error": self.svd_error,
            "factors_distance": self.factors_distance,
            "versions": {"rsoups": version("rsoups"), "peft": version("peft"), "torch": str(torch.__version__)},
            "command": command(),
            "history": scrubbed(history_of(parents)),
        }

    @property
    def named_configs(self) -> list[tuple[str, LoraSettings]]:
        """Source and settings of each ingredient; of a soup that was read, its own."""
        return [(adapter.source, adapter.settings) for adapter in self._origins] or [("the soup", self.settings)]

    @property
    def _origins(self) -> list[Adapter]:
        """Adapters that the soup was made of, or read from."""
        return list(self._adapters.values()) or [adapter for adapter in [self._file] if adapter is not None]

    def as_adapter(self) -> Adapter:
        """The soup as one adapter: the file that it was read from, or its tensors."""
        return self._file or adapter_of("the soup", self.settings, self.state_dict)

    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer that came with the ingredients; None if none of them has one."""
        folders = (tokenizer_folder(pinned(adapter.source, adapter.revision)) for adapter in self._origins)
        return next((folder for folder in folders if folder is not None), None)

    @cached_property
    def _modules(self) -> dict[str, LoraModule]:
        return read_modules("the soup", as_written(self.settings), self.layout)

    def check_loads(self) -> None:
        """Check by names and shapes that PEFT loads every tensor of the soup with its config.

        Raises:
            AdapterError: PEFT would pass over a tensor.
        """
        check_written(self.settings, self.layout, self._modules)

    def _check_unchanged(self) -> None:
        for adapter in self._adapters.values():
            adapter.check_unchanged()

    # --- what becomes of it ------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter_model.safetensors, adapter_config.json and soup.json, all or nothing.

        A soup that holds embeddings of tokens brings the tokenizer that came with the ingredients.

        Raises:
            OutputError: The folder holds something other than a soup, or cannot be written.
            AdapterError: An ingredient's file was written to since it was opened; PEFT would not load all tensors.
        """
        self.check_loads()
        order = sorted(self.tensors, key=lambda name: (-self.tensors[name].dtype.itemsize, name))  # safetensors' own
        layout = {name: (tensor_files.NAMES[self.tensors[name].dtype], self.tensors[name].shape) for name in order}
        with whole_folder(folder, SOUP_FILE) as partial:
            _, sha256 = tensor_files.write(partial / WEIGHTS_FILE, layout, lambda name: pieces_of(self.tensors[name]))
            self.settings.save(partial)
            manifest = self.lineage | {"sha256": sha256}
            (partial / SOUP_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            if holds_tokens(self.tensors) and (tokenizer := self.tokenizer_folder()) is not None:
                copy_files(tokenizer, TOKENIZER_FILES, partial)
            self._check_unchanged()

    def push_to_hub(
        self, repo_id: str, *, front: Front | str | Path | None = None, **options: Unpack[PushOptions]
    ) -> str:
        """Publish the soup with its card, and its front if there is one, in one commit.

        Args:
            repo_id: ``user/name``; created if it does not exist.
            front: Front with the soup among its points, or its records.jsonl.
            options: ``private``, ``license``, ``base``, ``commit_message``, ``create_pr``, ``dry_run`` and ``token``, as
                `rsoups.hub.push.push` takes them.

        Returns:
            The URL of the commit or the pull request; of a dry run the folder that would be pushed.

        Raises:
            HubError, FrontError: As `rsoups.hub.push.push`.
        """
        from rsoups.hub.push import push

        with TemporaryDirectory() as temporary:
            self.save_pretrained(temporary)
            return push(temporary, repo_id, front=front, sources=self.sources or None, **options)

    def truncate(self, rank: int | float) -> Soup:
        """The best approximation of the soup at a rank, or within a relative error: see `interpolate`'s `rank`.

        It is made from the ingredients, whatever an ``svd`` soup has lost of them.

        Raises:
            AdapterError: A ``factors`` soup, which is no larger than its ingredients.
            LambdasError: As `interpolate`.
        """
        methods.check_method("svd", rank)
        if self.method == "factors":
            raise AdapterError("a soup of method 'factors' has its ingredients' rank: truncate an 'exact' one")
        # A soup that was read is the one ingredient.
        named, row = ({"soup": self._file}, [1.0]) if self._file else (self._adapters, list(self.lambdas))
        (soup,) = soups_of(named, [row], "svd", rank, None, self.base_mismatch, self._base)
        return soup if self._file is not None else replace(soup, lambdas=self.lambdas)

    # The methods below need transformers and PEFT, whose import takes seconds.

    def load(self, base: PreTrainedModel, *, resize: bool = False, allow_base_mismatch: bool = False) -> PeftModel:
        """Attach the soup to its base for good; `attached` does so for a while.

        Args:
            base: The loaded base. If it is refused, it is as it was.
            resize: Give the base as many tokens as the soup has, if the soup holds the embeddings and head of all of them.
            allow_base_mismatch: Accept a base of another name than the adapters'.

        Raises:
            AdapterError: The base carries an adapter, has other modules or shapes than the soup, or another name.
        """
        from rsoups.soups import attach

        return attach.load(self, base, resize=resize, allow_base_mismatch=allow_base_mismatch)

    def attached(
        self, base: PreTrainedModel, *, resize: bool = False, allow_base_mismatch: bool = False
    ) -> AbstractContextManager[PeftModel]:
        """A context in which the soup is on its base. The base comes back exactly as it was, however the context ends.

        Args:
            base, resize, allow_base_mismatch: As `load`.

        Raises:
            AdapterError: As `load`; and within the context, where PEFT would merge the soup into the base.
        """
        from rsoups.soups import attach

        return attach.attached(self, base, resize=resize, allow_base_mismatch=allow_base_mismatch)

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
            base: Hub id, folder or loaded model. Of a model in 4 or 8 bit the full-precision weights are read again.
            out: Folder of the model.
            dtype: Dtype of the result; the base's own by default. Sums are in float32, rounded once.
            allow_base_mismatch: Accept a base of another name than the adapters'; recorded in the model's soup.json.

        Raises:
            AdapterError: The soup does not fit the base, or the base's kind of model cannot hold what the soup changes.
            OutputError: The folder holds something other than a merged soup, or cannot be written.
        """
        from rsoups.soups.merge import merge

        merge(self, base, out, dtype, allow_base_mismatch=allow_base_mismatch)


def soups_of(
    adapters: dict[str, Adapter],
    rows: list[list[float]],
    method: str,
    rank: int | float | None,
    dtype: torch.dtype | None,
    allow_base_mismatch: bool,
    base: str | Path | PreTrainedModel | None,
) -> list[Soup]:
    """Return the soup of each row of λ; arguments and errors as those of `interpolate`, adapters read and λ checked."""
    weights = BaseWeights(base) if base is not None else None
    if base is not None:
        check_base([(adapter.source, adapter.settings) for adapter in adapters.values()], base, allow_base_mismatch)
    adapters = of_one_base(adapters, weights)
    check_compatible(adapters.values(), allow_base_mismatch, with_base=weights is not None)
    if method == "factors":
        methods.check_factors(list(adapters.values()), rows)
    for adapter in adapters.values():
        adapter.check_values()  # also of an adapter whose λ is 0

    mixtures = methods.mixtures(list(adapters.values()), rows, method, rank, dtype, weights)
    return [
        Soup(
            _settings=mixture.settings,
            lambdas=tuple(row),
            method=method,
            base_mismatch=allow_base_mismatch,
            svd_error=mixture.svd_error,
            svd_errors=mixture.svd_errors,
            factors_distance=mixture.factors_distance,
            tensors=mixture.tensors,
            _adapters=adapters,
            _base=base,
        )
        for row, mixture in zip(rows, mixtures, strict=True)
    ]
