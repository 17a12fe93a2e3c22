"""Draw inline SVG: axes, lines, and marks that name their figures. Colors are classes of the page's style sheet.

Every mark has its figures in an aria-label and a title, and a shape of its own beside its color. Texts are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rsoups.fronts.estimates import Estimate

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


@dataclass(frozen=True)
class Look:
    """Color class and shape of a model, the same in all charts."""

    color: str
    shape: str


SOUP_LOOK, BASE_LOOK = Look("soup", "circle"), Look("base", "square")


def tag(name: str, *content: str, **attributes: object) -> Markup:
    """An element; texts are escaped, and an underscore in a name becomes a hyphen (``class_`` is ``class``)."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None
    )
    if not content:
        return Markup("<{}{}/>").format(name, written)
    return Markup("<{}{}>{}</{}>").format(name, written, Markup("").join(content), name)


def path(points: Iterable[tuple[float, float]], end: str = "") -> str:
    """The data of a path through points; ``end="Z"`` closes it."""
    return "M" + "L".join(f"{x:.5g},{y:.5g}" for x, y in points) + end


def text(classes: str, x: float, y: float, words: str, anchor: str = "start") -> Markup:
    """A text at a place."""
    return tag("text", words, class_=classes, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def swatch(look: Look, hollow: bool = False) -> Markup:
    """A mark for a legend."""
    classes = f"dot {look.color}" + (" hollow" if hollow else "")
    return _swatch(tag("path", class_=classes, d=SHAPES[look.shape]))


def _swatch(*content: Markup) -> Markup:
    return tag("svg", *content, class_="swatch", viewBox="-8 -8 16 16", aria_hidden="true")


CHORD = _swatch(tag("path", class_="chord", d="M-8,0H8"))
BAND = _swatch(
    tag("path", class_="band soup", d="M-8,-6H8V6H-8Z"),
    tag("path", class_="median soup", d="M-8,0H8"),
)


def chart(width: int, height: int, label: str, body: Iterable[str], classes: str = "") -> Markup:
    """A picture with its alternative text."""
    view = f"0 0 {width} {height}"
    return tag("svg", *body, class_=f"chart {classes}".strip(), viewBox=view, role="group", aria_label=label)


def mark(
    look: Look, x: float, y: float, tip: str, *, model: int | None = None, hollow: bool = False, under: str = ""
) -> Markup:
    """A shape at a place over what is drawn `under` it; marks of one `model` number are highlighted together."""
    shape = tag("path", class_="dot hollow" if hollow else "dot", d=SHAPES[look.shape])
    placed = tag("g", tag("circle", class_="halo", r=11), shape, transform=f"translate({x},{y})")
    return group(f"mark {look.color}", tip, model, under, placed)


def group(classes: str, tip: str, model: int | None, *content: str) -> Markup:
    """Shapes with one alternative text."""
    title = tag("title", tip)
    return tag("g", title, *content, class_=classes, role="img", aria_label=tip, data_model=model)


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

    def frame(self, x_label: str, y_label: str, x_ticks: int = 6, y_ticks: int = 5) -> Markup:
        """Grid, ticks and names; without an `x_label` no figures below. The vertical axis has its name above it."""
        parts = []
        for value in _ticks(self.x_limits, x_ticks):
            parts.append(tag("path", class_="grid", d=f"M{self.x(value)},{self.top}V{self.bottom}"))
            if x_label:
                parts.append(text("tick", self.x(value), self.bottom + 20, _signed(value), "middle"))
        for value in _ticks(self.y_limits, y_ticks):
            parts.append(tag("path", class_="grid", d=f"M{self.left},{self.y(value)}H{self.right}"))
            parts.append(text("tick", self.left - 8, self.y(value) + 4, _signed(value), "end"))
        if x_label:
            parts.append(text("name", self.right, self.bottom + 44, f"{x_label} →", "end"))
        if y_label:
            parts.append(text("name", self.left, self.top - 12, f"↑ {y_label}"))
        return Markup("").join(parts)

    def line(self, points: Iterable[tuple[float, float]], classes: str) -> Markup:
        return tag("path", class_=classes, d=path((self.x(x), self.y(y)) for x, y in points))

    def band(self, at: Sequence[float], estimates: Sequence[Estimate], classes: str) -> Markup:
        """The area between the bounds of intervals; empty without any."""
        rows = [(x, e) for x, e in zip(at, estimates, strict=True) if e.low is not None and e.high is not None]
        if len(rows) < 2:
            return Markup("")
        upper = [(x, e.high) for x, e in rows if e.high is not None]
        lower = [(x, e.low) for x, e in reversed(rows) if e.low is not None]
        return self.line(upper + lower, f"band {classes}")

    def bars(self, x: Estimate, y: Estimate) -> Markup:
        """The intervals of a point, as a cross."""
        data = ""
        if x.low is not None and x.high is not None:
            data += f"M{self.x(x.low)},{self.y(y.value)}H{self.x(x.high)}"
        if y.low is not None and y.high is not None:
            data += f"M{self.x(x.value)},{self.y(y.low)}V{self.y(y.high)}"
        return tag("path", class_="bar", d=data) if data else Markup("")

    def mark(
        self, look: Look, x: Estimate, y: Estimate, tip: str, model: int | None = None, hollow: bool = False
    ) -> Markup:
        """A mark over its intervals."""
        place = self.x(x.value), self.y(y.value)
        return mark(look, *place, tip, model=model, hollow=hollow, under=self.bars(x, y))


def limits_of(estimates: Iterable[Estimate], *more: float) -> Limits:
    """Limits of an axis that hold all intervals, with some room."""
    values = [v for e in estimates for v in (e.value, e.low, e.high) if v is not None] + list(more)
    low, high = min(values), max(values)
    room = (high - low) * 0.07 or max(abs(low), 1.0) * 0.1
    return low - room, high + room


def _ticks(limits: Limits, count: int) -> list[float]:
    """About `count` round numbers between limits."""
    low, high = limits
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _signed(value: float) -> str:
    return f"{value:g}".replace("-", "−")
