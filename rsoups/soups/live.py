"""A model whose λ is an input: every adapter beside one copy of the base, nothing merged, one λ for each row of a batch.

live = rsoups.LiveSoup.from_pretrained("base", {"helpful": a, "harmless": b})
live.generate(prompts, lambdas=[[1, 0], [.5, .5], [0, 1]])

Mixed rows or merged weights? `at` computes Σr more columns for every token, and takes any λ for any row. `merged` writes one λ
into the weights first, which costs a matmul for each layer, and then runs at the base's own speed: it is faster for many tokens
of one λ, and no other call can use the base meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from threading import Condition, get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rsoups.adapters.adapter import Adapter
from rsoups.bases.compatibility import check_compatible, check_one_base
from rsoups.bases.load import load_base, load_tokenizer
from rsoups.bases.names import check_base
from rsoups.bases.weights import BaseWeights, of_one_base
from rsoups.common.assets import need
from rsoups.common.errors import AdapterError, LambdasError
from rsoups.generation.sampling import fast_sampling
from rsoups.soups.interpolation import interpolate, named_adapters, opened
from rsoups.soups.lambdas import weights_of
from rsoups.soups.live_layers import Change, Mix, changes_of, layer_at
from rsoups.soups.methods import check_factors
from rsoups.soups.soup import Soup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_METHODS = ("exact", "factors")


class _ManyOrOne:
    """A lock that many may share, or one may hold alone."""

    def __init__(self) -> None:
        self._changed, self._sharing = Condition(), 0
        self._alone: int | None = None  # the thread

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._wait(lambda: self._alone is None)
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
            self._wait(lambda: self._alone is None and not self._sharing)
            self._alone = get_ident()
        try:
            yield
        finally:
            with self._changed:
                self._alone = None
                self._changed.notify_all()

    def _wait(self, is_free: Callable[[], bool]) -> None:
        if self._alone == get_ident():  # it would wait for itself
            raise LambdasError("the base is merged at another λ in this thread: leave `merged` first")
        self._changed.wait_for(is_free)


class LiveSoup:
    """One base and N adapters, interpolated as it runs: θ0 + Σ λi·Δi with λ of each row of the batch.

    λ travels with the call (a context variable), so that calls in several threads never mix. Outside of `at` the base is
    itself. The base may have any precision, 8 and 4 bit included.

    Attributes:
        model: The base, with hooks on the adapted layers.
        tokenizer: The base's tokenizer; None if there is none.
        adapters: The ingredients by name, in λ's order.
        names: Their names.
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
            AdapterError: As `interpolate`; for fully trained parameters, which cannot be mixed per row; for a base without
                one of the layers, or of another name; and for layers that are neither linear nor embeddings.
        """
        if method not in _METHODS:
            raise LambdasError(f"method is {method!r}, must be one of {list(_METHODS)}")
        self.adapters = of_one_base(opened(named_adapters(adapters)), BaseWeights(model))
        several = list(self.adapters.values())
        check_compatible(several, allow_base_mismatch, with_base=True)
        check_base([(adapter.source, adapter.config) for adapter in several], model, allow_base_mismatch)
        if method == "factors":
            check_factors(several)
        for adapter in several:
            _check_rows(adapter)
            adapter.check_values()

        self.model, self.tokenizer, self.method = model.eval(), tokenizer, method
        self.names = list(self.adapters)
        self.base_mismatch = allow_base_mismatch
        self._mix: ContextVar[Mix | None] = ContextVar("rsoups_mix", default=None)
        self._turns = _ManyOrOne()
        self._changes = changes_of(model, several, averages=method == "factors" and len(several) > 1)
        self._hooks = [layer_at(model, c.path).register_forward_hook(self._hook(c)) for c in self._changes]

    def __repr__(self) -> str:
        base = f"{type(self.model).__name__} {str(self.model.name_or_path)!r}"
        return f"LiveSoup({', '.join(self.names)}; {self.method}, {len(self._changes)} layers of {base})"

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
            kwargs: Options of ``AutoModelForCausalLM.from_pretrained``: revision, dtype, device_map, ...

        Raises:
            CheckpointError: The base cannot be loaded.
            AdapterError: As the constructor.
        """
        from transformers import BitsAndBytesConfig

        read = opened(named_adapters(adapters))
        if not allow_base_mismatch:  # before the base is loaded
            check_one_base(read.values())
            check_base([(a.source, a.config) for a in read.values()], base, revision=kwargs.get("revision"))
        if isinstance(quantization, str):
            if quantization not in ("8bit", "4bit"):
                raise LambdasError(f"quantization is {quantization!r}, must be '8bit', '4bit' or a config")
            need("bitsandbytes", "quantized")
            quantization = BitsAndBytesConfig(**{f"load_in_{quantization}": True})
        if quantization is not None:
            kwargs["quantization_config"] = quantization

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_base(base, device=device, **kwargs)
        if quantization is None and "device_map" not in kwargs:
            nn.Module.to(model, device)
        tokenizer = load_tokenizer(base, revision=kwargs.get("revision"))
        # The names were checked above. The loaded model may have another one: that of a copy it was loaded from.
        live = cls(model, read, method, tokenizer, allow_base_mismatch=True)
        live.base_mismatch = allow_base_mismatch
        return live

    @contextmanager
    def at(self, lambdas: Any, *, normalize: bool = False, extrapolate: bool = False) -> Iterator[PreTrainedModel]:
        """A context in which calls of the model are those of the soup.

        Any call that keeps rows apart works, `generate` with several sequences or beams of a prompt included.

        Args:
            lambdas: λ (N,) for all rows, or (B, N), one for each.
            normalize, extrapolate: As `interpolate`.

        Raises:
            LambdasError: As `interpolate`.
        """
        rows = weights_of(lambdas, len(self.names), normalize, extrapolate)
        with self.at_weights(torch.tensor(rows, dtype=torch.float32)) as model:
            yield model

    @contextmanager
    def at_weights(self, weights: Tensor) -> Iterator[PreTrainedModel]:
        """`at` any weights (B, N), unchecked; rows of zeros are the base."""
        with self._turns.shared():
            token = self._mix.set(Mix(weights))
            try:
                yield self.model
            finally:
                self._mix.reset(token)

    def keep(self, rows: Tensor) -> None:
        """Within `at` with one λ for each row: the batch goes on with these of its rows, in this order.

        Args:
            rows: Indices of rows (those that have not ended, say). A row may be there several times.
        """
        if (mix := self._mix.get()) is not None:
            mix.keep(rows)

    @contextmanager
    def merged(
        self, lambdas: Sequence[float], *, normalize: bool = False, extrapolate: bool = False
    ) -> Iterator[PreTrainedModel]:
        """A context in which the base's weights are those of the soup at one λ: for many tokens of one λ, faster than `at`.

        It waits for calls within `at`, and they wait for it; a call outside of both sees the soup. The base's own
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
                for change in self._changes:
                    layer = layer_at(self.model, change.path)
                    merged = change.merged(layer, torch.tensor(row))
                    own.append((layer, {name: layer._parameters.get(name) for name in merged}))
                    layer._parameters |= {k: nn.Parameter(v, requires_grad=False) for k, v in merged.items()}
                yield self.model
            finally:
                for layer, parameters in own:
                    layer._parameters |= parameters

    @property
    def can_merge(self) -> bool:
        """Whether `merged` can be used: the adapted weights are floating-point and not packed."""
        weights: list[Any] = [layer_at(self.model, change.path).weight for change in self._changes]
        return not getattr(self.model, "is_quantized", False) and all(w.is_floating_point() for w in weights)

    def generate(
        self,
        prompts: Sequence[str],
        lambdas: Any,
        *,
        max_new_tokens: int = 64,
        seed: int | None = None,
        **settings: Any,
    ) -> list[str]:
        """Return responses to prompts, in one batch.

        Args:
            prompts: Prompts as the policy reads them.
            lambdas: (N,) for all prompts, or (B, N), one λ for each.
            max_new_tokens: Length of the longest response.
            seed: Seed of sampling.
            settings: Settings of transformers' generate: do_sample, temperature, num_return_sequences, ...

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

        # Not `generation.respond`: λ belongs to the rows of this one batch, which may not be split, and any setting of
        # transformers' generate is allowed (beams, several sequences for a prompt), where `respond` samples purely.
        if seed is not None:
            torch.manual_seed(seed)
        with self.at(lambdas), torch.inference_mode(), fast_sampling(self.model.device):
            ids = self.model.generate(
                **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **settings
            )
        return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def to_soup(self, lambdas: Sequence[float]) -> Soup:
        """Return the soup at one λ, to save or publish."""
        return interpolate(self.adapters, list(lambdas), method=self.method, allow_base_mismatch=self.base_mismatch)

    def remove(self) -> None:
        """Take the adapters off the base."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hook(self, change: Change) -> Callable[[nn.Module, tuple, Tensor], Tensor | None]:
        # A forward hook, not a layer in place of the base's: the base keeps its modules, whatever they are (quantized, of a
        # model's own code), and a call outside of `at` costs one look at a context variable.
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            mix = self._mix.get()
            return None if mix is None else change.add_to(output, args[0], mix)

        return hook


def _check_rows(adapter: Adapter) -> None:
    """Refuse what cannot be mixed per row, because it is not added to the output of a layer."""
    remedy = "make a soup for each λ with rsoups.interpolate"
    if adapter.full:
        raise AdapterError(
            f"{adapter.source}: {adapter.full[0]} was trained as a whole: LiveSoup cannot mix fully trained parameters per "
            f"row; {remedy}"
        )
    fused = [path for path, m in adapter.modules.items() if m.experts > 1 or m.parameter not in (None, "weight")]
    if fused:
        raise AdapterError(
            f"{adapter.source}: {fused[0]} holds fused experts, whose change is in no layer's output: {remedy}"
        )
