"""What answers a sweep's prompts: one copy of the base on which every model of the sweep is put, row by row where it can be.

Items (model, prompt, sample) of all models share batches: a live soup gives each row its own λ. Where one λ has so many rows
that it fills batches by itself, they are its own, and its Δ is put into the base's weights for them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from rsoups.adapters.adapter import Adapter
from rsoups.bases.load import base_config, load_tokenizer
from rsoups.common.assets import resolve
from rsoups.generation.decoding import Decoder, Said, seed_of, uniforms
from rsoups.soups.live import LiveSoup

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rsoups.sweeps.items import Answer, Item, Nats, is_base
from rsoups.sweeps.places import MERGED_TOKENS, AttachedPlaces, LivePlaces, load_quietly, places_of

_CPU_TOKENS = 16_384  # of a batch: more is no faster (benchmarks/sweep.py)
_ALONE = 1 / 3  # of a batch, that the rows of one λ have to fill to be faster in batches of their own, merged
_FREE = 0.6  # of a GPU's memory, for a batch
_Key = tuple[int, tuple[int, ...]]  # a prompt's place, a response's tokens

logger = logging.getLogger(__name__)


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
            self._base = load_quietly(self._base)
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
            return live.at_weights(torch.zeros(1, len(live.names)))
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
            fills = sum(map(self._size, of_one)) >= max(_ALONE * self._tokens, MERGED_TOKENS)
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
            Nats(0.0 if is_base(item.model) else round(one.logp - chosen, 4), round(-plain, 4))
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
