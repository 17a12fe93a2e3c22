"""One set of points against another: hypervolume, IGD+, coverage, attainment, each with its interval.

A stack is an array of shape (1 + draws, points, rewards): the means as observed, then in each bootstrap draw over prompts,
the same draws in both stacks, so that differences are paired. All rewards are maximized.

Three things make a set of points look better than it is: more points, points that were chosen for the figures they are told by,
and a price that is left out. So as many soups are compared as there are runs on several rewards at once (MORL); a point is
chosen on one half of the prompts and told on the other; and hypervolume stands beside the number of PPO runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError
from rsoups.fronts.estimates import Estimate, Volume, hypervolume_and_error, hypervolumes, shared_means
from rsoups.fronts.grids import evenly_spread, simplex

Stack = NDArray[np.float64]
_DRAWS = 500  # for figures that are slower than a matrix product
_AT_ONCE = 50  # draws, of all points and preferences
_CURVE_DRAWS = 200
_CHOICES = 60  # of so many runs, of which hypervolumes are averaged
_PREFERENCES = 21  # on the line between two rewards; of more rewards ten times as many, at random
_ATTAINMENT_DRAWS = {2: 200, 3: 50}  # by rewards: moocore's time grows with the square of the draws at 3


@dataclass(frozen=True)
class Comparison:
    """Front `first` against front `second`; in the pairs, the first figure is that of `first`.

    Attributes:
        prompts: How many the two have in common; 0 where one of them has none, and then there are no intervals.
        hypervolume: Of each.
        gain: Hypervolume of `first` less that of `second`.
        igd_plus: Distance of each to the Pareto set of the other (Ishibuchi et al. 2015); 0 where it reaches all of it.
        coverage: The share of the other's points that it equals or beats in every reward (Zitzler and Thiele 1999).
        attained: The share of draws in which it reaches the other's Pareto points, their mean; None without prompts.
    """

    prompts: int
    hypervolume: tuple[Volume, Volume]
    gain: Estimate
    igd_plus: tuple[Estimate, Estimate]
    coverage: tuple[Estimate, Estimate]
    attained: tuple[float, float] | None

    def __str__(self) -> str:
        paired = f"{self.prompts} common prompts" if self.prompts else "means only: no common prompts to resample"
        lines = [
            f"hypervolume {self.hypervolume[0]}",
            f"  of the other {self.hypervolume[1]}",
            f"  difference {self.gain} ({paired})",
            f"IGD+ to the other {self.igd_plus[0]}, of the other {self.igd_plus[1]}",
            f"coverage of the other {self.coverage[0]}, by the other {self.coverage[1]}",
        ]
        if self.attained:
            lines.append("attained of the other {:.2f}, by the other {:.2f} of the draws".format(*self.attained))
        return "\n".join(lines)


@dataclass(frozen=True)
class Reach:
    """The hypervolume that a number of PPO runs reaches.

    Attributes:
        runs: The number of runs.
        soups: Of soups of so many ingredients, the mean over all choices of them; None beyond the number of ingredients.
        others: Of so many MORL runs, the mean over all choices of them (over 60, where there are more).
        best: The largest of these: a little too good, because it is chosen for being the largest.
    """

    runs: int
    soups: Estimate | None
    others: Estimate | None
    best: float | None

    def __str__(self) -> str:
        told = [f"soups {self.soups}"] if self.soups else []
        told += [f"MORL {self.others}, at best {self.best:.3f}"] if self.others else []
        return f"{self.runs} {'run' if self.runs == 1 else 'runs'}: {'; '.join(told) or 'nothing'}"


@dataclass(frozen=True)
class Advantage:
    """Soups against MORL runs: equal numbers of points, preferences, and the price.

    Attributes:
        soups, others: Hypervolumes of as many soups as there are MORL runs, and of these.
        gain: Their difference, paired over prompts.
        places: Which soups these are, in the order of `Front.soups`: evenly spread over λ, whatever their rewards.
        runs: PPO runs that each set took: (soups, others).
        curve: Hypervolume against the number of PPO runs.
        utility: Expected utility of these soups less that of the MORL runs: the mean over all preferences of the weighted sum
            of the rewards, of the point that suits the preference best. It is chosen on one half of the prompts and told on the
            other, both ways. None without prompts.
        utility_of_all: The same of all soups, which is what finer steps of λ add.
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
            f"soups less MORL {self.gain} ({len(self.places)} points each)",
        ]
        if self.utility:
            lines.append(
                f"expected utility of these soups less MORL {self.utility}, of all soups {self.utility_of_all}"
            )
        return "\n".join([*lines, *(f"with {reach}" for reach in self.curve)])


def volume_of(stack: Stack, names: Sequence[str], at: Sequence[float]) -> Volume:
    """Hypervolume of a stack above a reference."""
    return _volume(stack, hypervolumes(stack, at), names, at)


def _volume(stack: Stack, volumes: NDArray[np.float64], names: Sequence[str], at: Sequence[float]) -> Volume:
    interval = Estimate.basic(volumes)
    value, error = hypervolume_and_error(stack[0], at)
    return Volume(value, interval.low, interval.high, dict(zip(names, at, strict=True)), error)


def compared(first: Stack, second: Stack, prompts: int, names: Sequence[str], at: Sequence[float]) -> Comparison:
    """Everything that a `Comparison` holds."""
    volumes = hypervolumes(first, at), hypervolumes(second, at)
    attained = None
    if len(first) > 1:
        attained = _attained(first[1:], pareto_of(second[0])), _attained(second[1:], pareto_of(first[0]))
    return Comparison(
        prompts,
        (_volume(first, volumes[0], names, at), _volume(second, volumes[1], names, at)),
        Estimate.basic(volumes[0] - volumes[1]),
        (distance(first, second), distance(second, first)),
        (Estimate.of(_over_draws(_coverage, first, second)), Estimate.of(_over_draws(_coverage, second, first))),
        attained,
    )


def advantage(
    soups: Stack,
    others: Stack,
    runs: tuple[int, int],
    names: Sequence[str],
    at: Sequence[float],
    lambdas: Sequence[Sequence[float]] | None = None,
    with_ends: bool = True,
) -> Advantage:
    """Everything that an `Advantage` holds but the utilities.

    Args:
        soups, others: Stacks in the same bootstrap draws.
        runs: PPO runs that each set took.
        names: Of the rewards.
        at: The reference of hypervolumes.
        lambdas: Of the soups; by default two ingredients, λ in equal steps.
        with_ends: Whether the ingredients are among `others`.

    Raises:
        FrontError: A number of runs below 1, or fewer soups than other points.
    """
    if min(runs) < 1:
        raise FrontError(f"the runs of the soups and of the others are counted from 1, got {runs}")
    count = others.shape[1]
    if soups.shape[1] < count:
        raise FrontError(
            f"equal numbers of points are compared, and there are {soups.shape[1]} soups for {count} MORL runs "
            "(the ingredients among them): sweep more λ, or name fewer runs"
        )
    if lambdas is None:
        lambdas = simplex(2, max(2, soups.shape[1]))[: soups.shape[1]]
    places = evenly_spread(lambdas, count, with_ends)
    chosen = soups[:, places]
    # Noise makes both larger, alike with as many points each: the difference needs no correction.
    gain = Estimate.of(hypervolumes(chosen, at) - hypervolumes(others, at))
    volumes = volume_of(chosen, names, at), volume_of(others, names, at)
    return Advantage(*volumes, gain, tuple(places), runs, _curve(soups, others, lambdas, at))


def with_utilities(
    found: Advantage, soups: NDArray[np.float64], others: NDArray[np.float64], shares: NDArray[np.float64] | None
) -> Advantage:
    """An advantage with its expected utilities, of values of shape (prompts, points, rewards)."""
    if shares is None:
        return found
    few = utility_gain(soups[:, list(found.places)], others, shares)
    return replace(found, utility=few, utility_of_all=utility_gain(soups, others, shares))


def utility_gain(first: NDArray[np.float64], second: NDArray[np.float64], shares: NDArray[np.float64]) -> Estimate:
    """Expected utility of the first points less that of the second.

    For each preference μ a point is chosen by its largest Σ μi·Ri on one half of the prompts, and told by the other half: the
    noise that made it the best does not make it look better. The two ways round are averaged. The interval is ± 1.96 standard
    errors. The error of a bootstrap draw is what its choices are told by its prompts less what they are told by all prompts:
    so its deviation counts that the halves choose for one another, and not that draws choose worse than the prompts do.

    Args:
        first, second: Shape (prompts, points, rewards), on the same prompts.
        shares: Shape (draws, prompts), as `estimates.resampling` gives them.
    """
    prompts, _, rewards = first.shape
    preferences = _preferences(rewards).T
    order = np.random.default_rng(0).permutation(prompts)
    halves = order[: prompts // 2], order[prompts // 2 :]
    every = np.concatenate([np.full((1, prompts), 1 / prompts), shares[:_DRAWS]])

    value, errors = 0.0, np.zeros(len(every))
    for pick, tell in (halves, halves[::-1]):
        for values, sign in ((first, 0.5), (second, -0.5)):
            drawn, true = _told(_means(values, every, pick), _means(values, every, tell), preferences)
            value += sign * float(drawn[0])
            errors += sign * (drawn - true)
    error = 1.96 * float(errors[1:].std())
    return Estimate(value, value - error, value + error)


def _told(
    picked: Stack, told: Stack, preferences: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean utility over preferences of the points that each draw of `picked` chooses: by the same draw of `told`, and by its
    first one, which is as observed."""
    drawn: list[NDArray[np.float64]] = []
    true: list[NDArray[np.float64]] = []
    for start in range(0, len(picked), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        best = np.argmax(picked[rows] @ preferences, axis=1)[:, None]  # (draws, 1, preferences)
        utilities = told[rows] @ preferences
        observed = np.broadcast_to(told[:1] @ preferences, utilities.shape)
        for found, figures in ((drawn, utilities), (true, observed)):
            found.append(np.take_along_axis(figures, best, axis=1).mean(axis=(1, 2)))
    return np.concatenate(drawn), np.concatenate(true)


def _means(values: NDArray[np.float64], shares: NDArray[np.float64], prompts: NDArray[np.int64]) -> Stack:
    """Means over some of the prompts in each draw."""
    weights = shares[:, prompts]
    weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    return shared_means(weights, values[prompts])


def _preferences(rewards: int) -> NDArray[np.float64]:
    """Preferences that cover all of them evenly: (preferences, rewards), each summing to 1."""
    if rewards <= 2:
        return np.array(simplex(rewards, _PREFERENCES))
    return np.random.default_rng(0).dirichlet(np.ones(rewards), 10 * _PREFERENCES)


def _curve(soups: Stack, others: Stack, lambdas: Sequence[Sequence[float]], at: Sequence[float]) -> tuple[Reach, ...]:
    """Hypervolume against the number of runs. Soups are as many as there are other points, at most."""
    soups, others = soups[: 1 + _CURVE_DRAWS], others[: 1 + _CURVE_DRAWS]
    weights = np.asarray(lambdas)
    ingredients, count = weights.shape[1], others.shape[1]
    found = []
    for runs in range(1, max(ingredients, count) + 1):
        of_soups = []
        for some in combinations(range(ingredients), runs):
            within = np.flatnonzero(np.delete(weights, some, axis=1).sum(axis=1) < 1e-9)
            if len(within) > count:
                within = within[evenly_spread(weights[within][:, list(some)].tolist(), count)]
            if len(within):
                of_soups.append(hypervolumes(soups[:, within], at))
        of_others = [hypervolumes(others[:, list(some)], at) for some in _some_choices(count, runs)]
        best = max((float(volumes[0]) for volumes in of_others), default=None)
        found.append(Reach(runs, _average(of_soups), _average(of_others), best))
    return tuple(found)


def _average(volumes: Sequence[NDArray[np.float64]]) -> Estimate | None:
    return Estimate.basic(np.mean(volumes, axis=0)) if volumes else None


def _some_choices(count: int, size: int) -> list[tuple[int, ...]]:
    """The choices of `size` from `count`, or 60 of them at random."""
    choices = list(combinations(range(count), size))
    if len(choices) <= _CHOICES:
        return choices
    return [choices[i] for i in np.random.default_rng(0).choice(len(choices), _CHOICES, replace=False)]


def distance(points: Stack, to: Stack) -> Estimate:
    """IGD+ of points to the Pareto set of others, in units of the rewards."""
    from moocore import igd_plus

    found = Estimate.basic(_over_draws(lambda a, b: float(igd_plus(a, ref=pareto_of(b), maximise=True)), points, to))
    return Estimate(found.value, *(None if end is None else max(0.0, end) for end in (found.low, found.high)))


def pareto_of(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The points, shape (points, rewards), that no other beats."""
    from moocore import is_nondominated

    return means[is_nondominated(means, maximise=True)]


def attainment_surfaces(
    sets: Sequence[NDArray[np.float64]], levels: Sequence[float]
) -> dict[float, NDArray[np.float64]]:
    """Empirical attainment surfaces: by level, the corners of what at least this share of the sets attains.

    Fonseca et al. 2011, by moocore. Each set has shape (points, rewards); the corners too, sorted by the first reward.

    Raises:
        FrontError: Other than two or three rewards, or a level outside (0, 1].
    """
    from moocore import eaf

    rewards = sets[0].shape[1]
    if rewards not in _ATTAINMENT_DRAWS:
        raise FrontError(f"attainment surfaces are of two or three rewards, got {rewards}")
    if not levels or min(levels) <= 0 or max(levels) > 1:
        raise FrontError(f"attainment levels are shares of the draws, in (0, 1], got {list(levels)}")
    number = np.repeat(np.arange(len(sets)), [len(points) for points in sets])
    found = {}
    for level in levels:
        # moocore minimizes here; the surface of p% is what at least p% of the sets attain.
        corners = -eaf(-np.concatenate(list(sets)), number, percentiles=[100 * level])[:, :rewards]
        found[level] = corners[np.argsort(corners[:, 0])]
    return found


def attainment_draws(stack: Stack) -> list[NDArray[np.float64]]:
    """As many bootstrap draws of a stack as attainment surfaces are quickly made of."""
    return list(stack[1 : 1 + _ATTAINMENT_DRAWS.get(stack.shape[-1], 1)])


def outlines(surfaces: Mapping[float, NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """What to draw of three attainment surfaces of two rewards: around the band between the outer two, and along the median.

    Args:
        surfaces: By level, from the least; corners of shape (K, 2), as `attainment_surfaces` gives them.

    Returns:
        Two lines, points to be joined, each of shape (points, 2). A surface goes on without end to the left and downwards; here
        it ends at the outermost corners of the three.
    """
    corners = list(surfaces.values())
    left, bottom = np.concatenate(corners).min(axis=0)
    outer, median, inner = (
        np.stack([[left, *np.repeat(x, 2)], [*np.repeat(y, 2), bottom]], axis=1) for x, y in (c.T for c in corners)
    )
    return [np.concatenate([outer, inner[::-1]]), median]


def _over_draws(figure: Callable[[NDArray, NDArray], float], first: Stack, second: Stack) -> list[float]:
    return [figure(a, b) for a, b in zip(first[: 1 + _DRAWS], second[: 1 + _DRAWS], strict=True)]


def _coverage(points: NDArray[np.float64], of: NDArray[np.float64]) -> float:
    return float((points[:, None] >= of[None]).all(axis=-1).any(axis=0).mean())


def _attained(draws: Stack, goals: NDArray[np.float64]) -> float:
    reached = [(points[:, None] >= goals[None]).all(axis=-1).any(axis=0) for points in draws[:_DRAWS]]
    return float(np.mean(reached))
