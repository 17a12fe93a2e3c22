"""What the explorer shows, as HTML and SVG: the front with the chosen λ on it, texts side by side. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from rsoups.front import Front
from rsoups.points import BASE, Choice, Point
from rsoups.tasks import question_of
from rsoups.tasting import Question, Reading

_WIDTH, _HEIGHT = 460, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 16, 46
_SHAPES = ("diamond", "triangle", "cross")  # of the models beside soups and base, told apart without colour
_MANY = 12
_NEAREST = 4  # power of the distance: the nearest measured soups decide


def axes_of(front: Front) -> list[str]:
    """What a front can be drawn over: its rewards, and the λ of each ingredient."""
    return [*front.rewards, *(_lambda_axis(name) for name in front.soups[0].lambdas or {})]


def first_axes(front: Front) -> tuple[str, str]:
    """The first two rewards; one reward over the λ of the last ingredient."""
    if len(front.rewards) > 1:
        return front.rewards[0], front.rewards[1]
    return axes_of(front)[-1], front.rewards[0]


def _lambda_axis(name: str) -> str:
    return f"λ of {name}"


def expected(front: Front, lambdas: Mapping[str, float]) -> dict[str, float]:
    """Mean rewards to expect at λ: the measured ones, and between them their average weighted by nearness (Shepard).

    Args:
        front: With at least one soup.
        lambdas: By ingredient.
    """
    at = np.array([list((point.lambdas or {}).values()) for point in front.soups])
    distance = np.linalg.norm(at - np.array(list(lambdas.values())), axis=1)
    weights = distance.min() / np.maximum(distance, 1e-9) if distance.min() > 1e-9 else (distance <= 1e-9)
    weights = np.asarray(weights, dtype=float) ** _NEAREST
    return {r: float(np.average([p.mean[r] for p in front.soups], weights=weights)) for r in front.rewards}


def measured(front: Front, lambdas: Mapping[str, float]) -> Point | None:
    """The soup that the sweep measured at this λ."""
    near = [p for p in front.soups if all(abs(x - lambdas[name]) < 5e-3 for name, x in (p.lambdas or {}).items())]
    return near[0] if near else None


def _interval(point: Point, reward: str) -> str:
    return f"{point.low[reward]:.2f} to {point.high[reward]:.2f}" if reward in point.low else ""


def _described(name: str, point: Point) -> str:
    intervals = {r: f" ({_interval(point, r)})" if r in point.low else "" for r in point.mean}
    return f"{name}: " + ", ".join(f"{r} {point.mean[r]:.2f}{intervals[r]}" for r in point.mean)


def shares(lambdas: Mapping[str, float]) -> str:
    """λ in words: ``30% helpful, 70% harmless``."""
    return ", ".join(f"{100 * x:.0f}% {name}" for name, x in lambdas.items() if x >= 0.005)


def readout(front: Front, lambdas: Mapping[str, float]) -> str:
    """The chosen λ, and what to expect of it."""
    point = measured(front, lambdas)
    mean = point.mean if point else expected(front, lambdas)
    cells = []
    for reward in front.rewards:
        interval = _interval(point, reward) if point else "between measured λ"
        sign = "" if point else "≈ "
        cells.append(
            f"<div><dt>{escape(reward)}</dt><dd>{sign}{mean[reward]:.2f} <small>{escape(interval)}</small></dd></div>"
        )
    return f'<p class="chosen">{escape(shares(lambdas))}</p><dl class="expected">{"".join(cells)}</dl>'


def header(front: Front, names: Sequence[str]) -> str:
    """What this page is about."""
    return (
        f"<h1>{escape(' · '.join(front.rewards))}</h1><p>Soups of {escape(', '.join(names))}, measured on "
        f"{len(front.prompts)} prompts. Choose a trade-off, and read what it writes.</p>"
    )


def reading(found: Reading | None, names: Sequence[str], lambdas: Mapping[str, float] | None = None) -> str:
    """Texts at λ, of each ingredient alone and of the base, side by side."""
    titles = ["This soup", *(f"{name} alone" for name in names), "Base"]
    notes = [shares(lambdas or {}), *("" for _ in names), "no adapter"]
    texts = found.texts if found else [""] * len(titles)
    cards = [
        _card(
            title, note, text, "chosen" if not i else "", found is not None and i in found.busy, waiting=found is None
        )
        for i, (title, note, text) in enumerate(zip(titles, notes, texts, strict=True))
    ]
    columns = len(names) + 1 if len(names) < 4 else 3
    return f'<div class="cards" style="--columns: {columns}">{"".join(cards)}</div>'


def question(asked: Question | None, choice: str | None = None) -> str:
    """Two texts side by side; what wrote them only once someone has chosen."""
    if asked is None:
        return '<p class="hint">Two soups answer the same prompt. You choose without knowing which is which.</p>'
    cards = []
    for i, (side, text) in enumerate(zip("ab", asked.texts, strict=True)):
        note = shares(asked.lambdas[i]) if choice else ""
        cards.append(_card(side.upper(), note, text, "chosen" if side == choice else "", asked.busy))
    return f'<p class="asked">{escape(question_of(asked.prompt))}</p><div class="cards two">{"".join(cards)}</div>'


def advice(votes: int, choice: Choice | None) -> str:
    """The λ that the votes suggest, and how sure that is."""
    if choice is None:
        return '<p class="hint">No votes yet. A dozen begin to show a preference.</p>'
    after = "1 vote" if votes == 1 else f"{votes} votes"
    sure = "" if choice.share is None else f" That is {choice.share:.0%} sure, among the soups measured."
    return f"<p>After {after}, <strong>{escape(shares(choice.point.lambdas or {}))}</strong> looks best.{sure}</p>"


def _card(title: str, note: str, text: str, kind: str, busy: bool, waiting: bool = False) -> str:
    empty = "" if waiting else "<em>…</em>" if busy else "<em>nothing: it ended at once</em>"
    return (
        f'<article class="{kind}" aria-busy="{str(busy).lower()}"><h3>{escape(title)}</h3>'
        f"<small>{escape(note)}</small><p>{escape(text.strip()) or empty}</p></article>"
    )


def plot(front: Front, x: str, y: str, lambdas: Mapping[str, float], advised: Mapping[str, float] | None = None) -> str:
    """The front as SVG: every soup a button (``data-at`` is its place in ``front.soups``), and a ring at the chosen λ.

    Args:
        front: With at least one soup.
        x, y: Two of `axes_of`.
        lambdas: The chosen λ.
        advised: The λ that votes suggest.
    """
    scale = _Scale.of(front, x, y)
    parts = [scale.grid(x, y)]
    soups = [
        (_place(front, p.lambdas or {}, p.mean, x), _place(front, p.lambdas or {}, p.mean, y)) for p in front.soups
    ]
    if len(front.soups[0].lambdas or {}) == 2 and len(soups) > 1:
        ends = scale.path([soups[0], soups[-1]])
        parts.append(f'<path class="chord" d="{ends}"/><path class="line" d="{scale.path(soups)}"/>')
    labels = []
    for number, point in enumerate(front.others):
        if x in point.mean and y in point.mean:
            shape = "square" if point.name == BASE else _SHAPES[number % len(_SHAPES)]
            parts.append(_mark(scale, point, x, y, shape))
            labels.append(_label(scale, point.mean[x], point.mean[y], point.name))
    for number, (point, (px, py)) in enumerate(zip(front.soups, soups, strict=True)):
        parts.append(_soup(scale, number, point, px, py, x, y, measured(front, lambdas) is point))
        if alone := [name for name, weight in (point.lambdas or {}).items() if weight == 1]:
            labels.append(_label(scale, px, py, f"{alone[0]} alone"))
    for kind, chosen in (("advised", advised), ("ring", lambdas)):
        if chosen:
            mean = expected(front, chosen)
            cx, cy = scale.at(_place(front, chosen, mean, x), _place(front, chosen, mean, y))
            parts.append(f'<circle class="{kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="11"/>')
    name = f"Front: {y} over {x}. Arrow keys move between soups, Enter chooses one."
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="group" aria-label="{escape(name)}">{"".join(parts + labels)}</svg>'


def _place(front: Front, lambdas: Mapping[str, float], mean: Mapping[str, float], axis: str) -> float:
    return mean[axis] if axis in front.rewards else next(v for n, v in lambdas.items() if _lambda_axis(n) == axis)


@dataclass(frozen=True)
class _Scale:
    x: tuple[float, float]
    y: tuple[float, float]

    @classmethod
    def of(cls, front: Front, x: str, y: str) -> _Scale:
        return cls(_range(front, x), _range(front, y))

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, places: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in (self.at(*place) for place in places))

    def grid(self, x: str, y: str) -> str:
        from matplotlib.ticker import MaxNLocator

        ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
        parts = []
        for value in ticks.tick_values(*self.x):
            if self.x[0] <= value <= self.x[1]:
                px, _ = self.at(value, self.y[0])
                parts.append(f'<path d="M{px:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
                parts.append(f'<text x="{px:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{value:.4g}</text>')
        for value in ticks.tick_values(*self.y):
            if self.y[0] <= value <= self.y[1]:
                _, py = self.at(self.x[0], value)
                parts.append(f'<path d="M{_LEFT} {py:.1f}H{_WIDTH - _RIGHT}"/>')
                parts.append(f'<text x="{_LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{value:.4g}</text>')
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        parts.append(f'<text class="axis" x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}">{escape(x)}</text>')
        parts.append(f'<text class="axis" transform="translate(13 {middle}) rotate(-90)">{escape(y)}</text>')
        return f'<g class="grid" aria-hidden="true">{"".join(parts)}</g>'


def _range(front: Front, axis: str) -> tuple[float, float]:
    if axis not in front.rewards:
        return -0.04, 1.04
    low = min(point.low.get(axis, point.mean[axis]) for point in front.points)
    high = max(point.high.get(axis, point.mean[axis]) for point in front.points)
    margin = 0.07 * (high - low) or 0.5
    return low - margin, high + margin


def _bars(scale: _Scale, point: Point, px: float, py: float, x: str, y: str) -> str:
    """95% intervals, a line for each axis that is a reward."""
    out = ""
    if x in point.low:
        out += scale.path([(point.low[x], py), (point.high[x], py)])
    if y in point.low:
        out += scale.path([(px, point.low[y]), (px, point.high[y])])
    return f'<path class="bars" d="{out}"/>'


def _soup(scale: _Scale, number: int, point: Point, px: float, py: float, x: str, y: str, chosen: bool) -> str:
    cx, cy = scale.at(px, py)
    name = escape(_described(shares(point.lambdas or {}), point))
    return (
        f'<g class="soup" role="button" data-at="{number}" tabindex="-1" aria-pressed="{str(chosen).lower()}" '
        f'aria-label="{name}"><title>{name}</title>{_bars(scale, point, px, py, x, y)}'
        f'<circle class="reach" cx="{cx:.1f}" cy="{cy:.1f}" r="13"/><circle class="dot" cx="{cx:.1f}" cy="{cy:.1f}" r="5"/></g>'
    )


def _mark(scale: _Scale, point: Point, x: str, y: str, shape: str) -> str:
    cx, cy = scale.at(point.mean[x], point.mean[y])
    outline = {
        "square": "M-5 -5H5V5H-5Z",
        "diamond": "M0 -7L7 0L0 7L-7 0Z",
        "triangle": "M0 -7L7 5H-7Z",
        "cross": "M-2 -6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    }[shape]
    bars = _bars(scale, point, point.mean[x], point.mean[y], x, y)
    return (
        f'<g class="other {shape}"><title>{escape(_described(point.name, point))}</title>{bars}'
        f'<path class="dot" transform="translate({cx:.1f} {cy:.1f})" d="{outline}"/></g>'
    )


def _label(scale: _Scale, px: float, py: float, text: str) -> str:
    """Beside a mark, towards the middle of the plot."""
    cx, cy = scale.at(px, py)
    anchor, dx = ("start", 11) if cx < _WIDTH / 2 else ("end", -11)
    return f'<text class="label" x="{cx + dx:.1f}" y="{cy - 9:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
