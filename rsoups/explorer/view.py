"""The explorer's HTML and SVG, as pure functions: the front with the chosen λ, responses side by side."""

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
_MANY = 12  # soups, from which the style sheet shows one interval at a time
_POWER = 4  # of the distance: so large that the nearest measured soups decide


def axes_of(front: Front) -> list[str]:
    """Names of the axes that a front can have: its rewards, and the λ of each ingredient."""
    return [*front.rewards, *(_lambda_axis(name) for name in front.soups[0].lambdas or {})]


def first_axes(front: Front) -> tuple[str, str]:
    """The first two rewards; one reward over the λ of the last ingredient."""
    if len(front.rewards) > 1:
        return front.rewards[0], front.rewards[1]
    return axes_of(front)[-1], front.rewards[0]


def _lambda_axis(name: str) -> str:
    return f"λ of {name}"


def expected(front: Front, lambdas: Mapping[str, float]) -> dict[str, float]:
    """Expected mean rewards at λ: those of a measured soup, else the average of all, weighted by nearness (Shepard)."""
    soups = np.array([point.weights for point in front.soups])
    distance = np.maximum(np.linalg.norm(soups - list(lambdas.values()), axis=1), 1e-9)
    weights = (distance.min() / distance) ** _POWER
    means = {reward: [point.mean[reward] for point in front.soups] for reward in front.rewards}
    return {reward: float(np.average(values, weights=weights)) for reward, values in means.items()}


def measured(front: Front, lambdas: Mapping[str, float]) -> Point | None:
    """The soup that the sweep measured at this λ, to two digits; None if there is none."""
    for point in front.soups:
        if all(abs(weight - lambdas[name]) < 5e-3 for name, weight in (point.lambdas or {}).items()):
            return point
    return None


def _described(point: Point) -> str:
    name = shares(point.lambdas) if point.lambdas else point.name
    return f"{name}: {point.figures()}"


def shares(lambdas: Mapping[str, float]) -> str:
    """λ in words: ``30% helpful, 70% harmless``."""
    return ", ".join(f"{weight:.0%} {name}" for name, weight in lambdas.items() if weight >= 0.005)


def readout(front: Front, lambdas: Mapping[str, float]) -> str:
    """The chosen λ and its expected rewards."""
    point = measured(front, lambdas)
    means = expected(front, lambdas)
    cells = []
    for reward in front.rewards:
        figure = f"≈ {means[reward]:.2f} <small>between measured λ</small>"
        if point:
            mean = point.estimate(reward)
            interval = "" if mean.low is None else f"{mean.low:.2f} to {mean.high:.2f}"
            figure = f"{mean.value:.2f} <small>{interval}</small>"
        cells.append(f"<div><dt>{escape(reward)}</dt><dd>{figure}</dd></div>")
    return f'<p class="chosen">{escape(shares(lambdas))}</p><dl class="expected">{"".join(cells)}</dl>'


def header(front: Front, names: Sequence[str]) -> str:
    """The title of the page."""
    return (
        f"<h1>{escape(' · '.join(front.rewards))}</h1><p>Soups of {escape(', '.join(names))}, measured on "
        f"{len(front.prompts)} prompts. Choose a trade-off, and read its responses.</p>"
    )


def reading(read: Reading | None, names: Sequence[str], lambdas: Mapping[str, float] | None = None) -> str:
    """Responses at λ, of each ingredient alone and of the base, side by side; empty cards before the first ones."""
    titles = ["This soup", *(f"{name} alone" for name in names), "Base"]
    notes = [shares(lambdas or {}), *("" for _ in names), "no adapter"]
    cards = []
    for i, (title, note) in enumerate(zip(titles, notes, strict=True)):
        kind = "" if i else "chosen"
        cards.append(
            _card(title, note, read.texts[i], kind, i in read.busy) if read else _card(title, note, None, kind)
        )
    columns = len(names) + 1 if len(names) < 4 else 3
    return f'<div class="cards" style="--columns: {columns}">{"".join(cards)}</div>'


def question(pair: Question | None, choice: str | None = None) -> str:
    """Two responses side by side; their λ only once somebody has chosen."""
    if pair is None:
        return '<p class="hint">Two soups answer the same prompt. You choose without knowing which is which.</p>'
    cards = []
    for i, (side, text) in enumerate(zip("ab", pair.texts, strict=True)):
        note = shares(pair.lambdas[i]) if choice else ""
        cards.append(_card(side.upper(), note, text, "chosen" if side == choice else "", pair.busy))
    return f'<p class="asked">{escape(question_of(pair.prompt))}</p><div class="cards two">{"".join(cards)}</div>'


def advice(votes: int, choice: Choice | None) -> str:
    """The λ that the votes suggest, and its certainty."""
    if choice is None:
        return '<p class="hint">No votes yet. A dozen begin to show a preference.</p>'
    after = "1 vote" if votes == 1 else f"{votes} votes"
    certainty = "" if choice.share is None else f" That is {choice.share:.0%} sure, among the soups measured."
    return f"<p>After {after}, <strong>{escape(shares(choice.point.lambdas or {}))}</strong> looks best.{certainty}</p>"


def _card(title: str, note: str, text: str | None, kind: str, busy: bool = False) -> str:
    """A response with its title and note; None if nothing was generated yet."""
    body = escape((text or "").strip())
    if text is not None and not body:
        body = "<em>…</em>" if busy else "<em>nothing: it ended at once</em>"
    return (
        f'<article class="{kind}" aria-busy="{str(busy).lower()}"><h3>{escape(title)}</h3>'
        f"<small>{escape(note)}</small><p>{body}</p></article>"
    )


def plot(front: Front, x: str, y: str, lambdas: Mapping[str, float], advised: Mapping[str, float] | None = None) -> str:
    """The front as SVG: every soup is a button (``data-at`` is its place in ``front.soups``); a ring marks the chosen λ.

    Args:
        front: Front with at least one soup.
        x, y: Two of `axes_of`.
        lambdas: Chosen λ.
        advised: λ that votes suggest.
    """
    places = {point: _place(point.lambdas, {r: point.estimate(r) for r in point.mean}) for point in front.points}
    at = {point: (place[x], place[y]) for point, place in places.items() if x in place and y in place}
    ranges = [limits_of(place[axis] for place in places.values() if axis in place) for axis in (x, y)]
    axes = Axes(_LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, *ranges)
    line = [(at[point][0].value, at[point][1].value) for point in front.soups]
    parts, labels = [f'<g aria-hidden="true">{axes.frame(x, y)}</g>'], []
    if len(front.ingredients) == 2 and len(line) > 1:
        parts += [axes.line([line[0], line[-1]], "chord"), axes.line(line, "line")]

    looks, chosen = looks_of(front), measured(front, lambdas)
    for point in (*front.others, *front.soups):
        if point not in at:
            continue  # only soups have a place on an axis of λ
        number = front.soups.index(point) if point.lambdas else None
        parts.append(_mark(axes, *at[point], looks[point], _described(point), number, point is chosen))
        if point.alone or not point.lambdas:
            labels.append(_label(axes, *at[point], f"{point.alone} alone" if point.alone else point.name))

    for kind, mix in (("advised", advised), ("ring", lambdas)):
        if mix:
            place = _place(mix, {reward: Estimate(mean) for reward, mean in expected(front, mix).items()})
            cx, cy = axes.x(place[x].value), axes.y(place[y].value)
            parts.append(f'<circle class="{kind}" cx="{cx}" cy="{cy}" r="11"/>')
    help_text = escape(f"Front: {y} over {x}. Arrow keys move between soups, Enter chooses one.")
    many = ' class="many"' if len(front.soups) > _MANY else ""
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"{many}'
    return f'<svg {box} role="group" aria-label="{help_text}">{"".join(parts + labels)}</svg>'


def _place(lambdas: Mapping[str, float] | None, rewards: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """The place of a model on every axis."""
    return {**rewards, **{_lambda_axis(name): Estimate(weight) for name, weight in (lambdas or {}).items()}}


def _mark(axes: Axes, x: Estimate, y: Estimate, look: Look, words: str, number: int | None, chosen: bool) -> str:
    """A point with its intervals; the point of a soup is a button."""
    kind = 'role="img"'
    if number is not None:
        kind = f'role="button" data-at="{number}" tabindex="-1" aria-pressed="{str(chosen).lower()}"'
    return (
        f'<g class="mark {look.color}" {kind} aria-label="{escape(words)}"><title>{escape(words)}</title>{axes.bars(x, y)}'
        f'<g transform="translate({axes.x(x.value)},{axes.y(y.value)})"><circle class="reach" r="13"/>'
        f'<path class="dot" d="{SHAPES[look.shape]}"/></g></g>'
    )


def _label(axes: Axes, x: Estimate, y: Estimate, text: str) -> str:
    """A label beside a mark, on the side of the plot's middle."""
    px, py = axes.x(x.value), axes.y(y.value)
    anchor, dx = ("start", 11) if px < _WIDTH / 2 else ("end", -11)
    return f'<text class="label" x="{px + dx:.1f}" y="{py - 9:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
