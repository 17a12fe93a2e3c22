"""Functions as rewards, and what every reward's scores must be."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rsoups._errors import RewardError


def check_scores(name: str, scores: Sequence[float], prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Refuse scores that would poison a run.

    Raises:
        RewardError: Not one score per sample, or a score that is NaN or infinite; names the reward and the sample.
    """
    if len(scores) != len(responses):
        raise RewardError(f"reward {name!r} returned {len(scores)} scores for {len(responses)} responses")
    for score, prompt, response in zip(scores, prompts, responses, strict=True):
        if not math.isfinite(score):
            raise RewardError(f"reward {name!r} returned {score} for prompt {prompt!r}, response {response!r}")


class FunctionReward:
    """A function as a reward: ``reward(prompts, responses, **columns) -> list[float]``.

    Takes ``f(prompts, responses)`` and TRL's ``f(prompts, completions, **columns)`` alike; a function gets those of the
    dataset's columns that it names, or all where it takes any.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))
        self.__name__ = self.name
        self._function = function
        parameters = inspect.signature(function).parameters
        self._any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._known = set(parameters)
        named = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.columns = tuple(named[2:])

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        """Score each response to its prompt.

        Raises:
            RewardError: Not one finite score for each response (the sample is shown).
        """
        passed = {key: value for key, value in columns.items() if self._any or key in self._known}
        if "completions" in self._known:
            scores = self._function(prompts=list(prompts), completions=list(responses), **passed)
        else:
            scores = self._function(list(prompts), list(responses), **passed)
        scores = [float(score) for score in scores]
        check_scores(self.name, scores, prompts, responses)
        return scores


def imported(module: str, name: str) -> Callable[..., Any]:
    """A function by its module, which may be a file beside the user, and its name.

    Raises:
        RewardError: No such module or function.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"no reward function {module}:{name}: {error}") from None
    if not callable(found):
        raise RewardError(f"{module}:{name} is {type(found).__name__}, not a function")
    return found
