"""Empirical attainment surfaces: how far fronts reach over seeds or bootstrap draws (Fonseca et al. 2011)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError
from rsoups.fronts.estimates import Stack

_DRAWS = {2: 200, 3: 50}  # by number of rewards: moocore's time grows with the square of the draws at 3


def attainment_surfaces(
    sets: Sequence[NDArray[np.float64]], levels: Sequence[float]
) -> dict[float, NDArray[np.float64]]:
    """The corners of what at least a share of the sets attains, for each share.

    Args:
        sets: Points, each of shape (points, rewards).
        levels: Shares, in (0, 1].

    Returns:
        Corners by level, each of shape (K, rewards), float64, sorted by the first reward.

    Raises:
        FrontError: Other than two or three rewards, or a level outside (0, 1].
    """
    from moocore import eaf

    rewards = sets[0].shape[1]
    if rewards not in _DRAWS:
        raise FrontError(f"attainment surfaces need two or three rewards, got {rewards}: make a front of fewer rewards")
    if not levels or min(levels) <= 0 or max(levels) > 1:
        raise FrontError(f"attainment levels are shares of the draws, in (0, 1], got {list(levels)}")
    number = np.repeat(np.arange(len(sets)), [len(points) for points in sets])
    points = -np.concatenate(list(sets))  # moocore minimizes here
    surfaces = {}
    for level in levels:
        corners = -eaf(points, number, percentiles=[100 * level])[:, :rewards]
        surfaces[level] = corners[np.argsort(corners[:, 0])]
    return surfaces


def attainment_draws(stack: Stack) -> list[NDArray[np.float64]]:
    """The bootstrap draws of a stack that attainment surfaces use: few enough to take a second."""
    return list(stack[1 : 1 + _DRAWS.get(stack.shape[-1], 1)])


def outlines(surfaces: Mapping[float, NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Lines to draw for three attainment surfaces of two rewards: around the band between the outer two, and the median.

    Args:
        surfaces: By level, lowest first; corners of shape (K, 2), as `attainment_surfaces` gives them.

    Returns:
        Two lines, points to be joined, each of shape (points, 2). A surface extends without end to the left and downwards; here
        it ends at the outermost corners of the three.
    """
    corners = list(surfaces.values())
    left, bottom = np.concatenate(corners).min(axis=0)
    lines = []
    for x, y in (surface.T for surface in corners):
        lines.append(np.stack([[left, *np.repeat(x, 2)], [*np.repeat(y, 2), bottom]], axis=1))
    outer, median, inner = lines
    return [np.concatenate([outer, inner[::-1]]), median]
