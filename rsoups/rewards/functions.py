"""Functions as rewards: one's own, those that a card names, and the checks of what any reward gets and returns."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsoups.common.errors import RewardError
from rsoups.rewards import text_checks, text_metrics
from rsoups.rewards.cards import check_calibration, check_fields

_OF_TRL = {"completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}  # with every batch, no columns


@dataclass(frozen=True)
class FunctionCard:
    """A reward that is a function of rsoups. Each field is a key of the YAML file.

    Attributes:
        name: Names the reward in records, logs and plots.
        function: ``rsoups.rewards.text_metrics:...`` or ``rsoups.rewards.text_checks:...``.
        arguments: Of the function; its docstring says which.
        sign: 1, or -1 where a higher value is worse.
        mean, std: The score is ``(sign * value - mean) / std``, from a named calibration, so that rewards can be mixed.
        calibration: What mean and std were measured on.
        source: Where the function comes from.
    """

    name: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sign: int = 1
    mean: float = 0.0
    std: float = 1.0
    calibration: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        check_fields(self, f"reward card {self.name!r}")
        if not isinstance(self.arguments, Mapping):
            raise RewardError(f"reward card {self.name!r}: arguments is {self.arguments!r}, must be a mapping")
        if self.sign not in (1, -1):
            raise RewardError(f"reward card {self.name!r}: sign is {self.sign!r}, must be 1 or -1")
        check_calibration(self.name, self.mean, self.std)

    def summary(self) -> str:
        """The function with its arguments, on one line."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        return f"{self.function}({arguments})"

    def made(self) -> Callable[..., list[float]]:
        """The function, made of the card's arguments.

        Raises:
            RewardError: A function that is not one of rsoups' own, or arguments that it does not take.
        """
        known = {name: getattr(module, name) for module in (text_checks, text_metrics) for name in module.__all__}
        function = known.get(re.sub(r"^rsoups\.text_(checks|metrics):", "", self.function))  # as cards of 0.1 have it
        if function is None:
            raise RewardError(
                f"reward card {self.name!r}: function is {self.function!r}, must be one of {sorted(known)}; any other one is a "
                "reward without a card, as module:function"
            )
        try:
            inspect.signature(function).bind(**self.arguments)
        except TypeError as error:
            raise RewardError(
                f"reward card {self.name!r}: {self.function}: {error}; the card's arguments are {dict(self.arguments)} (say "
                "others in a card of your own; recipes/calibrate.py --arguments writes one)"
            ) from None
        return function(**self.arguments)


class FunctionReward:
    """A function as a reward: ``reward(prompts, responses, **columns) -> list[float]``; None is no opinion on a response.

    Takes ``f(prompts, responses)`` and TRL's ``f(prompts, completions, **columns)`` alike; a function gets those of the
    dataset's columns that it names, or all where it takes any.

    Attributes:
        name: Of records, logs and plots.
        columns: The dataset's columns that the function names.
        needs: Those among them without a default.
        card: Whose sign, mean and std apply; None for a function of one's own.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None, card: FunctionCard | None = None):
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))
        self.__name__ = self.name
        self.card = card
        self._function = function
        parameters = inspect.signature(function).parameters
        self._any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._known = set(parameters)
        named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        texts = {"prompts", "completions"} if "completions" in self._known else {p.name for p in named[:2]}
        named = [p for p in named if p.name not in texts | _OF_TRL]
        self.columns = tuple(p.name for p in named)
        self.needs = tuple(p.name for p in named if p.default is p.empty)

    @classmethod
    def of(cls, card: FunctionCard) -> FunctionReward:
        """The reward that a card names."""
        return cls(card.made(), card.name, card)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float | None]:
        """Score each response to its prompt.

        Raises:
            RewardError: A column that the function needs is missing, or not one finite score (or None) for each response (the
                sample is shown).
        """
        if lacking := [name for name in self.needs if columns.get(name) is None]:
            raise RewardError(f"reward {self.name!r} needs the column(s) {lacking} beside prompts and responses")
        passed = {key: value for key, value in columns.items() if self._any or key in self._known}
        if "completions" in self._known:
            values = self._function(prompts=list(prompts), completions=list(responses), **passed)
        else:
            values = self._function(list(prompts), list(responses), **passed)
        scores = [None if value is None else float(value) for value in values]
        if (card := self.card) is not None:
            scores = [None if s is None else (card.sign * s - card.mean) / card.std for s in scores]
        check_scores(self.name, scores, prompts, responses)
        return scores


def check_scores(name: str, scores: Sequence[float | None], prompts: Sequence[Any], responses: Sequence[str]) -> None:
    """Refuse scores that would poison a run; None is no score, and passes.

    Raises:
        RewardError: Not one score per sample, or a score that is NaN or infinite; names the reward and the sample.
    """
    if len(scores) != len(responses):
        raise RewardError(f"reward {name!r} returned {len(scores)} scores for {len(responses)} responses")
    for score, prompt, response in zip(scores, prompts, responses, strict=True):
        if score is not None and not math.isfinite(score):
            raise RewardError(f"reward {name!r} returned {score} for prompt {prompt!r}, response {response!r}")


def columns_read(rewards: Iterable[Any]) -> set[str]:
    """The dataset's columns that loaded rewards look at, by name."""
    return {name for reward in rewards for name in getattr(reward, "columns", ())}


def check_columns(rewards: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> None:
    """Refuse data without the columns that its rewards need, before anything is generated.

    A function of one's own gets what a row has, None included; those of cards need a value in every row.

    Args:
        rewards: Loaded rewards.
        columns: The data, a value for each row.

    Raises:
        RewardError: A needed column is missing, or is empty where it must not be.
    """
    for reward in rewards:
        for name in getattr(reward, "needs", ()):
            if name not in columns or all(value is None for value in columns[name]):
                raise RewardError(
                    f"reward {reward.name!r} needs a column {name!r}, the dataset gives {sorted(columns)}: choose a --dataset "
                    "that has it"
                )
            empty = sum(value is None or value == "" or value == [] for value in columns[name])
            if empty and getattr(reward, "card", None) is not None:
                raise RewardError(
                    f"reward {reward.name!r} needs {name!r} of every row: {empty} of {len(columns[name])} have none"
                )


def imported(module: str, name: str) -> Callable[..., Any]:
    """A function of a module, or of a file in the working folder.

    Raises:
        RewardError: No such function.
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
