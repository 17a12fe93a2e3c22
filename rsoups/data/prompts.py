"""Prompts and responses, as texts or messages: read, check and shorten them."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rsoups.common.errors import DatasetError

_T = TypeVar("_T")
_INSTRUCTION, _INPUT, _RESPONSE = "### Instruction:", " ### Input:", " ### Response: "
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}

logger = logging.getLogger(__name__)


def format_prompt(instruction: str, input: str | None = None) -> str:
    """Write a policy prompt. New lines become spaces, as in the paper's data."""
    parts = [_INSTRUCTION, " ", one_line(instruction)]
    if input:
        parts += [_INPUT, " ", one_line(input)]
    return "".join(parts) + _RESPONSE


def question_of(prompt: str | list[dict[str, Any]]) -> str:
    """Return the question of a policy prompt, which reward models read: its input, or its instruction if it has no input.

    A text that is not in the prompt format is its own question; the question of messages is the user's last turn.

    Raises:
        DatasetError: An empty question (the paper's code looked for an input that its assistant prompts do not have, and
            scored answers to nothing), or messages that `messages_of` refuses.
    """
    if not isinstance(prompt, str):
        question = _last_turn(messages_of(prompt))
    elif not prompt.startswith(_INSTRUCTION) or _RESPONSE.strip() not in prompt:
        question = prompt
    else:
        body = prompt[len(_INSTRUCTION) : prompt.rindex(_RESPONSE.strip())]
        instruction, _, input = body.partition(_INPUT)
        question = input.strip() or instruction

    if not question.strip():
        raise DatasetError(f"the prompt {shown(prompt)} asks nothing: its question is empty")
    return question.strip()


def _last_turn(messages: list[dict[str, str]]) -> str:
    """Return the text of the user's last message, in a conversation that waits for an answer."""
    if messages and messages[-1]["role"] == "assistant":
        raise DatasetError(
            f"the prompt {shown(messages)} ends with an assistant's message, so there is nothing to answer: leave it out"
        )
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


def messages_of(value: Any) -> list[dict[str, str]]:
    """Return messages as ``{"role", "content"}`` with one text each.

    Text parts of a content are joined, and ShareGPT's turns (``{"from": "human", "value": ...}``) get the usual names of roles.

    Raises:
        DatasetError: Not a list of messages, an unknown role, or a content that is not a text or parts of text.
    """
    if not isinstance(value, (list, tuple)):
        raise DatasetError(f"a prompt is a text or a list of messages, not {type(value).__name__}: {shown(value)}")
    return [_message(each) for each in value]


def _message(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise DatasetError(f"a message is {{'role': ..., 'content': ...}}, not {shown(value)}")
    role, content = value.get("role"), value.get("content")
    if role is None and "from" in value:
        role, content = _SHAREGPT.get(str(value["from"])), value.get("value")

    if role not in _ROLES:
        raise DatasetError(f"the message {shown(value)} has no known role; the roles are {', '.join(_ROLES)}")
    if value.get("tool_calls"):
        raise DatasetError(f"the message {shown(value)} calls tools, which rsoups does not: leave such rows out")
    parts = [content] if isinstance(content, str) else content
    texts = [_part(part) for part in parts] if isinstance(parts, (list, tuple)) else [None]
    if None in texts:
        raise DatasetError(f"the content of the message {shown(value)} must be a text, or a list of text parts")
    return {"role": role, "content": "".join(map(str, texts))}


def _part(part: Any) -> str | None:
    """Return the text of one part of a content; None for an image and the like."""
    if isinstance(part, Mapping) and str(part.get("type", "text")).endswith("text"):
        part = part.get("text")
    return part if isinstance(part, str) else None


def template_kwargs(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the variables of a chat template (``enable_thinking``, say), from a JSON object or a mapping.

    Raises:
        DatasetError: Not an object.
    """
    try:
        variables = json.loads(given) if isinstance(given, str) else given or {}
    except ValueError:
        variables = None
    if not isinstance(variables, Mapping):
        raise DatasetError(
            f'chat_template_kwargs is {given!r}, must be a JSON object such as {{"enable_thinking": false}}'
        )
    return dict(variables)


def prompt_of(value: Any) -> str | list[dict[str, str]]:
    """Return a dataset's prompt, checked: a text unchanged, or messages as `messages_of` returns them.

    Raises:
        DatasetError: Neither of them, or a prompt with an empty question.
    """
    prompt = value if isinstance(value, str) else messages_of(value)
    question_of(prompt)
    return prompt


def pair_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the question, the chosen and the rejected response of a preference pair, texts or messages.

    The prompt may be a column of its own, or the beginning of both conversations.

    Raises:
        DatasetError: A column is missing, or the two are not answers to one question.
    """
    if missing := [name for name in ("chosen", "rejected") if not row.get(name)]:
        raise DatasetError(
            f"a preference pair has prompt, chosen and rejected; {missing} of {shown(dict(row))} are empty"
        )
    sides = [row["chosen"], row["rejected"]]
    prompt = row.get("prompt")
    if all(isinstance(side, str) for side in sides):
        if not prompt:
            raise DatasetError(f"the pair {shown(dict(row))} has no prompt: give it as a column, or write messages")
        return question_of(prompt), sides[0], sides[1]

    (*turns, chosen), (*other_turns, rejected) = map(messages_of, sides)
    if turns != other_turns or {chosen["role"], rejected["role"]} != {"assistant"}:
        raise DatasetError(f"chosen and rejected are not two answers to one conversation: {shown(dict(row))}")
    if isinstance(prompt, str) and not turns:
        return question_of(prompt), chosen["content"], rejected["content"]
    return question_of([*messages_of(prompt or []), *turns]), chosen["content"], rejected["content"]


def shown(value: Any) -> str:
    """Return a value for an error message, shortened."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def response_start(prompt: str | list[dict[str, Any]]) -> str:
    """Return the words of the response that a policy prompt already holds: the text after its last ``### Response:``."""
    if not isinstance(prompt, str):
        return ""
    marker = _RESPONSE.strip()
    return prompt.rpartition(marker)[2].strip() if marker in prompt else ""


def whole_response(prompt: Any, completion: Any, tokenizer: Any = None, ids: list[int] | None = None) -> str:
    """Return a response as text, with the words of it that the prompt already holds.

    Args:
        prompt: Text or messages.
        completion: Text, or messages, of which the last one is the response.
        tokenizer: The policy's tokenizer, which says whether the prompt's last word goes on; a space comes between if None.
        ids: Tokens of the completion; needed with `tokenizer`.
    """
    if isinstance(completion, list):
        return messages_of(completion)[-1]["content"]
    start = response_start(prompt)
    if not start:
        return str(completion)
    if tokenizer is None or ids is None:
        return f"{start} {completion}"

    started = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    before, after = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (started, [*started, *ids]))
    return start + after[len(before) :]


def with_prefixes(
    rows: list[dict[str, Any]], tokenize: Callable[[str], list[int]], decode: Callable[[list[int]], str], shortest: int,
    longest: int, seed: int,
) -> list[str]:  # fmt: skip
    """Return prompts followed by the first tokens of a reference response, as the paper trains with.

    Args:
        rows: Rows ``{"prompt", "references"}``; the prompt of a row without references stays as it is.
        tokenize, decode: Functions of the policy's tokenizer, without special tokens.
        shortest, longest: Bounds of the number of tokens, which is drawn for each row from `seed` and the row's place.
        seed: Seed of the draws.

    Raises:
        DatasetError: A prompt of messages: a chat template has no place for the beginning of an answer.
    """
    prompts = []
    for place, row in enumerate(rows):
        if not isinstance(row["prompt"], str):
            raise DatasetError(
                f"--prefix_tokens goes with prompts that are texts, not with messages ({shown(row['prompt'])}): leave it out"
            )
        draw = random.Random(f"{seed} {place}")
        if references := row["references"]:
            ids = tokenize(one_line(draw.choice(references)))[: draw.randint(shortest, longest)]
            prompts.append(row["prompt"] + decode(ids).strip())
        else:
            prompts.append(row["prompt"])
    return prompts


def first_sentence(text: str) -> str:
    """Return the text up to its first full stop, question or exclamation mark (the whole text if it has none)."""
    text = one_line(text)
    end = _SENTENCE_END.search(text)
    return text[: end.end()] if end else text


def one_line(text: str) -> str:
    return " ".join(text.split())


def fit_prompts(prompts: list[_T], lengths: list[int], longest: int, policy: str) -> list[_T]:
    """Return the prompts that leave room for a response in the model's context.

    Args:
        prompts: Texts, or rows that hold them.
        lengths: Number of tokens of each prompt.
        longest: Number of tokens that a prompt may have.
        policy: ``"refuse"`` longer prompts, or ``"drop"`` them.

    Raises:
        DatasetError: Some are longer and the policy is to refuse, or none is left.
    """
    fitting = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= longest]
    over = len(prompts) - len(fitting)
    if over and policy == "refuse":
        raise DatasetError(
            f"{over} of {len(prompts)} prompts are longer than {longest} tokens (the longest: {max(lengths)}), the room that "
            "the context leaves beside a response: --long_prompts drop leaves them out"
        )
    if not fitting:
        raise DatasetError(f"none of {len(prompts)} prompts has at most {longest} tokens")
    return fitting
