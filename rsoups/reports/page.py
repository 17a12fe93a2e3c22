"""The contents of report.html; its markup and most of its words are in assets/report.html.j2.

Responses of models are untrusted text: the template escapes everything that is not a chart of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from rsoups.common.assets import asset
from rsoups.common.errors import FrontError
from rsoups.data.prompts import question_of
from rsoups.fronts.advantage import Reach
from rsoups.fronts.front import Front
from rsoups.fronts.points import Choice, Point, model_key
from rsoups.fronts.reading import prompt_key
from rsoups.reports.charts import (
    Models,
    band_in_words,
    chord_chart,
    chord_scatter,
    front_chart,
    lambda_chart,
    look_of_other_front,
    runs_chart,
)
from rsoups.reports.many_rewards import Series, parallel_chart, series_of, spider_chart, ternary_chart
from rsoups.reports.svg import BAND, CHORD, SOUP_LOOK, Look, swatch

EXTRAS = ("KL", "perplexity", "tokens", "words", "distinct-2")  # in the order of tables and charts
_SHOWN_LAMBDAS = (0.0, 0.3, 0.5, 0.7, 1.0)
_SHOWN_PROMPTS = 12
_SHOWN_PAIRS = 6
_SHOWN_CHARACTERS = 300_000  # of all texts together, so that a page stays under 1 MB
Legend = list[tuple[Markup, str]]
Record = Mapping[str, Any]


def page_of(
    front: Front,
    records: Iterable[Record],
    others: Mapping[str, Front],
    settings: Mapping[str, Any],
    curve: Sequence[Reach],
    sentences: Sequence[str],
) -> str:
    """The page as HTML; `curve` is hypervolume by the number of runs, empty without MORL runs."""
    models = Models(front)
    extras = [name for name in EXTRAS if front.soups and all(name in point.extras for point in front.soups)]
    if "tokens" in extras:
        extras.remove("words")
    held_out = settings.get("held_out")
    held_out = held_out if isinstance(held_out, list) else []
    series = series_of(front)
    highlighted = {entry.point for entry in series}
    head, rows = figures_of(front)
    assets = Environment(
        loader=FunctionLoader(asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return assets.get_template("report.html.j2").render(
        front=front,
        models=models,
        sentences=sentences,
        prompts=prompts_in_words(front),
        held_out=[reward for reward in front.rewards if reward in held_out],
        charts=_charts(models, others, series, curve, extras),
        legends=_legends(models, others, series),
        band=band_in_words(front),
        hidden_pairs=max(0, len(front.rewards) * (len(front.rewards) - 1) // 2 - _SHOWN_PAIRS),
        hidden_models=sum(point not in highlighted for point in front.others),
        extras=extras,
        choices=_choices(front),
        head=head,
        rows=rows,
        articles=_articles(models, records),
        middle=front.soups[len(front.soups) // 2] if front.soups else front.points[-1],
        longest=_SHOWN_CHARACTERS // (_SHOWN_PROMPTS * len(front.points)),
        settings={name: value for name, value in settings.items() if name != "command"},
        command=_command(settings.get("command")),
    )


def _charts(
    models: Models,
    others: Mapping[str, Front],
    series: Sequence[Series],
    curve: Sequence[Reach],
    extras: Sequence[str],
) -> dict[str, list[Markup]]:
    """The charts of each section; an empty list where the front has nothing for it."""
    front = models.front
    pairs = list(combinations(front.rewards, 2))
    charts: dict[str, list[Markup]] = dict.fromkeys(("chord", "triangle", "rewards", "runs", "drift"), [])
    charts["front"] = [front_chart(models, x, y, others, len(pairs) == 1) for x, y in pairs[:_SHOWN_PAIRS]]

    ends = sum(point.alone is not None for point in front.soups)
    if front.has_chord:
        charts["chord"] = [chord_chart(models, reward) for reward in front.rewards]
        charts["drift"] = [lambda_chart(models, name) for name in extras]
    elif 2 < len(front.ingredients) == ends < len(front.soups):
        charts["chord"] = [chord_scatter(models, reward) for reward in front.rewards]
    if len(front.ingredients) == 3 and len(front.soups) > 3:
        figures = {reward: {point: point.estimate(reward) for point in front.soups} for reward in front.rewards}
        charts["triangle"] = [ternary_chart(models, reward, figures[reward]) for reward in front.rewards]
        drift = {name: {point: point.extras[name] for point in front.soups} for name in extras}
        charts["drift"] = [ternary_chart(models, name, drift[name]) for name in extras]

    if len(front.rewards) > 2:
        charts["rewards"] = [parallel_chart(models, series), spider_chart(models, series)]
    if curve:
        charts["runs"] = [runs_chart(curve)]
    return charts


def _legends(models: Models, others: Mapping[str, Front], series: Sequence[Series]) -> dict[str, Legend]:
    """What the marks of each section's charts are."""
    front = models.front
    other_models = [(swatch(models.looks[point]), point.label) for point in front.others]
    marks = list(other_models)
    if front.soups:
        numbers = f", numbers: λ of {front.ingredients[1]}" if len(front.ingredients) == 2 else ""
        marks.insert(0, (swatch(SOUP_LOOK), f"soups{numbers}"))
        marks.append((swatch(SOUP_LOOK, hollow=True), "hollow: beaten by another point"))
    if front.has_chord:
        marks.append((CHORD, "chord"))
    if front.has_band:
        marks.append((BAND, f"reach of the {'soups' if front.soups else 'points'} in 95% of draws"))
    for number, name in enumerate(others):
        marks.append((swatch(look_of_other_front(number), hollow=True), name))
    runs = [
        (swatch(SOUP_LOOK), "soups"),
        (swatch(Look("c1", "diamond")), "MORL, the mean over choices of runs"),
        (CHORD, "MORL, the best choice of runs"),
    ]
    rewards = [(swatch(entry.look), entry.name) for entry in series]
    drift = other_models if front.has_chord else []
    return {"front": marks, "chord": [], "triangle": [], "rewards": rewards, "runs": runs, "drift": drift}


def _choices(front: Front) -> list[tuple[str, Choice]]:
    """Choices by several rules, first of what is above the base, if there is any."""
    if len(front.soups) < 2:
        return []
    rules: list[tuple[str, Choice]] = []
    with suppress(FrontError):  # without a base, or nothing above it: the sentences say so
        rules.append(("above the base in every reward", front.select(above_base=True)))
    if len(front.rewards) > 1:
        rules.append(("all rewards count alike", front.select(dict.fromkeys(front.rewards, 1.0))))
        rules.append(("the knee, where the front bends", front.select(knee=True)))
    return rules + [(f"most {reward}", front.select(maximize=reward)) for reward in front.rewards]


def _articles(models: Models, records: Iterable[Record]) -> list[dict[str, Any]]:
    """Prompts, each with the records of its models: some are shown without a script, the others unfold, or it chooses one."""
    front = models.front
    by_model: dict[tuple[Any, ...], Record] = {}
    for record in records:
        model = model_key(record["name"], record["lambdas"], record["method"])
        by_model.setdefault((model, prompt_key(record["prompt"])), record)  # the first of several samples
    if not front.prompts or not by_model:
        return []
    shown = _shown_points(front)
    folded = [point for point in models.shown if point not in shown]
    every = max(1, len(front.prompts) // _SHOWN_PROMPTS)
    articles = []
    for prompt in front.prompts[::every][:_SHOWN_PROMPTS]:
        responses = {point: by_model[point.key, prompt] for point in models.shown}
        question = question_of(responses[shown[0]]["prompt"])
        articles.append({"question": question, "responses": responses, "shown": shown, "folded": folded})
    return articles


def _shown_points(front: Front) -> list[Point]:
    """Models whose texts are shown without a script: the base and some soups.

    Of two ingredients the soups nearest to λ = 0, .3, .5, .7, 1 of the second; of more, the ends and the one in the middle.
    """
    if not front.soups:
        return front.points[:5]
    if len(front.ingredients) == 2:
        soups = [min(front.soups, key=lambda point: abs(point.weights[1] - wanted)) for wanted in _SHOWN_LAMBDAS]
    else:
        soups = [point for point in front.soups if point.alone]
        soups.append(min(front.soups, key=lambda point: max(point.weights)))
    return list(dict.fromkeys(([front.base] if front.base else []) + soups))


def _command(command: Any) -> str:
    return " ".join(map(str, command)) if isinstance(command, list) else str(command or "")


def figures_of(front: Front) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of all models: rewards, extras, and whether a point is on the Pareto front."""
    pareto, shares = set(front.pareto()), front.pareto_shares()
    extras = [name for name in EXTRAS if any(name in point.extras for point in front.points)]
    rows = []
    for point in [*front.others, *front.soups]:
        share = "" if shares is None else f" ({shares[front.points.index(point)]:.0%})"
        figures = [str(point.estimate(reward)) for reward in front.rewards]
        figures += [str(point.extras.get(name, "")) for name in extras]
        rows.append([point.label, *figures, ("yes" if point in pareto else "no") + share])
    return [front.legend, *front.rewards, *extras, "Pareto"], rows


def prompts_in_words(front: Front) -> str:
    """The number of prompts, and how intervals are made."""
    if not front.prompts:
        return "Means from elsewhere, no prompts."
    return f"{len(front.prompts)} prompts; intervals: 95% bootstrap over prompts, the same draws for every model."
