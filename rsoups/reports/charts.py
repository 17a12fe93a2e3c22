"""Charts of a front as inline SVG: what report.html is made of. Colors are the page's, in light and in dark.

Every mark tells its figures in an aria-label and a title, has a shape of its own beside its color, and is hollow where
another point beats it. Text is escaped here.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rsoups.fronts.advantage import Reach
from rsoups.fronts.attainment import outlines
from rsoups.fronts.estimates import Estimate
from rsoups.fronts.front import Front
from rsoups.fronts.points import BASE, Point

Limits = tuple[float, float]
SHAPES = {
    "circle": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z",
    "square": "M-4.6,-4.6H4.6V4.6H-4.6Z",
    "diamond": "M0,-6.4L6.4,0L0,6.4L-6.4,0Z",
    "up": "M0,-6.2L5.8,4.4H-5.8Z",
    "down": "M0,6.2L5.8,-4.4H-5.8Z",
    "plus": "M-1.9,-6H1.9V-1.9H6V1.9H1.9V6H-1.9V1.9H-6V-1.9H-1.9Z",
    "cross": "M-5.6,-3.2L-3.2,-5.6L0,-2.4L3.2,-5.6L5.6,-3.2L2.4,0L5.6,3.2L3.2,5.6L0,2.4L-3.2,5.6L-5.6,3.2L-2.4,0Z",
    "star": "M0,-6.8L1.9,-2.2L6.8,-2L3,1.1L4.2,5.9L0,3.2L-4.2,5.9L-3,1.1L-6.8,-2L-1.9,-2.2Z",
}
_OTHERS = ("diamond", "up", "down", "plus", "star", "cross")
_COLORS = ("c1", "c2", "c3", "c4", "c5", "c6")
# Seven steps of viridis, which grows lighter evenly and is told apart with any color vision; text on them in the last column.
_RAMP = ("#440154", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725")

BAND = (
    '<svg class="swatch" viewBox="-8 -8 16 16" aria-hidden="true"><path class="band soup" d="M-8,-6H8V6H-8Z"/>'
    '<path class="median soup" d="M-8,0H8"/></svg>'
)

CHORD = '<svg class="swatch" viewBox="-8 -8 16 16" aria-hidden="true"><path class="chord" d="M-8,0H8"/></svg>'


@dataclass(frozen=True)
class Look:
    """Color class and shape of a model, the same in all charts."""

    color: str
    shape: str


def looks_of(front: Front) -> dict[Point, Look]:
    """Soups are blue circles, the base a gray square, every other model has a pair of color and shape of its own."""
    looks = {point: Look("soup", "circle") for point in front.soups}
    others = [point for point in front.others if point.name != BASE]
    looks |= {p: Look(_COLORS[i % 6], _OTHERS[(i + i // 6) % 6]) for i, p in enumerate(others)}
    return looks | {point: Look("base", "square") for point in front.others if point.name == BASE}


def beside_look(number: int) -> Look:
    """Of all points of another front; its colors are taken from the other end than those of models beside the soups."""
    return Look(_COLORS[5 - number % 6], "circle")


def escaped(text: object) -> str:
    return html.escape(str(text), quote=True)


def swatch(look: Look, hollow: bool = False) -> str:
    """A mark for a legend."""
    return (
        f'<svg class="swatch" viewBox="-8 -8 16 16" aria-hidden="true"><path class="dot {look.color}'
        f'{" hollow" if hollow else ""}" d="{SHAPES[look.shape]}"/></svg>'
    )


@dataclass(frozen=True)
class Axes:
    """A rectangle of the picture with linear scales."""

    left: float
    top: float
    right: float
    bottom: float
    x_limits: Limits
    y_limits: Limits

    def x(self, value: float) -> float:
        low, high = self.x_limits
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        low, high = self.y_limits
        return round(self.bottom - (value - low) / (high - low) * (self.bottom - self.top), 1)

    def frame(self, x_label: str, y_label: str, x_ticks: int = 6, y_ticks: int = 5) -> str:
        """Grid, ticks and names (no figures without an `x_label`): the upright axis's name stands above it, unturned."""
        out = []
        for value in _ticks(self.x_limits, x_ticks):
            out.append(f'<path class="grid" d="M{self.x(value)},{self.top}V{self.bottom}"/>')
            if x_label:
                out.append(_text("tick", self.x(value), self.bottom + 20, _signed(value), "middle"))
        for value in _ticks(self.y_limits, y_ticks):
            out.append(f'<path class="grid" d="M{self.left},{self.y(value)}H{self.right}"/>')
            out.append(_text("tick", self.left - 8, self.y(value) + 4, _signed(value), "end"))
        if x_label:
            out.append(_text("name", self.right, self.bottom + 44, f"{x_label} →", "end"))
        if y_label:
            out.append(_text("name", self.left, self.top - 12, f"↑ {y_label}"))
        return "".join(out)

    def line(self, at: Iterable[tuple[float, float]], classes: str) -> str:
        return f'<path class="{classes}" d="M{"L".join(f"{self.x(x)},{self.y(y)}" for x, y in at)}"/>'

    def band(self, at: Sequence[float], estimates: Sequence[Estimate], classes: str) -> str:
        """The area between the bounds of intervals; nothing where there are none."""
        rows = [
            (x, e.low, e.high) for x, e in zip(at, estimates, strict=True) if e.low is not None and e.high is not None
        ]
        if len(rows) < 2:
            return ""
        edge = [(x, high) for x, _, high in rows] + [(x, low) for x, low, _ in reversed(rows)]
        return self.line(edge, f"band {classes}")

    def bars(self, x: Estimate, y: Estimate) -> str:
        """The intervals of a point, as a cross."""
        out = ""
        if x.low is not None and x.high is not None:
            out += f"M{self.x(x.low)},{self.y(y.value)}H{self.x(x.high)}"
        if y.low is not None and y.high is not None:
            out += f"M{self.x(x.value)},{self.y(y.low)}V{self.y(y.high)}"
        return f'<path class="bar" d="{out}"/>' if out else ""


def _text(classes: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def _signed(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _ticks(limits: Limits, count: int) -> list[float]:
    low, high = limits
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def limits_of(estimates: Iterable[Estimate], *more: float) -> Limits:
    """What holds all intervals, with some room."""
    values = [v for e in estimates for v in (e.value, e.low, e.high) if v is not None] + list(more)
    low, high = min(values), max(values)
    room = (high - low) * 0.07 or max(abs(low), 1.0) * 0.1
    return low - room, high + room


def _svg(width: int, height: int, told: str, body: str, classes: str = "") -> str:
    return f'<svg class="chart {classes}" viewBox="0 0 {width} {height}" role="group" aria-label="{escaped(told)}">{body}</svg>'


def _mark(
    look: Look, x: float, y: float, tip: str, *, model: int | None = None, hollow: bool = False, before: str = ""
) -> str:
    """A shape at a place, with what it tells; `before` is drawn under it and is lit with it."""
    number = "" if model is None else f' data-model="{model}"'
    return (
        f'<g class="mark {look.color}" role="img" aria-label="{escaped(tip)}"{number}><title>{escaped(tip)}</title>{before}'
        f'<g transform="translate({x},{y})"><circle class="halo" r="11"/>'
        f'<path class="dot{" hollow" if hollow else ""}" d="{SHAPES[look.shape]}"/></g></g>'
    )


def tip_of(point: Point, rewards: Sequence[str]) -> str:
    return "\n".join([point.label, *(f"{reward} {point.estimate(reward)}" for reward in rewards)])


def front_chart(
    front: Front, x: str, y: str, models: Mapping[Point, int], beside: Mapping[str, Front], wide: bool
) -> str:
    """Two rewards against each other: soups (joined, of two ingredients, with their chord), the base, others, other fronts."""
    width, height = (680, 470) if wide else (440, 380)
    every = [*front.points, *(p for other in beside.values() for p in other.points)]
    reach = outlines(front.attainment()) if front.has_band else []
    x_limits, y_limits = (
        limits_of((p.estimate(reward) for p in every), *(at for line in reach for at in line[:, column]))
        for column, reward in enumerate((x, y))
    )
    axes = Axes(62, 42, width - 22, height - 62, x_limits, y_limits)
    body = [axes.frame(x, y)]
    if reach:
        band, median = reach
        body += [axes.line(band, "band soup"), axes.line(median, "median soup")]
    looks, pareto = looks_of(front), set(front.pareto())
    joined = len(front.ingredients) == 2 and len(front.soups) > 1
    if joined:
        at = [(p.mean[x], p.mean[y]) for p in front.soups]
        body += [axes.line([at[0], at[-1]], "chord"), axes.line(at, "line soup")]
    for number, (name, other) in enumerate(beside.items()):
        look = beside_look(number)
        for point in other.soups or other.points:
            place = axes.x(point.mean[x]), axes.y(point.mean[y])
            bars = axes.bars(point.estimate(x), point.estimate(y))
            body.append(_mark(look, *place, f"{name}: {tip_of(point, front.rewards)}", hollow=True, before=bars))
    for point in [*front.soups, *front.others]:
        place = axes.x(point.mean[x]), axes.y(point.mean[y])
        bars = axes.bars(point.estimate(x), point.estimate(y))
        tip = tip_of(point, front.rewards) + ("" if point in pareto else "\nbeaten by another point")
        body.append(_mark(looks[point], *place, tip, model=models[point], hollow=point not in pareto, before=bars))
    body += [_lambda_label(axes, front, place, x, y) for place in range(len(front.soups))]
    ends = "; ".join(tip_of(p, (x, y)).replace("\n", ", ") for p in _ends(front))
    told = f"{y} against {x}, higher is better in both.{told_of_reach(front)} {ends}"
    return _svg(width, height, told, "".join(body), ("wide " if wide else "") + ("quiet" if len(every) > 30 else ""))


def told_of_reach(front: Front) -> str:
    """What the band behind the points is, in words; nothing where there is none."""
    if not front.has_band:
        return ""
    return (
        f" Shaded: how far the {'soups' if front.soups else 'points'} reach when prompts are drawn again: to the lower "
        "edge in 97.5% of the bootstrap draws, to the thin line in half of them, to the upper edge in 2.5%."
    )


def _ends(front: Front) -> list[Point]:
    """What a picture's alternative text tells: the base, and the soups of one ingredient alone."""
    base = [] if front.base is None else [front.base]
    return base + [point for point in front.soups if max((point.lambdas or {}).values()) == 1]


def _lambda_label(axes: Axes, front: Front, place: int, x: str, y: str) -> str:
    """λ of the second ingredient at every soup; of three ingredients and more, the name at the ends."""
    point = front.soups[place]
    weights = list((point.lambdas or {}).values())
    if len(weights) == 2:
        text, minor = f"{weights[1]:.3g}", " minor" if place % 2 else ""
    elif max(weights) == 1:
        text, minor = front.ingredients[weights.index(1)], ""
    else:
        return ""
    near_right = axes.x(point.mean[x]) > axes.right - 90 and len(weights) > 2
    at = axes.x(point.mean[x]) + (-9 if near_right else 8), axes.y(point.mean[y]) - 8
    anchor = "end" if near_right else "start"
    return _text(f"lambda{minor}", *at, text, anchor)


def chord_chart(front: Front, reward: str, models: Mapping[Point, int]) -> str:
    """Of two ingredients: a reward over λ with its chord, and below, the difference with its interval."""
    soups, second = front.soups, front.ingredients[1]
    at = [(point.lambdas or {})[second] for point in soups]
    found = [point.estimate(reward) for point in soups]
    gaps = [gap[reward] for _, gap in front.linear_mode_connectivity()]
    limits = min(at) - 0.03, max(at) + 0.03
    upper = Axes(62, 42, 418, 220, limits, limits_of(found))
    lower = Axes(62, 262, 418, 352, limits, limits_of(gaps, 0.0))
    body = [upper.frame("", reward), upper.band(at, found, "soup")]
    ends = [(at[0], found[0].value), (at[-1], found[-1].value)]
    body += [upper.line(ends, "chord"), upper.line(zip(at, (e.value for e in found), strict=True), "line soup")]
    body += [
        lower.frame(f"λ of {second}", "soup less chord", y_ticks=3),
        lower.line([(limits[0], 0), (limits[1], 0)], "chord"),
    ]
    for point, x, estimate, gap in zip(soups, at, found, gaps, strict=True):
        tip = f"{point.label}\n{reward} {estimate}\nless the chord {gap}"
        body.append(_mark(Look("soup", "circle"), upper.x(x), upper.y(estimate.value), tip, model=models[point]))
        sure = gap.is_above_zero or gap.is_below_zero
        bars = lower.bars(Estimate(x), gap)
        body.append(
            _mark(
                Look("soup", "circle"),
                lower.x(x),
                lower.y(gap.value),
                tip,
                model=models[point],
                hollow=not sure,
                before=bars,
            )
        )
    told = f"{reward} over λ of {second} with the chord between the ends, and its difference from the chord"
    return _svg(440, 412, told, "".join(body))


def chord_scatter(front: Front, reward: str, models: Mapping[Point, int]) -> str:
    """Of three ingredients or more: each soup's reward against its chord's; above the line the soup has more."""
    rows = front.linear_mode_connectivity()
    chords = [Estimate(point.mean[reward] - gap[reward].value) for point, gap in rows]
    limits = limits_of([*chords, *(point.estimate(reward) for point, _ in rows)])
    axes = Axes(62, 42, 418, 330, limits, limits)
    body = [axes.frame(f"chord: Σ λ·{reward} of the ends", reward), axes.line([(v, v) for v in limits], "chord")]
    for (point, gap), chord in zip(rows, chords, strict=True):
        value, estimate = chord.value, gap[reward]
        bounds = (
            (None, None)
            if estimate.low is None or estimate.high is None
            else (value + estimate.low, value + estimate.high)
        )
        tip = f"{point.label}\n{reward} {point.estimate(reward)}\nless the chord {estimate}"
        sure = estimate.is_above_zero or estimate.is_below_zero
        bars = axes.bars(chord, Estimate(value + estimate.value, *bounds))
        place = axes.x(value), axes.y(point.mean[reward])
        body.append(_mark(Look("soup", "circle"), *place, tip, model=models[point], hollow=not sure, before=bars))
    return _svg(440, 392, f"{reward} of each soup against its chord", "".join(body), "quiet")


def lambda_chart(front: Front, name: str, models: Mapping[Point, int]) -> str:
    """Of two ingredients: one of the points' extras over λ; dashed lines are the other models'."""
    soups, second = front.soups, front.ingredients[1]
    at, found = [(p.lambdas or {})[second] for p in soups], [p.extras[name] for p in soups]
    others = [(p, p.extras[name]) for p in front.others if name in p.extras]
    axes = Axes(62, 42, 418, 238, (min(at) - 0.03, max(at) + 0.03), limits_of([*found, *(e for _, e in others)]))
    looks = looks_of(front)
    body = [axes.frame(f"λ of {second}", name, y_ticks=4), axes.band(at, found, "soup")]
    for point, estimate in others:
        body.append(axes.line([(x, estimate.value) for x in axes.x_limits], f"level {looks[point].color}"))
        tip = f"{point.label}\n{name} {estimate}"
        body.append(_mark(looks[point], axes.right, axes.y(estimate.value), tip, model=models[point]))
    body.append(axes.line(zip(at, (e.value for e in found), strict=True), "line soup"))
    for point, x, estimate in zip(soups, at, found, strict=True):
        tip = f"{point.label}\n{name} {estimate}"
        body.append(_mark(Look("soup", "circle"), axes.x(x), axes.y(estimate.value), tip, model=models[point]))
    return _svg(440, 300, f"{name} of the soups over λ of {second}", "".join(body))


def runs_chart(curve: Sequence[Reach]) -> str:
    """Hypervolume against the number of PPO runs: soups, and MORL on average and at best over the choices of runs."""
    best = [(float(reach.runs), reach.best) for reach in curve if reach.best is not None]
    series = [
        (Look("c1", "diamond"), "MORL", [(reach.runs, reach.others) for reach in curve if reach.others]),
        (Look("soup", "circle"), "soups", [(reach.runs, reach.soups) for reach in curve if reach.soups]),
    ]
    every = [estimate for _, _, found in series for _, estimate in found]
    limits = limits_of(every, *(value for _, value in best))
    axes = Axes(62, 42, 658, 300, (0.5, max(reach.runs for reach in curve) + 0.5), limits)
    body = [axes.frame("PPO runs", "hypervolume"), axes.line(best, "chord")]
    for look, name, found in series:
        body.append(axes.line([(runs, estimate.value) for runs, estimate in found], f"line {look.color}"))
        for runs, estimate in found:
            tip = f"{name}\n{runs} {'run' if runs == 1 else 'runs'}\nhypervolume {estimate}"
            bars = axes.bars(Estimate(runs), estimate)
            body.append(_mark(look, axes.x(runs), axes.y(estimate.value), tip, before=bars))
    return _svg(
        680, 364, "Hypervolume against the number of PPO runs, of soups and of MORL runs", "".join(body), "wide"
    )


def ternary_chart(
    front: Front, name: str, figure: Callable[[Point], Estimate | None], models: Mapping[Point, int]
) -> str:
    """Of three ingredients: a figure at each λ of the triangle, as a color and a number; a ring marks the Pareto points."""
    shown = [(point, e) for point in front.soups if (e := figure(point)) is not None]
    corners = ((220.0, 70.0), (62.0, 343.6), (378.0, 343.6))
    places = [_in_triangle(list((p.lambdas or {}).values()), corners) for p, _ in shown]
    nearest = min((math.dist(a, b) for i, a in enumerate(places) for b in places[:i]), default=60.0)
    radius, numbers = min(20.0, max(5.0, nearest * 0.48)), nearest >= 26
    values = [e.value for _, e in shown]
    low, high = min(values), max(values)
    pareto = set(front.pareto())
    body = [_text("name", 14, 28, name)]
    body.append(f'<path class="triangle" d="M{"L".join(f"{x},{y}" for x, y in corners)}Z"/>')
    for (point, estimate), (x, y) in zip(shown, places, strict=True):
        step = round((estimate.value - low) / (high - low) * (len(_RAMP) - 1)) if high > low else len(_RAMP) // 2
        ring = " pareto" if point in pareto else ""
        tip = f"{point.label}\n{name} {estimate}" + ("\non the Pareto front" if ring else "")
        body.append(
            f'<g class="mark cell" role="img" aria-label="{escaped(tip)}" data-model="{models[point]}"><title>{escaped(tip)}'
            f'</title><circle class="tile{ring}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{_RAMP[step]}"/>'
        )
        if numbers:
            ink = "on-dark" if step < 4 else "on-light"
            body.append(_text(f"value {ink}", x, y + 3.6, _short(estimate.value, high - low), "middle"))
        body.append("</g>")
    anchors = (("middle", 0, -24), ("start", -50, 40), ("end", 50, 40))
    for ingredient, (x, y), (anchor, right, down) in zip(front.ingredients, corners, anchors, strict=True):
        body.append(_text("name", x + right, y + down, ingredient, anchor))
    told = f"{name} over the triangle of λ, from {low:.3g} to {high:.3g}"
    return _svg(440, 400, told, "".join(body))


def _in_triangle(weights: Sequence[float], corners: Sequence[tuple[float, float]]) -> tuple[float, float]:
    x, y = (sum(w * corner[axis] for w, corner in zip(weights, corners, strict=True)) for axis in (0, 1))
    return x, y


def _short(value: float, spread: float) -> str:
    """Decimals that tell values apart that spread so far and fit a tile, without the zero before the point."""
    decimals = 0 if spread > 20 or abs(value) >= 100 else 1 if spread > 2 or abs(value) >= 10 else 2
    return re.sub(r"^(-?)0\.", r"\1.", f"{round(value, decimals) + 0.0:.{decimals}f}").replace("-", "−")


@dataclass(frozen=True)
class Series:
    """A model that is set off against the others, with its color, shape and dashes (by the color's class)."""

    point: Point
    name: str
    look: Look


def series_of(front: Front) -> list[Series]:
    """The soup nearest to uniform, each ingredient alone, three other models, the base."""
    even = 1 / max(1, len(front.ingredients))
    ends = [p for p in front.soups if max((p.lambdas or {}).values()) == 1]
    found = []
    if between := [p for p in front.soups if p not in ends]:
        off = {p: max(abs(w - even) for w in (p.lambdas or {}).values()) for p in between}
        uniform = min(between, key=lambda p: off[p])
        name = "uniform soup" if off[uniform] < 0.01 else "soup nearest to uniform"
        found.append(Series(uniform, f"{name} ({uniform.label})", Look("soup", "circle")))
    looks = looks_of(front)
    others = [p for p in front.others if p.name != BASE][:3]
    used = {looks[p].color for p in others}
    free = [color for color in reversed(_COLORS) if color not in used]
    for number, end in enumerate(ends):
        name = next(n for n, w in (end.lambdas or {}).items() if w == 1)
        found.append(Series(end, f"{name} alone", Look(free[number % len(free)], _OTHERS[-1 - number % 6])))
    found += [Series(p, p.name, looks[p]) for p in others]
    return found + [Series(p, p.name, Look("base", "square")) for p in front.others if p.name == BASE]


def _scaled(front: Front, points: Sequence[Point]) -> Callable[[Point, str], float]:
    """A reward of a point from 0, the least of these points, to 1."""
    ranges = {r: (min(p.mean[r] for p in points), max(p.mean[r] for p in points)) for r in front.rewards}

    def scale(point: Point, reward: str) -> float:
        low, high = ranges[reward]
        return (point.mean[reward] - low) / (high - low) if high > low else 0.5

    return scale


def parallel_chart(front: Front, series: Sequence[Series], models: Mapping[Point, int]) -> str:
    """An upright axis for each reward, from the least to the largest of all models; a line for each model."""
    scale = _scaled(front, front.points)
    step = 560 / (len(front.rewards) - 1)
    at = {reward: round(60 + i * step, 1) for i, reward in enumerate(front.rewards)}
    crowded = len(at) > 3 or max(map(len, at)) > 14
    body = []
    for number, (reward, x) in enumerate(at.items()):
        values = [p.mean[reward] for p in front.points]
        # Names at the edges stay inside; neighbors take turns where they are many or long.
        anchor, middle = {0: ("start", 10.0), len(at) - 1: ("end", 670.0)}.get(number, ("middle", x))
        up = 26 * (crowded and number % 2 == 0)
        body += [f'<path class="axis" d="M{x},84V384"/>', _text("name", middle, 48 - up, reward, anchor)]
        body += [_text("tick", x, y, f"{value:.3g}", "middle") for y, value in ((74, max(values)), (408, min(values)))]
    set_off = {entry.point for entry in series}

    def path(point: Point) -> str:
        return "M" + "L".join(f"{x},{384 - 300 * scale(point, reward):.1f}" for reward, x in at.items())

    for point in front.soups:
        if point not in set_off:
            tip, line = escaped(tip_of(point, front.rewards)), path(point)
            body.append(
                f'<g class="mark thin" role="img" aria-label="{tip}" data-model="{models[point]}"><title>{tip}</title>'
                f'<path class="reach" d="{line}"/><path class="line soup faint" d="{line}"/></g>'
            )
    for entry in reversed(series):
        body.append(f'<path class="line {entry.look.color} set-off" d="{path(entry.point)}"/>')
        for reward, x in at.items():
            place = x, round(384 - 300 * scale(entry.point, reward), 1)
            body.append(
                _mark(
                    entry.look, *place, f"{entry.name}\n{tip_of(entry.point, front.rewards)}", model=models[entry.point]
                )
            )
    return _svg(680, 424, "Every model as a line through its rewards", "".join(body), "wide")


def spider_chart(front: Front, series: Sequence[Series], models: Mapping[Point, int]) -> str:
    """A spoke for each reward, from the least (near the middle) to the largest of the models set off."""
    scale = _scaled(front, [entry.point for entry in series])
    turn = {r: 2 * math.pi * i / len(front.rewards) - math.pi / 2 for i, r in enumerate(front.rewards)}

    def place(reward: str, reach: float) -> tuple[float, float]:
        return round(220 + reach * math.cos(turn[reward]), 1), round(214 + reach * math.sin(turn[reward]), 1)

    def ring(reaches: Iterable[float]) -> str:
        corners = (place(reward, reach) for reward, reach in zip(front.rewards, reaches, strict=True))
        return "M" + "L".join(f"{x},{y}" for x, y in corners) + "Z"

    body = [f'<path class="web" d="{ring([30 + 130 * k] * len(front.rewards))}"/>' for k in (0, 1 / 3, 2 / 3, 1)]
    for reward, angle in turn.items():
        x, y = place(reward, 160)
        side = 0 if abs(math.cos(angle)) < 0.3 else 1 if math.cos(angle) > 0 else -1
        anchor, at = {0: ("middle", x), 1: ("end", 438.0), -1: ("start", 2.0)}[
            side
        ]  # long names grow towards the middle
        body.append(f'<path class="web" d="M220,214L{x},{y}"/>')
        body.append(_text("name", at, y + (28 if math.sin(angle) > 0.3 else -16), reward, anchor))
    for entry in reversed(series):
        reaches = [30 + 130 * scale(entry.point, reward) for reward in front.rewards]
        fill = " filled" if entry.look.color == "soup" else ""
        body.append(f'<path class="line {entry.look.color} set-off{fill}" d="{ring(reaches)}"/>')
        for reward, reach in zip(front.rewards, reaches, strict=True):
            tip = f"{entry.name}\n{tip_of(entry.point, front.rewards)}"
            body.append(_mark(entry.look, *place(reward, reach), tip, model=models[entry.point]))
    return _svg(440, 400, "Rewards of the uniform soup, the ingredients and other models as polygons", "".join(body))
