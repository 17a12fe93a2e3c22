"""Functions as rewards: a user's own, and those that a card names."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from rsoups.common.errors import RewardError
from rsoups.rewards import relevance, text_checks, text_metrics
from rsoups.rewards.cards import Card, Sign, Text, card_class
from rsoups.rewards.interface import LoadedReward

# What TRL passes with every batch; these are no columns of the dataset.
_OF_TRL = {"completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
# Cards of version 0.1 name a function's module too.
_MODULES = (
    "rsoups.text_checks:",
    "rsoups.text_metrics:",
    "rsoups.rewards.text_checks:",
    "rsoups.rewards.text_metrics:",
)


@card_class
class FunctionCard(Card):
    """A reward that is a function of rsoups. Each field is a key of the YAML file.

    The score is ``(sign * value - mean) / std``.

    Attributes:
        function: Name of a function of `rsoups.rewards.text_metrics`, `text_checks` or `relevance`.
        arguments: Arguments of the function; its docstring describes them.
        sign: 1, or -1 where a higher value is worse.
    """

    function: Text
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sign: Sign = 1

    def summary(self) -> str:
        """Return the function with its arguments, on one line."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{self.function}({arguments})"

    def build(self) -> Callable[..., list[float]]:
        """Call the function that the card names with the card's arguments: it returns the reward's function.

        Raises:
            RewardError: Not a function of rsoups, or arguments that it does not take.
        """
        modules = (relevance, text_checks, text_metrics)
        known = {name: getattr(module, name) for module in modules for name in module.__all__}
        name = self.function
        for module in _MODULES:
            name = name.removeprefix(module)
        if name not in known:
            raise RewardError(
                f"reward card {self.name!r}: function is {self.function!r}, must be one of {sorted(known)}. For a function of "
                "your own write no card: pass module:function as the reward"
            )

        try:
            inspect.signature(known[name]).bind(**self.arguments)
        except TypeError as error:
            raise RewardError(
                f"reward card {self.name!r}: {name}: {error}; the card's arguments are {dict(self.arguments)}. Write a card "
                "with other arguments (recipes/calibrate.py --arguments writes one)"
            ) from None
        return known[name](**self.arguments)


class FunctionReward(LoadedReward):
    """A function as a reward.

    Both ``f(prompts, responses)`` and TRL's ``f(prompts, completions, **columns)`` are functions of a reward. The function
    gets the columns that it names, or all where it takes any. Its responses are texts.

    Args:
        function: Function that returns a number, or None, for each response.
        name: Name of the reward; the function's if None.
        card: Card whose sign, mean and std apply.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None, card: FunctionCard | None = None):
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.card = card
        self._function = function

        parameters = inspect.signature(function).parameters
        self._takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._known = set(parameters)
        named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        texts = {"prompts", "completions"} if "completions" in self._known else {p.name for p in named[:2]}
        columns = [p for p in named if p.name not in texts | _OF_TRL]
        self.columns = tuple(p.name for p in columns)
        self.needs = tuple(p.name for p in columns if p.default is p.empty)

    def _scores(self, prompts: list[Any], responses: list[str], columns: dict[str, Any]) -> list[float | None]:
        passed = {key: value for key, value in columns.items() if self._takes_any or key in self._known}
        if "completions" in self._known:
            values = self._function(prompts=prompts, completions=responses, **passed)
        else:
            values = self._function(prompts, responses, **passed)

        scores = [None if value is None else float(value) for value in values]
        if self.card is None:
            return scores
        return [None if score is None else self.card.scaled(self.card.sign * score) for score in scores]


def as_reward(reward: Callable[..., Any], name: str | None = None) -> LoadedReward:
    """Return a reward as it is, and a function as a reward.

    Args:
        reward: Loaded reward, or a function.
        name: Name of the function's reward; the function's own if None.
    """
    return reward if isinstance(reward, LoadedReward) else FunctionReward(reward, name)


def imported(module: str, name: str) -> Callable[..., Any]:
    """Return a function of a module, or of a file in the working folder.

    Raises:
        RewardError: No such function.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)

    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"no reward function {module}:{name}: {error}") from None
    if not callable(function):
        raise RewardError(f"{module}:{name} is {type(function).__name__}, not a function")
    return function
