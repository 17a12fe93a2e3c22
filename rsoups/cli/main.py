"""The command `rsoups`: its groups of commands, and its errors in one line.

The commands are thin: each calls one function of the library, and imports it only then.
"""

from __future__ import annotations

import logging
import runpy
import sys
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError, Group, Parameter

from rsoups import __version__
from rsoups.cli import fronts, models, rewards, soups
from rsoups.common.assets import shipped
from rsoups.common.errors import RsoupsError, one_line

# Commands that are scripts of recipes/, with flags of their own.
RECIPES = {
    "sft": ("sft", "Fine-tune a base on a task's references, the common start of all runs."),
    "reward-model": ("reward_model", "Train a reward model on preference pairs."),
    "train": ("ppo_reward", "Train one adapter on a reward: PPO, GRPO or RLOO."),
    "sweep": ("sweep", "Generate and score at every λ, then draw the front and write the report."),
    "demo": ("demo", "Run the whole recipe on the embedded models: offline, in minutes."),
}

COMMANDS: dict[str, list[Callable[..., None]]] = {
    "Soups": [soups.interpolate, soups.inspect, soups.merge, soups.convert],
    "Fronts": [fronts.report, fronts.select, fronts.explore],
    "Rewards and data": [rewards.tasks, rewards.preview, rewards.rewards, rewards.score, rewards.probe],
    "Versions and the Hub": [
        models.push,
        models.pull,
        models.log,
        models.diff,
        models.verify,
        models.patch,
        models.revert,
        models.test,
    ],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. An error that rsoups raises on purpose is one line on stderr and exit code 2.

    Args:
        argv: The command and its arguments; `sys.argv` by default.
    """
    words = [_with_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)]
    # Where bitsandbytes is installed, it warns everyone of CPU kernels that only 4-bit bases miss.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    if words[:1] and words[0] in RECIPES:
        return _run_recipe(words[0], words[1:])
    try:
        _app()(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _refuse(f"{error}. See: rsoups {' '.join(error.command_chain or ())} --help".replace("  ", " "))
    except RsoupsError as error:
        return _refuse(error)
    return 0


def _app() -> App:
    app = App(
        name="rsoups",
        help="Rewarded soups: train one adapter per reward, and choose the trade-off by interpolating them.",
        version=f"rsoups {__version__}",
        help_format="markdown",
        default_parameter=Parameter(consume_multiple=True, negative=()),
    )
    # Groups and commands are shown in this order, which is that of the work.
    recipes = Group("Recipes (each has flags of its own)", sort_key=0)
    for place, (name, (_, text)) in enumerate(RECIPES.items()):
        app.command(App(name=name, help=text, group=recipes, sort_key=place))  # listed for --help; `main` runs them
    for number, (title, functions) in enumerate(COMMANDS.items(), 1):
        group = Group(title, sort_key=number)
        for place, function in enumerate(functions):
            # Of an optional argument, cyclopts says only [ARGS].
            usage = "Usage: rsoups explore [OPTIONS] [FOLDER]" if function is fronts.explore else None
            app.command(function, group=group, sort_key=place, usage=usage)
    return app


def _with_hyphens(word: str) -> str:
    """A flag with hyphens, as the help has it: ``--subject_to`` is accepted too."""
    if not word.startswith("--"):
        return word
    flag, separator, value = word.partition("=")
    return flag.replace("_", "-") + separator + value


def _run_recipe(name: str, arguments: list[str]) -> int:
    script = str(shipped("recipes") / f"{RECIPES[name][0]}.py")
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, {"COMMAND": f"rsoups {name}"}, run_name="__main__")  # for the recipe's help
    except SystemExit as end:  # the recipe has printed why it refuses
        if end.code != 2:
            raise
        return 2
    return 0


def _refuse(message: object) -> int:
    print(one_line(message), file=sys.stderr)
    return 2
