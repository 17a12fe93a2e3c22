"""Choose a point of a front by one rule: the largest weighted sum, the largest value within limits, the knee, votes, the base.

A `Rule` takes means of shape (..., points, rewards) and returns the place of the chosen point, shape (...), or -1 where no
point qualifies. All rewards are maximized.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError, did_you_mean
from rsoups.fronts.estimates import pareto_mask
from rsoups.fronts.points import Choice, Point

if TYPE_CHECKING:
    from rsoups.fronts.front import Front
    from rsoups.fronts.votes import VotedUtility

Rule = Callable[[NDArray[np.float64]], NDArray[np.int64]]
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_LIMIT = re.compile(rf"\s*(?P<reward>\S.*?)\s*(?P<sign>>=|<=|>|<)\s*(?P<value>{_NUMBER})\s*")


@dataclass(frozen=True)
class Limit:
    """A limit of one reward: `reward` `sign` `value`, such as ``harmless >= 0.2``."""

    reward: str
    sign: str
    value: float

    def holds(self, values: Any) -> Any:
        """Whether a number, or each number of an array, keeps the limit."""
        return _COMPARISONS[self.sign](values, self.value)

    def __str__(self) -> str:
        return f"{self.reward} {self.sign} {self.value:g}"


def parse_limit(text: str) -> Limit:
    """A limit from text, ``"harmless >= 0.2"``; the comparison is >=, >, <= or <.

    Raises:
        FrontError: The text has another form, or its number is not finite.
    """
    match = _LIMIT.fullmatch(str(text))
    if not match or not math.isfinite(float(match["value"])):
        raise FrontError(
            f"invalid limit {text!r}: write a reward, >=, >, <= or <, and a number, such as 'coverage >= 0.2'"
        )
    return Limit(match["reward"], match["sign"], float(match["value"]))


def by_preference(preference: Mapping[str, float], rewards: Sequence[str]) -> Rule:
    """The largest Σ μi·Ri: weights on the rewards as they are (Ramé et al. 2023, section 2).

    Raises:
        FrontError: An unknown reward, or weights that are negative, not finite or all 0.
    """
    _check_names(preference, rewards)
    weights = np.array([float(preference.get(reward, 0)) for reward in rewards])
    if not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() == 0:
        raise FrontError(f"preference weights must be finite, at least 0 and not all 0, got {dict(preference)}")
    return lambda means: np.argmax(means @ (weights / weights.sum()), axis=-1)


class Constrained:
    """The largest value of one reward among the points that keep limits.

    Raises:
        FrontError: An unknown reward.
    """

    def __init__(self, maximize: str, limits: Sequence[Limit], rewards: Sequence[str]):
        _check_names([maximize, *(limit.reward for limit in limits)], rewards)
        self._column, self._limits, self._rewards = list(rewards).index(maximize), limits, list(rewards)

    def __call__(self, means: NDArray[np.float64]) -> NDArray[np.int64]:
        allowed = self._allowed(means, self._limits)
        best = np.argmax(np.where(allowed, means[..., self._column], -np.inf), axis=-1)
        return np.where(allowed.any(axis=-1), best, -1)

    def _allowed(self, means: NDArray[np.float64], limits: Iterable[Limit]) -> NDArray[np.bool_]:
        """Which points keep the limits: shape (..., points)."""
        allowed = np.ones(means.shape[:-1], dtype=bool)
        for limit in limits:
            allowed &= limit.holds(means[..., self._rewards.index(limit.reward)])
        return allowed

    def explain(self, means: NDArray[np.float64], labels: Sequence[str]) -> str:
        """Why no point of `means`, shape (points, rewards), keeps all limits: for each limit the best reachable value."""
        reasons = []
        for limit in self._limits:
            column = means[:, self._rewards.index(limit.reward)]
            others = self._allowed(means, (other for other in self._limits if other is not limit))
            if others.any():
                upwards = column if limit.sign in (">", ">=") else -column
                best = int(np.argmax(np.where(others, upwards, -np.inf)))
                rest = ", the other limits kept" if len(self._limits) > 1 else ""
                reasons.append(f"{limit}: the best reachable is {column[best]:.4g} ({labels[best]}){rest}")
        if not reasons:  # two limits or more that exclude each other even two by two
            for limit in self._limits:
                column = means[:, self._rewards.index(limit.reward)]
                reasons.append(f"{limit.reward} reaches from {column.min():.4g} to {column.max():.4g}")
        return "; ".join(reasons)


def knee(means: NDArray[np.float64]) -> NDArray[np.int64]:
    """The Pareto-optimal point farthest above the plane through the front's ends, rewards scaled to [0, 1] on the front.

    The ends are the points with the most of each reward; above is the side of the ideal point, which has the most of every
    reward. Das 1999, "On characterizing the knee of the Pareto curve based on normal-boundary intersection".
    """
    if means.ndim > 2:
        return np.array([knee(draw) for draw in means])
    optimal = np.flatnonzero(pareto_mask(means))
    front = means[optimal]
    width = np.ptp(front, axis=0)
    if not width.any():  # one point, or copies of it
        return optimal[0]
    scaled = (front - front.min(axis=0))[:, width > 0] / width[width > 0]
    heights = np.round(scaled @ _normal_of_ends(scaled), 12)  # rounded, so that among equal points the first is chosen
    return optimal[np.argmax(heights)]


def _normal_of_ends(scaled: NDArray[np.float64]) -> NDArray[np.float64]:
    """Normal of the plane through the ends of a front in [0, 1], shape (points, rewards), toward the ideal point.

    Where one point is the end of several rewards, many planes hold the ends: the plane farthest from the ideal point is used.
    """
    total = scaled.sum(axis=1)
    ends = scaled[[int(np.argmax(np.where(column == 1, total, -np.inf))) for column in scaled.T]]
    middle = ends.mean(axis=0)
    across, upwards = (ends - middle).T, 1 - middle
    normal = upwards - across @ np.linalg.lstsq(across, upwards, rcond=None)[0]
    # Where the ideal point is in the plane, only rounding errors are left of the normal.
    return normal if np.abs(normal).max(initial=0) > 1e-9 else np.ones_like(middle)


def _check_names(names: Iterable[str], rewards: Sequence[str]) -> None:
    unknown = [name for name in names if name not in rewards]
    if unknown:
        raise FrontError(f"no reward {unknown}; there are {list(rewards)}.{did_you_mean(unknown[0], rewards)}")


def choose_by_weights(front: Front, preference: Mapping[str, float]) -> Choice:
    """The point with the largest weighted sum of rewards."""
    weights = ", ".join(f"{name} {weight:g}" for name, weight in preference.items())
    return _by_rule(front, front.candidates, by_preference(preference, front.rewards), f"preference {weights}")


def choose_by_limits(front: Front, maximize: str, subject_to: Mapping[str, str] | Iterable[str]) -> Choice:
    """The point with the most of one reward among those that keep limits, ``{"b": ">= 0.2"}`` or ``["b >= 0.2"]``."""
    if isinstance(subject_to, Mapping):
        subject_to = [f"{reward} {limit}" for reward, limit in subject_to.items()]
    limits = [parse_limit(text) for text in subject_to]
    rule = Constrained(maximize, limits, front.rewards)
    means = front.stack(front.candidates)[0]
    if rule(means) < 0:
        labels = [point.label for point in front.candidates]
        raise FrontError(f"no point keeps the limits; {rule.explain(means, labels)}")
    return _by_rule(front, front.candidates, rule, ", ".join([f"largest {maximize}", *map(str, limits)]))


def choose_knee(front: Front) -> Choice:
    """The knee of the front."""
    return _by_rule(front, front.candidates, knee, "knee of the front")


def choose_by_votes(front: Front, votes: str | Path | Sequence[Mapping[str, Any]] | VotedUtility) -> Choice:
    """The soup that voters like best."""
    from rsoups.fronts.votes import VotedUtility, fit_votes

    if not front.soups:
        raise FrontError("votes choose among soups, and this front has none: sweep soups first")
    utility = votes if isinstance(votes, VotedUtility) else fit_votes(votes, front.ingredients)
    if sorted(utility.ingredients) != sorted(front.ingredients):
        raise FrontError(
            f"the votes are about {utility.ingredients}, the soups weigh {front.ingredients}: collect votes on these soups"
        )
    best, share = utility.best_of([point.lambdas or {} for point in front.soups])
    return choice_of(front, front.soups[best], f"best liked in {utility.votes} votes", share)


def choose_above_base(front: Front, preference: Mapping[str, float]) -> Choice:
    """The best point by preference among those above the base in every reward, with 95% confidence where there is one."""
    points = [point for point in front.candidates if point is not front.base]
    rule = by_preference(preference, front.rewards)
    if front.base is None or not points:
        labels = [point.label for point in front.points]
        raise FrontError(f"above_base compares points with the base; there are {labels}: evaluate the base and soups")
    gains = {point: front.difference(point, front.base).values() for point in points}
    surely = [point for point in points if all(gain.is_above_zero for gain in gains[point])]
    likely = [point for point in points if all(gain.value > 0 for gain in gains[point])]

    if not likely:
        lowest = {point: min(gain.value for gain in gains[point]) for point in points}
        nearest = max(points, key=lambda point: (share_above_base(front, point) or 0, lowest[point]))
        raise FrontError(
            "no good choice: no soup is above the base in every reward; the nearest is "
            f"{choice_of(front, nearest, 'most often above it', None)}"
        )
    certainty = ", with 95% confidence" if surely else ", though not with 95% confidence" if front.prompts else ""
    return _by_rule(front, surely or likely, rule, f"above the base in every reward{certainty}")


def share_above_base(front: Front, point: Point) -> float | None:
    """Share of the bootstrap draws in which a point is above the base in every reward; None without draws or a base."""
    if front.base is None or front.shares is None:
        return None
    draws = front.stack([point, front.base])[1:]
    return float((draws[:, 0] > draws[:, 1]).all(axis=-1).mean())


def choice_of(front: Front, point: Point, rule: str, share: float | None) -> Choice:
    """A choice, compared with the base if there is one."""
    if front.base is None or point is front.base:
        return Choice(point, rule, share)
    gains = front.difference(point, front.base)
    behind = {reward: gain for reward, gain in gains.items() if gain.value <= 0}
    return Choice(point, rule, share, share_above_base(front, point), behind)


def _by_rule(front: Front, points: Sequence[Point], rule: Rule, words: str) -> Choice:
    """The point that a rule chooses by the observed means, and the share of draws in which it chooses the same."""
    means = front.stack(points)
    chosen = int(rule(means[0]))
    share = None if len(means) == 1 else float(np.mean(rule(means[1:]) == chosen))
    return choice_of(front, points[chosen], words, share)
