"""Commands: report, select, explore."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.cli.hub import add_override
from rsoups.common.assets import named_sources
from rsoups.common.errors import AdapterError, FrontError

if TYPE_CHECKING:
    from rsoups.fronts.front import Front


def add_fronts(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands over a sweep's records."""
    report = commands.add_parser("report", help="draw the front of a records file and write its report")
    report.add_argument("records", type=Path, help="records.jsonl of a sweep")
    report.add_argument("--out", type=Path, help="folder of the report; beside the records if left out")
    report.add_argument(
        "--reference",
        nargs="+",
        metavar="REWARD=VALUE",
        help="where hypervolume is counted from, for each reward (all maximized)",
    )
    report.add_argument(
        "--other",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="further fronts: records.jsonl, or points in a .csv",
    )
    report.set_defaults(run=_report)

    select = commands.add_parser("select", help="choose λ among the soups of a records file, by one rule")
    select.add_argument("records", type=Path, help="records.jsonl of a sweep, or points in a .csv")
    select.add_argument("--preference", nargs="+", metavar="REWARD=WEIGHT", help="the largest weighted sum")
    select.add_argument(
        "--maximize", metavar="REWARD", help="the most of one reward, with --subject_to limits of others"
    )
    select.add_argument("--subject_to", nargs="+", metavar="'REWARD >= 0.2'", help="limits of rewards, each in quotes")
    select.add_argument("--knee", action="store_true", help="where the front bends")
    select.add_argument("--votes", type=Path, help="votes.jsonl: what people chose between generations")
    select.add_argument(
        "--above_base", action="store_true", help="above the base in every reward; with --preference, its best by it"
    )
    select.set_defaults(run=_select)


def add_explore(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    explore = commands.add_parser("explore", help="choose λ on a page: slide, read, vote, save; or write it as a Space")
    explore.add_argument("folder", nargs="?", type=Path, help="of a sweep: records.jsonl, the models beside it")
    explore.add_argument("--base", help="folder or Hub id; the sweep's if left out")
    explore.add_argument("--adapters", nargs="+", default=[], metavar="NAME=FOLDER", help="the sweep's if left out")
    explore.add_argument("--host", default="127.0.0.1", help="address to listen on")
    explore.add_argument("--port", type=int, help="the first free one from 7860 if left out")
    explore.add_argument("--export", type=Path, metavar="FOLDER", help="write a Hugging Face Space there instead")
    add_override(explore)
    explore.set_defaults(run=_explore)


def _front(path: Path) -> Front:
    from rsoups.fronts.front import Front

    return Front.from_csv(path) if path.suffix == ".csv" else Front.from_jsonl(path)


def _report(args: argparse.Namespace) -> None:
    from rsoups.common.files import read_jsonl
    from rsoups.reports.report import write_report

    front = _front(args.records)
    others = {name: _front(Path(path)) for name, path in named_sources(args.other, "other fronts", FrontError).items()}
    records = [] if args.records.suffix == ".csv" else read_jsonl(args.records)
    told = write_report(
        front,
        records,
        args.out or args.records.parent,
        reference=_figures(args.reference) if args.reference else None,
        others=others,
        settings=_settings(args.records),
    )
    print("\n".join([*front.notes, front.to_markdown(), *(f"- {sentence}" for sentence in told)]))
    print(args.out or args.records.parent)


def _select(args: argparse.Namespace) -> None:
    front = _front(args.records)
    choice = front.select(
        _figures(args.preference) if args.preference else None,
        maximize=args.maximize,
        subject_to=dict(_limit(text) for text in args.subject_to) if args.subject_to else None,
        knee=args.knee,
        votes=args.votes,
        above_base=args.above_base,
    )
    for note in front.notes:
        print(note)
    print(f"{choice}  (all rewards maximized)")
    if choice.behind:
        print(_better(front))
    if choice.point.lambdas:
        adapters = _settings(args.records).get("adapters", {})
        found = [_source(args.records.parent, name, adapters.get(name)) for name in choice.point.lambdas]
        found = [os.path.normpath(source) for source in found]  # without the way up and down again
        weights = " ".join(f"{weight:.6g}" for weight in choice.point.lambdas.values())
        print(f"rsoups interpolate {shlex.join(found)} --lambdas {weights} --out soup")


def _better(front: Front) -> str:
    """What is above the base in every reward, where a choice is not."""
    try:
        return f"Above the base in every reward (--above_base): {front.select(above_base=True)}"
    except FrontError as error:
        return f"{error}"


def _settings(records: Path) -> dict[str, Any]:
    """What a sweep leaves beside its records."""
    path = records.with_suffix(".settings.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _source(folder: Path, name: str, told: str | None) -> str:
    """An ingredient's folder, told as seen from that of the records, or its Hub id; its name where neither is known."""
    inside = folder / told if told else None
    return str(inside) if inside and inside.is_dir() else told or name


def _figures(given: Sequence[str]) -> dict[str, float]:
    """``a=.7 b=.3``, or ``a=.7,b=.3``."""
    found = {}
    for pair in ",".join(given).split(","):
        name, separator, value = pair.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise FrontError(f"{pair!r} is not REWARD=NUMBER")
    return found


def _limit(text: str) -> tuple[str, str]:
    """``a >= 0.2`` to the reward and its limit."""
    place = min((at for sign in "<>" if (at := text.find(sign)) > 0), default=0)
    if not place:
        raise FrontError(f"the limit {text!r} is not like 'REWARD >= 0.2'")
    return text[:place].strip(), text[place:]


def _explore(args: argparse.Namespace) -> None:
    from rsoups.explorer.app import explore
    from rsoups.explorer.space import write_space

    if wrong := [pair for pair in args.adapters if "=" not in pair]:
        raise AdapterError(f"--adapters takes NAME=FOLDER or NAME=HUB_ID, got {wrong}")
    models = {"base": args.base, "adapters": named_sources(args.adapters, "adapters")}
    models["allow_base_mismatch"] = args.allow_base_mismatch
    if args.export:
        write_space(args.folder, args.export, **models)
        print(f"{args.export}\npublish it: hf upload user/name {args.export} . --repo-type space")
    else:
        explore(args.folder, host=args.host, port=args.port, **models)
