"""The command line: thin commands over the library and the recipes. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from rsoups import __version__
from rsoups.cli import data, fronts, hub, rewards, soups
from rsoups.common.assets import shipped
from rsoups.common.errors import RsoupsError

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
            return _recipe(arguments[0], arguments[1:])
        args = _parser().parse_args(arguments)
        args.run(args)
    except RsoupsError as error:
        told = " ".join(str(error).splitlines())  # other libraries' reasons may have several lines
        print(f"rsoups: {told}", file=sys.stderr)
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
    interpolate.add_argument(
        "--rank", type=soups.rank, help="of an svd soup; below 1 the largest relative error, which decides the rank"
    )
    interpolate.add_argument("--normalize", action="store_true", help="divide the weights by their sum")
    interpolate.add_argument("--extrapolate", action="store_true", help="allow weights outside [0, 1], and any sum")
    interpolate.add_argument("--base", help=soups.BASE)
    hub.add_override(interpolate)
    interpolate.set_defaults(run=soups.interpolate)

    inspect = commands.add_parser("inspect", help="what adapters are, how far apart, whether they can be souped")
    inspect.add_argument("adapters", nargs="+", help="folders or Hub ids (id@revision)")
    inspect.add_argument("--records", type=Path, help="records.jsonl of a sweep over them: looks for barriers too")
    inspect.add_argument("--base", help=soups.BASE)
    hub.add_override(inspect)
    inspect.set_defaults(run=soups.inspect)

    merge = commands.add_parser("merge", help="write an adapter or a soup into its base: a whole model")
    merge.add_argument("adapter", help="folder or Hub id (id@revision)")
    merge.add_argument("--base", help="folder or Hub id; the one that the adapter names if left out")
    merge.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the model; the base's if left out"
    )
    merge.add_argument("--out", required=True, type=Path, help="folder of the model")
    hub.add_override(merge)
    merge.set_defaults(run=soups.merge)

    convert = commands.add_parser("convert", help="pickled weights (.bin, .pt) of an adapter or a model to safetensors")
    convert.add_argument("source", help="folder, file or Hub id (id@revision)")
    convert.add_argument(
        "--out", type=Path, help="new folder; the cache if left out, where every command finds it under the same name"
    )
    convert.set_defaults(run=soups.convert)

    list_rewards = commands.add_parser("rewards", help="the reward cards that ship with rsoups")
    list_rewards.set_defaults(run=rewards.rewards)

    score = commands.add_parser("score", help="score one response, and show what a reward model reads")
    score.add_argument("--reward", required=True, help="a card's name or path, a classifier's Hub id, module:function")
    score.add_argument("--prompt", required=True, help="a policy's prompt, or a bare question")
    score.add_argument("--response", required=True)
    score.add_argument("--reference", nargs="+", help="texts that a statistical reward compares the response with")
    score.add_argument(
        "--column",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="what else of a row the reward reads; VALUE as in a line of JSON, or a text",
    )
    score.add_argument("--device", default="cpu")
    score.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    score.set_defaults(run=rewards.score)

    rewards.add_probe(commands)

    tasks = commands.add_parser("tasks", help="the tasks that write prompts")
    tasks.set_defaults(run=data.tasks)

    preview = commands.add_parser("preview", help="five prompts of a task, and what a reward would see of them")
    preview.add_argument("--task", required=True, help="a task's name, or custom")
    preview.add_argument("--dataset", help="file, folder or Hub id; the task's own if left out")
    preview.add_argument("--template", help="of a custom task's prompts")
    preview.add_argument("--split", default="train", choices=("train", "test", "all"), help="all: of one file")
    preview.add_argument("--reward", help="a reward, as in rsoups score")
    preview.add_argument("--tokenizer", default="rsoups/tiny-llama", help="whose tokens are counted")
    preview.add_argument("--chat_template_kwargs", help=data.TEMPLATE_HELP)
    preview.add_argument("--rows", type=int, default=1000, help="how many of the dataset's rows are looked at")
    preview.set_defaults(run=data.preview)

    fronts.add_fronts(commands)
    fronts.add_explore(commands)
    hub.add_commands(commands)
    for name, text in _RECIPES.items():  # listed here for --help; `main` runs them
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _recipe(name: str, arguments: list[str]) -> int:
    script = str(shipped("recipes") / f"{name}.py")
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:  # what a recipe refuses it has told
        if end.code != 2:
            raise
        return 2
    return 0
