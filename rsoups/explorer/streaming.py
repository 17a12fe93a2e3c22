"""Generate responses to one prompt at several λ, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rsoups.common.errors import DatasetError, LambdasError
from rsoups.generation.decoding import Decoder, Prompt, encode, seed_of, uniforms
from rsoups.soups.lambdas import weights_of

if TYPE_CHECKING:
    from rsoups.soups.live import LiveSoup


def stream(
    live: LiveSoup,
    prompt: Prompt,
    lambdas: Sequence[Sequence[float] | None],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    template: Mapping[str, Any] | None = None,
) -> Iterator[list[str]]:
    """Yield the responses so far after every token.

    All rows share the random numbers of a sweep's first response to this prompt: texts differ by λ alone, and at the λ, seed
    and temperature of a record the text is the record's. A text depends neither on the other rows nor on other threads.
    Generation stops when the caller stops reading.

    Args:
        live: Model with its tokenizer.
        prompt: Text or messages for the policy.
        lambdas: (B, N), one row for each response; None in place of a row means the base.
        max_new_tokens: Length of the longest response, in tokens.
        temperature: Sampling temperature; 0 decodes greedily.
        seed: Seed of the sampling.
        template: Variables of the chat template, as in the sweep.

    Yields:
        B texts, without special tokens.

    Raises:
        DatasetError: The prompt is empty, or leaves no room for a response in the model's context.
        LambdasError: As in `interpolate`; the LiveSoup has no tokenizer.
    """
    tokenizer = live.tokenizer
    if tokenizer is None:
        raise LambdasError("this LiveSoup has no tokenizer: make it with from_pretrained, or pass one")
    count = len(live.names)
    rows = [[0.0] * count if row is None else weights_of(row, count, False, False)[0] for row in lambdas]
    weights = torch.tensor(rows)
    ids = encode(tokenizer, prompt, template)
    _check_room(live, len(ids), max_new_tokens)

    def keep(remaining: Tensor) -> None:
        nonlocal weights
        weights = weights[remaining.to(weights.device)]
        live.keep(remaining)

    numbers = [uniforms(seed_of(seed, prompt, 0), max_new_tokens)] * len(rows)
    uniform = torch.tensor(numbers, dtype=torch.float64) if temperature > 0 else None
    decoder = Decoder(live.model, tokenizer, temperature, max_new_tokens)
    steps = decoder.steps([ids] * len(rows), uniform, keep=keep, models=range(len(rows)))
    while True:
        # λ is set for one step at a time, because the caller may ask for the next step from another thread.
        with live.at_weights(weights):
            step = next(steps, None)
        if step is None:
            return
        tokens = [[token for token in row if token >= 0] for row in step[0].tolist()]
        yield tokenizer.batch_decode(tokens, skip_special_tokens=True)


def _check_room(live: LiveSoup, tokens: int, max_new_tokens: int) -> None:
    context = getattr(live.model.config.get_text_config(), "max_position_embeddings", None)
    if not tokens:
        raise DatasetError("the prompt is empty: write something")
    if context is not None and tokens + max_new_tokens > context:
        raise DatasetError(
            f"the prompt has {tokens} tokens; with a response of up to {max_new_tokens}, the model reads "
            f"{max(0, context - max_new_tokens)} at most: shorten one of them"
        )
