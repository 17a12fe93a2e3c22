"""The command line: thin commands over the library and the recipes. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from rsoups import __version__
from rsoups._errors import RsoupsError
from rsoups._resources import shipped

_RECIPES = {
    "sweep": "generate and score at every λ, then draw the front and write the report",
    "demo": "the whole recipe on the embedded models, offline, in minutes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that rsoups raises on purpose are one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Where it is installed, it tells everyone of CPU kernels that only 4-bit bases miss.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if arguments[:1] and arguments[0] in _RECIPES:
            _recipe(arguments[0], arguments[1:])
        else:
            args = _parser().parse_args(arguments)
            args.run(args)
    except RsoupsError as error:
        print(f"rsoups: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rsoups", description="Rewarded soups: one adapter per reward, any trade-off."
    )
    parser.add_argument("--version", action="version", version=f"rsoups {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    interpolate = commands.add_parser("interpolate", help="make one soup from several adapters")
    interpolate.add_argument("adapters", nargs="+", help="folders or Hub ids (id@revision)")
    interpolate.add_argument(
        "--lambdas", nargs="+", type=float, help="one weight for each adapter; uniform if left out"
    )
    interpolate.add_argument("--out", required=True, type=Path, help="folder of the soup")
    interpolate.add_argument("--method", default="exact", choices=("exact", "factors", "svd"))
    interpolate.add_argument("--rank", type=int, help="rank of an svd soup")
    interpolate.add_argument("--normalize", action="store_true", help="divide the weights by their sum")
    interpolate.add_argument("--extrapolate", action="store_true", help="allow weights outside [0, 1]")
    interpolate.set_defaults(run=_interpolate)

    report = commands.add_parser("report", help="draw the front of a records file and write its report")
    report.add_argument("records", type=Path, help="records.jsonl of a sweep")
    report.add_argument("--out", type=Path, help="folder of the report; beside the records if left out")
    report.set_defaults(run=_report)

    for name, text in _RECIPES.items():  # listed here for --help; `main` runs them
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _recipe(name: str, arguments: list[str]) -> None:
    script = str(shipped("recipes") / f"{name}.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _interpolate(args: argparse.Namespace) -> None:
    from rsoups.soup import Soup, interpolate

    soup = interpolate(
        args.adapters,
        args.lambdas,
        method=args.method,
        rank=args.rank,
        normalize=args.normalize,
        extrapolate=args.extrapolate,
    )
    assert isinstance(soup, Soup)
    soup.save_pretrained(args.out)
    print(args.out)


def _report(args: argparse.Namespace) -> None:
    from rsoups.front import Front
    from rsoups.report import write_report
    from rsoups.tasks import read_jsonl

    front = Front.from_jsonl(args.records)
    write_report(front, read_jsonl(args.records), args.out or args.records.parent)
    print(front.to_markdown())
    print(args.out or args.records.parent)


if __name__ == "__main__":
    sys.exit(main())
