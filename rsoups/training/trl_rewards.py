"""Rewards as functions that TRL's trainers call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rsoups.common.errors import RewardError, RsoupsError, SettingsError
from rsoups.data.prompts import whole_response
from rsoups.rewards.functions import as_reward
from rsoups.rewards.interface import LoadedReward, check_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PLACE = "_place"  # column of a dataset: place of the row's values in the `data` of `reward_function`


def check_weights(weights: Sequence[float] | None, rewards: int) -> None:
    """Refuse weights μ that are not one for each reward, that are not finite, or that are all 0.

    Raises:
        SettingsError: As said; None is fine, and means 1 for each.
    """
    if weights is None:
        return
    if len(weights) != rewards:
        raise SettingsError(f"reward_weights are {list(weights)}: give one weight for each of the {rewards} rewards")
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise SettingsError(f"reward_weights are {list(weights)}: they must be finite, and one at least must not be 0")


def reward_function(
    reward: Callable[..., Any],
    cut: Callable[[str], str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[..., list[float | None]]:
    """Give a reward TRL's signature, ``f(prompts, completions, **columns)``, and only the part of a response that counts.

    If the prompt holds the response's first words, the reward sees them too. With a `tokenizer` they are joined as their tokens
    are: there is no space within a word.

    Args:
        reward: A loaded reward, or a function.
        cut: Function from a response to the part of it that counts.
        tokenizer: Tokenizer of the policy.
        data: Columns whose values the reward gets unchanged; the dataset's column `PLACE` holds a row's place in them. (Arrow
            would change the values of the dataset's own columns: one type for all rows, one set of keys for all dicts.)
    """
    scored = as_reward(reward)

    def function(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        ids = columns.get("completion_ids") or [None] * len(prompts)
        rows = zip(prompts, completions, ids, strict=True)
        responses = [cut(whole_response(prompt, completion, tokenizer, row)) for prompt, completion, row in rows]
        places = columns.pop(PLACE, [])
        columns |= {name: [values[place] for place in places] for name, values in (data or {}).items()}
        return scored(prompts, responses, **columns)

    function.__name__ = scored.name
    return function


def named_failures(reward: Any) -> Any:
    """A reward function of TRL's signature whose failures are `RewardError`s that name it and where it failed.

    A loaded reward names its failures itself; it and anything else that TRL takes (a model, its name, an async function)
    come back as they are. A function ``f(prompts, responses)`` becomes a reward.
    """
    from torch import nn

    if isinstance(reward, (str, nn.Module, LoadedReward)) or inspect.iscoroutinefunction(reward):
        return reward
    if not _takes_completions(reward):
        return as_reward(reward)
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
        check_scores(name, scores, prompts, completions)
        return scores

    function.__name__ = name
    return function


def _takes_completions(reward: Any) -> bool:
    """Whether a function has TRL's signature."""
    parameters = inspect.signature(reward).parameters
    return "completions" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
