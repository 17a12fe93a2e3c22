"""Inputs of reward models: questions and responses as token ids, shortened where they are too long, in batches."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = re.compile(r"\{(\w+)\}")  # in templates
FIELDS = {"question", "response", "bos", "eos", "sep"}
_NO_ROOM = "a response fills all %d tokens that a reward model reads: its end is not seen"

# Tokens of a batch, padding included. Larger batches leave a CPU's caches and are slower (benchmarks/scoring.py).
_BATCH_TOKENS, _BATCH_TOKENS_ON_CPU = 8_192, 768

logger = logging.getLogger(__name__)


def filled(template: str, **values: str) -> str:
    """Return a template with its fields replaced, all at once: a field's name inside a value is text."""
    return FIELD.sub(lambda match: values[match[1]], template)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    reverse: bool = False,
    cut: str = "end",
) -> list[dict[str, list[int]]]:
    """Tokenize (question, response) pairs as a sequence classifier reads them; `reverse` puts the response first.

    A pair of more than `max_length` tokens loses tokens of its question, at the side `cut` (``end`` or ``start``); where the
    response alone is longer, the whole question and the end of the response.
    """

    def encode(question: str, response: str, lost: str) -> dict[str, list[int]]:
        pair = (response, question) if reverse else (question, response)
        tokenizer.truncation_side = "left" if (lost, cut) == ("question", "start") else "right"
        side = "only_second" if reverse == (lost == "question") else "only_first"
        return dict(tokenizer(*pair, truncation=side, max_length=max_length))

    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    sizes = [len(ids) for ids in tokenizer(list(responses), add_special_tokens=False)["input_ids"]]
    encoded, own_side = [], tokenizer.truncation_side
    try:
        for question, response, size in zip(questions, responses, sizes, strict=True):
            if size < room:
                encoded.append(encode(question, response, "question"))
            else:
                logger.warning(_NO_ROOM, max_length)
                encoded.append(encode("", response, "response"))
    finally:
        tokenizer.truncation_side = own_side
    return encoded


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    questions: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    cut: str = "end",
) -> list[dict[str, list[int]]]:
    """Tokenize texts made by a template, shortened as by `encode_pairs`.

    An empty text becomes one end-of-text token, for models whose tokenizer adds no token of its own (GPT-2).
    """
    special = {name: getattr(tokenizer, f"{name}_token") or "" for name in ("bos", "eos", "sep")}

    def encode(question: str, response: str) -> dict[str, list[int]]:
        text = filled(template, question=question, response=response, **special)
        row = dict(tokenizer(text))
        return row if row["input_ids"] else dict(tokenizer(tokenizer.eos_token or tokenizer.pad_token))

    encoded = []
    for question, response in zip(questions, responses, strict=True):
        row = encode(question, response)
        while len(row["input_ids"]) > max_length and question:
            question = _shortened(tokenizer, question, len(row["input_ids"]) - max_length, cut)
            row = encode(question, response)

        if len(row["input_ids"]) > max_length:
            logger.warning(_NO_ROOM, max_length)
            row = {key: ids[:max_length] for key, ids in row.items()}
        encoded.append(row)
    return encoded


def encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict[str, str]]],
    responses: Sequence[str],
    max_length: int,
    cut: str = "end",
) -> list[dict[str, list[int]]]:
    """Tokenize conversations with their responses by the tokenizer's chat template, which writes every special token itself.

    A conversation of more than `max_length` tokens loses its oldest turns, then a side of its last question, at last the end
    of the response; never its system prompt, nor the tokens that end the response, where a decoder reads its score.

    Args:
        conversations: Messages of each prompt, of which the last one is the user's.
    """

    def encode(messages: list[dict[str, str]], response: str) -> dict[str, list[int]]:
        whole = [*messages, {"role": "assistant", "content": response}]
        row: Any = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)
        return {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]}

    encoded = []
    for messages, response in zip(conversations, responses, strict=True):
        row = encode(messages, response)
        while (over := len(row["input_ids"]) - max_length) > 0:
            fewer = _without_oldest_turns(messages)
            question = fewer[-1]["content"]
            if len(fewer) < len(messages):
                messages = fewer
            elif question:
                messages = [*fewer[:-1], {**fewer[-1], "content": _shortened(tokenizer, question, over, cut)}]
            elif response:
                logger.warning(_NO_ROOM, max_length)
                response = _shortened(tokenizer, response, over, "end")
            else:
                break  # the template itself, or the system prompt, is longer
            row = encode(messages, response)
        encoded.append(row)
    return encoded


def _without_oldest_turns(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return messages without the oldest question and its answer; as they are, where there is only one question."""
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return messages if len(users) < 2 else messages[: users[0]] + messages[users[1] :]


def _shortened(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, cut: str) -> str:
    """Return a text without so many tokens of its end or start; always shorter, as one character may be several tokens."""
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if tokens >= len(places):
        return ""
    if cut == "start":
        return text[max(places[tokens][0], 1) :]
    return text[: min(places[-tokens - 1][1], len(text) - 1)]


def batches(encoded: Sequence[dict[str, list[int]]], device: Any, even: bool = False) -> Iterator[list[int]]:
    """Yield batches as places of samples: of like length, or of one length where `even`, the longest first."""
    budget = _BATCH_TOKENS_ON_CPU if device.type == "cpu" else _BATCH_TOKENS
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]), reverse=True)
    while order:
        longest = len(encoded[order[0]]["input_ids"])
        size = max(1, budget // longest)
        if even:
            size = min(size, sum(len(encoded[i]["input_ids"]) == longest for i in order))
        yield order[:size]
        order = order[size:]


def padded(rows: Sequence[dict[str, list[int]]], pad: int, device: Any) -> dict[str, Any]:
    """Return ids, mask and token types as tensors (B, longest) of int64, padded on the right."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    fill = {key: pad if key == "input_ids" else 0 for key in rows[0]}
    return {
        key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows], device=device)
        for key, value in fill.items()
    }
