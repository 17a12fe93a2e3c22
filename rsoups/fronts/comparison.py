"""Compare two fronts: hypervolume, IGD+, coverage and attainment, each with its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError
from rsoups.fronts.estimates import (
    Estimate,
    Stack,
    Volume,
    hypervolumes,
    means_with_draws,
    pareto_mask,
    resampling,
    volume_of,
)
from rsoups.fronts.points import values_of
from rsoups.fronts.tables import html_table

if TYPE_CHECKING:
    from rsoups.fronts.front import Front

_DRAWS = 500  # for figures that are slower than a matrix product


@dataclass(frozen=True, repr=False)
class Comparison:
    """Front `first` against front `second`. In each pair, the first figure belongs to `first`.

    Attributes:
        prompts: Number of common prompts; 0 if one front has none, and then there are no intervals.
        hypervolume: Hypervolume of each.
        gain: Hypervolume of `first` minus that of `second`.
        igd_plus: Distance of each to the Pareto set of the other (Ishibuchi et al. 2015); 0 if it reaches all of it.
        coverage: Share of the other's points that each equals or beats in every reward (Zitzler and Thiele 1999).
        attained: Mean share of the other's Pareto points that each reaches in a bootstrap draw; None without prompts.
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

    def __repr__(self) -> str:
        return f"Comparison(hypervolume {self.gain} more than the other, {self.prompts} common prompts)"

    def _repr_html_(self) -> str:
        volumes = [str(Estimate(volume.value, volume.low, volume.high)) for volume in self.hypervolume]
        rows = [
            ["hypervolume", *volumes],
            ["hypervolume minus the other's", str(self.gain), ""],
            ["IGD+ to the other", *map(str, self.igd_plus)],
            ["coverage of the other", *map(str, self.coverage)],
        ]
        if self.attained:
            rows.append(["attained of the other", *(f"{share:.2f}" for share in self.attained)])
        return html_table([f"{self.prompts} common prompts", "this front", "the other"], rows)


def check_same_rewards(front: Front, other: Front) -> None:
    """Refuse to compare fronts of different rewards."""
    if front.rewards != other.rewards:
        raise FrontError(
            f"fronts of the same rewards are compared: these have {front.rewards} and {other.rewards}; sweep both with "
            "the same rewards"
        )


def paired_stacks(front: Front, other: Front) -> tuple[Stack, Stack, int]:
    """Stacks of two fronts on their common prompts in the same draws, and the number of these prompts.

    If one front has no prompts, the stacks hold means alone, and the number is 0.

    Raises:
        FrontError: Other rewards, or no common prompts.
    """
    check_same_rewards(front, other)
    common = sorted(set(front.prompts) & set(other.prompts))
    if not common and front.prompts and other.prompts:
        raise FrontError("the two fronts have no prompt in common: sweep both on the same prompts")
    shares = resampling(len(common), seed=0)
    stacks = []
    for each in (front, other):
        values = values_of(each.candidates)
        if common:
            place = {prompt: number for number, prompt in enumerate(each.prompts)}
            values = values[[place[prompt] for prompt in common]]
        stacks.append(means_with_draws(values, shares))
    return stacks[0], stacks[1], len(common)


def compared(first: Stack, second: Stack, prompts: int, names: Sequence[str], reference: Sequence[float]) -> Comparison:
    """The `Comparison` of two stacks in the same draws; reference and names of the rewards are in one order."""
    gain = hypervolumes(first, reference) - hypervolumes(second, reference)
    attained = None
    if len(first) > 1:
        attained = _attained(first[1:], _pareto_set(second[0])), _attained(second[1:], _pareto_set(first[0]))
    return Comparison(
        prompts,
        (volume_of(first, names, reference), volume_of(second, names, reference)),
        Estimate.basic(gain),
        (distance(first, second), distance(second, first)),
        (Estimate.of(_over_draws(_reached, first, second)), Estimate.of(_over_draws(_reached, second, first))),
        attained,
    )


def distance(points: Stack, goals: Stack) -> Estimate:
    """IGD+ of points to the Pareto set of others, in units of the rewards."""
    from moocore import igd_plus

    def figure(own: NDArray[np.float64], others: NDArray[np.float64]) -> float:
        return float(igd_plus(own, ref=_pareto_set(others), maximise=True))

    estimate = Estimate.basic(_over_draws(figure, points, goals))
    if estimate.low is None or estimate.high is None:
        return estimate
    return Estimate(estimate.value, max(0.0, estimate.low), max(0.0, estimate.high))


def _pareto_set(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The different points, shape (points, rewards), that no other point dominates."""
    return np.unique(means[pareto_mask(means)], axis=0)


def _over_draws(figure: Callable[[NDArray, NDArray], float], first: Stack, second: Stack) -> list[float]:
    return [figure(a, b) for a, b in zip(first[: 1 + _DRAWS], second[: 1 + _DRAWS], strict=True)]


def _reached(points: NDArray[np.float64], goals: NDArray[np.float64]) -> float:
    """Share of the goals that some point equals or beats in every reward."""
    return float((points[:, None] >= goals[None]).all(axis=-1).any(axis=0).mean())


def _attained(draws: Stack, goals: NDArray[np.float64]) -> float:
    return float(np.mean([_reached(points, goals) for points in draws[:_DRAWS]]))
