"""One set of points against another: hypervolume, IGD+, coverage, attainment, each with its interval.

A stack is an array of shape (1 + draws, points, rewards): the means as observed, then in each bootstrap draw over prompts,
the same draws in both stacks, so that differences are paired. All rewards are maximised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsoups._errors import FrontError
from rsoups.estimates import Estimate, Volume, hypervolume_and_error, hypervolumes

Stack = NDArray[np.float64]
_DRAWS = 500  # for figures that are slower than a matrix product
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
class Advantage:
    """What soups reach beyond runs trained on several rewards at once (MORL), and what each costs.

    Attributes:
        soups, others: Their hypervolumes.
        gain: The difference, paired over prompts.
        runs: PPO runs that each set took: (soups, others).
        per_run: Hypervolume per PPO run spent: (soups, others).
    """

    soups: Volume
    others: Volume
    gain: Estimate
    runs: tuple[int, int]
    per_run: tuple[Estimate, Estimate]

    def __str__(self) -> str:
        lines = [
            f"soups {self.soups}",
            f"MORL {self.others}",
            f"soups less MORL {self.gain}",
            f"per PPO run: soups {self.per_run[0]} ({self.runs[0]} runs), MORL {self.per_run[1]} ({self.runs[1]} runs)",
        ]
        return "\n".join(lines)


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
    soups: Stack, others: Stack, runs: tuple[int, int], names: Sequence[str], at: Sequence[float]
) -> Advantage:
    """Everything that an `Advantage` holds.

    Raises:
        FrontError: A number of runs below 1.
    """
    if min(runs) < 1:
        raise FrontError(f"the runs of the soups and of the others are counted from 1, got {runs}")
    volumes = hypervolumes(soups, at), hypervolumes(others, at)
    return Advantage(
        _volume(soups, volumes[0], names, at),
        _volume(others, volumes[1], names, at),
        Estimate.basic(volumes[0] - volumes[1]),
        runs,
        (Estimate.basic(volumes[0] / runs[0]), Estimate.basic(volumes[1] / runs[1])),
    )


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
        # moocore minimises here; the surface of p% is what at least p% of the sets attain.
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
