"""Draw a front as a picture with matplotlib: front.png, for a README or a paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from rsoups.common.errors import FrontError
from rsoups.fronts.attainment import outlines
from rsoups.fronts.estimates import Estimate
from rsoups.fronts.front import Front
from rsoups.fronts.points import BASE, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colors, distinct with any color vision; shapes differ too.
_BLUE, _GRAY, _BLACK = "#0072B2", "#777777", "#222222"
_OTHERS = [("#D55E00", "D"), ("#009E73", "^"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X")]


def draw_front(front: Front) -> Figure:
    """One panel for each pair of rewards: soups joined from λ = 0 to 1, their chord, base and others, with intervals."""
    pairs = list(combinations(front.rewards, 2))
    if not pairs:
        return draw_chord(front) if front.has_chord else _draw_one_reward(front)
    columns = min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure = new_figure(7.2 * columns, 5.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (x, y) in zip(panels, pairs, strict=False):
        _draw_pair(axes, front, x, y)
    for axes in panels[len(pairs) :]:
        axes.set_visible(False)
    return figure


def draw_chord(front: Front) -> Figure:
    """Each reward of the soups of two ingredients over λ, with the chord between the ends.

    Raises:
        FrontError: The front is not of two ingredients, or an end was not evaluated.
    """
    if not front.has_chord:
        raise FrontError("a plot over λ needs soups of two ingredients, including both ends: sweep λ = 0 and 1 too")
    soups = front.soups
    at = [point.weights[1] for point in soups]
    figure = new_figure(4.6 * len(front.rewards), 3.6)
    for axes, reward in zip(figure.subplots(1, len(front.rewards), squeeze=False)[0], front.rewards, strict=True):
        style(axes)
        if all(reward in point.low for point in soups):
            low, high = [point.low[reward] for point in soups], [point.high[reward] for point in soups]
            axes.fill_between(at, low, high, color=_BLUE, alpha=0.15)
        means = [point.mean[reward] for point in soups]
        axes.plot(at, means, "o-", color=_BLUE, ms=5, label="soups")
        axes.plot([at[0], at[-1]], [means[0], means[-1]], "--", color=_GRAY, lw=1.2, label="chord")
        axes.set_xlabel(f"λ of {front.ingredients[1]}")
        axes.set_ylabel(reward)
    add_legend(figure.axes[0])
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style(axes: Axes) -> None:
    """Draw a light grid behind the marks, and no frame above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.6, zorder=0)
    axes.set_axisbelow(True)


def add_legend(axes: Axes) -> None:
    """Add a legend that has each label once."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once, frameon=False, fontsize=9)


def bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """How far intervals reach below and above their figures, as matplotlib takes it; 0 without an interval."""
    below = [0.0 if e.low is None else max(0.0, e.value - e.low) for e in estimates]
    above = [0.0 if e.high is None else max(0.0, e.high - e.value) for e in estimates]
    return [below, above]


def _draw_one_reward(front: Front) -> Figure:
    """A single reward that cannot be drawn over λ: each model on a line of its own."""
    reward, points = front.rewards[0], [*front.others, *front.soups]
    figure = new_figure(7.2, 1.4 + 0.28 * len(points))
    axes = figure.subplots()
    style(axes)
    estimates = [point.estimate(reward) for point in points]
    means = [estimate.value for estimate in estimates]
    axes.errorbar(means, range(len(points)), xerr=bars(estimates), fmt="o", color=_BLUE, ecolor=_BLUE + "55")
    axes.set_yticks(range(len(points)), [point.label for point in points])
    axes.invert_yaxis()
    axes.set_xlabel(f"{reward}  (mean reward)")
    return figure


def _draw_pair(axes: Axes, front: Front, x: str, y: str) -> None:
    """Two rewards against each other."""
    style(axes)
    soups, joined = front.soups, len(front.ingredients) == 2
    if front.has_band:
        band, median = outlines(front.attainment())
        axes.fill(*band.T, color=_BLUE, alpha=0.12, lw=0, zorder=1, label="reach in 95% of draws")
        axes.plot(*median.T, color=_BLUE, alpha=0.45, lw=0.8, zorder=1)
    if joined and len(soups) > 1:
        ends = [[soup.mean[reward] for soup in (soups[0], soups[-1])] for reward in (x, y)]
        axes.plot(*ends, "--", color=_GRAY, lw=1.2, zorder=1, label="chord")
    if soups:
        _mark(axes, soups, x, y, _BLUE, "o-" if joined else "o", "soups")
        for point in soups:
            _label(axes, point, x, y)
    for number, point in enumerate(front.others):
        color, marker = (_BLACK, "s") if point.name == BASE else _OTHERS[number % len(_OTHERS)]
        _mark(axes, [point], x, y, color, marker, point.name)

    axes.set_xlabel(f"{x}  (mean reward)")
    axes.set_ylabel(f"{y}  (mean reward)")
    note = f"{len(front.prompts)} prompts, bars: 95% bootstrap over prompts" if front.prompts else "means, as published"
    if joined:
        first, second = front.ingredients
        note += f"\nnumbers: λ of {second}, the rest is {first}"
    axes.set_title(note, fontsize=9, color=_GRAY, loc="left")
    add_legend(axes)


def _mark(axes: Axes, points: Sequence[Point], x: str, y: str, color: str, marker: str, label: str) -> None:
    """Points with their intervals."""
    axes.errorbar(
        [point.mean[x] for point in points],
        [point.mean[y] for point in points],
        xerr=bars([point.estimate(x) for point in points]),
        yerr=bars([point.estimate(y) for point in points]),
        fmt=marker,
        color=color,
        ecolor=color + "55",
        elinewidth=1,
        markersize=6,
        lw=1.6,
        label=label,
        zorder=3,
    )


def _label(axes: Axes, point: Point, x: str, y: str) -> None:
    """λ of the second ingredient beside a point; of three ingredients or more, the name at the ends.

    It is placed to the upper right, where a front of two maximized rewards leaves room.
    """
    words = f"{point.weights[1]:.3g}" if len(point.weights) == 2 else point.alone
    if words:
        place = point.mean[x], point.mean[y]
        axes.annotate(words, place, (6, 5), textcoords="offset points", fontsize=8, color=_BLUE, zorder=4)
