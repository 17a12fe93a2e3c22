"""A model whose λ is an input: every adapter beside one copy of the base, nothing merged, one λ for each row of a batch.

live = rsoups.LiveSoup.from_pretrained("base", {"helpful": a, "harmless": b})
live.generate(prompts, lambdas=[[1, 0], [.5, .5], [0, 1]])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rsoups._errors import AdapterError, LambdasError
from rsoups._resources import resolve
from rsoups.adapters import Adapter, check_compatible, read_adapter
from rsoups.sampling import fast_sampling
from rsoups.soup import Soup, interpolate, named_adapters, weights_of
from rsoups.stacking import check_factors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_METHODS = ("exact", "factors")


@dataclass
class _Mix:
    """λ of a call, and what has been made of it for layers of the same ranks."""

    lambdas: Tensor  # (B, N) or (1, N), float32
    made: dict[Any, Tensor] = field(default_factory=dict)

    def columns(self, ranks: tuple[int, ...], rows: int, like: Tensor) -> Tensor:
        """λi once for each column of ingredient i: (rows, Σr), or (1, Σr) for one λ for all rows."""
        key = (ranks, rows, like.dtype, like.device)
        if key not in self.made:
            repeats = torch.tensor(ranks)
            self.made[key] = self.rows(rows).repeat_interleave(repeats, dim=1).to(like.device, like.dtype)
        return self.made[key]

    def rows(self, rows: int) -> Tensor:
        """λ of each row of a batch, which generation repeats for several sequences or beams of a prompt."""
        if len(self.lambdas) in (1, rows):
            return self.lambdas
        if rows % len(self.lambdas):
            raise LambdasError(f"{len(self.lambdas)} rows of λ for a batch of {rows}: one for all, or one for each row")
        return self.lambdas.repeat_interleave(rows // len(self.lambdas), dim=0)


class LiveSoup:
    """One base and N adapters, interpolated as it runs: θ0 + Σ λi·Δi with λ of each row of the batch.

    λ travels with the call (a context variable), so that calls in several threads never mix. Outside of `at` the base is
    itself. Over bases in any precision, 8 and 4 bit included.

    Attributes:
        model: The base, with hooks on the adapted layers.
        tokenizer: Its tokenizer, None where there is none.
        names: Of the ingredients, in λ's order.
        method: ``exact`` or ``factors``, as in `interpolate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Sequence[Any] | Mapping[str, Any],
        method: str = "exact",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        """Put adapters on a loaded base, until `remove`.

        Raises:
            AdapterError: As `interpolate`; for whole trained parameters, which no λ of a row can choose; for a base without
                one of the layers, and for layers that are neither linear nor embeddings.
        """
        if method not in _METHODS:
            raise LambdasError(f"method is {method!r}, must be one of {list(_METHODS)}")
        named = named_adapters(adapters)
        self._adapters = {name: a if isinstance(a, Adapter) else read_adapter(a) for name, a in named.items()}
        several = list(self._adapters.values())
        check_compatible(several)
        if method == "factors":
            check_factors(several)
        for adapter in several:
            if adapter.full:
                raise AdapterError(
                    f"{adapter.source}: {adapter.full[0]} was trained as a whole: it would have to be another one in each row; "
                    "make a soup for each λ with rsoups.interpolate"
                )
            adapter.check_values()
        self.model, self.tokenizer, self.method = model.eval(), tokenizer, method
        self.names = list(self._adapters)
        self._mix: ContextVar[_Mix | None] = ContextVar("rsoups_mix", default=None)
        self._hooks: list[Any] = []
        try:
            for path in dict.fromkeys(path for adapter in several for path in adapter.modules):
                layer = _layer(model, path)
                _check_shape(layer, path, several)
                self._hooks.append(layer.register_forward_hook(self._hook(path)))
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
        **kwargs: Any,
    ) -> LiveSoup:
        """Load a base with its tokenizer, and put adapters on it.

        Args:
            base: Hub id, folder or ``rsoups/...``.
            adapters: As `interpolate` takes them.
            method: ``exact`` or ``factors``.
            quantization: ``"8bit"``, ``"4bit"`` or a quantization config of transformers.
            kwargs: To ``AutoModelForCausalLM.from_pretrained``: revision, dtype, device_map, ...
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        source = resolve(base)
        if isinstance(quantization, str):
            if quantization not in ("8bit", "4bit"):
                raise LambdasError(f"quantization is {quantization!r}, must be '8bit', '4bit' or a config")
            quantization = BitsAndBytesConfig(**{f"load_in_{quantization}": True})
        if quantization is not None:
            kwargs["quantization_config"] = quantization
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kwargs.setdefault("dtype", torch.float32 if source != base or device == "cpu" else "auto")
        model = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, **kwargs)
        if quantization is None and "device_map" not in kwargs:
            nn.Module.to(model, device)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=kwargs.get("revision"))
        return cls(model, adapters, method, tokenizer)

    @contextmanager
    def at(self, lambdas: Any, *, normalize: bool = False, extrapolate: bool = False) -> Iterator[PreTrainedModel]:
        """A context in which calls of the model are those of the soup: λ (N,) for all rows, or (B, N), one for each.

        Any call that keeps rows apart works, `generate` with several sequences or beams of a prompt included.

        Raises:
            LambdasError: As `interpolate`.
        """
        rows = weights_of(lambdas, len(self.names), normalize, extrapolate)
        token = self._mix.set(_Mix(torch.tensor(rows, dtype=torch.float32)))
        try:
            yield self.model
        finally:
            self._mix.reset(token)

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
        soup = interpolate(self._adapters, list(lambdas), method=self.method)
        assert isinstance(soup, Soup)
        return soup

    def remove(self) -> None:
        """Take the adapters off the base."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hook(self, path: str) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        layer = _layer(self.model, path)
        parts = [adapter.modules.get(path) for adapter in self._adapters.values()]
        like = next(part for part in parts if part)
        ranks = tuple(part.rank if part else 0 for part in parts)
        A, B, bias = self._stacked(path, ranks, layer)
        averaged = self.method == "factors" and len(ranks) > 1

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if (mix := self._mix.get()) is None:
                return output
            x = args[0]
            rows = x.shape[0]
            if not like.embedding and x.dim() == 2 and len(mix.lambdas) > 1:
                raise LambdasError(f"layer {path} does not keep the rows of a batch apart: use one λ for all of them")
            low = nn.functional.embedding(x, A) if like.embedding else nn.functional.linear(x.to(A.dtype), A)
            weight = mix.columns(ranks, rows, low)
            weight = weight if low.dim() == 2 else weight.unsqueeze(1)
            low = low * weight
            if averaged:  # Σ λi·Ai first, then each Bi of it
                low = low.unflatten(-1, (len(ranks), ranks[0])).sum(-2)
                low = low.repeat(*[1] * (low.dim() - 1), len(ranks)) * weight
            change = nn.functional.linear(low, B)
            if bias is not None:
                own = mix.rows(rows).to(bias.device, bias.dtype) @ bias
                change = change + (own if change.dim() == 2 else own.unsqueeze(1))
            return output + change.to(output.dtype)

        return hook

    def _stacked(self, path: str, ranks: tuple[int, ...], layer: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
        """All A (Σr, in) (of an embedding (vocabulary, Σr)), all B (out, Σr) with their scalings, all biases (N, out)."""
        weight: Any = layer.weight
        dtype = weight.dtype if weight.dtype.is_floating_point else self.model.dtype
        A: list[Tensor] = []
        B: list[Tensor] = []
        biases: list[Tensor | None] = []
        for adapter in self._adapters.values():
            if (module := adapter.modules.get(path)) is None:
                biases.append(None)
                continue
            A.append(adapter.tensor(module.A).float())
            B.append(adapter.tensor(module.B).float() * module.scaling)
            biases.append(adapter.tensor(module.bias).float() * module.scaling if module.bias else None)
        stacked = torch.cat(A), torch.cat(B, dim=1)
        embedding = next(m for a in self._adapters.values() if (m := a.modules.get(path))).embedding
        a = stacked[0].T.contiguous() if embedding else stacked[0]
        bias = None
        if any(part is not None for part in biases):
            bias = torch.stack([torch.zeros(len(B[0])) if part is None else part for part in biases])
        to = {"device": weight.device, "dtype": dtype}
        return a.to(**to), stacked[1].to(**to), None if bias is None else bias.to(**to)


def _layer(model: PreTrainedModel, path: str) -> nn.Module:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise AdapterError(f"the base {type(model).__name__} has no layer {path}") from None
    if not isinstance(layer, (nn.Linear, Conv1D, nn.Embedding)):
        raise AdapterError(f"{path} is a {type(layer).__name__}: a live soup covers linear layers and embeddings")
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
