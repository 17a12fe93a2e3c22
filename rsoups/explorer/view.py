"""What the explorer shows, as HTML and SVG: the front with the chosen λ on it, texts side by side. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from rsoups.data.prompts import question_of
from rsoups.explorer.tasting import Question, Reading
from rsoups.fronts.estimates import Estimate
from rsoups.fronts.front import Front
from rsoups.fronts.points import Choice, Point
from rsoups.reports.charts import looks_of
from rsoups.reports.svg import SHAPES, Axes, Look, limits_of

_WIDTH, _HEIGHT = 460, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 34, 54
_MANY = 12  # soups
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


def _described(point: Point) -> str:
    name = shares(point.lambdas) if point.lambdas else point.name
    return f"{name}: " + ", ".join(f"{reward} {point.estimate(reward)}" for reward in point.mean)


def shares(lambdas: Mapping[str, float]) -> str:
    """λ in words: ``30% helpful, 70% harmless``."""
    return ", ".join(f"{100 * x:.0f}% {name}" for name, x in lambdas.items() if x >= 0.005)


def readout(front: Front, lambdas: Mapping[str, float]) -> str:
    """The chosen λ, and what to expect of it."""
    point = measured(front, lambdas)
    mean = point.mean if point else expected(front, lambdas)
    cells = []
    for reward in front.rewards:
        figure = f"≈ {mean[reward]:.2f} <small>between measured λ</small>"
        if point:
            found = point.estimate(reward)
            interval = "" if found.low is None else f"{found.low:.2f} to {found.high:.2f}"
            figure = f"{found.value:.2f} <small>{interval}</small>"
        cells.append(f"<div><dt>{escape(reward)}</dt><dd>{figure}</dd></div>")
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
    places = {point: _place(point.lambdas, {r: point.estimate(r) for r in point.mean}) for point in front.points}
    at = {point: (place[x], place[y]) for point, place in places.items() if x in place and y in place}
    ranges = [limits_of(place[a] for place in places.values() if a in place) for a in (x, y)]
    axes = Axes(_LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, *ranges)
    line = [(at[point][0].value, at[point][1].value) for point in front.soups]
    parts, labels = [f'<g aria-hidden="true">{axes.frame(x, y)}</g>'], []
    if len(front.ingredients) == 2 and len(line) > 1:
        parts += [axes.line([line[0], line[-1]], "chord"), axes.line(line, "line")]
    looks, chosen = looks_of(front), measured(front, lambdas)
    for point in [p for p in (*front.others, *front.soups) if p in at]:
        number = front.soups.index(point) if point.lambdas else None
        parts.append(_mark(axes, *at[point], looks[point], _described(point), number, point is chosen))
        alone = [f"{name} alone" for name, weight in (point.lambdas or {}).items() if weight == 1]
        if alone or not point.lambdas:
            labels.append(_label(axes, *at[point], alone[0] if alone else point.name))
    for kind, where in (("advised", advised), ("ring", lambdas)):
        if where:
            place = _place(where, {r: Estimate(mean) for r, mean in expected(front, where).items()})
            cx, cy = axes.x(place[x].value), axes.y(place[y].value)
            parts.append(f'<circle class="{kind}" cx="{cx}" cy="{cy}" r="11"/>')
    told = escape(f"Front: {y} over {x}. Arrow keys move between soups, Enter chooses one.")
    many = ' class="many"' if len(front.soups) > _MANY else ""  # their intervals show one at a time
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}"{many} role="group" aria-label="{told}">{"".join(parts + labels)}</svg>'
    )


def _place(lambdas: Mapping[str, float] | None, rewards: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Where something is on every axis."""
    return {**rewards, **{_lambda_axis(name): Estimate(share) for name, share in (lambdas or {}).items()}}


def _mark(axes: Axes, x: Estimate, y: Estimate, look: Look, told: str, number: int | None, chosen: bool) -> str:
    """A point with its intervals; a soup is a button."""
    kind = 'role="img"'
    if number is not None:
        kind = f'role="button" data-at="{number}" tabindex="-1" aria-pressed="{str(chosen).lower()}"'
    return (
        f'<g class="mark {look.color}" {kind} aria-label="{escape(told)}"><title>{escape(told)}</title>{axes.bars(x, y)}'
        f'<g transform="translate({axes.x(x.value)},{axes.y(y.value)})"><circle class="reach" r="13"/>'
        f'<path class="dot" d="{SHAPES[look.shape]}"/></g></g>'
    )


def _label(axes: Axes, x: Estimate, y: Estimate, text: str) -> str:
    """Beside a mark, towards the middle of the plot."""
    px, py = axes.x(x.value), axes.y(y.value)
    anchor, dx = ("start", 11) if px < _WIDTH / 2 else ("end", -11)
    return f'<text class="label" x="{px + dx:.1f}" y="{py - 9:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
