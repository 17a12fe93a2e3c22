"""The contents of report.html; its markup is in assets/report.html.j2.

Responses of models are untrusted text: the template escapes everything that is not a chart of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
from rsoups.reports.many_rewards import parallel_chart, series_of, spider_chart, ternary_chart
from rsoups.reports.svg import BAND, CHORD, SOUP_LOOK, Look, swatch

_SHOWN_LAMBDAS = (0.0, 0.3, 0.5, 0.7, 1.0)
_SHOWN_PROMPTS = 12
_SHOWN_PAIRS = 6
_SHOWN_CHARACTERS = 300_000  # of all texts together, so that a page stays under 1 MB
_LENGTH = "Of a response. A reward that likes length, and nothing else, shows here."
_EXTRAS = {
    "KL": "Nats per response from the base (k1 estimate). Far above the others', a model has left the base for its reward.",
    "perplexity": "Of the responses under the base, per token. Near 1 the model recites; high, it babbles.",
    "tokens": _LENGTH,
    "words": _LENGTH,
    "distinct-2": "Different pairs of words over all pairs of words. A collapsed model repeats itself and falls towards 0.",
}


@dataclass(frozen=True)
class Figure:
    """Charts with a legend, a caption, and definitions of what they show."""

    charts: list[Markup]
    caption: str
    legend: list[tuple[Markup, str]] = field(default_factory=list)
    note: str = ""
    definitions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Article:
    """A prompt with the records of each model: some are shown without a script, the others unfold, or are chosen by it."""

    question: str
    shown: list[tuple[Point, Mapping[str, Any]]]
    folded: list[tuple[Point, Mapping[str, Any]]]


class Page:
    """The sections of report.html; a method returns None for a section that the front has nothing for."""

    def __init__(
        self,
        front: Front,
        records: Iterable[Mapping[str, Any]],
        others: Mapping[str, Front],
        settings: Mapping[str, Any],
        curve: Sequence[Reach],
    ):
        self._front, self._others, self._settings, self._curve = front, others, settings, curve
        self._models = Models(front)
        self._records: dict[tuple[Any, ...], Mapping[str, Any]] = {}
        for record in records:
            model = model_key(record["name"], record["lambdas"], record["method"])
            self._records.setdefault((model, prompt_key(record["prompt"])), record)  # the first of several samples

    def html(self, sentences: Sequence[str]) -> str:
        """The page, with these sentences on top."""
        front = self._front
        held_out = [name for name in self._settings.get("held_out", []) if name in front.rewards]
        head, rows = figures_of(front)
        assets = Environment(loader=FunctionLoader(asset), autoescape=True, undefined=StrictUndefined)
        assets.trim_blocks = assets.lstrip_blocks = True
        return assets.get_template("report.html.j2").render(
            front=front,
            held_out=held_out,
            prompts=prompts_in_words(front),
            sentences=sentences,
            figures={
                "front": self._fronts(),
                "chord": self._chords(),
                "triangle": self._triangles(),
                "rewards": self._all_rewards(),
                "runs": self._runs(),
                "drift": self._drift(),
            },
            choices=self._choices(),
            legend=front.legend.removeprefix("model (").removesuffix(")"),
            head=head,
            rows=rows,
            articles=self._articles(),
            models=self._models,
            middle=front.soups[len(front.soups) // 2] if front.soups else front.points[-1],
            longest=_SHOWN_CHARACTERS // (_SHOWN_PROMPTS * len(front.points)),
            settings={name: value for name, value in self._settings.items() if name != "command"},
            command=_command(self._settings.get("command")),
        )

    def _fronts(self) -> Figure | None:
        front, looks = self._front, self._models.looks
        pairs = list(combinations(front.rewards, 2))
        if not pairs:
            return None
        legend = [(swatch(looks[point]), point.label) for point in front.others]
        if front.soups:
            numbers = f", numbers: λ of {front.ingredients[1]}" if len(front.ingredients) == 2 else ""
            legend.insert(0, (swatch(SOUP_LOOK), f"soups{numbers}"))
            legend.append((swatch(SOUP_LOOK, hollow=True), "hollow: beaten by another point"))
        if front.has_chord:
            legend.append((CHORD, "chord"))
        if front.has_band:
            legend.append((BAND, f"reach of the {'soups' if front.soups else 'points'} in 95% of draws"))
        for number, name in enumerate(self._others):
            legend.append((swatch(look_of_other_front(number), hollow=True), name))

        shown = pairs[:_SHOWN_PAIRS]
        charts = [front_chart(self._models, x, y, self._others, len(pairs) == 1) for x, y in shown]
        hidden = len(pairs) - len(shown)
        note = f"{hidden} more pairs of rewards are not drawn." if hidden else ""
        return Figure(charts, f"Bars: 95% intervals. Up and right is better.{band_in_words(front)}", legend, note)

    def _chords(self) -> Figure | None:
        front = self._front
        if front.has_chord:
            caption = (
                "Dashed: the ends' rewards, mixed by λ. Below: soup minus chord; hollow where 0 is in the interval."
            )
            return Figure([chord_chart(self._models, reward) for reward in front.rewards], caption)
        ends = sum(point.alone is not None for point in front.soups)
        if len(front.ingredients) < 3 or ends < len(front.ingredients) or len(front.soups) <= ends:
            return None
        caption = (
            "Above the line the soup has more than its ends' rewards mixed; hollow where the line is in the interval."
        )
        return Figure([chord_scatter(self._models, reward) for reward in front.rewards], caption)

    @property
    def _has_triangle(self) -> bool:
        return len(self._front.ingredients) == 3 and len(self._front.soups) >= 4

    def _triangles(self) -> Figure | None:
        if not self._has_triangle:
            return None
        caption = "Each corner is one ingredient alone. Lighter is higher. Ringed: on the Pareto front."
        charts = []
        for reward in self._front.rewards:
            charts.append(ternary_chart(self._models, reward, {p: p.estimate(reward) for p in self._front.soups}))
        return Figure(charts, caption)

    def _all_rewards(self) -> Figure | None:
        front = self._front
        if len(front.rewards) < 3:
            return None
        series = series_of(front)
        highlighted = {entry.point for entry in series}
        left = sum(point not in highlighted for point in front.others)
        caption = (
            "Each reward on its own scale, from the least to the largest of the models drawn. Thin lines: other soups."
        )
        caption += f" {left} more models are in the table." if left else ""
        legend = [(swatch(entry.look), entry.name) for entry in series]
        return Figure([parallel_chart(self._models, series), spider_chart(self._models, series)], caption, legend)

    def _runs(self) -> Figure | None:
        if not self._curve:
            return None
        legend = [
            (swatch(SOUP_LOOK), "soups"),
            (swatch(Look("c1", "diamond")), "MORL, the mean over choices of runs"),
            (CHORD, "MORL, the best choice of runs"),
        ]
        caption = "Some ingredients make any number of soups at the same price; here there are as many as MORL runs."
        return Figure([runs_chart(self._curve)], caption, legend)

    def _drift(self) -> Figure | None:
        front = self._front
        names = [name for name in _EXTRAS if front.soups and all(name in point.extras for point in front.soups)]
        if "tokens" in names:
            names.remove("words")
        legend = []
        if not names:
            return None
        if front.has_chord:
            charts = [lambda_chart(self._models, name) for name in names]
            legend = [(swatch(self._models.looks[point]), point.label) for point in front.others]
        elif self._has_triangle:
            charts = [ternary_chart(self._models, name, {p: p.extras[name] for p in front.soups}) for name in names]
        else:
            return None
        caption = "Reward hacking shows here, not in the rewards."
        return Figure(charts, caption, legend, definitions={name: _EXTRAS[name] for name in names})

    def _choices(self) -> list[tuple[str, Choice]]:
        """Choices by several rules, first of what is above the base, if there is any."""
        front = self._front
        if len(front.soups) < 2:
            return []
        rules: list[tuple[str, Choice]] = []
        with suppress(FrontError):  # without a base, or nothing above it: the sentences say so
            rules.append(("above the base in every reward", front.select(above_base=True)))
        if len(front.rewards) > 1:
            rules.append(("all rewards count alike", front.select(dict.fromkeys(front.rewards, 1.0))))
            rules.append(("the knee, where the front bends", front.select(knee=True)))
        return rules + [(f"most {reward}", front.select(maximize=reward)) for reward in front.rewards]

    def _articles(self) -> list[Article]:
        front = self._front
        if not front.prompts or not self._records:
            return []
        shown = _shown_points(front)
        folded = [point for point in self._models.shown if point not in shown]
        every = max(1, len(front.prompts) // _SHOWN_PROMPTS)
        articles = []
        for prompt in front.prompts[::every][:_SHOWN_PROMPTS]:
            records = {point: self._records[point.key, prompt] for point in self._models.shown}
            question = question_of(records[shown[0]]["prompt"])
            articles.append(Article(question, *([(p, records[p]) for p in points] for points in (shown, folded))))
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
    extras = [name for name in _EXTRAS if any(name in point.extras for point in front.points)]
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
