"""Write the report of a front: report.html, one self-contained page, report.md and front.png.

A report is a pure function of records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rsoups.common.files import write_whole
from rsoups.fronts.advantage import Advantage
from rsoups.fronts.front import Front
from rsoups.fronts.notes import sweep_settings, trained_on_of, trained_prompts_of
from rsoups.fronts.tables import markdown_table
from rsoups.reports.page import figures_of, page_of, prompts_in_words
from rsoups.reports.plots import draw_front
from rsoups.reports.sentences import advantage_of, sentences_of


def write_report(
    front: Front,
    records: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    reference: Mapping[str, float] | None = None,
    others: Mapping[str, Front] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write report.html (without external references), report.md and, if matplotlib is installed, front.png.

    Args:
        front: Front of these records.
        records: Records, for their texts.
        folder: Folder of the report; created if it does not exist.
        reference: Reference of hypervolumes, by reward; without it the report has none.
        others: Other fronts of the same rewards by name, to draw and to compare.
        settings: How the records were made; by default ``records.settings.json`` in `folder`, which a sweep writes.

    Returns:
        What the report says in words, one sentence each.

    Raises:
        FrontError: Other fronts of other rewards or prompts, or an incomplete reference.
        OutputError: A file cannot be written.
    """
    folder = Path(folder)
    if settings is None:
        settings = sweep_settings(folder / "records.jsonl")
    front.trained_on |= trained_on_of(settings)
    front.trained_prompts |= trained_prompts_of(settings)
    advantage = None if reference is None else advantage_of(front, reference)
    sentences = sentences_of(front, reference, others or {}, advantage)

    folder.mkdir(parents=True, exist_ok=True)
    if find_spec("matplotlib") is None:
        sentences.append(
            "front.png is not drawn: that needs matplotlib (pip install 'rsoups[report]'), then run rsoups report."
        )
    else:
        draw_front(front).savefig(folder / "front.png", dpi=160)
    curve = advantage.curve if isinstance(advantage, Advantage) else ()
    write_whole(folder / "report.md", _markdown(front, sentences))
    write_whole(folder / "report.html", page_of(front, records, others or {}, settings, curve, sentences))
    return sentences


def _markdown(front: Front, sentences: Sequence[str]) -> str:
    """The report as Markdown: the picture, notes, a table of all models, sentences."""
    notes = "".join(f"**{note}**\n\n" for note in front.notes)
    table = markdown_table(*figures_of(front))
    items = "\n".join(f"- {sentence}" for sentence in sentences)
    return f"""# Front

![The front](front.png)

{notes}{table}

{prompts_in_words(front)} Every reward is maximized.

{items}
"""
