"""A model whose λ is an input: every adapter beside one copy of the base, nothing merged, one λ for each row of a batch.

live = rsoups.LiveSoup.from_pretrained("base", {"helpful": a, "harmless": b})
live.generate(prompts, lambdas=[[1, 0], [.5, .5], [0, 1]])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate
from threading import Condition, get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.bases.compatibility import check_compatible, check_one_base
from rsoups.bases.load import load_base, load_tokenizer
from rsoups.bases.names import check_base
from rsoups.bases.weights import BaseWeights, of_one_base
from rsoups.common.assets import need, resolve
from rsoups.common.errors import AdapterError, LambdasError
from rsoups.generation.sampling import fast_sampling
from rsoups.soups.attach import output_scale
from rsoups.soups.lambdas import weights_of
from rsoups.soups.methods import check_factors
from rsoups.soups.soup import Soup, interpolate, named_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_METHODS = ("exact", "factors")


# Layers that read one input in the usual architectures: one matmul for the A of all. (Where they do not, each gets its own.)
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(eq=False)
class _Inputs:
    """What layers of one input share: the A of every adapter, one under the other.

    Attributes:
        A: (Σr, in); of an embedding (vocabulary, Σr).
        ranks: For each layer, of each adapter (0 where it has none there).
        embedding: Whether x are ids.
    """

    A: Tensor
    ranks: list[tuple[int, ...]]
    embedding: bool

    def __call__(self, x: Tensor) -> Tensor:
        """(..., Σr)."""
        if self.embedding:
            return nn.functional.embedding(x, self.A)
        return nn.functional.linear(x if x.dtype == self.A.dtype else x.to(self.A.dtype), self.A)


@dataclass(eq=False)
class _Change:
    """What a soup adds to one layer: B·(λ·A·x), A as rows `start` to `stop` of its inputs'.

    Attributes:
        ranks: Of each adapter.
        B: (out, Σr), with the adapters' scalings.
        bias: (N, out), scaled too, or None.
        scale: What the layer multiplies its output by, in `at`: that of some embeddings.
    """

    inputs: _Inputs
    start: int
    stop: int
    ranks: tuple[int, ...]
    B: Tensor
    bias: Tensor | None
    scale: float


class _Mix:
    """λ of a call, and what has been made of it."""

    def __init__(self, lambdas: Tensor):
        self.lambdas = lambdas  # (B, N) or (1, N), float32
        self._columns: dict[tuple[_Inputs, int], Tensor] = {}
        self._last: tuple[_Inputs, Tensor, Tensor] | None = None  # layers of one input are called one after the other

    def low(self, inputs: _Inputs, x: Tensor) -> Tensor:
        """λ·A·x, (..., Σr)."""
        if self._last is None or self._last[0] is not inputs or self._last[1] is not x:
            low = inputs(x)
            self._last = inputs, x, low * self.columns(inputs, low)
        return self._last[2]

    def columns(self, inputs: _Inputs, like: Tensor) -> Tensor:
        """λi once for each row of adapter i's A: (rows, 1, Σr), or (1, 1, Σr) of one λ for all rows."""
        key = inputs, like.shape[0]
        if key not in self._columns:
            repeats = torch.tensor([rank for ranks in inputs.ranks for rank in ranks])
            rows = self.rows(like.shape[0]).repeat(1, len(inputs.ranks)).repeat_interleave(repeats, dim=1)
            rows = rows.to(like.device, like.dtype)
            self._columns[key] = rows if like.dim() == 2 else rows.unsqueeze(1)
        return self._columns[key]

    def rows(self, rows: int) -> Tensor:
        """λ of each row of a batch, which generation repeats for several sequences or beams of a prompt."""
        if len(self.lambdas) in (1, rows):
            return self.lambdas
        if rows % len(self.lambdas):
            raise LambdasError(f"{len(self.lambdas)} rows of λ for a batch of {rows}: one for all, or one for each row")
        return self.lambdas.repeat_interleave(rows // len(self.lambdas), dim=0)

    def keep(self, rows: Tensor) -> None:
        if len(self.lambdas) > 1:
            self.lambdas = self.lambdas[rows.to(self.lambdas.device)]
            self._columns, self._last = {}, None


class _ManyOrOne:
    """A lock that many may share, or one may hold alone."""

    def __init__(self) -> None:
        self._changed, self._sharing = Condition(), 0
        self._alone: int | None = None  # the thread

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            if self._alone == get_ident():
                raise LambdasError("the base is merged at another λ here: leave `merged` before `at`")
            self._changed.wait_for(lambda: self._alone is None)
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            if self._alone == get_ident():
                raise LambdasError("the base is merged at another λ here: leave `merged` first")
            self._changed.wait_for(lambda: self._alone is None and not self._sharing)
            self._alone = get_ident()
        try:
            yield
        finally:
            with self._changed:
                self._alone = None
                self._changed.notify_all()


class LiveSoup:
    """One base and N adapters, interpolated as it runs: θ0 + Σ λi·Δi with λ of each row of the batch.

    λ travels with the call (a context variable), so that calls in several threads never mix. Outside of `at` the base is
    itself. Over bases in any precision, 8 and 4 bit included.

    Attributes:
        model: The base, with hooks on the adapted layers.
        tokenizer: Its tokenizer, None where there is none.
        names: Of the ingredients, in λ's order.
        method: ``exact`` or ``factors``, as in `interpolate`.
        base_mismatch: Whether adapters of other bases were let in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Sequence[Any] | Mapping[str, Any],
        method: str = "exact",
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        allow_base_mismatch: bool = False,
    ):
        """Put adapters on a loaded base, until `remove`.

        Args:
            model: The base.
            adapters: As `interpolate` takes them.
            method: ``exact`` or ``factors``.
            tokenizer: The base's tokenizer.
            allow_base_mismatch: Accept adapters that name other bases; recorded in soups made of them.

        Raises:
            AdapterError: As `interpolate`; for whole trained parameters, which no λ of a row can choose; for a base without
                one of the layers, or of another name; and for layers that are neither linear nor embeddings.
        """
        if method not in _METHODS:
            raise LambdasError(f"method is {method!r}, must be one of {list(_METHODS)}")
        named = named_adapters(adapters)
        read = {name: a if isinstance(a, Adapter) else read_adapter(a) for name, a in named.items()}
        self._adapters = of_one_base(read, BaseWeights(model))
        several = list(self._adapters.values())
        check_compatible(several, allow_base_mismatch, with_base=True)
        check_base([(adapter.source, adapter.config) for adapter in several], model, allow_base_mismatch)
        if method == "factors":
            check_factors(several)
        for adapter in several:
            if adapter.full:
                raise AdapterError(
                    f"{adapter.source}: {adapter.full[0]} was trained as a whole: it would have to be another one in each row; "
                    "make a soup for each λ with rsoups.interpolate"
                )
            if fused := [p for p, m in adapter.modules.items() if m.experts > 1 or p.endswith(".base_layer")]:
                raise AdapterError(
                    f"{adapter.source}: {fused[0]} holds fused experts, whose change is in no layer's output: make a soup for "
                    "each λ with rsoups.interpolate"
                )
            adapter.check_values()
        self.model, self.tokenizer, self.method = model.eval(), tokenizer, method
        self.names = list(self._adapters)
        self.base_mismatch = allow_base_mismatch
        self._mix: ContextVar[_Mix | None] = ContextVar("rsoups_mix", default=None)
        self._turns = _ManyOrOne()
        self._hooks: list[Any] = []
        self._changes: dict[str, _Change] = {}
        try:
            paths = list(dict.fromkeys(path for adapter in several for path in adapter.modules))
            for path in paths:
                output_scale(_layer(model, path), path, model)
                _check_shape(_layer(model, path), path, several)
            for group in _of_one_input(paths):
                self._changes |= self._stacked(group)
            for path, change in self._changes.items():
                self._hooks.append(_layer(model, path).register_forward_hook(self._hook(path, change)))
        except AdapterError:
            self.remove()
            raise

    @classmethod
    def from_pretrained(
        cls,
        base: str,
        adapters: Sequence[Any] | Mapping[str, Any],
        method: str = "exact",
        quantization: Any = None,
        *,
        allow_base_mismatch: bool = False,
        **kwargs: Any,
    ) -> LiveSoup:
        """Load a base with its tokenizer, and put adapters on it.

        Args:
            base: Hub id, folder or ``rsoups/...``.
            adapters: As `interpolate` takes them.
            method: ``exact`` or ``factors``.
            quantization: ``"8bit"``, ``"4bit"`` or a quantization config of transformers.
            allow_base_mismatch: Accept adapters that name other bases.
            kwargs: To ``AutoModelForCausalLM.from_pretrained``: revision, dtype, device_map, ...

        Raises:
            CheckpointError: The base cannot be loaded.
            AdapterError: As of the constructor.
        """
        from transformers import BitsAndBytesConfig

        source = resolve(base)
        named = {name: a if isinstance(a, Adapter) else read_adapter(a) for name, a in named_adapters(adapters).items()}
        if not allow_base_mismatch:  # before the base is loaded
            check_one_base(named.values())
            check_base([(a.source, a.config) for a in named.values()], base, revision=kwargs.get("revision"))
        if isinstance(quantization, str):
            if quantization not in ("8bit", "4bit"):
                raise LambdasError(f"quantization is {quantization!r}, must be '8bit', '4bit' or a config")
            need("bitsandbytes", "quantized")
            quantization = BitsAndBytesConfig(**{f"load_in_{quantization}": True})
        if quantization is not None:
            kwargs["quantization_config"] = quantization
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kwargs.setdefault("dtype", torch.float32 if source != base or device == "cpu" else "auto")
        model = load_base(base, **kwargs)
        if quantization is None and "device_map" not in kwargs:
            nn.Module.to(model, device)
        tokenizer = load_tokenizer(base, revision=kwargs.get("revision"))
        live = cls(
            model, named, method, tokenizer, allow_base_mismatch=True
        )  # it may be loaded from a copy of another name
        live.base_mismatch = allow_base_mismatch
        return live

    @contextmanager
    def at(self, lambdas: Any, *, normalize: bool = False, extrapolate: bool = False) -> Iterator[PreTrainedModel]:
        """A context in which calls of the model are those of the soup: λ (N,) for all rows, or (B, N), one for each.

        Any call that keeps rows apart works, `generate` with several sequences or beams of a prompt included.

        Raises:
            LambdasError: As `interpolate`.
        """
        rows = weights_of(lambdas, len(self.names), normalize, extrapolate)
        with self._at(torch.tensor(rows, dtype=torch.float32)) as model:
            yield model

    @contextmanager
    def _at(self, weights: Tensor) -> Iterator[PreTrainedModel]:
        """`at` any weights (B, N): rows of zeros are the base."""
        with self._turns.shared():
            token = self._mix.set(_Mix(weights))
            try:
                yield self.model
            finally:
                self._mix.reset(token)

    def keep(self, rows: Tensor) -> None:
        """Within `at` one λ for each row: the batch goes on with these of its rows (those that have not ended, say), each as
        often as it is named."""
        if (mix := self._mix.get()) is not None:
            mix.keep(rows)

    @contextmanager
    def merged(
        self, lambdas: Sequence[float], *, normalize: bool = False, extrapolate: bool = False
    ) -> Iterator[PreTrainedModel]:
        """A context in which the base's weights are those of the soup at one λ: for many tokens of one λ, faster than `at`.

        Alone: it waits for calls within `at`, and they wait for it; a call outside of both sees the soup. The base's own
        weights are set aside and put back, the same tensors. Sums are in float32, rounded once.

        Raises:
            LambdasError: As `interpolate`; within `at` or `merged` of the same thread.
            AdapterError: The base is quantized: rounding would lose the change. Use `at`.
        """
        (row,) = weights_of([float(x) for x in lambdas], len(self.names), normalize, extrapolate)
        if not self.can_merge:
            raise AdapterError("the base's weights are quantized and cannot take a soup in: use `at`")
        if self._mix.get() is not None:
            raise LambdasError("`merged` within `at`: leave it first")
        own: list[tuple[nn.Module, dict[str, Any]]] = []
        with self._turns.alone():
            try:
                for path, change in self._changes.items():
                    layer = _layer(self.model, path)
                    merged = self._merged(layer, change, torch.tensor(row))
                    own.append((layer, {name: layer._parameters.get(name) for name in merged}))
                    layer._parameters |= {k: nn.Parameter(v, requires_grad=False) for k, v in merged.items()}
                yield self.model
            finally:
                for layer, parameters in own:
                    layer._parameters |= parameters

    @property
    def can_merge(self) -> bool:
        """Whether `merged` can be used: the adapted weights are floating-point and not packed."""
        weights: list[Any] = [_layer(self.model, path).weight for path in self._changes]
        return not getattr(self.model, "is_quantized", False) and all(w.is_floating_point() for w in weights)

    def _merged(self, layer: nn.Module, change: _Change, row: Tensor) -> dict[str, Tensor]:
        """The layer's parameters at one λ."""
        weight: Any = layer.weight
        repeats = torch.tensor(change.ranks)
        columns = row.repeat_interleave(repeats).to(weight.device)
        A = change.inputs.A[change.start : change.stop] if not change.inputs.embedding else change.inputs.A.T
        A, B = A.float() * columns[:, None], change.B.float()
        if self.method == "factors" and len(change.ranks) > 1:  # Σ λi·Ai first, then each Bi of it
            A = A.unflatten(0, (len(change.ranks), -1)).sum(0).repeat(len(change.ranks), 1) * columns[:, None]
        delta = B @ A  # (out, in)
        if isinstance(layer, (Conv1D, nn.Embedding)):
            delta = delta.T
        out = {"weight": (weight.float() + delta).to(weight.dtype)}
        if change.bias is not None:
            bias = row.to(change.bias.device) @ change.bias.float()
            own: Any = layer.bias
            out["bias"] = (bias if own is None else bias + own.float()).to(weight.dtype)
        return out

    def generate(
        self,
        prompts: Sequence[str],
        lambdas: Any,
        *,
        max_new_tokens: int = 64,
        seed: int | None = None,
        **settings: Any,
    ) -> list[str]:
        """Responses to prompts, in one batch.

        Args:
            prompts: As the policy reads them.
            lambdas: (N,) for all prompts, or (B, N), one λ for each.
            max_new_tokens: Longest response.
            seed: Of sampling.
            settings: Of transformers' generate: do_sample, temperature, num_return_sequences, ...

        Returns:
            One text for each prompt and sequence, without special tokens.
        """
        if self.tokenizer is None:
            raise LambdasError("this LiveSoup was made without a tokenizer: use `at` with ids of your own")
        tokenizer = deepcopy(self.tokenizer)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(self.model.device)
        inputs.pop("token_type_ids", None)
        if seed is not None:
            torch.manual_seed(seed)
        with self.at(lambdas), torch.inference_mode(), fast_sampling(self.model.device):
            ids = self.model.generate(
                **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **settings
            )
        return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def to_soup(self, lambdas: Sequence[float]) -> Soup:
        """The soup at one λ, to save or publish."""
        soup = interpolate(self._adapters, list(lambdas), method=self.method, allow_base_mismatch=self.base_mismatch)
        assert isinstance(soup, Soup)
        return soup

    def remove(self) -> None:
        """Take the adapters off the base."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hook(self, path: str, change: _Change) -> Callable[[nn.Module, tuple, Tensor], Tensor | None]:
        inputs, B, bias = change.inputs, change.B.T * change.scale, change.bias
        count = len(change.ranks) if self.method == "factors" else 1

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if (mix := self._mix.get()) is None:
                return None
            x = args[0]
            if x.dim() == 2 and len(mix.lambdas) > 1 and not inputs.embedding:
                raise LambdasError(f"layer {path} does not keep the rows of a batch apart: use one λ for all of them")
            low = mix.low(inputs, x)[..., change.start : change.stop]
            if count > 1:  # Σ λi·Ai first, then each Bi of it
                low = low.unflatten(-1, (count, -1)).sum(-2).repeat(*[1] * (low.dim() - 1), count)
                low = low * mix.columns(inputs, low)[..., change.start : change.stop]
            if bias is not None:
                own = mix.rows(x.shape[0]).to(bias.device, bias.dtype) @ bias
                output = output + (own if output.dim() == 2 else own.unsqueeze(1)).to(output.dtype)
            if output.dtype != low.dtype:
                return output + (low @ B).to(output.dtype)
            flat = output.flatten(0, -2), low.flatten(0, -2), B
            if torch.is_grad_enabled() or not output.is_contiguous():
                return torch.addmm(*flat).view_as(output)
            flat[0].addmm_(*flat[1:])  # into the layer's fresh output
            return output

        return hook

    def _stacked(self, paths: list[str]) -> dict[str, _Change]:
        """The changes of layers that read one input, their A stacked; in the base's precision."""
        layer: Any = _layer(self.model, paths[0])
        dtype = layer.weight.dtype if layer.weight.dtype.is_floating_point else self.model.dtype
        to = {"device": layer.weight.device, "dtype": dtype}
        like = next(m for a in self._adapters.values() if (m := a.modules.get(paths[0])))
        A: list[Tensor] = []
        rest: list[tuple[tuple[int, ...], Tensor, Tensor | None]] = []
        for path in paths:
            parts = [(adapter, adapter.modules.get(path)) for adapter in self._adapters.values()]
            A += [adapter.tensor(module.A).float() for adapter, module in parts if module]
            B = [adapter.tensor(module.B).float() * module.scaling for adapter, module in parts if module]
            biases = [
                adapter.tensor(module.bias).float() * module.scaling
                if module and module.bias
                else torch.zeros(len(B[0]))
                for adapter, module in parts
            ]
            with_bias = any(module and module.bias for _, module in parts)
            ranks = tuple(module.rank if module else 0 for _, module in parts)
            rest.append((ranks, torch.cat(B, dim=1).to(**to), torch.stack(biases).to(**to) if with_bias else None))
        stacked = torch.cat(A).T.contiguous() if like.embedding else torch.cat(A)
        inputs = _Inputs(stacked.to(**to), [ranks for ranks, _, _ in rest], like.embedding)
        stops = list(accumulate(sum(ranks) for ranks, _, _ in rest))
        return {
            path: _Change(
                inputs, stop - sum(one[0]), stop, *one, output_scale(_layer(self.model, path), path, self.model)
            )
            for path, stop, one in zip(paths, stops, rest, strict=True)
        }


def _of_one_input(paths: list[str]) -> list[list[str]]:
    """Layers, those together that read the same input as far as their names tell."""
    groups: dict[tuple[str, Any], list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        groups.setdefault((parent, next((s for s in _SIBLINGS if name in s), name)), []).append(path)
    return list(groups.values())


def _layer(model: PreTrainedModel, path: str) -> nn.Module:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise AdapterError(f"the base {type(model).__name__} has no layer {path}") from None
    return layer


def _check_shape(layer: nn.Module, path: str, adapters: list[Adapter]) -> None:
    """The base's shape, as its layers tell it where their weights are packed into 4 bit."""
    if isinstance(layer, nn.Linear):
        shape = layer.out_features, layer.in_features
    elif isinstance(layer, nn.Embedding):
        shape = layer.embedding_dim, layer.num_embeddings
    else:
        weight: Any = layer.weight
        shape = tuple(reversed(weight.shape))
    for adapter in adapters:
        if (module := adapter.modules.get(path)) and module.shape != shape:
            raise AdapterError(f"{path} is {shape} in the base, and the one of {adapter.source} is {module.shape}")
