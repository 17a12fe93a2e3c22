"""Rules that choose a point of a front: the largest weighted sum, the largest value within limits, the knee.

A rule takes means of shape (..., points, rewards) and returns the place of the chosen point, shape (...), or -1 where no point
qualifies. All rewards are maximized.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError
from rsoups.fronts.estimates import pareto_mask

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
        kept = np.ones(means.shape[:-1], dtype=bool)
        for limit in limits:
            kept &= limit.holds(means[..., self._rewards.index(limit.reward)])
        return kept

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
        raise FrontError(f"no reward {unknown}; there are {list(rewards)}")
