"""Do soups beat MORL runs? Equal numbers of points, expected utility over preferences, and the number of PPO runs.

Three things make a set of points look better than it is: more points, points that are chosen by the figures reported, and an
unstated price. Therefore as many soups are compared as there are runs on several rewards at once (MORL); a point is chosen on
one half of the prompts and evaluated on the other; and hypervolume is given by the number of PPO runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError
from rsoups.fronts.estimates import Estimate, Stack, Volume, hypervolumes, means_with_draws, shared_means, volume_of
from rsoups.fronts.grids import evenly_spread, simplex
from rsoups.fronts.tables import html_table

_DRAWS = 500  # of the utilities
_AT_ONCE = 50  # draws in memory at once, of all points and preferences
_CURVE_DRAWS = 200
_CHOICES = 60  # of the runs, at most, over which hypervolumes are averaged
_PREFERENCES = 21  # on the line between two rewards; of more rewards ten times as many, at random
Values = NDArray[np.float64]  # (prompts, points, rewards)


@dataclass(frozen=True)
class Reach:
    """The hypervolume that a number of PPO runs reaches.

    Attributes:
        runs: Number of runs.
        soups: Mean hypervolume of soups of this many ingredients, over all choices of them; None beyond their number.
        others: Mean hypervolume of this many MORL runs, over all choices of them (at most 60).
        best: The largest of these, a little too good, because it is chosen for being the largest.
    """

    runs: int
    soups: Estimate | None
    others: Estimate | None
    best: float | None

    def __str__(self) -> str:
        parts = [f"soups {self.soups}"] if self.soups else []
        parts += [f"MORL {self.others}, at best {self.best:.3f}"] if self.others else []
        return f"{self.runs} {'run' if self.runs == 1 else 'runs'}: {'; '.join(parts) or 'nothing'}"


@dataclass(frozen=True, repr=False)
class Advantage:
    """Soups against MORL runs.

    Attributes:
        soups, others: Hypervolume of as many soups as there are MORL runs, and of these runs.
        gain: Their difference, paired over prompts.
        places: Places of these soups in `Front.soups`: evenly spread over λ, whatever their rewards.
        runs: PPO runs that each set took: (soups, others).
        curve: Hypervolume by the number of PPO runs.
        utility: Expected utility of these soups minus that of the MORL runs: the mean over all preferences of the weighted sum
            of the rewards, at the point that suits the preference best. The point is chosen on one half of the prompts and
            evaluated on the other, both ways. None without prompts.
        utility_of_all: The same for all soups: what finer steps of λ add.
    """

    soups: Volume
    others: Volume
    gain: Estimate
    places: tuple[int, ...]
    runs: tuple[int, int]
    curve: tuple[Reach, ...]
    utility: Estimate | None = None
    utility_of_all: Estimate | None = None

    def __str__(self) -> str:
        lines = [
            f"soups {self.soups}",
            f"MORL {self.others}",
            f"soups minus MORL {self.gain} ({len(self.places)} points each)",
        ]
        if self.utility:
            lines.append(
                f"expected utility of these soups minus MORL {self.utility}, of all soups {self.utility_of_all}"
            )
        return "\n".join([*lines, *(f"with {reach}" for reach in self.curve)])

    def __repr__(self) -> str:
        utility = f", utility {self.utility}" if self.utility else ""
        return f"Advantage(soups minus MORL, {len(self.places)} points each: hypervolume {self.gain}{utility})"

    def _repr_html_(self) -> str:
        rows = [[f"hypervolume, {len(self.places)} points each", str(self.gain)]]
        if self.utility:
            rows.append(["expected utility of these points", str(self.utility)])
            rows.append(["expected utility of all soups", str(self.utility_of_all)])
        return html_table(["", "soups minus MORL"], rows)


def advantage(
    soups: Values,
    others: Values,
    shares: NDArray[np.float64] | None,
    *,
    runs: tuple[int, int],
    names: Sequence[str],
    reference: Sequence[float],
    lambdas: Sequence[Sequence[float]],
    with_ends: bool = True,
) -> Advantage:
    """The `Advantage` of soups over other runs, on the same prompts.

    Args:
        soups, others: Rewards of each prompt, shape (prompts, points, rewards).
        shares: Bootstrap draws, shape (draws, prompts), as `estimates.resampling` gives them; None for means alone.
        runs: PPO runs that each set took.
        names, reference: Names of the rewards, and the reference of hypervolumes in their order.
        lambdas: λ of the soups.
        with_ends: Whether the ingredients are among `others`.

    Raises:
        FrontError: A number of runs below 1, or fewer soups than other points.
    """
    if min(runs) < 1:
        raise FrontError(f"the numbers of runs of the soups and of the others are counted from 1, got {runs}")
    count = others.shape[1]
    if soups.shape[1] < count:
        raise FrontError(
            f"equal numbers of points are compared, and there are {soups.shape[1]} soups for {count} MORL runs "
            "(including the ingredients): sweep more λ, or name fewer runs"
        )
    places = evenly_spread(lambdas, count, with_ends)
    all_soups, all_others = means_with_draws(soups, shares), means_with_draws(others, shares)
    chosen = all_soups[:, places]
    # Noise makes both volumes larger, and equally so with as many points each: the difference needs no correction.
    gain = Estimate.of(hypervolumes(chosen, reference) - hypervolumes(all_others, reference))
    return Advantage(
        volume_of(chosen, names, reference),
        volume_of(all_others, names, reference),
        gain,
        tuple(places),
        runs,
        _curve(all_soups, all_others, lambdas, reference),
        None if shares is None else utility_gain(soups[:, places], others, shares),
        None if shares is None else utility_gain(soups, others, shares),
    )


def utility_gain(first: Values, second: Values, shares: NDArray[np.float64]) -> Estimate:
    """Expected utility of the first points minus that of the second.

    For each preference μ, the point with the largest Σ μi·Ri is chosen on one half of the prompts and evaluated on the other:
    the noise that made it the best does not make it look better. The two ways round are averaged. The interval is ± 1.96
    standard errors. The error of a bootstrap draw is the utility of its choices on its own prompts minus their utility on all
    prompts: the interval counts that the halves choose for one another, and not that draws choose worse than the prompts do.

    Args:
        first, second: Rewards of each prompt, shape (prompts, points, rewards), on the same prompts.
        shares: Bootstrap draws, shape (draws, prompts).
    """
    prompts, _, rewards = first.shape
    preferences = _preferences(rewards).T
    order = np.random.default_rng(0).permutation(prompts)
    halves = order[: prompts // 2], order[prompts // 2 :]
    weights = np.concatenate([np.full((1, prompts), 1 / prompts), shares[:_DRAWS]])

    value, errors = 0.0, np.zeros(len(weights))
    for choosing, evaluating in (halves, halves[::-1]):
        for values, sign in ((first, 0.5), (second, -0.5)):
            stacks = _means(values, weights, choosing), _means(values, weights, evaluating)
            drawn, observed = _utilities(*stacks, preferences)
            value += sign * float(drawn[0])
            errors += sign * (drawn - observed)
    error = 1.96 * float(errors[1:].std())
    return Estimate(value, value - error, value + error)


def _utilities(
    choosing: Stack, evaluating: Stack, preferences: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean utility over preferences, shape (rewards, preferences), of the points that each draw of `choosing` chooses.

    Returns:
        The utility in the same draw of `evaluating`, and in its first draw, which holds the observed means; each (draws,).
    """
    drawn: list[NDArray[np.float64]] = []
    observed: list[NDArray[np.float64]] = []
    for start in range(0, len(choosing), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        best = np.argmax(choosing[rows] @ preferences, axis=1)[:, None]  # (draws, 1, preferences)
        utilities = evaluating[rows] @ preferences
        first = np.broadcast_to(evaluating[:1] @ preferences, utilities.shape)
        drawn.append(np.take_along_axis(utilities, best, axis=1).mean(axis=(1, 2)))
        observed.append(np.take_along_axis(first, best, axis=1).mean(axis=(1, 2)))
    return np.concatenate(drawn), np.concatenate(observed)


def _means(values: Values, weights: NDArray[np.float64], prompts: NDArray[np.int64]) -> Stack:
    """Means over some of the prompts in each draw."""
    some = weights[:, prompts]
    some = some / np.maximum(some.sum(axis=1, keepdims=True), 1e-12)
    return shared_means(some, values[prompts])


def _preferences(rewards: int) -> NDArray[np.float64]:
    """Preferences that cover all possible ones evenly: shape (preferences, rewards), each row with sum 1."""
    if rewards <= 2:
        return np.array(simplex(rewards, _PREFERENCES))
    return np.random.default_rng(0).dirichlet(np.ones(rewards), 10 * _PREFERENCES)


def _curve(
    soups: Stack, others: Stack, lambdas: Sequence[Sequence[float]], reference: Sequence[float]
) -> tuple[Reach, ...]:
    """Hypervolume by the number of runs. There are at most as many soups as other points."""
    soups, others = soups[: 1 + _CURVE_DRAWS], others[: 1 + _CURVE_DRAWS]
    weights = np.asarray(lambdas)
    ingredients, count = weights.shape[1], others.shape[1]
    curve = []
    for runs in range(1, max(ingredients, count) + 1):
        of_soups = []
        for some in combinations(range(ingredients), runs):
            within = np.flatnonzero(np.abs(np.delete(weights, some, axis=1)).sum(axis=1) < 1e-9)
            if len(within) > count:
                within = within[evenly_spread(weights[within][:, list(some)].tolist(), count)]
            if len(within):
                of_soups.append(hypervolumes(soups[:, within], reference))
        of_others = [hypervolumes(others[:, list(some)], reference) for some in _some_choices(count, runs)]
        best = max((float(volumes[0]) for volumes in of_others), default=None)
        curve.append(Reach(runs, _average(of_soups), _average(of_others), best))
    return tuple(curve)


def _average(volumes: Sequence[NDArray[np.float64]]) -> Estimate | None:
    return Estimate.basic(np.mean(volumes, axis=0)) if volumes else None


def _some_choices(count: int, size: int) -> list[tuple[int, ...]]:
    """All choices of `size` out of `count`, or 60 of them at random."""
    choices = list(combinations(range(count), size))
    if len(choices) <= _CHOICES:
        return choices
    return [choices[i] for i in np.random.default_rng(0).choice(len(choices), _CHOICES, replace=False)]
