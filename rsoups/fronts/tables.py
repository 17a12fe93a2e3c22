"""A front as rows, CSV, Markdown, or an HTML table for notebooks."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.fronts.reading import LAMBDA

if TYPE_CHECKING:
    from rsoups.fronts.front import Front


def rows_of(front: Front) -> list[dict[str, Any]]:
    """One row for each point, as `Front.to_table` describes them."""
    pareto = set(front.pareto())
    extras = dict.fromkeys(name for point in front.points for name in point.extras)
    rows = []
    for point in [*front.others, *front.soups]:
        row: dict[str, Any] = {"name": point.name}
        row |= {LAMBDA + name: (point.lambdas or {}).get(name) for name in front.ingredients}
        figures = {name: point.estimate(name) for name in front.rewards} | {
            name: point.extras.get(name) for name in extras
        }
        for name, figure in figures.items():
            row[name] = figure and figure.value
            row[f"{name}_low"], row[f"{name}_high"] = figure and figure.low, figure and figure.high
        rows.append(row | {"pareto": point in pareto})
    return rows


def write_csv(front: Front, path: str | Path) -> None:
    """Write the points as `Front.from_csv` reads them."""
    names = ["name", *(LAMBDA + name for name in front.ingredients)]
    names += [name + end for name in front.rewards for end in ("", "_low", "_high")]
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows_of(front))


def means_of(front: Front) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of all points: the mean of each reward with its interval."""
    points = [*front.others, *front.soups]
    rows = [[point.label, *(str(point.estimate(reward)) for reward in front.rewards)] for point in points]
    return [front.legend, *front.rewards], rows


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the rows; the others are aligned to the right."""
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the rows; texts are escaped."""
    lines = ["<table><thead><tr>", *(f"<th>{escape(cell)}</th>" for cell in head), "</tr></thead><tbody>"]
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    return "".join([*lines, "</tbody></table>"])
