"""One prompt at several λ, token by token: every λ is a row of one batch, and all rows draw with the same luck."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from queue import Queue
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from rsoups.common.errors import DatasetError, LambdasError
from rsoups.generation.decoding import encode
from rsoups.generation.sampling import draw
from rsoups.generation.settings import sample_purely
from rsoups.soups.lambdas import weights_of

if TYPE_CHECKING:
    from rsoups.soups.live import LiveSoup


def stream(
    live: LiveSoup,
    prompt: str | list[dict[str, Any]],
    lambdas: Sequence[Sequence[float] | None],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    template: Mapping[str, Any] | None = None,
) -> Iterator[list[str]]:
    """Responses as they grow, after every token.

    A row's text depends on the prompt, its own λ, the temperature and the seed; not on the rows beside it, nor on other
    threads. Whoever stops reading stops the generation.

    Args:
        live: The model, with its tokenizer.
        prompt: As the policy reads it, or messages for the tokenizer's chat template.
        lambdas: (B, N), one row for each text; None as a row is the base.
        max_new_tokens: Longest response.
        temperature: Of sampling; 0 is greedy.
        seed: Of the one random number with which all rows draw their next token: texts differ by λ alone.
        template: Variables of the chat template, as in the sweep.

    Yields:
        B texts so far, without special tokens.

    Raises:
        DatasetError: A prompt that leaves no room for a response in the model's context.
        LambdasError: As `interpolate`.
    """
    if (tokenizer := live.tokenizer) is None:
        raise LambdasError("this LiveSoup was made without a tokenizer: there is nothing to write texts with")
    count = len(live.names)
    rows = [[0.0] * count if row is None else weights_of(row, count, False, False)[0] for row in lambdas]
    read = torch.tensor([encode(tokenizer, prompt, template)] * len(rows), device=live.model.device)
    inputs = {"input_ids": read, "attention_mask": torch.ones_like(read)}
    _check_room(live, read.shape[1], max_new_tokens)
    steps, stop = _Steps(), _Stop()
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "streamer": steps,
        "stopping_criteria": StoppingCriteriaList([stop]),
        # `_SameLuck` has drawn already
        "do_sample": False, "temperature": None, "top_k": None, "top_p": None,
    }  # fmt: skip
    if temperature > 0:
        settings["logits_processor"] = LogitsProcessorList([_SameLuck(temperature, seed)])

    sample_purely(live.model)  # as a sweep: no penalty, filter or beams of the base's generation_config

    def generate() -> None:
        try:  # λ and inference mode are of the thread that generates
            with live.at_weights(torch.tensor(rows)), torch.inference_mode():
                live.model.generate(**inputs, **settings)
        except Exception as error:
            steps.queue.put(error)

    worker = threading.Thread(target=generate, daemon=True)
    worker.start()
    try:
        ids: list[list[int]] = [[] for _ in rows]
        while (step := steps.queue.get()) is not None:
            if isinstance(step, Exception):
                raise step
            for row, token in zip(ids, step, strict=True):
                row.append(token)
            yield tokenizer.batch_decode(ids, skip_special_tokens=True)
    finally:
        stop.asked.set()
        worker.join()


def _check_room(live: LiveSoup, tokens: int, max_new_tokens: int) -> None:
    context = getattr(live.model.config, "max_position_embeddings", None)
    if not tokens:
        raise DatasetError("the prompt is empty: write something")
    if context is not None and tokens + max_new_tokens > context:
        raise DatasetError(
            f"the prompt has {tokens} tokens; with a response of up to {max_new_tokens}, the model reads "
            f"{max(0, context - max_new_tokens)} at most: shorten one of them"
        )


class _Steps(BaseStreamer):
    """Hands on the next tokens (B,) of each step, then None. (transformers' own streamers take one row only.)"""

    def __init__(self) -> None:
        self.queue: Queue[list[int] | Exception | None] = Queue()
        self._seen_prompt = False

    def put(self, value: Tensor) -> None:
        if self._seen_prompt:
            self.queue.put(value.reshape(-1).tolist())
        self._seen_prompt = True

    def end(self) -> None:
        self.queue.put(None)


class _Stop(StoppingCriteria):
    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


class _SameLuck(LogitsProcessor):
    """Draws a token for each row with one random number for all, and leaves only that token possible."""

    def __init__(self, temperature: float, seed: int):
        self._temperature, self._luck = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        at = torch.rand(1, 1, dtype=torch.float64, generator=self._luck)
        drawn = draw(torch.softmax(scores.float() / self._temperature, dim=-1), at)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
