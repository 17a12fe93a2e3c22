"""Choose a point of a front by one rule; the body of `Front.select`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsoups.common.errors import FrontError
from rsoups.fronts.points import Choice, Point
from rsoups.fronts.selection import Constrained, Rule, by_preference, knee, parse_limit

if TYPE_CHECKING:
    from rsoups.fronts.front import Front
    from rsoups.fronts.votes import VotedUtility


def by_weights(front: Front, preference: Mapping[str, float]) -> Choice:
    """The point with the largest weighted sum of rewards."""
    weights = ", ".join(f"{name} {weight:g}" for name, weight in preference.items())
    return _by_rule(front, front.candidates, by_preference(preference, front.rewards), f"preference {weights}")


def by_limits(front: Front, maximize: str, subject_to: Mapping[str, str] | Iterable[str]) -> Choice:
    """The point with the most of one reward among those that keep limits.

    Args:
        front: The front.
        maximize: The reward.
        subject_to: Limits: ``{"b": ">= 0.2"}``, or ``["b >= 0.2"]``.

    Raises:
        FrontError: An unknown reward, an invalid limit, or no point keeps the limits (the best reachable is named).
    """
    if isinstance(subject_to, Mapping):
        subject_to = [f"{reward} {limit}" for reward, limit in subject_to.items()]
    limits = [parse_limit(text) for text in subject_to]
    rule = Constrained(maximize, limits, front.rewards)
    means = front.stack(front.candidates)[0]
    if rule(means) < 0:
        labels = [point.label for point in front.candidates]
        raise FrontError(f"no point keeps the limits; {rule.explain(means, labels)}")
    return _by_rule(front, front.candidates, rule, ", ".join([f"largest {maximize}", *map(str, limits)]))


def by_knee(front: Front) -> Choice:
    """The knee of the front."""
    return _by_rule(front, front.candidates, knee, "knee of the front")


def by_votes(front: Front, votes: str | Path | Sequence[Mapping[str, Any]] | VotedUtility) -> Choice:
    """The soup that voters like best.

    Raises:
        FrontError: No soups, or votes about other ingredients.
        VotesError: As `fit_votes`.
    """
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


def by_base(front: Front, preference: Mapping[str, float]) -> Choice:
    """The best point by preference among those above the base in every reward, with 95% confidence where there is one.

    Raises:
        FrontError: No base, no other points, or no point above the base (the nearest is named).
    """
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
