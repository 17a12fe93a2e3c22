"""What answers a sweep's prompts: one copy of the base on which every model of the sweep is put, row by row where it can be.

Items (model, prompt, sample) of all models share batches: a live soup gives each row its own λ. Where one λ has so many rows
that it fills batches by itself, they are its own, and its Δ is put into the base's weights for them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from rsoups._errors import AdapterError
from rsoups._resources import base_config, load_base, load_tokenizer, resolve
from rsoups.adapters import Adapter
from rsoups.decoding import Decoder, Prompt, Said, seed_of, uniforms
from rsoups.live import LiveSoup
from rsoups.soup import Soup, interpolate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CPU_TOKENS = 16_384  # of a batch: more is no faster (benchmarks/sweep.py)
# Of one λ in a batch, from which merging it pays. (The embedded policy's few weights are merged in the time of two steps, and
# it pays from one row on; more weights need more tokens.)
_MERGED_TOKENS = 1_024
_ALONE = 1 / 3  # of a batch, that the rows of one λ have to fill to be faster in batches of their own, merged
_FREE = 0.6  # of a GPU's memory, for a batch
Keep = Callable[[Tensor], None] | None
_Key = tuple[int, tuple[int, ...]]  # a prompt's place, a response's tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Model:
    """One model of the sweep: a soup, another adapter, the ensemble of the ingredients, or the base where it is none.

    Attributes:
        name: In the records.
        soup: λ by ingredient.
        other: Name of another adapter.
        ensemble: Whether it is the mean of the ingredients' next-token distributions.
    """

    name: str
    soup: Mapping[str, float] | None = None
    method: str | None = None
    other: str | None = None
    ensemble: bool = False

    @property
    def head(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"name": self.name, "lambdas": self.soup and dict(self.soup), "method": self.method}

    @property
    def key(self) -> str:
        return json.dumps([self.name, self.soup and dict(self.soup), self.method])


@dataclass(frozen=True, eq=False)
class Item:
    """One response to be made.

    Attributes:
        place: Of the prompt in the sweep.
        ids: The prompt's tokens.
        sample: Which response of this model to it.
    """

    model: Model
    place: int
    prompt: Prompt
    ids: list[int]
    sample: int


@dataclass(frozen=True)
class Answer:
    """A whole response: its text, how many tokens it has and, unless a server gave it, these and their log p."""

    text: str
    tokens: int
    said: Said | None = None


class Nats(NamedTuple):
    """What the base makes of a response, as records tell it; None where it is not known."""

    kl: float | None = None
    base_nll: float | None = None


class Base:
    """The base: its tokenizer at once, its weights when there is something to answer."""

    def __init__(self, base: str | PreTrainedModel | LiveSoup, tokenizer: PreTrainedTokenizerBase | None):
        self._base: Any = base
        if isinstance(base, LiveSoup):
            config, tokenizer = base.model.config, tokenizer or base.tokenizer
            source = config.name_or_path
        elif isinstance(base, str):
            source, config = resolve(base), base_config(base)
        else:
            config, source = base.config, base.config.name_or_path
        self.tokenizer = tokenizer or load_tokenizer(source)
        self.context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)

    def fingerprint(self) -> str:
        """Load the weights. SHA-256 of the base's own: of each parameter its name, its shape and 16 values from all over it,
        the same in float32 and in bfloat16. (Left out are parameters that are kept elsewhere while unused, on disk say, and
        the values of 4-bit ones on a CPU, which bitsandbytes packs anew when they are first used.)
        """
        if isinstance(self._base, str):
            self._base = _loaded(self._base)
        found = hashlib.sha256()
        with self._itself() as model:
            for name, parameter in model.named_parameters():
                if parameter.dtype == torch.uint8 and parameter.device.type == "cpu":
                    found.update(f"{name}\n".encode())
                elif not parameter.is_meta:
                    values = parameter.detach().flatten()
                    some = values[:: max(1, len(values) // 16)][:16].to(torch.bfloat16)
                    found.update(f"{name} {tuple(parameter.shape)} {some.tolist()}\n".encode())
        return found.hexdigest()

    def _itself(self) -> AbstractContextManager[PreTrainedModel]:
        """A context in which the loaded base is itself: of a live soup, not merged by another thread."""
        if isinstance(live := self._base, LiveSoup):
            return live._at(torch.zeros(1, len(live.names)))
        return nullcontext(self._base)

    def generator(
        self,
        adapters: Mapping[str, Adapter],
        others: Mapping[str, Adapter],
        method: str,
        ensemble: bool,
        **settings: Any,
    ) -> Generator:
        """What answers, on the weights that were loaded."""
        base = self._base
        places = places_of(base, adapters, others, method, ensemble)
        model = base.model if isinstance(base, LiveSoup) else base
        return Generator(model, self.tokenizer, places, **settings)


class Generator:
    """Answers items in batches, on one base.

    Attributes:
        on_cpu: Whether it keeps the processor's cores busy.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        placed: LivePlaces | AttachedPlaces,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        batch_tokens: int | str = "auto",
    ):
        self._decode = Decoder(model.eval(), tokenizer, temperature, max_new_tokens)
        self.on_cpu = model.device.type == "cpu"
        self._places, self._seed = placed, seed
        self._read: dict[_Key, tuple[float, float]] = {}  # by the base: log p, plain and as it was chosen
        self._tokens = _fitting(model) if batch_tokens == "auto" else int(batch_tokens)

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Items of like length, the longest first, in batches of at most so many tokens, padding included."""
        apart: dict[str, list[Item]] = {}
        for item in items:
            apart.setdefault(item.model.key, []).append(item)
        alone: list[list[Item]] = []
        together: list[Item] = []
        for of_one in apart.values():
            fills = sum(map(self._size, of_one)) >= max(_ALONE * self._tokens, _MERGED_TOKENS)
            model = of_one[0].model
            single = not self._places.mixes or model.ensemble or (fills and self._places.can_merge)
            if single:
                alone.append(of_one)
            else:
                together += of_one
        for group in [*alone, together]:
            yield from self._packed(group)

    def _packed(self, items: list[Item]) -> Iterator[list[Item]]:
        items = sorted(items, key=lambda item: len(item.ids), reverse=True)  # stable: the same for every model
        while items:
            size = max(1, self._tokens // self._size(items[0]))
            yield items[:size]
            items = items[size:]

    def _size(self, item: Item) -> int:
        """Tokens of a row; of an ensemble, of all its rows."""
        members = len(self._places.ingredients) if item.model.ensemble else 1
        return members * (len(item.ids) + self._decode.max_new_tokens)

    def __call__(self, batch: list[Item]) -> list[Answer]:
        """Answers to a batch; where memory does not hold it, in halves, and so from now on."""
        try:
            return self._answers(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not should_reduce_batch_size(error):
                raise
        torch.cuda.empty_cache()
        self._tokens = max(1, sum(map(self._size, batch)) // 2)
        return [answer for half in self._packed(batch) for answer in self(half)]

    def _answers(self, batch: list[Item]) -> list[Answer]:
        prompts = [item.ids for item in batch]
        decode, own = self._decode, None
        if decode.temperature > 0:
            seeds = [seed_of(self._seed, item.prompt, item.sample) for item in batch]
            own = torch.tensor([uniforms(seed, decode.max_new_tokens) for seed in seeds], dtype=torch.float64)
        members = len(self._places.ingredients) if batch[0].model.ensemble else 1
        models = [item.model for item in batch]
        numbers = {model.key: i for i, model in enumerate(models)}
        with self._places.at(models, sum(map(self._size, batch))) as keep:
            said = decode(prompts, own, members, keep, [numbers[model.key] for model in models])
        return [Answer(decode.text(one), len(one.ids), one) for one in said]

    def nats(self, batch: Sequence[Item], answers: Sequence[Answer]) -> list[Nats]:
        """KL of answers to the base, and what they cost under it. What several models say is read once."""
        said = [answer.said for answer in answers if answer.said]
        keys = [(item.place, tuple(one.ids)) for item, one in zip(batch, said, strict=True)]
        new = {key: (item.ids, one) for key, item, one in zip(keys, batch, said, strict=True) if key not in self._read}
        self._read |= zip(new, self._logps(list(new.values())), strict=True)
        return [
            Nats(0.0 if _is_base(item.model) else round(one.logp - chosen, 4), round(-plain, 4))
            for item, one, (plain, chosen) in zip(batch, said, map(self._read.__getitem__, keys), strict=True)
        ]

    def _logps(self, responses: list[tuple[list[int], Said]]) -> list[tuple[float, float]]:
        """Of responses to prompts (tokens) by the base; where memory does not hold them, in halves."""
        try:
            return self._decode.logps([prompt for prompt, _ in responses], [said for _, said in responses])
        except RuntimeError as error:
            if len(responses) == 1 or not should_reduce_batch_size(error):
                raise
        torch.cuda.empty_cache()
        half = len(responses) // 2
        return self._logps(responses[:half]) + self._logps(responses[half:])

    def close(self) -> None:
        """Leave the base as it was found."""
        self._places.close()


class LivePlaces:
    """Rows of any models in one batch, on live soups: one of the ingredients, one of the other adapters."""

    mixes = True

    def __init__(self, live: LiveSoup, others: LiveSoup | None, keep_live: bool):
        self._live, self._others, self._keep_live = live, others, keep_live
        self.ingredients, self.can_merge = live.names, live.can_merge

    @contextmanager
    def at(self, models: Sequence[Model], tokens: int) -> Iterator[Keep]:
        """A context in which the base is these models, row by row; yields what is told of the rows that remain,
        None where they are all of one."""
        lives = [live for live in (self._live, self._others) if live is not None]
        first = models[0]
        with ExitStack() as stack:
            kept: list[LiveSoup] = []
            if all(model.key == first.key for model in models) and not first.ensemble:
                for live in lives:
                    (row,) = self._rows(live, [first])
                    if any(row) and self.can_merge and tokens >= _MERGED_TOKENS:
                        stack.enter_context(live.merged(row, extrapolate=True))
                    elif any(row):
                        stack.enter_context(live._at(torch.tensor([row])))
            else:
                for live in lives:
                    rows = torch.tensor(self._rows(live, models))
                    if rows.any():
                        stack.enter_context(live._at(rows))
                        kept.append(live)

            def keep(rows: Tensor) -> None:
                for live in kept:
                    live.keep(rows)

            yield keep if kept else None

    def _rows(self, live: LiveSoup, models: Sequence[Model]) -> list[list[float]]:
        """λ of each row of a batch; of zeros where it is the base, or of the other soup's adapters."""
        rows: list[list[float]] = []
        for model in models:
            if live is self._others:
                rows.append([float(name == model.other) for name in live.names])
            elif model.ensemble:
                rows += torch.eye(len(live.names)).tolist()
            else:
                rows.append([(model.soup or {}).get(name, 0.0) for name in live.names])
        return rows

    def close(self) -> None:
        for live in (self._others, None if self._keep_live else self._live):
            if live is not None:
                live.remove()


class AttachedPlaces:
    """One model at a time, as an ordinary adapter on the base: for what no live soup can hold (whole trained parameters)."""

    mixes = can_merge = False

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Adapter], others: Mapping[str, Adapter]):
        self._model, self._adapters, self._others = model, adapters, others
        self.ingredients = list(adapters)
        self._made: tuple[str, Soup] | None = None

    @contextmanager
    def at(self, models: Sequence[Model], tokens: int) -> Iterator[Keep]:
        """As `LivePlaces.at`; the models are one."""
        with ExitStack() as stack:
            if not _is_base(models[0]):
                stack.enter_context(self._soup(models[0]).attached(self._model, allow_base_mismatch=True))
                self._model.eval()
            yield None

    def _soup(self, model: Model) -> Soup:
        if self._made is None or self._made[0] != model.key:
            if model.other:
                soup = interpolate([self._others[model.other]], [1.0])
            else:
                row = list((model.soup or {}).values())
                method = model.method or "exact"
                soup = interpolate(self._adapters, row, method=method, extrapolate=True, allow_base_mismatch=True)
            assert isinstance(soup, Soup)
            self._made = model.key, soup
        return self._made[1]

    def close(self) -> None:
        pass


def places_of(
    base: PreTrainedModel | LiveSoup,
    adapters: Mapping[str, Adapter],
    others: Mapping[str, Adapter],
    method: str,
    ensemble: bool,
) -> LivePlaces | AttachedPlaces:
    """Live places where the adapters can be live. (The names of their bases were compared by `sweep`.)

    Raises:
        AdapterError: Adapters that fit neither way; an ensemble of some that cannot be live.
    """
    model = base.model if isinstance(base, LiveSoup) else base
    live: LiveSoup | None = None
    try:
        live = base if isinstance(base, LiveSoup) else LiveSoup(model, adapters, method, allow_base_mismatch=True)
        beside = LiveSoup(model, others, allow_base_mismatch=True) if others else None
        return LivePlaces(live, beside, live is base)
    except AdapterError as error:
        if live is not None and live is not base:
            live.remove()
        if ensemble or live is base:
            raise
        logger.info("soups are attached one after the other: %s", error)
    first = [1.0] + [0.0] * (len(adapters) - 1)
    interpolate(adapters, first, method=method, allow_base_mismatch=True)  # refused here, before the work
    return AttachedPlaces(model, adapters, others)


def _loaded(name: str) -> PreTrainedModel:
    """A base by folder, Hub id or ``rsoups/...``, on this process's GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embedded = resolve(name) != name  # stored in half precision to be small, computed with in float32
    dtype = torch.float32 if embedded or device == "cpu" else torch.bfloat16
    return torch.nn.Module.to(load_base(name, dtype=dtype), device)


def _is_base(model: Model) -> bool:
    return model.soup is None and model.other is None and not model.ensemble


def _fitting(model: PreTrainedModel) -> int:
    """Tokens that a batch may have: what fills the memory of a GPU, and on a CPU what keeps it busy."""
    if model.device.type != "cuda":
        return _CPU_TOKENS
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    working = 16 * config.hidden_size * model.dtype.itemsize  # activations of a layer, the prompts being read
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1_024, int(_FREE * free / (cache + working)))
