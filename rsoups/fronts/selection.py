"""Rules that choose a point of a front, and how sure the choice is: the share of bootstrap draws that make the same one.

Arrays of means, shape (..., points, rewards), to the index of the chosen point, shape (...); -1 where none will do.
All rewards are maximized.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError

Rule = Callable[[NDArray[np.float64]], NDArray[np.int64]]
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


_LIMIT = re.compile(r"\s*(?P<reward>.*?)\s*(?P<sign>>=|<=|>|<)\s*(?P<value>[^<>=\s]+)\s*", re.DOTALL)


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
    value = math.nan
    if match and match["reward"]:
        with suppress(ValueError):
            value = float(match["value"])
    if not match or not math.isfinite(value):
        raise FrontError(
            f"invalid limit {text!r}: write a reward, >=, >, <= or <, and a number, such as 'coverage >= 0.2'"
        )
    return Limit(match["reward"], match["sign"], value)


def by_preference(preference: Mapping[str, float], rewards: Sequence[str]) -> Rule:
    """The largest Σ μi·Ri, the user's weights on the rewards as they are (Ramé et al. 2023, section 2).

    Raises:
        FrontError: A name that is no reward, or weights that are negative, not finite or all 0.
    """
    _known(preference, rewards)
    weights = np.array([float(preference.get(reward, 0)) for reward in rewards])
    if not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() == 0:
        raise FrontError(f"preference weights must be finite, at least 0 and not all 0, got {dict(preference)}")
    return lambda means: np.argmax(means @ (weights / weights.sum()), axis=-1)


class Constrained:
    """The largest value of one reward among the points whose other rewards keep their limits.

    Raises:
        FrontError: A name that is no reward, or a limit that is not like ``">= 0.2"``.
    """

    def __init__(self, maximize: str, subject_to: Mapping[str, str], rewards: Sequence[str]):
        _known([maximize, *subject_to], rewards)
        self._column = list(rewards).index(maximize)
        self._limits = {reward: _limit(reward, text) for reward, text in subject_to.items()}
        self._rewards = list(rewards)

    def allowed(self, means: NDArray[np.float64], leaving_out: str | None = None) -> NDArray[np.bool_]:
        """Which points keep all limits (but one): shape (..., points)."""
        kept = np.ones(means.shape[:-1], dtype=bool)
        for reward, (compare, value) in self._limits.items():
            if reward != leaving_out:
                kept &= compare(means[..., self._rewards.index(reward)], value)
        return kept

    def __call__(self, means: NDArray[np.float64]) -> NDArray[np.int64]:
        allowed = self.allowed(means)
        best = np.argmax(np.where(allowed, means[..., self._column], -np.inf), axis=-1)
        return np.where(allowed.any(axis=-1), best, -1)

    def refuse(self, means: NDArray[np.float64], labels: Sequence[str]) -> None:
        """Say which limits cannot be kept, and the best that can be reached.

        Raises:
            FrontError: No point of `means`, shape (points, rewards), keeps all limits.
        """
        if self.allowed(means).any():
            return
        told = []
        for reward, (compare, value) in self._limits.items():
            column = means[:, self._rewards.index(reward)]
            others = self.allowed(means, leaving_out=reward)
            if not others.any():
                continue
            upwards = compare in (operator.ge, operator.gt)
            at = int(np.argmax(np.where(others, column if upwards else -column, -np.inf)))
            rest = ", the other limits kept" if len(self._limits) > 1 else ""
            told.append(
                f"{reward} {_sign(compare)} {value:g}: the best reachable is {column[at]:.4g} ({labels[at]}){rest}"
            )
        if not told:  # two limits or more that exclude each other even two by two
            told = [
                f"{reward} reaches from {column.min():.4g} to {column.max():.4g}"
                for reward in self._limits
                for column in [means[:, self._rewards.index(reward)]]
            ]
        raise FrontError(f"no point keeps the limits; {'; '.join(told)}")


def knee(means: NDArray[np.float64]) -> NDArray[np.int64]:
    """The Pareto-optimal point farthest above the plane through the front's ends, rewards scaled to [0, 1] on the front.

    The ends are the points with the most of each reward; above is the side of the ideal point, the most of every reward.
    Das 1999, "On characterizing the knee of the Pareto curve based on normal-boundary intersection".
    """
    from moocore import is_nondominated

    if means.ndim > 2:
        return np.array([knee(draw) for draw in means])
    kept = np.flatnonzero(is_nondominated(means, maximise=True, keep_weakly=True))
    on_front = means[kept]
    width = np.ptp(on_front, axis=0)
    if not width.any():  # one point, or copies of it
        return kept[0]
    scaled = (on_front - on_front.min(axis=0))[:, width > 0] / width[width > 0]
    heights = np.round(scaled @ _normal_of_ends(scaled), 12)  # of ends that nothing is above, the first
    return kept[np.argmax(heights)]


def _normal_of_ends(scaled: NDArray[np.float64]) -> NDArray[np.float64]:
    """Normal of the plane through the ends of a front in [0, 1], shape (points, rewards), towards the ideal point.

    Where one point is the end of several rewards, many planes hold the ends: it is the one farthest from the ideal point.
    """
    total = scaled.sum(axis=1)
    ends = scaled[[int(np.argmax(np.where(column == 1, total, -np.inf))) for column in scaled.T]]
    middle = ends.mean(axis=0)
    across, upwards = (ends - middle).T, 1 - middle
    normal = upwards - across @ np.linalg.lstsq(across, upwards, rcond=None)[0]
    # Rounding alone is left where the ideal point is in the plane.
    return normal if np.abs(normal).max(initial=0) > 1e-9 else np.ones_like(middle)


def _known(names: Mapping[str, Any] | Sequence[str], rewards: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in rewards]:
        raise FrontError(f"no reward {unknown}; there are {list(rewards)}")


def _limit(reward: str, text: str) -> tuple[Callable[[Any, Any], Any], float]:
    limit = parse_limit(f"{reward} {text}")
    return _COMPARISONS[limit.sign], limit.value


def _sign(compare: Callable[[Any, Any], Any]) -> str:
    return next(sign for sign, found in _COMPARISONS.items() if found is compare)
