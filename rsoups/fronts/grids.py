"""λ to evaluate: grids and random points of the simplex, evenly spread subsets, the largest gap of a front."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

_NEAREST = 1e-3  # λ that are nearer to each other than this count as the same


def simplex(ingredients: int, points: int = 11, *, random: int = 0, seed: int = 0) -> list[list[float]]:
    """λ on a regular grid of the simplex; for two ingredients from (1, 0) to (0, 1).

    Args:
        ingredients: Number of ingredients, N.
        points: Number of points on each edge; 2 gives the N ends alone.
        random: Number of further points, uniform on the simplex (Dirichlet(1, ..., 1)).
        seed: Seed of the random points.

    Raises:
        ValueError: Fewer than one ingredient or two points.
    """
    if ingredients < 1 or points < 2 or random < 0:
        raise ValueError(
            f"simplex needs at least 1 ingredient, 2 points and 0 random points, got {ingredients}, {points} and {random}"
        )
    # Each choice of N - 1 bars among steps + N - 1 places cuts the steps into N counts.
    steps = points - 1
    places = steps + ingredients - 1
    cuts = [(-1, *bars, places) for bars in combinations(range(places), ingredients - 1)]
    counts = np.diff(np.array(cuts), axis=1) - 1
    return (counts[::-1] / steps).tolist() + np.random.default_rng(seed).dirichlet([1.0] * ingredients, random).tolist()


def edges(ingredients: int, points: int = 11) -> list[list[float]]:
    """λ of many ingredients at low cost: each alone, the uniform soup, and `points` on each edge between two.

    Ramé et al. 2023 evaluate more than two ingredients alone and in the uniform soup. Four ingredients and five points are 23
    λ here, 35 in the whole grid (eleven points: 59 and 286).

    Args:
        ingredients: Number of ingredients, N.
        points: Number of points on each edge with its ends; 2 gives the N ends and the uniform soup.

    Raises:
        ValueError: Fewer than one ingredient or two points.
    """
    ends = np.eye(ingredients)
    rows = simplex(ingredients, 2)
    for first, second in combinations(ends, 2):
        rows += [(first * a + second * b).tolist() for a, b in simplex(2, points)[1:-1]]
    uniform = [1 / ingredients] * ingredients
    return rows if uniform in rows else [*rows, uniform]


def evenly_spread(lambdas: Sequence[Sequence[float]], count: int, with_ends: bool = True) -> list[int]:
    """Places of λ that are spread evenly over the simplex, whatever their rewards.

    Args:
        lambdas: λ, K × N.
        count: Number of places, at most K.
        with_ends: Whether to begin with the ends, λ = 1 of one ingredient; otherwise they are left out if enough others exist.

    Returns:
        Places, sorted.
    """
    at = np.asarray(lambdas, dtype=np.float64)
    inside = [place for place, row in enumerate(at) if row.max() < 1 - _NEAREST]
    free = inside if not with_ends and len(inside) >= count else list(range(len(at)))
    chosen: list[int] = []
    if at.shape[1] == 2:
        targets = np.linspace(0, 1, count) if with_ends else np.linspace(0, 1, count + 2)[1:-1]
        for target in targets:
            # Of two places at the same distance, the one nearer to the middle: both sides of the front are treated alike.
            distances = np.round(np.abs(at[:, 1] - target), 9)
            nearest = min(free, key=lambda place: (distances[place], abs(at[place, 1] - 0.5)))
            chosen.append(nearest)
            free.remove(nearest)
        return sorted(chosen)

    # Of more ingredients: again and again the place that is farthest from all chosen ones.
    if with_ends:
        chosen = [place for place in free if place not in inside][:count]
    if not chosen:
        chosen = [free[int(np.argmin(((at[free] - 1 / at.shape[1]) ** 2).sum(axis=1)))]]
    while len(chosen) < count:
        left = [place for place in free if place not in chosen]
        distances = ((at[left][:, None] - at[chosen][None]) ** 2).sum(axis=-1).min(axis=1)
        chosen.append(left[int(np.argmax(distances))])
    return sorted(chosen)


def largest_gap(lambdas: Sequence[Sequence[float]], rewards: NDArray[np.float64]) -> list[float] | None:
    """The λ to evaluate next: the middle of the two neighbors whose rewards are farthest apart.

    Two points are neighbors if no other point is inside the ball between them (Gabriel's graph; of two ingredients, points that
    follow each other). Each reward is divided by its standard deviation over the points.

    Args:
        lambdas: λ, K × N.
        rewards: Mean of each reward at each λ, shape (K, rewards).

    Returns:
        N weights; None where all neighbors are too near to each other or have the same rewards, or with one point only.
    """
    at = np.asarray(lambdas, dtype=np.float64)
    deviation = rewards.std(axis=0)
    scaled = rewards / np.where(deviation > 0, deviation, 1)
    squared = ((at[:, None] - at[None]) ** 2).sum(-1)
    largest, middle = 0.0, None
    for i, j in combinations(range(len(at)), 2):
        inside = np.delete(squared[i] + squared[j], [i, j]) < squared[i, j] * (1 - 1e-9)
        gap = float(np.linalg.norm(scaled[i] - scaled[j]))
        if gap > largest and squared[i, j] >= _NEAREST**2 and not inside.any():
            largest, middle = gap, (at[i] + at[j]) / 2
    return None if middle is None else (middle / middle.sum()).tolist()
