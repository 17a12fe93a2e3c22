"""Charts of three rewards or ingredients and more: the triangle of λ, parallel axes, the spider map."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rsoups.fronts.estimates import Estimate
from rsoups.fronts.front import Front
from rsoups.fronts.points import BASE, Point
from rsoups.reports.charts import COLORS, OTHER_SHAPES, Models, looks_of
from rsoups.reports.svg import BASE_LOOK, SOUP_LOOK, Look, chart, group, mark, path, tag, text

# Seven steps of viridis, which grows lighter evenly and is distinct with any color vision.
_RAMP = ("#440154", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725")
_CORNERS = ((220.0, 70.0), (62.0, 343.6), (378.0, 343.6))  # of the triangle of λ


def ternary_chart(models: Models, name: str, estimates: Mapping[Point, Estimate]) -> Markup:
    """Of three ingredients: a figure at each λ of the triangle, as a color and a number; a ring marks the Pareto points."""
    places = [_in_triangle(point.weights) for point in estimates]
    nearest = min((math.dist(a, b) for i, a in enumerate(places) for b in places[:i]), default=60.0)
    radius = min(20.0, max(5.0, nearest * 0.48))
    values = [estimate.value for estimate in estimates.values()]
    low, high = min(values), max(values)

    body = [text("name", 14, 28, name), tag("path", class_="triangle", d=path(_CORNERS, "Z"))]
    for (point, estimate), (x, y) in zip(estimates.items(), places, strict=True):
        step = round((estimate.value - low) / (high - low) * (len(_RAMP) - 1)) if high > low else len(_RAMP) // 2
        optimal = point in models.pareto
        classes = "tile pareto" if optimal else "tile"
        tile = [tag("circle", class_=classes, cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius:.1f}", fill=_RAMP[step])]
        if nearest >= 26:
            ink = "on-dark" if step < 4 else "on-light"
            tile.append(text(f"value {ink}", x, y + 3.6, _short(estimate.value, high - low), "middle"))
        tip = f"{point.label}\n{name} {estimate}" + ("\non the Pareto front" if optimal else "")
        body.append(group("mark cell", tip, models.numbers[point], *tile))

    anchors = (("middle", 0, -24), ("start", -50, 40), ("end", 50, 40))
    for ingredient, (x, y), (anchor, right, down) in zip(models.front.ingredients, _CORNERS, anchors, strict=True):
        body.append(text("name", x + right, y + down, ingredient, anchor))
    return chart(440, 400, f"{name} over the triangle of λ, from {low:.3g} to {high:.3g}", body)


def _in_triangle(weights: Sequence[float]) -> tuple[float, float]:
    x, y = (sum(w * corner[axis] for w, corner in zip(weights, _CORNERS, strict=True)) for axis in (0, 1))
    return x, y


def _short(value: float, spread: float) -> str:
    """A number for a tile, without the zero before the point; its decimals tell values apart that spread so far."""
    decimals = 0 if spread > 20 or abs(value) >= 100 else 1 if spread > 2 or abs(value) >= 10 else 2
    return re.sub(r"^(-?)0\.", r"\1.", f"{round(value, decimals) + 0.0:.{decimals}f}").replace("-", "−")


@dataclass(frozen=True)
class Series:
    """A model that is highlighted among the others: a line with a color, a shape and (by the color's class) dashes."""

    point: Point
    name: str
    look: Look


def series_of(front: Front) -> list[Series]:
    """The soup nearest to uniform, each ingredient alone, three other models, the base."""
    series = []
    between = [point for point in front.soups if not point.alone]
    if between:
        even = 1 / len(front.ingredients)
        distances = {point: max(abs(weight - even) for weight in point.weights) for point in between}
        uniform = min(between, key=lambda point: distances[point])
        name = "uniform soup" if distances[uniform] < 0.01 else "soup nearest to uniform"
        series.append(Series(uniform, f"{name} ({uniform.label})", SOUP_LOOK))

    looks = looks_of(front)
    others = [point for point in front.others if point.name != BASE][:3]
    used = {looks[point].color for point in others}
    free = [color for color in reversed(COLORS) if color not in used]
    ends = [point for point in front.soups if point.alone]
    for number, point in enumerate(ends):
        look = Look(free[number % len(free)], OTHER_SHAPES[-1 - number % 6])
        series.append(Series(point, f"{point.alone} alone", look))
    series += [Series(point, point.name, looks[point]) for point in others]
    return series + [Series(point, point.name, BASE_LOOK) for point in front.others if point.name == BASE]


def _scale(front: Front, points: Sequence[Point]) -> Callable[[Point, str], float]:
    """A function that maps a reward of a point to [0, 1] between the least and the largest of these points."""
    low = {reward: min(point.mean[reward] for point in points) for reward in front.rewards}
    high = {reward: max(point.mean[reward] for point in points) for reward in front.rewards}

    def scale(point: Point, reward: str) -> float:
        width = high[reward] - low[reward]
        return (point.mean[reward] - low[reward]) / width if width > 0 else 0.5

    return scale


def parallel_chart(models: Models, series: Sequence[Series]) -> Markup:
    """A vertical axis for each reward, from the least to the largest of all models; a line for each model."""
    front = models.front
    scale = _scale(front, front.points)
    step = 560 / (len(front.rewards) - 1)
    at = {reward: round(60 + i * step, 1) for i, reward in enumerate(front.rewards)}

    def height(point: Point, reward: str) -> float:
        return round(384 - 300 * scale(point, reward), 1)

    def line(point: Point) -> str:
        return path((x, height(point, reward)) for reward, x in at.items())

    body = _parallel_axes(front, at)
    highlighted = {entry.point for entry in series}
    for point in front.soups:
        if point not in highlighted:
            paths = [tag("path", class_=classes, d=line(point)) for classes in ("reach", "line soup faint")]
            body.append(group("mark thin", models.tip(point), models.numbers[point], *paths))
    for entry in reversed(series):
        body.append(tag("path", class_=f"line {entry.look.color} set-off", d=line(entry.point)))
        tip = f"{entry.name}\n{models.tip(entry.point)}"
        for reward, x in at.items():
            body.append(mark(entry.look, x, height(entry.point, reward), tip, model=models.numbers[entry.point]))
    return chart(680, 424, "Every model as a line through its rewards", body, "wide")


def _parallel_axes(front: Front, at: dict[str, float]) -> list[Markup]:
    """Axes with the name, the least and the largest value of each reward.

    Names at the edges stay inside the picture; every second one is raised where names are many or long.
    """
    crowded = len(at) > 3 or max(map(len, at)) > 14
    body = []
    for number, (reward, x) in enumerate(at.items()):
        values = [point.mean[reward] for point in front.points]
        anchor, middle = {0: ("start", 10.0), len(at) - 1: ("end", 670.0)}.get(number, ("middle", x))
        raised = 26 if crowded and number % 2 == 0 else 0
        body += [tag("path", class_="axis", d=f"M{x},84V384"), text("name", middle, 48 - raised, reward, anchor)]
        body += [text("tick", x, y, f"{value:.3g}", "middle") for y, value in ((74, max(values)), (408, min(values)))]
    return body


def spider_chart(models: Models, series: Sequence[Series]) -> Markup:
    """A spoke for each reward, from the least (near the middle) to the largest of the highlighted models."""
    front = models.front
    scale = _scale(front, [entry.point for entry in series])
    angles = {reward: 2 * math.pi * i / len(front.rewards) - math.pi / 2 for i, reward in enumerate(front.rewards)}

    def place(reward: str, radius: float) -> tuple[float, float]:
        return round(220 + radius * math.cos(angles[reward]), 1), round(214 + radius * math.sin(angles[reward]), 1)

    body = []
    for radius in (30, 30 + 130 / 3, 30 + 260 / 3, 160):
        body.append(tag("path", class_="web", d=path([place(reward, radius) for reward in front.rewards], "Z")))
    for reward, angle in angles.items():
        x, y = place(reward, 160)
        # Long names grow towards the middle.
        anchor, left = ("middle", x)
        if abs(math.cos(angle)) >= 0.3:
            anchor, left = ("end", 438.0) if math.cos(angle) > 0 else ("start", 2.0)
        body.append(tag("path", class_="web", d=f"M220,214L{x},{y}"))
        body.append(text("name", left, y + (28 if math.sin(angle) > 0.3 else -16), reward, anchor))
    for entry in reversed(series):
        corners = [place(reward, 30 + 130 * scale(entry.point, reward)) for reward in front.rewards]
        filled = " filled" if entry.look.color == "soup" else ""
        body.append(tag("path", class_=f"line {entry.look.color} set-off{filled}", d=path(corners, "Z")))
        tip = f"{entry.name}\n{models.tip(entry.point)}"
        body += [mark(entry.look, *corner, tip, model=models.numbers[entry.point]) for corner in corners]
    label = "Rewards of the uniform soup, the ingredients and other models as polygons"
    return chart(440, 400, label, body)
