"""The front as one self-contained page: report.html, with report.md and front.png beside it.

Pure functions of records; nothing is computed that the records do not hold. Charts are in `charts`, the picture in `plots`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

from rsoups.common.assets import template
from rsoups.common.errors import FrontError
from rsoups.data.prompts import question_of
from rsoups.fronts.advantage import Advantage, Reach
from rsoups.fronts.comparison import Comparison
from rsoups.fronts.estimates import Estimate
from rsoups.fronts.front import MORL, Front
from rsoups.fronts.notes import not_checked, trained_on_of, trained_prompts_of
from rsoups.fronts.points import Choice, Point
from rsoups.fronts.reading import prompt_key
from rsoups.reports.charts import (
    BAND,
    CHORD,
    Look,
    beside_look,
    chord_chart,
    chord_scatter,
    escaped,
    front_chart,
    lambda_chart,
    looks_of,
    parallel_chart,
    runs_chart,
    series_of,
    spider_chart,
    swatch,
    ternary_chart,
    told_of_reach,
)
from rsoups.reports.plots import draw_front

_SHOWN_LAMBDAS = (0.0, 0.3, 0.5, 0.7, 1.0)
_SHOWN_PROMPTS = 12
_SHOWN_PAIRS = 6
_EXTRAS = ("KL", "perplexity", "tokens", "words", "distinct-2")
_TOLD = {
    "KL": "Nats per response from the base (k1 estimate). Far above the others', a model has left the base for its reward.",
    "perplexity": "Of the responses under the base, per token. Near 1 the model recites; high, it babbles.",
    "tokens": "Of a response. A reward that likes length, and nothing else, shows here.",
    "words": "Of a response. A reward that likes length, and nothing else, shows here.",
    "distinct-2": "Different pairs of words over all pairs of words. A collapsed model repeats itself and falls towards 0.",
}


def write_report(
    front: Front,
    records: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    reference: Mapping[str, float] | None = None,
    others: Mapping[str, Front] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write report.html (no external reference), report.md and, where matplotlib is installed, front.png.

    Args:
        front: Of the same records.
        records: For the texts.
        folder: Made if it is not there.
        reference: Of hypervolumes, by reward; without it none is told.
        others: Further fronts of the same rewards by name, drawn and compared.
        settings: How the records were made; by default ``records.settings.json`` in `folder`, where a sweep leaves it.

    Returns:
        What the report says in words, a sentence each.

    Raises:
        FrontError: Other fronts of other rewards or prompts, or a reference that is none.
    """
    others, folder = dict(others or {}), Path(folder)
    beside = folder / "records.settings.json"
    if settings is None and beside.is_file():
        settings = json.loads(beside.read_text(encoding="utf-8"))
    front.trained_on |= trained_on_of(settings or {})
    front.trained_prompts |= trained_prompts_of(settings or {})
    found = _advantage(front, reference) if reference is not None else None
    told = _sentences(front, reference, others, found)
    folder.mkdir(parents=True, exist_ok=True)
    if find_spec("matplotlib") is None:
        told.append(
            "front.png is not drawn: that needs matplotlib (pip install 'rsoups[report]'), then run rsoups report."
        )
    else:
        draw_front(front).savefig(folder / "front.png", dpi=160)
    curve = found.curve if isinstance(found, Advantage) else ()
    page = _Page(front, _texts(records), others, settings or {}, curve)
    (folder / "report.md").write_text(_markdown(front, told), encoding="utf-8")
    (folder / "report.html").write_text(page.html(told), encoding="utf-8")
    return told


def sentences(front: Front, reference: Mapping[str, float] | None, others: Mapping[str, Front]) -> list[str]:
    """What there is to say, in words with figures: the chord, hypervolume, MORL, other fronts, the choice of λ."""
    return _sentences(front, reference, others, None if reference is None else _advantage(front, reference))


def _sentences(
    front: Front,
    reference: Mapping[str, float] | None,
    others: Mapping[str, Front],
    advantage: Advantage | str | None,
) -> list[str]:
    found = _chord_sentences(front)
    if reference is not None:
        found.append(f"Hypervolume of the {'soups' if front.soups else 'points'}: {front.hypervolume(reference)}.")
        if advantage is not None:
            found.append(advantage if isinstance(advantage, str) else _advantage_sentence(front, advantage))
        found += [_against(name, front.compare(other, reference)) for name, other in others.items()]
    found += _choice_sentences(front)
    return found + list(filter(None, [not_checked(front)]))


def _against(name: str, result: Comparison) -> str:
    return (
        f"Against {name} ({result.prompts or 'no'} common prompts): {result.gain} more hypervolume; IGD+ to its "
        f"front {result.igd_plus[0]}, of it to this front {result.igd_plus[1]}; {result.coverage[0].value:.0%} of its "
        f"points are equalled or beaten here, {result.coverage[1].value:.0%} of these by it."
    )


def _advantage(front: Front, reference: Mapping[str, float]) -> Advantage | str | None:
    """Soups against MORL; a sentence where they cannot be compared, and nothing where there is no MORL run."""
    if not front.soups or not any(point.name.lower().startswith(MORL.lower()) for point in front.others):
        return None
    try:
        return front.advantage(reference, with_ends=len(_alone(front)) == len(front.ingredients))
    except FrontError as error:
        if set(reference) != set(front.rewards):
            raise
        return f"Soups are not compared with MORL: {error}."


def _advantage_sentence(front: Front, found: Advantage) -> str:
    with_ends = len(found.places) > sum(point.name.lower().startswith(MORL.lower()) for point in front.others)
    counted = ", the ingredients among them" if with_ends else ""
    places = ", ".join(front.soups[place].label for place in found.places)
    told = [
        f"Soups less MORL in hypervolume, {len(found.places)} points each: {found.gain}{_verdict(found.gain)}; "
        f"soups at {places} ({found.runs[0]} runs), MORL ({found.runs[1]} runs{counted})."
    ]
    if found.utility and found.utility_of_all:
        told.append(
            "Expected utility over all preferences, the point chosen on one half of the prompts and told on the other: these "
            f"soups less MORL {found.utility}{_verdict(found.utility)}; all {len(front.soups)} soups less MORL "
            f"{found.utility_of_all}{_verdict(found.utility_of_all)}."
        )
    soups = ", ".join(f"{reach.soups.value:.3f} with {reach.runs}" for reach in found.curve if reach.soups)
    others = ", ".join(
        f"{reach.others.value:.3f} (at best {reach.best:.3f}) with {reach.runs}"
        for reach in found.curve
        if reach.others
    )
    told.append(f"Hypervolume by PPO runs: soups {soups}; MORL, the mean over choices of runs, {others}.")
    return " ".join(told)


def _verdict(gain: Estimate) -> str:
    if gain.low is None:
        return ""
    return " (more)" if gain.is_above_zero else " (less)" if gain.is_below_zero else " (no clear difference)"


def _choice_sentences(front: Front) -> list[str]:
    """Which soup to take where nothing else is known: what is above the base in every reward."""
    if front.base is None or not front.soups:
        return []
    try:
        return [f"Best soup above the base: {front.select(above_base=True)}."]
    except FrontError as error:
        return [f"{str(error)[0].upper()}{str(error)[1:]}."]


def _chord_sentences(front: Front) -> list[str]:
    """What each reward does between the ends, against the chord."""
    try:
        rows = front.linear_mode_connectivity()
    except FrontError:
        return []
    inner = [gaps for point, gaps in rows if max((point.lambdas or {}).values()) < 1]
    out = []
    for reward in front.rewards if inner else []:
        above = sum(gaps[reward].is_above_zero for gaps in inner)
        below = sum(gaps[reward].is_below_zero for gaps in inner)
        mean = sum(gaps[reward].value for gaps in inner) / len(inner)
        sure = (
            f"; above it with 95% confidence at {above} of {len(inner)} λ, below it at {below}" if front.prompts else ""
        )
        out.append(f"{reward}: between the ends the soups are {mean:+.3f} from the chord on average{sure}.")
    return out


def _texts(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Records by model and prompt, the first of each."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        key = _key(record["name"], record["lambdas"], record["method"])
        found.setdefault(key, {}).setdefault(prompt_key(record["prompt"]), record)
    return found


def _key(name: str, lambdas: Mapping[str, float] | None, method: str | None) -> str:
    return f"{name} {sorted((lambdas or {}).items())} {method}"


def _kept(front: Front) -> list[Point]:
    """Whose texts are read without a script: the base, λ of the second ingredient 0, .3, .5, .7, 1; else ends and middle."""
    base = [] if front.base is None else [front.base]
    soups = front.soups
    if not soups:
        return front.points[:5]
    if len(front.ingredients) == 2:
        return base + list(dict.fromkeys(_nearest(soups, wanted) for wanted in _SHOWN_LAMBDAS))
    even = min(soups, key=lambda p: max((p.lambdas or {}).values()))
    ends = _alone(front)
    return base + [*ends, *([even] if even not in ends else [])]


def _alone(front: Front) -> list[Point]:
    return [point for point in front.soups if max((point.lambdas or {}).values()) == 1]


def _nearest(soups: Sequence[Point], wanted: float) -> Point:
    return min(soups, key=lambda point: abs(list((point.lambdas or {}).values())[1] - wanted))


def _table(front: Front) -> tuple[list[str], list[list[str]]]:
    pareto, shares = set(front.pareto()), front.pareto_shares()
    extras = [name for name in _EXTRAS if any(name in point.extras for point in front.points)]
    rows = []
    for point in [*front.others, *front.soups]:
        share = "" if shares is None else f" ({shares[front.points.index(point)]:.0%})"
        figures = [str(point.estimate(reward)) for reward in front.rewards]
        figures += [str(point.extras.get(name, "")) for name in extras]
        rows.append([point.label, *figures, ("yes" if point in pareto else "no") + share])
    return [front.legend, *front.rewards, *extras, "Pareto"], rows


def _markdown(front: Front, told: Sequence[str]) -> str:
    head, rows = _table(front)
    lines = ["# Front", "", "![The front](front.png)", "", *(f"**{note}**\n" for note in front.notes)]
    lines += ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", f"{_how_many(front)} Every reward is maximized.", ""]
    lines += [f"- {sentence}" for sentence in told]
    return "\n".join(lines) + "\n"


def _how_many(front: Front) -> str:
    if not front.prompts:
        return "Means from elsewhere, no prompts."
    return f"{len(front.prompts)} prompts; intervals: 95% bootstrap over prompts, the same draws for every model."


class _Page:
    """The sections of report.html, each a piece of HTML or nothing."""

    def __init__(
        self,
        front: Front,
        texts: Mapping[str, Mapping[str, Mapping[str, Any]]],
        others: Mapping[str, Front],
        settings: Mapping[str, Any],
        curve: Sequence[Reach],
    ):
        self._curve = curve
        self._front, self._texts, self._others, self._settings = front, texts, others, settings
        self._shown = [*front.others, *front.soups]
        self._models = {point: number for number, point in enumerate(self._shown)}

    def html(self, told: Sequence[str]) -> str:
        front = self._front
        sections = [
            ("front", "The front", self._fronts()),
            ("chord", "Against the chord", self._chords()),
            ("triangle", "Over the triangle of λ", self._triangles()),
            ("rewards", "All rewards at once", self._all_rewards()),
            ("runs", "Against the number of runs", self._runs()),
            ("drift", "Drift from the base", self._drift()),
            ("choices", "Which λ?", self._choices()),
            ("figures", "Figures", self._figures()),
            ("texts", "The same prompt at every λ", self._articles()),
            ("made", "How it was made", self._made()),
        ]
        held_out = [name for name in self._settings.get("held_out", []) if name in front.rewards]
        apart = f" No run was trained on {', '.join(held_out)}." if held_out else ""
        return template("report.html").substitute(
            rewards=escaped(", ".join(front.rewards)),
            lead=escaped(f"{_how_many(front)} Every reward is maximized: higher is better.{apart}"),
            notes="".join(f'<p class="notice">{escaped(note)}</p>' for note in front.notes),
            told="".join(f"<li>{escaped(sentence)}</li>" for sentence in told),
            links="".join(f'<a href="#{name}">{escaped(title)}</a>' for name, title, body in sections if body),
            sections="\n".join(
                f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escaped(title)}</h2>\n{body}</section>'
                for name, title, body in sections
                if body
            ),
        )

    def _fronts(self) -> str:
        front = self._front
        pairs = list(combinations(front.rewards, 2))
        charts = [
            front_chart(front, x, y, self._models, self._others, len(pairs) == 1) for x, y in pairs[:_SHOWN_PAIRS]
        ]
        if not charts:
            return ""
        looks = looks_of(front)
        keys = [(swatch(looks[p]), p.label) for p in front.others]
        if front.soups:
            weighed = f", numbers: λ of {front.ingredients[1]}" if len(front.ingredients) == 2 else ""
            keys.insert(0, (swatch(looks[front.soups[0]]), f"soups{weighed}"))
            keys.append((swatch(looks[front.soups[0]], hollow=True), "hollow: beaten by another point"))
        if front.has_chord:
            keys.append((CHORD, "chord"))
        if front.has_band:
            keys.append((BAND, f"reach of the {'soups' if front.soups else 'points'} in 95% of draws"))
        for number, name in enumerate(self._others):
            keys.append((swatch(beside_look(number), hollow=True), name))
        left = len(pairs) - len(charts)
        note = f'<p class="note">{left} more pairs of rewards are not drawn.</p>' if left > 0 else ""
        caption = f"Bars: 95% intervals. Up and right is better.{told_of_reach(front)}"
        return _figure(charts, caption, keys) + note

    def _chords(self) -> str:
        front = self._front
        if front.has_chord:
            charts = [chord_chart(front, reward, self._models) for reward in front.rewards]
            text = "Dashed: the ends' rewards, mixed by λ. Below: soup less chord; hollow where 0 is in the interval."
            return _figure(charts, text)
        try:
            if len(front.ends) < 2 or len(front.soups) <= len(front.ends):
                return ""
        except FrontError:
            return ""
        charts = [chord_scatter(front, reward, self._models) for reward in front.rewards]
        text = (
            "Above the line the soup has more than its ends' rewards mixed; hollow where the line is in the interval."
        )
        return _figure(charts, text)

    def _triangles(self) -> str:
        front = self._front
        if len(front.ingredients) != 3 or len(front.soups) < 4:
            return ""
        charts = [
            ternary_chart(front, reward, lambda p, reward=reward: p.estimate(reward), self._models)  # type: ignore[misc]
            for reward in front.rewards
        ]
        return _figure(charts, "Each corner is one ingredient alone. Lighter is higher. Ringed: on the Pareto front.")

    def _all_rewards(self) -> str:
        front = self._front
        if len(front.rewards) < 3:
            return ""
        series = series_of(front)
        charts = [parallel_chart(front, series, self._models), spider_chart(front, series, self._models)]
        keys = [(swatch(entry.look), entry.name) for entry in series]
        left = sum(point not in {entry.point for entry in series} for point in front.others)
        text = "Each reward on its own scale, from the least to the largest of the models drawn; thin lines: the other soups."
        text += f" {left} more models are in the table." if left else ""
        return _figure(charts, text, keys)

    def _runs(self) -> str:
        if not self._curve:
            return ""
        keys = [
            (swatch(Look("soup", "circle")), "soups"),
            (swatch(Look("c1", "diamond")), "MORL, the mean over choices of runs"),
        ]
        keys.append((CHORD, "MORL, the best choice of runs"))
        return _figure(
            [runs_chart(self._curve)],
            "Soups of some ingredients have any number of points for the price of these; here as many as there are MORL runs.",
            keys,
        )

    def _drift(self) -> str:
        front = self._front
        names = [name for name in _EXTRAS if front.soups and all(name in point.extras for point in front.soups)]
        if "tokens" in names:
            names.remove("words")
        if front.has_chord:
            charts = [lambda_chart(front, name, self._models) for name in names]
        elif len(front.ingredients) == 3 and len(front.soups) >= 4:
            charts = [
                ternary_chart(front, name, lambda p, name=name: p.extras.get(name), self._models)  # type: ignore[misc]
                for name in names
            ]
        else:
            return ""
        looks = looks_of(front)
        keys = [(swatch(looks[p]), p.label) for p in front.others] if front.has_chord else []
        told = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(_TOLD[name])}</dd></div>" for name in names)
        caption = "Reward hacking shows here, not in the rewards."
        return _figure(charts, caption, keys) + f'<dl class="note">{told}</dl>'

    def _choices(self) -> str:
        front = self._front
        if len(front.soups) < 2:
            return ""
        rows = []
        for words, choice in self._rules():
            sure = ("" if share is None else f"{share:.0%}" for share in (choice.share, choice.above_base))
            cells = [choice.point.label, *sure]
            figures = [str(choice.point.estimate(reward)) for reward in front.rewards]
            behind = [reward for reward in front.rewards if reward in choice.behind]
            mark = f" <small>not above the base: {escaped(', '.join(behind))}</small>" if behind else ""
            rows.append(
                f'<tr><th scope="row">{escaped(words)}</th><td>{escaped(cells[0])}{mark}</td>'
                f"{''.join(f'<td>{cell}</td>' for cell in cells[1:])}{''.join(map(_cell, figures))}</tr>"
            )
        legend = front.legend.removeprefix("model (").removesuffix(")")
        head = ["if", legend, "same choice in", "above the base in", *front.rewards]
        note = (
            "“Same choice in”: the share of bootstrap draws over prompts that choose this λ. “Above the base in”: the share in "
            "which it is above the base in every reward. <code>rsoups select</code> takes weights, limits and votes."
        )
        return _scrolled("Choices of λ", head, "".join(rows)) + f'<p class="note">{note}</p>'

    def _rules(self) -> list[tuple[str, Choice]]:
        """Choices by some rules, what is above the base first, where there is something."""
        front = self._front
        rules: list[tuple[str, Choice]] = []
        with suppress(FrontError):  # no base, or nothing above it: the sentences tell it
            rules.append(("above the base in every reward", front.select(above_base=True)))
        if len(front.rewards) > 1:
            rules.append(("all rewards count alike", front.select(dict.fromkeys(front.rewards, 1.0))))
            rules.append(("the knee, where the front bends", front.select(knee=True)))
        return rules + [(f"most {reward}", front.select(maximize=reward)) for reward in front.rewards]

    def _figures(self) -> str:
        head, rows = _table(self._front)
        cells = "".join(
            f'<tr><th scope="row">{escaped(row[0])}</th>{"".join(_cell(cell) for cell in row[1:])}</tr>' for row in rows
        )
        note = (
            ""
            if not self._front.prompts
            else "In parentheses: the share of bootstrap draws in which the point is on the Pareto front."
        )
        return _scrolled("All models", head, cells) + f'<p class="note">{note}</p>'

    def _articles(self) -> str:
        front = self._front
        if not front.prompts or not self._texts:
            return ""
        kept = _kept(front)
        fixed = [p for p in (front.base, *(_alone(front) if len(front.ingredients) < 5 else [])) if p is not None]
        middle = front.soups[len(front.soups) // 2] if front.soups else front.points[-1]
        options = "".join(
            f'<option value="{number}"{" selected" if point is middle else ""}>{escaped(point.label)}</option>'
            for point, number in self._models.items()
        )
        slider = ""
        if front.has_chord:
            first = self._models[front.soups[0]]
            slider = (
                f'<input type="range" id="slide" min="{first}" max="{first + len(front.soups) - 1}" step="1" '
                f'value="{self._models[middle]}" aria-label="λ of {escaped(front.ingredients[1])}">'
            )
        weighed = f" <small>λ: {escaped(' / '.join(front.ingredients))}</small>" if front.ingredients else ""
        bar = (
            f'<div class="chooser" hidden><label for="model">Read the texts of{weighed}</label>'
            f'<select id="model">{options}</select>{slider}</div>'
        )
        articles = [
            self._article(prompt, kept, fixed)
            for prompt in front.prompts[:: max(1, len(front.prompts) // _SHOWN_PROMPTS)][:_SHOWN_PROMPTS]
        ]
        return bar + "\n".join(articles)

    def _article(self, prompt: str, kept: Sequence[Point], fixed: Sequence[Point]) -> str:
        """A prompt with its texts: the kept ones are read without a script, the others unfolded, or chosen by it."""

        def column(point: Point) -> str:
            record = self._texts[_key(point.name, point.lambdas, point.method)][prompt]
            scores = "".join(
                f"<span>{escaped(name)} {'none' if score is None else format(score, '.2f')}</span>"
                for name, score in sorted(record["rewards"].items())
            )
            text = escaped(record["response"]) if record["response"].strip() else "<em>empty</em>"
            stays = "" if point not in fixed else f' data-fixed="{0 if point is self._front.base else 2}"'
            label = f'<h4 data-model="{self._models[point]}"{stays}>{escaped(self._named(point))}</h4>'
            return f'<div class="text">{label}<p>{text}</p><small>{scores}</small></div>'

        rest = [point for point in self._shown if point not in kept]
        more = "".join(column(point) for point in rest)
        more = (
            f'<details><summary>{len(rest)} other models</summary><div class="row">{more}</div></details>'
            if rest
            else ""
        )
        row = "".join(column(point) for point in kept)
        first = self._shown[0]
        asked = self._texts[_key(first.name, first.lambdas, first.method)][prompt]["prompt"]
        return f'<article><h3>{escaped(question_of(asked))}</h3><div class="row">{row}</div>{more}</article>'

    def _named(self, point: Point) -> str:
        """The label, with the ingredient's name at the ends."""
        alone = [name for name, weight in (point.lambdas or {}).items() if weight == 1]
        return f"{alone[0]} alone" if alone else point.label

    def _made(self) -> str:
        settings = dict(self._settings)
        if not settings:
            return ""
        command = settings.pop("command", None)
        if isinstance(command, list):
            command = " ".join(map(str, command))
        shown = f'<pre tabindex="0"><code>{escaped(command)}</code></pre>' if command else ""
        return shown + _definitions(settings)


def _definitions(values: Mapping[str, Any]) -> str:
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            told = _definitions(value) if value else "none"
        elif isinstance(value, (list, tuple)):
            told = escaped(", ".join(map(str, value))) or "none"
        else:
            told = escaped(value)
        rows.append(f"<div><dt>{escaped(str(name).replace('_', ' '))}</dt><dd>{told}</dd></div>")
    return f"<dl>{''.join(rows)}</dl>"


def _cell(text: str) -> str:
    """A figure, what is in brackets after it in smaller type."""
    figure, space, rest = text.partition(" ")
    return f"<td>{escaped(figure)}{space}{f'<small>{escaped(rest)}</small>' if rest else ''}</td>"


def _figure(charts: Sequence[str], caption: str, keys: Sequence[tuple[str, str]] = ()) -> str:
    legend = "".join(f"<li>{mark}{escaped(name)}</li>" for mark, name in keys)
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    return f'<figure>{legend}<div class="charts">{"".join(charts)}</div><figcaption>{escaped(caption)}</figcaption></figure>'


def _scrolled(name: str, head: Sequence[str], rows: str) -> str:
    """A table that scrolls sideways by itself where the page is narrow."""
    cells = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)
    return (
        f'<div class="scroll" role="region" aria-label="{escaped(name)}" tabindex="0"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
