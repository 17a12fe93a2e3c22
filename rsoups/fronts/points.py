"""One model on a front, the choice of one, and how it is read from records or from a table's row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError
from rsoups.fronts.estimates import Estimate, distinct, means_with_draws

SOUP, BASE = "soup", "base"
LAMBDA = "lambda_"  # begins a column of weights
_FIELDS = ("name", "lambdas", "method", "prompt", "response", "rewards", "seed")


@dataclass(frozen=True, eq=False)
class Point:
    """One model on the front.

    Attributes:
        name: ``"soup"``, ``"base"``, or the name it was evaluated under.
        lambdas: Weights by ingredient, None unless a soup.
        method: Of interpolation, None unless a soup.
        mean: By reward.
        low, high: By reward, the 95% percentile bootstrap interval over prompts; empty where none is known.
        n: Prompts; 0 for a point from elsewhere.
        values: Shape (n, rewards), float64: each prompt's rewards, in the front's order of prompts and rewards; the means
            alone, shape (1, rewards), where there are no prompts.
        extras: What shows reward hacking, where the records tell it: ``words`` and ``tokens`` of a response, ``distinct-2``
            of all responses, ``KL`` to the base (nats per response, k1) and ``perplexity`` under the base (per token).
        tells_method: Whether the label tells the method: there are soups of others beside it.
    """

    name: str
    lambdas: dict[str, float] | None
    method: str | None
    mean: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    n: int
    values: NDArray[np.float64]
    extras: dict[str, Estimate] = field(default_factory=dict)
    tells_method: bool = False

    @property
    def label(self) -> str:
        """The name; of a soup its λ, and its method where the front has several."""
        if self.lambdas is None:
            return self.name
        method = f" ({self.method})" if self.tells_method else ""
        return "λ " + " / ".join(f"{x:.3g}" for x in self.lambdas.values()) + method

    def estimate(self, reward: str) -> Estimate:
        """The mean of a reward with its interval."""
        return Estimate(self.mean[reward], self.low.get(reward), self.high.get(reward))


@dataclass(frozen=True, eq=False)
class Choice:
    """A point that was chosen, why, and how sure that is.

    Attributes:
        point: The point.
        rule: Why, in words.
        share: In how many of the bootstrap draws over prompts (of the draws from the voter's posterior, for votes) the same
            point is chosen; None where there are no prompts to resample.
        above_base: In how many of the draws over prompts the point is above the base in every reward; None where there are no
            prompts to resample, or no base.
        behind: By reward, the point less the base, where that is not above 0. Empty without a base.
    """

    point: Point
    rule: str
    share: float | None
    above_base: float | None = None
    behind: dict[str, Estimate] = field(default_factory=dict)

    def __str__(self) -> str:
        sure = "" if self.share is None else f"; chosen in {self.share:.0%} of the draws"
        if self.above_base is not None:
            sure += f"; above the base in every reward in {self.above_base:.0%} of the draws"
        figures = ", ".join(f"{reward} {self.point.estimate(reward)}" for reward in self.point.mean)
        behind = ", ".join(f"in {reward}, by {gain}" for reward, gain in self.behind.items())
        caution = f". Not above the base {behind}" if behind else ""
        return f"{self.point.label} ({self.rule}{sure}): {figures}{caution}"


def check_record(number: int, record: Mapping[str, Any], rewards: list[str]) -> list[str]:
    """The names of the rewards, sorted: those given, or the record's own where none are.

    Raises:
        FrontError: No record, one that lacks a field or has other rewards, or a reward that is not finite.
    """
    if not isinstance(record, Mapping) or (missing := [field for field in _FIELDS if field not in record]):
        lacks = f"lacks {missing}" if isinstance(record, Mapping) else f"is {record!r}"
        raise FrontError(f"record {number} {lacks}; a record has {list(_FIELDS)}")
    where = f"record {number} ({record['name']}, lambdas {record['lambdas']}, prompt {record['prompt']!r})"
    if not isinstance(record["prompt"], (str, list)) or not isinstance(record["rewards"], Mapping):
        raise FrontError(f"{where}: a prompt is a text or messages, and rewards are values by name")
    known = rewards or sorted(record["rewards"])
    if sorted(record["rewards"]) != known or not known:
        raise FrontError(f"{where} has rewards {sorted(record['rewards'])}, others have {rewards}")
    for reward in known:
        score = record["rewards"][reward]
        if score is None and reward in record.get("abstained", ()):
            continue
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise FrontError(f"{where}: {reward} is {score!r}, must be a finite number")
    return known


def lambdas_of(number: int, record: Mapping[str, Any], ingredients: Sequence[str]) -> dict[str, float]:
    """λ of a soup's record, in the order of the ingredients.

    Raises:
        FrontError: They are no weights by name, or of other ingredients.
    """
    lambdas = record["lambdas"]
    if not isinstance(lambdas, Mapping) or sorted(lambdas) != sorted(ingredients):
        of = list(lambdas) if isinstance(lambdas, Mapping) else repr(lambdas)
        raise FrontError(
            f"record {number} is of a soup of {of}, others are of {list(ingredients)}: make a front of each"
        )
    return {name: lambdas[name] for name in ingredients}


def model_key(name: str, lambdas: Mapping[str, float] | None, method: str | None) -> tuple[Any, ...]:
    """The key of a model among records: name, λ in any order of the ingredients, method."""
    return name, None if lambdas is None else tuple(sorted(lambdas.items())), method


def prompt_key(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as a text: messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def mean_score(records: Sequence[Mapping[str, Any]], reward: str) -> float:
    """The mean of a reward over the records that it scored; NaN where it scored none (None, named under ``abstained``)."""
    scores = [score for record in records if (score := record["rewards"][reward]) is not None]
    return float(np.mean(scores)) if scores else math.nan


def point_of_records(
    records: Sequence[Sequence[Mapping[str, Any]]], rewards: list[str], shares: NDArray[np.float64] | None
) -> Point:
    """A point from its records: for each prompt those of its samples."""
    head = records[0][0]
    values = np.array([[mean_score(some, name) for name in rewards] for some in records])
    found = estimates_of(values, rewards, shares)
    mean = {name: estimate.value for name, estimate in found.items()}
    low = {name: estimate.low for name, estimate in found.items() if estimate.low is not None}
    high = {name: estimate.high for name, estimate in found.items() if estimate.high is not None}
    extras = _extras(records, shares)
    return Point(head["name"], head["lambdas"], head["method"], mean, low, high, len(values), values, extras)


def estimates_of(
    values: NDArray[np.float64], names: Sequence[str], shares: NDArray[np.float64] | None
) -> dict[str, Estimate]:
    """By column of values of shape (prompts, columns), the mean over prompts and its interval."""
    return {name: Estimate.of(c) for name, c in zip(names, means_with_draws(values, shares).T, strict=True)}


def _extras(records: Sequence[Sequence[Mapping[str, Any]]], shares: NDArray[np.float64] | None) -> dict[str, Estimate]:
    """What the records tell beside rewards: `Point.extras`."""
    columns = {"words": [np.mean([len(r["response"].split()) for r in some]) for some in records]}
    for name, key in (("tokens", "tokens"), ("KL", "kl"), ("nll", "base_nll")):
        if all(isinstance(r.get(key), (int, float)) and math.isfinite(r[key]) for some in records for r in some):
            columns[name] = [np.mean([r[key] for r in some]) for some in records]
    extras = estimates_of(np.array(list(columns.values()), dtype=np.float64).T, list(columns), shares)
    if variety := distinct([[r["response"] for r in some] for some in records]):
        extras["distinct-2"] = variety
    if extras.pop("nll", None) and sum(columns.get("tokens", [0])) > 0:
        nll, tokens = means_with_draws(np.array([columns["nll"], columns["tokens"]]).T, shares).T
        extras["perplexity"] = Estimate.of(np.exp(nll / np.maximum(tokens, 1e-9)))
    return extras


def point_of_row(where: str, row: Mapping[str, str], rewards: Sequence[str]) -> Point:
    def number(column: str) -> float:
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise FrontError(f"{where}: {column} is {row[column]!r}, must be a finite number")
        return value

    columns = [column for column in row if isinstance(column, str) and column.startswith(LAMBDA)]
    is_soup = any(row[column] for column in columns)
    lambdas = {column.removeprefix(LAMBDA): number(column) for column in columns} if is_soup else None
    mean = {name: number(name) for name in rewards}
    low, high = ({name: number(name + end) for name in rewards if row.get(name + end)} for end in ("_low", "_high"))
    name = row.get("name") or (SOUP if is_soup else where.rpartition(", ")[2])
    return Point(name, lambdas, None, mean, low, high, 0, np.array([list(mean.values())]))


def cells_of(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    if estimate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
