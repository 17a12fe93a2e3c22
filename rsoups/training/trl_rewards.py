"""Rewards as functions that TRL's trainers call."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rsoups.common.errors import RewardError, RsoupsError
from rsoups.data.prompts import messages_of, response_start
from rsoups.rewards.functions import FunctionReward, check_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PLACE = "_place"  # column of a dataset: where a row's other columns are, in what `reward_function` is given

logger = logging.getLogger(__name__)


def reward_function(
    reward: Callable[..., Any],
    cut: Callable[[str], str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[..., list[float | None]]:
    """A reward in TRL's signature, ``f(prompts, completions, **columns)``, that sees what `cut` leaves of a response.

    Where the prompt holds the response's first words, it sees them too; with the policy's `tokenizer`, joined as the tokens
    say (a word that goes on has no space before it).

    Args:
        reward: A loaded reward, or a function.
        cut: Response -> the part of it that counts.
        tokenizer: The policy's.
        data: Columns whose values the reward gets as they are, at the places that the dataset's column `PLACE` tells. (As
            columns of the dataset Arrow would change them: all rows of one type, all dicts with the same keys.)
    """
    scored = FunctionReward(reward)

    def whole(prompt: Any, completion: Any, ids: list[int] | None) -> str:
        if isinstance(completion, list):  # messages: a conversation's answer
            return messages_of(completion)[-1]["content"]
        if not (start := response_start(prompt)):
            return str(completion)
        if tokenizer is None or ids is None:
            return f"{start} {completion}"
        started = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        before, after = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (started, [*started, *ids]))
        return start + after[len(before) :]

    def function(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        ids = columns.get("completion_ids") or [None] * len(prompts)
        rows = zip(prompts, completions, ids, strict=True)
        places = columns.pop(PLACE, [])
        columns |= {name: [values[place] for place in places] for name, values in (data or {}).items()}
        return scored(prompts, [cut(whole(*row)) for row in rows], **columns)

    function.__name__ = scored.name
    return function


def named_failures(reward: Any) -> Any:
    """A reward function of TRL's signature whose failures are `RewardError`s that name it and where it failed.

    Anything else that TRL takes (a model, its name, an async function) comes back as it is.
    """
    from torch import nn

    if isinstance(reward, (str, nn.Module)) or inspect.iscoroutinefunction(reward):
        return reward
    name = getattr(reward, "__name__", type(reward).__name__)

    def function(prompts: list, completions: list, **columns: Any) -> list[float]:
        try:
            scores = list(reward(prompts=prompts, completions=completions, **columns))
        except RsoupsError:
            raise
        except Exception as error:
            raise RewardError(
                f"reward {name!r} raised {type(error).__name__}: {error}; the batch begins with prompt {prompts[0]!r}, "
                f"response {completions[0]!r}"
            ) from error
        if len(scores) != len(completions):
            raise RewardError(
                f"reward {name!r} returned {len(scores)} scores for {len(completions)} responses; the batch begins with "
                f"prompt {prompts[0]!r}, response {completions[0]!r}"
            )
        check_scores(name, scores, prompts, completions)
        return scores

    function.__name__ = name
    return function
