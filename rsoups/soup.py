"""Interpolate adapters: θ(λ) = θ0 + Σ λi·Δi (Rewarded soups, arXiv 2306.04488, equation 1), as one PEFT adapter.

soup = rsoups.interpolate({"helpful": "user/helpful-lora", "harmless": "./harmless-lora"}, [0.3, 0.7])
soup.save_pretrained("soup")        # peft.PeftModel.from_pretrained(base, "soup") loads it
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from rsoups._errors import AdapterError, LambdasError
from rsoups._files import whole_folder
from rsoups.adapters import BASE_EMBEDDING, PREFIX, WEIGHTS_FILE, Adapter, LoraModule, check_compatible, read_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOUP_FILE = "soup.json"
_METHODS = ("exact", "factors", "svd")
_SUM_TOLERANCE = 1e-6  # λ in single precision still count as summing to 1
_Modules = dict[str, LoraModule]


@dataclass(frozen=True)
class Ingredient:
    """Where one adapter of a soup came from.

    Attributes:
        name: The key or the folder's name it was given under.
        source: Hub id or folder; of an absolute path only the last part, so that publishing tells no one's disk.
        revision: Hub commit, or None.
        sha256: Of its weights.
    """

    name: str
    source: str
    revision: str | None
    sha256: str


@dataclass(frozen=True, eq=False)
class Soup:
    """An interpolation of adapters: an ordinary LoRA with its lineage.

    Attributes:
        state_dict: Tensors by PEFT's names.
        config: PEFT's config.
        lambdas: One weight for each ingredient.
        ingredients: What was interpolated.
        method: ``exact``, ``factors`` or ``svd``.
        base_mismatch: Whether `allow_base_mismatch` let ingredients of differently named bases in.
        svd_error: Relative Frobenius error of Δ, of the whole soup; None unless the method is ``svd``.
        svd_errors: The same for each module.
    """

    state_dict: dict[str, Tensor]
    config: LoraConfig
    lambdas: tuple[float, ...]
    ingredients: tuple[Ingredient, ...]
    method: str
    base_mismatch: bool = False
    svd_error: float | None = None
    svd_errors: dict[str, float] = field(default_factory=dict)

    @property
    def lineage(self) -> dict[str, Any]:
        """What soup.json holds: base, ingredients with their hashes and λ, method, error, versions."""
        return {
            "base": {"model": self.config.base_model_name_or_path, "revision": self.config.revision},
            "base_mismatch_allowed": self.base_mismatch,
            "ingredients": [
                {**asdict(ingredient), "lambda": weight}
                for ingredient, weight in zip(self.ingredients, self.lambdas, strict=True)
            ],
            "method": self.method,
            "svd_error": self.svd_error,
            "versions": {name: version(name) for name in ("rsoups", "peft", "torch")},
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter_model.safetensors, adapter_config.json and soup.json, all or nothing.

        Raises:
            OutputError: The folder holds something other than a soup, or cannot be written.
        """
        with whole_folder(folder, SOUP_FILE) as partial:
            tensors = {key: tensor.contiguous() for key, tensor in self.state_dict.items()}
            save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
            deepcopy(self.config).save_pretrained(str(partial))
            (partial / SOUP_FILE).write_text(json.dumps(self.lineage, indent=2) + "\n", encoding="utf-8")

    def load(self, base: PreTrainedModel) -> PeftModel:
        """Attach the soup to its base; `unload()` of what is returned gives the base back.

        Every tensor is checked to have arrived: PEFT only warns where a base is deeper or a module is missing.

        Raises:
            AdapterError: `base` already carries an adapter, or lacks a module of the soup, or has more or other-shaped ones.
        """
        if isinstance(base, PeftModel):
            raise AdapterError("the base already carries an adapter; load the soup on the plain model")
        try:
            model = get_peft_model(base, deepcopy(self.config))
        except ValueError as error:
            raise AdapterError(f"the soup does not fit this base: {error}") from None
        finally:
            if getattr(base, "peft_config", None) is not None:
                del base.peft_config  # PEFT leaves it behind and would warn at the next load
        with_embeddings = any(key.endswith(BASE_EMBEDDING) for key in self.state_dict)
        try:
            tensors = get_peft_model_state_dict(model, save_embedding_layers=with_embeddings)
            self._check_fit({key: tuple(tensor.shape) for key, tensor in tensors.items()})
            set_peft_model_state_dict(model, dict(self.state_dict))
            for key, loaded in get_peft_model_state_dict(model, save_embedding_layers=with_embeddings).items():
                if not torch.equal(loaded.cpu(), self.state_dict[key].to(loaded.dtype)):
                    raise AdapterError(f"PEFT did not load tensor {key} as it is in the soup")
        except AdapterError:
            model.unload()
            raise
        return model

    def _check_fit(self, wanted: dict[str, tuple[int, ...]]) -> None:
        if absent := sorted(self.state_dict.keys() - wanted.keys()):
            raise AdapterError(
                f"the base has no module for {len(absent)} tensor(s) of the soup, the first is {absent[0]}"
            )
        if extra := sorted(wanted.keys() - self.state_dict.keys()):
            raise AdapterError(
                f"the base has {len(extra)} targeted module(s) more than the soup, the first is {extra[0]}: is it deeper?"
            )
        for key, shape in wanted.items():
            if shape != tuple(self.state_dict[key].shape):
                raise AdapterError(
                    f"tensor {key} is {tuple(self.state_dict[key].shape)} in the soup, the base needs {shape}"
                )

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, commit_message: str | None = None, token: str | None = None
    ) -> str:
        """Publish the soup with a model card, in one commit.

        Returns:
            The URL of the commit.

        Raises:
            HubError: The Hub refuses or cannot be reached; nothing is half-published.
        """
        from rsoups.hub import push

        return push(self, repo_id, private=private, commit_message=commit_message, token=token)


def interpolate(
    adapters: Sequence[Any] | Mapping[str, Any],
    lambdas: Any = None,
    *,
    method: str = "exact",
    rank: int | None = None,
    normalize: bool = False,
    extrapolate: bool = False,
    dtype: torch.dtype | None = None,
    allow_base_mismatch: bool = False,
) -> Soup | list[Soup]:
    """Interpolate adapters of one base.

    Args:
        adapters: N folders, Hub ids, PeftModels, or tuples (PeftModel, adapter name); or a dict of them by name.
        lambdas: N weights, or a K × N matrix for a list of K soups (every ingredient is read once). Uniform by default.
        method: ``exact``: Σ λi·si·Bi·Ai as one LoRA of rank Σ ri. ``factors``: Σ λi·Ai and Σ λi·Bi apart, as the paper's
            code did: the rank stays, and it is right only for adapters from one initialisation. ``svd``: the best
            approximation of exact at `rank` (Eckart-Young), its relative error recorded.
        rank: Of an svd soup; the largest rank among the ingredients by default.
        normalize: Divide the weights by their sum.
        extrapolate: Allow weights outside [0, 1].
        dtype: Of the soup's tensors. By default float32, and for a soup of one ingredient (λ one-hot, or an adapter
            given several times) that adapter's own tensors, bit for bit.
        allow_base_mismatch: Interpolate although the ingredients name different bases; recorded in the lineage.

    Returns:
        A Soup, or a list of them for a matrix.

    Raises:
        AdapterError: As `read_adapter`, and for ingredients that do not fit together.
        LambdasError: Not one finite weight per adapter, not summing to 1, or outside [0, 1].
        ValueError: An unknown method, or a rank that the method does not use.
    """
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}, must be one of {list(_METHODS)}")
    if rank is not None and (method != "svd" or rank < 1):
        raise ValueError(f"rank={rank} with method={method!r}: rank is that of an svd soup, at least 1")
    named = _named(adapters)
    weights = _weights(lambdas, len(named), normalize, extrapolate)
    read = {name: source if isinstance(source, Adapter) else read_adapter(source) for name, source in named.items()}
    check_compatible(read.values(), allow_base_mismatch)
    if method == "factors":
        _check_factors(list(read.values()))

    def soup(row: Sequence[float]) -> Soup:
        kept = _distinct(read.values(), row)
        ingredients = tuple(_ingredient(name, adapter) for name, adapter in read.items())
        whole: dict[str, Any] = {
            "lambdas": tuple(row),
            "ingredients": ingredients,
            "method": method,
            "base_mismatch": allow_base_mismatch,
        }
        if len(kept) == 1 and math.isclose(kept[0][1], 1, abs_tol=1e-12) and (method != "svd" or rank is None):
            alone = kept[0][0]
            state = {key: tensor if dtype is None else tensor.to(dtype) for key, tensor in alone.tensors.items()}
            error = 0.0 if method == "svd" else None
            return Soup(state, _for_inference(alone.config), **whole, svd_error=error)
        full = {key: _sum(kept, key, dtype) for key in kept[0][0].full}
        if method == "factors":
            state = {key: _sum(kept, key, dtype) for key in kept[0][0].tensors}
            return Soup(state, _for_inference(kept[0][0].config), **whole)
        modules = _exact(kept)
        errors: dict[str, float] = {}
        error = None
        if method == "svd":
            largest = max(module.A.shape[0] for adapter, _ in kept for module in adapter.modules.values())
            modules, errors, error = _truncate(modules, rank or largest)
        state = _state_dict(modules, dtype or torch.float32) | full
        return Soup(state, _config([a for a, _ in kept], modules), **whole, svd_error=error, svd_errors=errors)

    soups = [soup(row) for row in weights]
    return soups if lambdas is not None and np.ndim(lambdas) == 2 else soups[0]


def _named(adapters: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(adapters, (str, Path, PeftModel, Adapter)):
        raise AdapterError("interpolate takes a list or a dict of adapters, this is one adapter")
    if not adapters:
        raise LambdasError("no adapters to interpolate")
    if isinstance(adapters, Mapping):
        return dict(adapters)
    names = [Path(s).name if isinstance(s, (str, Path)) else f"adapter {i}" for i, s in enumerate(adapters)]
    if len(set(names)) < len(names):
        names = [f"{name} {i}" for i, name in enumerate(names)]
    return dict(zip(names, adapters, strict=True))


def _weights(lambdas: Any, count: int, normalize: bool, extrapolate: bool) -> list[list[float]]:
    """Checked weights, K rows of `count`."""
    if lambdas is None:
        return [[1 / count] * count]
    try:
        rows = np.atleast_2d(np.asarray(lambdas, dtype=np.float64))
    except (TypeError, ValueError):
        raise LambdasError(f"lambdas must be {count} numbers, or rows of {count} numbers; got {lambdas!r}") from None
    if rows.ndim != 2 or rows.shape[1] != count or not len(rows):
        raise LambdasError(f"lambdas have shape {np.shape(lambdas)}, but there are {count} adapters: one λ for each")
    for row in rows:
        if not np.isfinite(row).all():
            raise LambdasError(f"lambdas {row.tolist()} hold NaN or infinity")
        total = math.fsum(row)
        if normalize:
            if abs(total) < _SUM_TOLERANCE:
                raise LambdasError(f"lambdas {row.tolist()} sum to {total:g}: they cannot be normalized")
            row /= total
        elif abs(total - 1) > _SUM_TOLERANCE:
            raise LambdasError(f"lambdas {row.tolist()} sum to {total:g}, not 1; normalize=True divides by the sum")
        if not extrapolate and ((row < 0).any() or (row > 1 + _SUM_TOLERANCE).any()):
            raise LambdasError(f"lambdas {row.tolist()} are not all within [0, 1]; extrapolate=True allows it")
    return [[float(value) for value in row] for row in rows]


def _distinct(adapters: Any, row: Sequence[float]) -> list[tuple[Adapter, float]]:
    """Adapters of non-zero weight, each once: an adapter given twice is itself with the sum of its weights."""
    found: dict[str, tuple[Adapter, list[float]]] = {}
    for adapter, weight in zip(adapters, row, strict=True):
        key = adapter.sha256 + json.dumps({path: m.scaling for path, m in adapter.modules.items()})
        found.setdefault(key, (adapter, []))[1].append(weight)
    kept = [(adapter, math.fsum(weights)) for adapter, weights in found.values()]
    return [(adapter, weight) for adapter, weight in kept if weight] or kept[:1]


def _ingredient(name: str, adapter: Adapter) -> Ingredient:
    source = Path(adapter.source)
    return Ingredient(name, source.name if source.is_absolute() else adapter.source, adapter.revision, adapter.sha256)


def _sum(kept: list[tuple[Adapter, float]], key: str, dtype: torch.dtype | None) -> Tensor:
    """Σ λi·Ti of one tensor in float64, rounded once."""
    total = torch.zeros_like(kept[0][0].tensors[key], dtype=torch.float64)
    for adapter, weight in kept:
        total += weight * adapter.tensors[key].double()
    return total.to(dtype or torch.float32)


def _exact(kept: list[tuple[Adapter, float]]) -> _Modules:
    """Each module's Δ = Σ λi·si·Bi·Ai as one pair of stacked factors; λi·si goes into B, in float64."""
    modules = {}
    with_bias = any(module.bias is not None for adapter, _ in kept for module in adapter.modules.values())
    for path in dict.fromkeys(path for adapter, _ in kept for path in adapter.modules):
        parts = [(a.modules[path], weight) for a, weight in kept if path in a.modules]
        A = torch.cat([module.A.double() for module, _ in parts], dim=0)
        B = torch.cat([weight * module.scaling * module.B.double() for module, weight in parts], dim=1)
        bias = None
        if with_bias:
            bias = torch.zeros(B.shape[0], dtype=torch.float64)
            for module, weight in parts:
                if module.bias is not None:
                    bias += weight * module.scaling * module.bias.double()
        modules[path] = LoraModule(A, B, 1.0, bias, parts[0][0].embedding)
    return modules


def _truncate(modules: _Modules, rank: int) -> tuple[_Modules, dict[str, float], float]:
    """The best approximation of each Δ of at most `rank`, with its relative Frobenius error, per module and in all.

    From the factors: QR of B and of Aᵀ leaves an SVD of a Σr × Σr core; the dense Δ is never formed.
    """
    out, errors = {}, {}
    lost_in_all = total_in_all = 0.0
    for path, module in modules.items():
        q_b, r_b = torch.linalg.qr(module.B.flatten(1))
        q_a, r_a = torch.linalg.qr(module.A.flatten(1).T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        k = min(rank, len(s))
        root = s[:k].sqrt()
        A = (root[:, None] * (vh[:k] @ q_a.T)).reshape(k, *module.A.shape[1:])
        B = ((q_b @ u[:, :k]) * root).reshape(module.B.shape[0], k, *module.B.shape[2:])
        out[path] = LoraModule(A, B, 1.0, module.bias, module.embedding)
        lost, total = float((s[k:] ** 2).sum()), float((s**2).sum())
        errors[path] = math.sqrt(lost / total) if total else 0.0
        lost_in_all, total_in_all = lost_in_all + lost, total_in_all + total
    return out, errors, math.sqrt(lost_in_all / total_in_all) if total_in_all else 0.0


def _check_factors(adapters: list[Adapter]) -> None:
    first, *others = adapters
    for other in others:
        if first.tensors.keys() != other.tensors.keys():
            raise AdapterError(
                f"method 'factors' needs the same modules in all ingredients; "
                f"{first.source} and {other.source} differ: use 'exact'"
            )
        for path, module in first.modules.items():
            ranks = module.A.shape[0], other.modules[path].A.shape[0]
            scalings = module.scaling, other.modules[path].scaling
            if ranks[0] != ranks[1] or scalings[0] != scalings[1]:
                raise AdapterError(
                    f"method 'factors' needs one rank and one alpha; module {path} has ranks {ranks} and scalings {scalings} "
                    f"in {first.source} and {other.source}: use 'exact'"
                )


def _state_dict(modules: _Modules, dtype: torch.dtype) -> dict[str, Tensor]:
    """PEFT's names for the factors."""
    state = {}
    for path, module in modules.items():
        kind, suffix = ("lora_embedding_", "") if module.embedding else ("lora_", ".weight")
        state[f"{PREFIX}{path}.{kind}A{suffix}"] = module.A.to(dtype)
        state[f"{PREFIX}{path}.{kind}B{suffix}"] = module.B.to(dtype)
        if module.bias is not None:
            state[f"{PREFIX}{path}.{kind}B.bias"] = module.bias.to(dtype)
    return state


def _for_inference(config: LoraConfig) -> LoraConfig:
    config = deepcopy(config)
    config.inference_mode = True
    return config


def _config(adapters: list[Adapter], modules: _Modules) -> LoraConfig:
    """A config of the stacked factors: alpha equal to the rank, so that PEFT scales by 1, module by module."""
    config = _for_inference(adapters[0].config)
    ranks = {path: module.A.shape[0] for path, module in modules.items()}
    config.r = config.lora_alpha = Counter(ranks.values()).most_common(1)[0][0]
    config.rank_pattern = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora = False
    config.lora_bias = any(module.bias is not None for module in modules.values())
    config.lora_dropout = 0.0
    config.init_lora_weights = True
    selection = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    if any(getattr(a.config, name) != getattr(config, name) for a in adapters for name in selection):
        config.target_modules = "|".join(re.escape(path) for path in modules)  # PEFT matches a string as a whole
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config
