"""Generate a sweep's responses on one shared base, in batches that all models share where they can.

How batches are formed:

- A batch has at most `batch_tokens` tokens, padding and the longest possible responses included: what fits the memory.
- Prompts of like length go together, the longest first, so that little is padded and memory runs out at once if it does.
- Rows of different models share a batch, each with its own λ (mixed rows). A model with so many rows that they fill a good part
  of a batch has batches of its own: these are merged into the base's weights, which is faster (`places`).
- The ensemble has batches of its own, because each of its rows is as many rows as there are ingredients.
- Models that cannot be live have batches of their own too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from rsoups.generation.decoding import Decoder, Response, seed_of, uniforms
from rsoups.sweeps.items import Answer, Item, Nats, by_model
from rsoups.sweeps.places import AttachedPlaces, LivePlaces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CPU_TOKENS = 16_384  # of a batch on a CPU: more is not faster (benchmarks/sweep.py)
_GPU_SHARE = 0.6  # of a GPU's free memory that a batch may fill
_OWN_BATCH = 1 / 3  # share of a batch that the rows of one model must fill to be faster in batches of their own


class Generator:
    """Generates responses in batches, on one base.

    Attributes:
        on_cpu: Whether generation keeps the cores of the processor busy.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        places: LivePlaces | AttachedPlaces,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        batch_tokens: int | str = "auto",
    ):
        self._decoder = Decoder(model.eval(), tokenizer, temperature, max_new_tokens)
        self._places, self._seed = places, seed
        self.on_cpu = model.device.type == "cpu"
        self._batch_tokens = _fitting(model) if batch_tokens == "auto" else int(batch_tokens)
        # (log p, log p at the sampling temperature) under the base, by place of the prompt and tokens of the response.
        self._base_logps: dict[tuple[int, tuple[int, ...]], tuple[float, float]] = {}

    def batches(self, items: list[Item]) -> Iterator[list[Item]]:
        """Divide items into batches, by the rules at the top of this file."""
        groups = by_model(items)
        own = [group for group in groups if self._is_alone(group)]
        mixed = [item for group in groups if not self._is_alone(group) for item in group]
        for group in [*own, mixed]:
            yield from self._packed(group)

    def _is_alone(self, group: list[Item]) -> bool:
        """Whether the items of one model have batches of their own."""
        if isinstance(self._places, AttachedPlaces) or group[0].model.is_ensemble:
            return True
        tokens = sum(map(self._size, group))
        return tokens >= _OWN_BATCH * self._batch_tokens and self._places.merges(tokens)

    def _packed(self, items: list[Item]) -> Iterator[list[Item]]:
        # The order is stable, so that batches hold the same prompts for every model.
        items = sorted(items, key=lambda item: len(item.ids), reverse=True)
        while items:
            count = max(1, self._batch_tokens // self._size(items[0]))
            yield items[:count]
            items = items[count:]

    def _size(self, item: Item) -> int:
        """Tokens of an item's rows, the longest response included."""
        return self._members(item) * (len(item.ids) + self._decoder.max_new_tokens)

    def _members(self, item: Item) -> int:
        """Rows of an item: one, or one for each member of an ensemble."""
        return len(self._places.ingredients) if item.model.is_ensemble else 1

    def __call__(self, batch: list[Item]) -> list[Answer]:
        """Generate the responses of a batch. If memory runs out, batches are half as large from now on."""
        try:
            return self._answers(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not should_reduce_batch_size(error):
                raise
        # Outside of the except clause, where the error's traceback would keep the batch's tensors alive.
        torch.cuda.empty_cache()
        self._batch_tokens = max(1, sum(map(self._size, batch)) // 2)
        return [answer for half in self._packed(batch) for answer in self(half)]

    def _answers(self, batch: list[Item]) -> list[Answer]:
        models = [item.model for item in batch]
        numbers = {model.key: number for number, model in enumerate(models)}
        uniform = None
        if self._decoder.temperature > 0:
            # A response draws with random numbers of its own, so that it does not depend on its batch.
            seeds = [seed_of(self._seed, item.prompt, item.sample) for item in batch]
            rows = [uniforms(seed, self._decoder.max_new_tokens) for seed in seeds]
            uniform = torch.tensor(rows, dtype=torch.float64)

        with self._places.at(models, sum(map(self._size, batch))) as keep:
            responses = self._decoder(
                [item.ids for item in batch],
                uniform,
                self._members(batch[0]),
                keep,
                [numbers[model.key] for model in models],
            )
        return [Answer(self._decoder.text(response), len(response.ids), response) for response in responses]

    def nats(self, batch: Sequence[Item], answers: Sequence[Answer]) -> list[Nats]:
        """KL to the base and negative log-likelihood under the base; the base reads equal responses to a prompt once."""
        responses = [answer.response for answer in answers if answer.response]
        keys = [(item.place, tuple(response.ids)) for item, response in zip(batch, responses, strict=True)]
        new = {
            key: (item.ids, response)
            for key, item, response in zip(keys, batch, responses, strict=True)
            if key not in self._base_logps
        }
        self._base_logps |= zip(new, self._logps(list(new.values())), strict=True)

        nats = []
        for item, response, key in zip(batch, responses, keys, strict=True):
            plain, at_temperature = self._base_logps[key]
            kl = 0.0 if item.model.is_base else round(response.logp - at_temperature, 4)
            nats.append(Nats(kl, round(-plain, 4)))
        return nats

    def _logps(self, responses: list[tuple[list[int], Response]]) -> list[tuple[float, float]]:
        """Log-probabilities under the base of responses to prompts (tokens); in halves if memory runs out."""
        try:
            return self._decoder.logps([prompt for prompt, _ in responses], [response for _, response in responses])
        except RuntimeError as error:
            if len(responses) == 1 or not should_reduce_batch_size(error):
                raise
        torch.cuda.empty_cache()
        half = len(responses) // 2
        return self._logps(responses[:half]) + self._logps(responses[half:])

    def close(self) -> None:
        """Leave the base as it was."""
        self._places.close()


def _fitting(model: PreTrainedModel) -> int:
    """Tokens of a batch that fill the free memory of a GPU, or keep a CPU busy."""
    if model.device.type != "cuda":
        return _CPU_TOKENS

    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head_size * model.dtype.itemsize
    activations = 16 * config.hidden_size * model.dtype.itemsize  # of one layer, while it reads the prompts
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1_024, int(_GPU_SHARE * free / (cache + activations)))
