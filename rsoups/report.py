"""The front as a picture and as one self-contained page: front.png, report.html, report.md.

Pure functions of records; nothing is computed that the records do not hold.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups._errors import FrontError
from rsoups._resources import template
from rsoups.front import BASE, Front, Point
from rsoups.tasks import question_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; shapes differ too.
_BLUE, _GREY, _BLACK = "#0072B2", "#777777", "#222222"
_OTHERS = [("#D55E00", "D"), ("#009E73", "^"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X")]
_SHOWN_LAMBDAS = (0.0, 0.3, 0.5, 0.7, 1.0)
_SHOWN_PROMPTS = 12


def write_report(front: Front, records: Iterable[Mapping[str, Any]], folder: str | Path) -> None:
    """Write front.png, report.html (no external reference) and report.md.

    Args:
        front: Of the same records.
        records: For the texts.
        folder: Made if it is not there.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "rsoups"}):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        figure = draw_front(front)
        figure.savefig(folder / "front.png", dpi=160)
        pictures = {"front": _embedded(figure), "chord": _embedded(draw_chord(front)) if _has_chord(front) else ""}
    records = list(records)
    (folder / "report.md").write_text(_markdown(front, records), encoding="utf-8")
    (folder / "report.html").write_text(_page(front, records, pictures), encoding="utf-8")


def draw_front(front: Front) -> Figure:
    """One panel for each pair of rewards: soups joined from λ = 0 to 1, their chord, base and others, with intervals."""
    from matplotlib.figure import Figure

    pairs = list(combinations(front.rewards, 2))
    if not pairs:
        return draw_chord(front)
    figure = Figure(figsize=(7.2 * len(pairs), 5.4), layout="constrained")
    for axes, (x, y) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        _draw_pair(axes, front, x, y)
    return figure


def _draw_pair(axes: Axes, front: Front, x: str, y: str) -> None:
    _style(axes)
    soups = front.soups
    if soups:
        joined = len(soups[0].lambdas or {}) == 2
        if joined and len(soups) > 1:
            ends = soups[0], soups[-1]
            axes.plot(*([p.mean[r] for p in ends] for r in (x, y)), "--", color=_GREY, lw=1.2, zorder=1, label="chord")
        _mark(axes, soups, x, y, _BLUE, "o", "soups", line="-" if joined else "")
        for point in soups:
            _label(axes, point, x, y)
    for number, point in enumerate(front.others):
        colour, marker = (_BLACK, "s") if point.name == BASE else _OTHERS[number % len(_OTHERS)]
        _mark(axes, [point], x, y, colour, marker, point.name)
    axes.set_xlabel(f"{x}  (mean reward)")
    axes.set_ylabel(f"{y}  (mean reward)")
    note = f"{front.points[0].n} prompts, bars: 95% bootstrap over prompts"
    if soups and len(soups[0].lambdas or {}) == 2:
        first, second = soups[0].lambdas or {}
        note += f"\nnumbers: λ of {second}, the rest is {first}"
    axes.set_title(note, fontsize=9, color=_GREY, loc="left")
    axes.legend(frameon=False, fontsize=9)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.6, zorder=0)
    axes.set_axisbelow(True)


def _mark(
    axes: Axes, points: Sequence[Point], x: str, y: str, colour: str, marker: str, label: str, line: str = ""
) -> None:
    def bars(reward: str) -> list[list[float]]:
        below = [max(0.0, p.mean[reward] - p.low[reward]) for p in points]
        return [below, [max(0.0, p.high[reward] - p.mean[reward]) for p in points]]

    axes.errorbar(
        [p.mean[x] for p in points],
        [p.mean[y] for p in points],
        xerr=bars(x),
        yerr=bars(y),
        fmt=marker + line,
        color=colour,
        ecolor=colour + "55",
        elinewidth=1,
        markersize=6,
        lw=1.6,
        label=label,
        zorder=3,
    )


def _label(axes: Axes, point: Point, x: str, y: str) -> None:
    """λ beside a point, to the upper right, where a front of two maximised rewards leaves room."""
    weights = list((point.lambdas or {}).values())
    text = f"{weights[1]:.3g}" if len(weights) == 2 else "/".join(f"{w:.2g}" for w in weights)
    axes.annotate(
        text,
        (point.mean[x], point.mean[y]),
        xytext=(6, 5),
        textcoords="offset points",
        fontsize=8,
        color=_BLUE,
        zorder=4,
    )


def _has_chord(front: Front) -> bool:
    try:
        return len(front.ends) == 2
    except FrontError:
        return False


def draw_chord(front: Front) -> Figure:
    """Each reward of the soups of two ingredients over λ, with the chord between the ends."""
    from matplotlib.figure import Figure

    if not _has_chord(front):
        raise FrontError("a plot over λ needs soups of two ingredients, both ends included")
    soups = front.soups
    second = list(soups[0].lambdas or {})[1]
    at = [(p.lambdas or {})[second] for p in soups]
    figure = Figure(figsize=(4.6 * len(front.rewards), 3.6), layout="constrained")
    for axes, reward in zip(figure.subplots(1, len(front.rewards), squeeze=False)[0], front.rewards, strict=True):
        _style(axes)
        axes.fill_between(at, [p.low[reward] for p in soups], [p.high[reward] for p in soups], color=_BLUE, alpha=0.15)
        axes.plot(at, [p.mean[reward] for p in soups], "o-", color=_BLUE, ms=5, label="soups")
        ends = [soups[0].mean[reward], soups[-1].mean[reward]]
        axes.plot([at[0], at[-1]], ends, "--", color=_GREY, lw=1.2, label="chord")
        axes.set_xlabel(f"λ of {second}")
        axes.set_ylabel(reward)
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def _embedded(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _texts(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Records by model label and prompt, the first of each."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(_key(record["name"], record["lambdas"]), {}).setdefault(record["prompt"], record)
    return found


def _key(name: str, lambdas: Mapping[str, float] | None) -> str:
    return f"{name} {lambdas}"


def _variety(records: Mapping[str, Mapping[str, Any]]) -> tuple[float, float, int]:
    """Mean words, distinct-2 (different pairs of words over all pairs of words) and the number of different responses."""
    texts = [record["response"].split() for record in records.values()]
    pairs = [pair for words in texts for pair in zip(words, words[1:], strict=False)]
    words = sum(map(len, texts)) / max(1, len(texts))
    return words, len(set(pairs)) / max(1, len(pairs)), len({tuple(text) for text in texts})


def _shown(front: Front) -> list[Point]:
    """The base and the soups whose texts are shown: λ of the second ingredient 0, .3, .5, .7, 1; else ends and middle."""
    base = [point for point in front.others if point.name == BASE]
    soups = front.soups
    if not soups:
        return front.points[:5]
    if len(soups[0].lambdas or {}) == 2:
        return base + list(dict.fromkeys(_nearest(soups, wanted) for wanted in _SHOWN_LAMBDAS))
    even = min(soups, key=lambda p: max((p.lambdas or {}).values()))
    ends = [p for p in soups if max((p.lambdas or {}).values()) == 1]
    return base + [*ends, *([even] if even not in ends else [])]


def _nearest(soups: Sequence[Point], wanted: float) -> Point:
    return min(soups, key=lambda point: abs(list((point.lambdas or {}).values())[1] - wanted))


def _chord_sentences(front: Front) -> list[str]:
    """What the front does against its chord, and against every other model, in words with figures."""
    out = []
    if _has_chord(front) and len(front.soups) > 2:
        inner = [(p, gaps) for p, gaps in front.linear_mode_connectivity() if max((p.lambdas or {}).values()) < 1]
        for reward in front.rewards:
            above = sum(gaps[reward].is_above_zero for _, gaps in inner)
            below = sum(gaps[reward].is_below_zero for _, gaps in inner)
            mean = sum(gaps[reward].value for _, gaps in inner) / len(inner)
            out.append(
                f"{reward}: between the ends the soups are {mean:+.3f} from the chord on average; above it with 95% "
                f"confidence at {above} of {len(inner)} λ, below it at {below}."
            )
    return out


def _table(front: Front, records: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    texts = _texts(records)
    pareto = set(front.pareto())
    head = [front.legend, *front.rewards, "words", "distinct-2", "different responses", "Pareto"]
    rows = []
    for point in [*front.others, *front.soups]:
        words, distinct, different = _variety(texts[_key(point.name, point.lambdas)])
        rewards = [f"{point.mean[r]:.3f} [{point.low[r]:.3f}, {point.high[r]:.3f}]" for r in front.rewards]
        rows.append(
            [
                point.label,
                *rewards,
                f"{words:.1f}",
                f"{distinct:.2f}",
                f"{different} of {point.n}",
                "yes" if point in pareto else "",
            ]
        )
    return head, rows


def _markdown(front: Front, records: list[Mapping[str, Any]]) -> str:
    head, rows = _table(front, records)
    lines = ["# Front", "", "![The front](front.png)", ""]
    lines += ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", f"{front.points[0].n} prompts; intervals: 95% bootstrap over prompts.", ""]
    lines += [f"- {sentence}" for sentence in _chord_sentences(front)]
    return "\n".join(lines) + "\n"


def _page(front: Front, records: list[Mapping[str, Any]], pictures: Mapping[str, str]) -> str:
    escape = html.escape
    head, rows = _table(front, records)
    cells = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    ends = ", ".join(f"{p.label}: " + ", ".join(f"{r} {p.mean[r]:.2f}" for r in front.rewards) for p in _shown(front))
    figures = f'<img src="{pictures["front"]}" alt="The front of mean rewards. {escape(ends)}">'
    if pictures["chord"]:
        figures += f'<h2>Against the chord</h2><img src="{pictures["chord"]}" alt="Each reward over λ, with the chord">'
        figures += "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in _chord_sentences(front)) + "</ul>"
    texts = _texts(records)
    shown = _shown(front)
    prompts = []
    for prompt in front.prompts[:: max(1, len(front.prompts) // _SHOWN_PROMPTS)][:_SHOWN_PROMPTS]:
        columns = "".join(_column(point, texts[_key(point.name, point.lambdas)][prompt]) for point in shown)
        prompts.append(f'<article><h3>{escape(question_of(prompt))}</h3><div class="row">{columns}</div></article>')
    return template("report.html").substitute(
        n=front.points[0].n,
        rewards=escape(", ".join(front.rewards)),
        figures=figures,
        head="".join(f'<th scope="col">{escape(cell)}</th>' for cell in head),
        rows=cells,
        texts="\n".join(prompts),
    )


def _column(point: Point, record: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{name} {score:.2f}" for name, score in sorted(record["rewards"].items()))
    text = html.escape(record["response"]) or "<em>empty</em>"
    return f"<section><h4>{html.escape(point.label)}</h4><p>{text}</p><small>{html.escape(scores)}</small></section>"
