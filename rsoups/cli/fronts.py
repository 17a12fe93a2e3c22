"""Commands over a sweep's records: report, select, explore."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.common.assets import named_sources
from rsoups.common.errors import AdapterError, FrontError

if TYPE_CHECKING:
    from rsoups.fronts.front import Front


def report(
    records: Path, *, out: Path | None = None, reference: list[str] | None = None, other: list[str] | None = None
) -> None:
    """Draw the front of a records file and write its report.

    Example: `rsoups report runs/sweep/records.jsonl --reference helpful=-1 harmless=-1`

    Args:
        records: File records.jsonl of a sweep, or points in a .csv.
        out: Folder of the report; beside the records if left out.
        reference: Reference point of the hypervolume, REWARD=VALUE for each reward; all rewards are maximized.
        other: Further fronts to compare, FILE or NAME=FILE: records.jsonl, or points in a .csv.
    """
    from rsoups.common.files import read_jsonl
    from rsoups.fronts.notes import sweep_settings
    from rsoups.reports.report import write_report

    front = _front(records)
    others = named_sources(other or [], "other fronts", FrontError)
    sentences = write_report(
        front,
        [] if records.suffix == ".csv" else read_jsonl(records),
        out or records.parent,
        reference=_figures(reference) if reference else None,
        others={name: _front(Path(path)) for name, path in others.items()},
        settings=sweep_settings(records),
    )
    print("\n".join([*front.notes, front.to_markdown(), *(f"- {sentence}" for sentence in sentences)]))
    print(out or records.parent)


def select(
    records: Path,
    *,
    preference: list[str] | None = None,
    maximize: str | None = None,
    subject_to: list[str] | None = None,
    knee: bool = False,
    votes: Path | None = None,
    above_base: bool = False,
) -> None:
    """Choose λ among the soups of a records file, by one rule.

    Example: `rsoups select runs/sweep/records.jsonl --maximize helpful --subject-to "harmless >= 0.2"`

    Args:
        records: File records.jsonl of a sweep, or points in a .csv.
        preference: Weights of the rewards, REWARD=WEIGHT for each: the largest weighted sum is chosen.
        maximize: Reward to maximize, within the limits of --subject-to.
        subject_to: Limits of other rewards, each in quotes: 'REWARD >= 0.2'.
        knee: Choose the knee, where the front bends most.
        votes: File votes.jsonl with people's choices between pairs of responses.
        above_base: Choose among soups above the base in every reward; with --preference, the best of them by it.
    """
    front = _front(records)
    choice = front.select(
        _figures(preference) if preference else None,
        maximize=maximize,
        subject_to=subject_to,
        knee=knee,
        votes=votes,
        above_base=above_base,
    )
    for note in front.notes:
        print(note)
    print(f"{choice}  (all rewards maximized)")
    if choice.behind:
        print(_best_above_base(front))
    if choice.point.lambdas:
        print(_command_of(choice.point.lambdas, records))


def explore(
    folder: Path | None = None,
    *,
    base: str | None = None,
    adapters: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    export: Path | None = None,
    allow_base_mismatch: bool = False,
) -> None:
    """Choose λ on a page: slide, read, vote, save; or write the page as a Hugging Face Space.

    Example: `rsoups explore runs/sweep`

    Args:
        folder: Folder of a sweep, with records.jsonl and the adapters beside it.
        base: Folder or Hub id of the base; the sweep's if left out.
        adapters: Adapters, NAME=FOLDER or NAME=HUB_ID; the sweep's if left out.
        host: Address to listen on.
        port: Port to listen on; the first free one from 7860 if left out.
        export: Folder for a Hugging Face Space, written instead of opening the page.
        allow_base_mismatch: Accept a base of another name than the adapters'.
    """
    from rsoups.explorer.app import explore as open_page
    from rsoups.explorer.space import write_space

    if unnamed := [pair for pair in adapters or [] if "=" not in pair]:
        raise AdapterError(f"--adapters takes NAME=FOLDER or NAME=HUB_ID, got {unnamed}")
    models: dict[str, Any] = {"base": base, "adapters": named_sources(adapters or [], "adapters")}
    models["allow_base_mismatch"] = allow_base_mismatch
    if export:
        write_space(folder, export, **models)
        print(f"{export}\npublish it: hf upload user/name {export} . --repo-type space")
    else:
        open_page(folder, host=host, port=port, **models)


def _front(path: Path) -> Front:
    from rsoups.fronts.front import Front

    return Front.from_csv(path) if path.suffix == ".csv" else Front.from_jsonl(path)


def _best_above_base(front: Front) -> str:
    """The best soup above the base in every reward, for a choice that is not above it."""
    try:
        return f"Above the base in every reward (--above-base): {front.select(above_base=True)}"
    except FrontError as error:
        return f"{error}"


def _command_of(lambdas: dict[str, float], records: Path) -> str:
    """The command that makes the chosen soup."""
    from rsoups.fronts.notes import sweep_settings

    adapters = sweep_settings(records).get("adapters")
    adapters = adapters if isinstance(adapters, dict) else {}
    sources = [os.path.normpath(_source(records.parent, name, adapters.get(name))) for name in lambdas]
    weights = " ".join(f"{weight:.6g}" for weight in lambdas.values())
    return f"rsoups interpolate {shlex.join(sources)} --lambdas {weights} --out soup"


def _source(folder: Path, name: str, recorded: str | None) -> str:
    """An adapter's folder, as recorded from the folder of the records, or its Hub id; its name where neither is known."""
    inside = folder / recorded if recorded else None
    return str(inside) if inside and inside.is_dir() else recorded or name


def _figures(pairs: Sequence[str]) -> dict[str, float]:
    """Numbers by reward, of ``a=.7 b=.3`` or ``a=.7,b=.3``."""
    figures = {}
    for pair in ",".join(pairs).split(","):
        name, separator, value = pair.rpartition("=")
        try:
            figures[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise FrontError(f"{pair!r} is not REWARD=NUMBER")
    return figures
