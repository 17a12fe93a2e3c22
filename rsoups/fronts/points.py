"""A point of a front (one evaluated model) and the choice of one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsoups.fronts.estimates import Estimate, means_with_draws

SOUP, BASE = "soup", "base"


class Named:
    """A model by its name, its λ and its method, which a sweep's models and a front's points have.

    Attributes:
        name: ``"soup"``, ``"base"``, or the name it is evaluated under.
        lambdas: λ by ingredient; None unless the model is a soup.
        method: Method of interpolation; None unless the model is a soup.
    """

    name: str
    lambdas: Mapping[str, float] | None
    method: str | None

    @property
    def key(self) -> tuple[Any, ...]:
        """The key that `model_key` gives to this model's records."""
        return model_key(self.name, self.lambdas, self.method)

    @property
    def weights(self) -> list[float]:
        """λ in the order of the ingredients; empty unless the model is a soup."""
        return list((self.lambdas or {}).values())


@dataclass(frozen=True, eq=False, repr=False)
class Point(Named):
    """One model on the front.

    Attributes:
        name: ``"soup"``, ``"base"``, or the name it was evaluated under.
        lambdas: Weights by ingredient; None unless the model is a soup.
        method: Method of interpolation; None unless the model is a soup.
        mean: Mean by reward.
        low, high: Bounds of the 95% percentile bootstrap interval over prompts, by reward; empty without an interval.
        n: Number of prompts; 0 for a point that was read from a table.
        values: Shape (n, rewards), float64: the rewards of each prompt, in the front's order of prompts and rewards. Shape
            (1, rewards), the means alone, where there are no prompts. NaN where a reward has no score.
        extras: Measures that show reward hacking, if the records hold them: ``words`` and ``tokens`` of a response,
            ``distinct-2`` of all responses, ``KL`` to the base (nats per response, k1) and ``perplexity`` under the base (per
            token).
        tells_method: Whether the label names the method, because the front has soups of several methods.
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
    def alone(self) -> str | None:
        """Name of the ingredient with λ = 1 where all others have 0; None for any other model."""
        mixed = [name for name, weight in (self.lambdas or {}).items() if weight]
        return mixed[0] if len(mixed) == 1 and (self.lambdas or {})[mixed[0]] == 1 else None

    @property
    def label(self) -> str:
        """The name of the model, or the λ of a soup (with its method, if the front has several)."""
        if self.lambdas is None:
            return self.name
        method = f" ({self.method})" if self.tells_method else ""
        return "λ " + " / ".join(f"{weight:.3g}" for weight in self.weights) + method

    def estimate(self, reward: str) -> Estimate:
        """The mean of a reward with its interval."""
        return Estimate(self.mean[reward], self.low.get(reward), self.high.get(reward))

    def figures(self) -> str:
        """The mean of each reward with its interval, as text."""
        return ", ".join(f"{reward} {self.estimate(reward)}" for reward in self.mean)

    def __repr__(self) -> str:
        return f"Point({self.label}: {self.figures()})"


@dataclass(frozen=True, eq=False, repr=False)
class Choice:
    """The point that a rule chooses, and how certain the choice is.

    Attributes:
        point: The point.
        rule: The rule in words.
        share: Share of the bootstrap draws over prompts that choose the same point (for votes: of the draws from the
            posterior); None without prompts to resample.
        above_base: Share of the draws in which the point is above the base in every reward; None without prompts or a base.
        behind: Point minus base, for each reward in which this is not above 0. Empty without a base.
    """

    point: Point
    rule: str
    share: float | None
    above_base: float | None = None
    behind: dict[str, Estimate] = field(default_factory=dict)

    def __str__(self) -> str:
        rule = self.rule
        if self.share is not None:
            rule += f"; chosen in {self.share:.0%} of the draws"
        if self.above_base is not None:
            rule += f"; above the base in every reward in {self.above_base:.0%} of the draws"
        behind = ", ".join(f"in {reward}, by {gain}" for reward, gain in self.behind.items())
        caution = f". Not above the base {behind}" if behind else ""
        return f"{self.point.label} ({rule}): {self.point.figures()}{caution}"

    def __repr__(self) -> str:
        return f"Choice({self})"


def model_key(name: str, lambdas: Mapping[str, float] | None, method: str | None) -> tuple[Any, ...]:
    """The key of a model among records: name, λ in any order of the ingredients, method."""
    return name, None if lambdas is None else tuple(sorted(lambdas.items())), method


def is_number(value: Any) -> bool:
    """Whether a value from a file is a finite number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def estimates_of(
    values: NDArray[np.float64], names: Sequence[str], shares: NDArray[np.float64] | None
) -> dict[str, Estimate]:
    """The mean over prompts of each column, with its interval: values of shape (prompts, columns), float64."""
    columns = means_with_draws(values, shares).T
    return {name: Estimate.of(column) for name, column in zip(names, columns, strict=True)}


def values_of(points: Sequence[Point]) -> NDArray[np.float64]:
    """Rewards of points for each prompt: shape (prompts, points, rewards), float64."""
    return np.stack([point.values for point in points], axis=1)
