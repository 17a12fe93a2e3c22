"""λ to sweep: grids and random points of the simplex, and where a front wants one more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

_NEAREST = 1e-3  # λ nearer to each other than this are not told apart


def simplex(ingredients: int, points: int = 11, *, random: int = 0, seed: int = 0) -> list[list[float]]:
    """λ on a regular grid of the simplex, `points` to each edge; for two ingredients, from the first alone, (1, 0), to the
    second alone, (0, 1).

    Args:
        ingredients: N.
        points: To each edge; 2 gives the N ends alone.
        random: So many more, uniform on the simplex (Dirichlet(1, ..., 1)): of many ingredients a grid has too many.
        seed: Of the random ones.

    Raises:
        ValueError: Fewer than one ingredient or two points.
    """
    if ingredients < 1 or points < 2 or random < 0:
        raise ValueError(f"simplex needs at least 1 ingredient and 2 points, got {ingredients} and {points}, {random}")
    steps = points - 1
    grid = [c for c in product(range(steps + 1), repeat=ingredients) if sum(c) == steps]
    found = [[count / steps for count in counts] for counts in sorted(grid, reverse=True)]
    return found + np.random.default_rng(seed).dirichlet([1.0] * ingredients, random).tolist()


def evenly_spread(lambdas: Sequence[Sequence[float]], count: int, with_ends: bool = True) -> list[int]:
    """Places of `count` of the λ that are spread evenly over the simplex, whatever the rewards are there.

    Args:
        lambdas: K × N.
        count: At most K.
        with_ends: Begin with the ends, λ = 1 of one ingredient; else keep to the inside where there is enough of it.

    Returns:
        Places, sorted.
    """
    at = np.asarray(lambdas, dtype=np.float64)
    free = list(range(len(at)))
    inside = [place for place in free if at[place].max() < 1 - _NEAREST]
    if not with_ends and len(inside) >= count:
        free = inside
    chosen: list[int] = []
    if at.shape[1] == 2:
        steps = count - 1 if with_ends else count + 1
        for second in np.linspace(0, 1, steps + 1)[slice(None) if with_ends else slice(1, -1)]:
            # Of two that are as near, the one nearer to the middle, so that both sides of the front are alike.
            off = np.round(np.abs(at[:, 1] - second), 9), np.abs(at[:, 1] - 0.5)
            chosen.append(min(free, key=lambda place: (off[0][place], off[1][place])))
            free.remove(chosen[-1])
        return sorted(chosen)

    # Of more ingredients the farthest from those that were chosen before, one after the other.
    if with_ends:
        chosen = [place for place in free if place not in inside][:count]
    chosen = chosen or [min(free, key=lambda place: float(((at[place] - 1 / at.shape[1]) ** 2).sum()))]
    while len(chosen) < count:
        distances = ((at[:, None] - at[chosen][None]) ** 2).sum(axis=-1).min(axis=1)
        chosen.append(max((place for place in free if place not in chosen), key=lambda place: distances[place]))
    return sorted(chosen)


def edges(ingredients: int, points: int = 11) -> list[list[float]]:
    """λ of many ingredients at a small price: each alone, their uniform soup, and `points` to each edge between two.

    Ramé et al. 2023 evaluate more than two ingredients alone and in the uniform soup. Four ingredients and five points are 23
    λ here, where the whole grid has 35 (and 286 for eleven).

    Args:
        ingredients: N.
        points: To each edge, its ends included; 2 gives the N ends and the uniform soup.

    Raises:
        ValueError: Fewer than one ingredient or two points.
    """
    alone = simplex(ingredients, 2)
    between = [
        [1 - at / (points - 1) if k == i else at / (points - 1) if k == j else 0.0 for k in range(ingredients)]
        for i, j in combinations(range(ingredients), 2)
        for at in range(1, points - 1)
    ]
    uniform = [1 / ingredients] * ingredients
    return alone + between + ([] if uniform in alone + between else [uniform])


def largest_gap(lambdas: Sequence[Sequence[float]], rewards: NDArray[np.float64]) -> list[float] | None:
    """The λ that a front wants next: the middle of the two neighbors whose rewards are farthest apart.

    Neighbors are points with no other one inside the ball between them (Gabriel's graph: of two ingredients, the next
    ones in order). Each reward counts in units of its deviation over the points.

    Args:
        lambdas: K × N.
        rewards: (K, rewards), the mean of each reward at each λ.

    Returns:
        N weights; None where neighbors are too near to each other, or there is one point only.
    """
    at = np.asarray(lambdas, dtype=np.float64)
    deviation = rewards.std(axis=0)
    scaled = rewards / np.where(deviation > 0, deviation, 1)
    squared = ((at[:, None] - at[None]) ** 2).sum(-1)
    best, middle = 0.0, None
    for i, j in combinations(range(len(at)), 2):
        inside = np.delete(squared[i] + squared[j], [i, j]) < squared[i, j] * (1 - 1e-9)
        if squared[i, j] < _NEAREST**2 or inside.any():
            continue
        gap = float(np.linalg.norm(scaled[i] - scaled[j]))
        if gap > best:
            best, middle = gap, (at[i] + at[j]) / 2
    return None if middle is None else [float(x) for x in middle / middle.sum()]
