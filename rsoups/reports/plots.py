"""The front as a picture file, by matplotlib: front.png, for a README or a paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from rsoups.common.errors import FrontError
from rsoups.fronts.attainment import outlines
from rsoups.fronts.front import Front
from rsoups.fronts.points import BASE, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colors, told apart with any color vision; shapes differ too.
_BLUE, _GRAY, _BLACK = "#0072B2", "#777777", "#222222"
_OTHERS = [("#D55E00", "D"), ("#009E73", "^"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X")]


def draw_front(front: Front) -> Figure:
    """One panel for each pair of rewards: soups joined from λ = 0 to 1, their chord, base and others, with intervals."""
    from matplotlib.figure import Figure

    pairs = list(combinations(front.rewards, 2))
    if not pairs:
        return draw_chord(front) if front.has_chord else _draw_one(front)
    columns = min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure = Figure(figsize=(7.2 * columns, 5.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (x, y) in zip(grid, pairs, strict=False):
        _draw_pair(axes, front, x, y)
    for axes in grid[len(pairs) :]:
        axes.set_visible(False)
    return figure


def _draw_one(front: Front) -> Figure:
    """A single reward, where there is no λ to draw it over: each model on a line of its own."""
    from matplotlib.figure import Figure

    reward, points = front.rewards[0], [*front.others, *front.soups]
    figure = Figure(figsize=(7.2, 1.4 + 0.28 * len(points)), layout="constrained")
    axes = figure.subplots()
    _style(axes)
    for place, point in enumerate(points):
        below, above = _bars([point], reward)
        axes.errorbar([point.mean[reward]], [place], xerr=[below, above], fmt="o", color=_BLUE, ecolor=_BLUE + "55")
    axes.set_yticks(range(len(points)), [point.label for point in points])
    axes.invert_yaxis()
    axes.set_xlabel(f"{reward}  (mean reward)")
    return figure


def _draw_pair(axes: Axes, front: Front, x: str, y: str) -> None:
    _style(axes)
    soups = front.soups
    if front.has_band:
        band, median = outlines(front.attainment())
        axes.fill(*band.T, color=_BLUE, alpha=0.12, lw=0, zorder=1, label="reach in 95% of draws")
        axes.plot(*median.T, color=_BLUE, alpha=0.45, lw=0.8, zorder=1)
    if soups:
        joined = len(soups[0].lambdas or {}) == 2
        if joined and len(soups) > 1:
            ends = soups[0], soups[-1]
            axes.plot(*([p.mean[r] for p in ends] for r in (x, y)), "--", color=_GRAY, lw=1.2, zorder=1, label="chord")
        _mark(axes, soups, x, y, _BLUE, "o", "soups", line="-" if joined else "")
        for point in soups:
            _label(axes, point, x, y)
    for number, point in enumerate(front.others):
        color, marker = (_BLACK, "s") if point.name == BASE else _OTHERS[number % len(_OTHERS)]
        _mark(axes, [point], x, y, color, marker, point.name)
    axes.set_xlabel(f"{x}  (mean reward)")
    axes.set_ylabel(f"{y}  (mean reward)")
    note = f"{len(front.prompts)} prompts, bars: 95% bootstrap over prompts" if front.prompts else "means, as published"
    if soups and len(soups[0].lambdas or {}) == 2:
        first, second = soups[0].lambdas or {}
        note += f"\nnumbers: λ of {second}, the rest is {first}"
    axes.set_title(note, fontsize=9, color=_GRAY, loc="left")
    axes.legend(frameon=False, fontsize=9)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.6, zorder=0)
    axes.set_axisbelow(True)


def _mark(
    axes: Axes, points: Sequence[Point], x: str, y: str, color: str, marker: str, label: str, line: str = ""
) -> None:
    axes.errorbar(
        [p.mean[x] for p in points],
        [p.mean[y] for p in points],
        xerr=_bars(points, x),
        yerr=_bars(points, y),
        fmt=marker + line,
        color=color,
        ecolor=color + "55",
        elinewidth=1,
        markersize=6,
        lw=1.6,
        label=label,
        zorder=3,
    )


def _bars(points: Sequence[Point], reward: str) -> list[list[float]]:
    """How far the intervals reach below and above, as matplotlib wants it; 0 where there are none."""
    found = [point.estimate(reward) for point in points]
    below = [0.0 if e.low is None else max(0.0, e.value - e.low) for e in found]
    return [below, [0.0 if e.high is None else max(0.0, e.high - e.value) for e in found]]


def _label(axes: Axes, point: Point, x: str, y: str) -> None:
    """λ beside a point, to the upper right, where a front of two maximized rewards leaves room; of more than two, the ends."""
    weights = point.lambdas or {}
    alone = [name for name, weight in weights.items() if weight == 1]
    if len(weights) != 2 and not alone:
        return
    text = f"{list(weights.values())[1]:.3g}" if len(weights) == 2 else alone[0]
    axes.annotate(
        text,
        (point.mean[x], point.mean[y]),
        xytext=(6, 5),
        textcoords="offset points",
        fontsize=8,
        color=_BLUE,
        zorder=4,
    )


def draw_chord(front: Front) -> Figure:
    """Each reward of the soups of two ingredients over λ, with the chord between the ends."""
    from matplotlib.figure import Figure

    if not front.has_chord:
        raise FrontError("a plot over λ needs soups of two ingredients, both ends included")
    soups = front.soups
    second = list(soups[0].lambdas or {})[1]
    at = [(p.lambdas or {})[second] for p in soups]
    figure = Figure(figsize=(4.6 * len(front.rewards), 3.6), layout="constrained")
    for axes, reward in zip(figure.subplots(1, len(front.rewards), squeeze=False)[0], front.rewards, strict=True):
        _style(axes)
        if all(reward in p.low for p in soups):
            axes.fill_between(
                at, [p.low[reward] for p in soups], [p.high[reward] for p in soups], color=_BLUE, alpha=0.15
            )
        axes.plot(at, [p.mean[reward] for p in soups], "o-", color=_BLUE, ms=5, label="soups")
        ends = [soups[0].mean[reward], soups[-1].mean[reward]]
        axes.plot([at[0], at[-1]], ends, "--", color=_GRAY, lw=1.2, label="chord")
        axes.set_xlabel(f"λ of {second}")
        axes.set_ylabel(reward)
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure
