"""Command lines of the recipes: TRL's parser, with one spelling, a help of a few screens, and errors of one line."""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from trl import TrlParser

from rsoups.common.errors import SettingsError, did_you_mean, shown_flag
from rsoups.training.configs import config_path, given_flags, spelled_out

# Settings of TRL's classes that the help describes. The others it lists with their defaults.
_COMMON = (
    *(
        "model_name_or_path",
        "model_revision",
        "dtype",
        "load_in_4bit",
        "load_in_8bit",
        "use_peft",
        "lora_r",
        "lora_alpha",
    ),
    *("output_dir", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "max_length"),
    *("max_completion_length", "temperature", "bf16", "save_steps", "save_total_limit", "seed", "use_vllm"),
    *("push_to_hub", "hub_model_id", "trust_remote_code"),
)
_RECIPE = "the recipe"  # title of the recipe's own flags
_TYPES = {bool: "BOOL", int: "INT", float: "FLOAT"}
# What the help says of two of TRL's settings, in the words of the other commands.
_WORDS = {
    "model_name_or_path": "Base model: a folder, a Hub id, or rsoups/... for an embedded one.",
    "output_dir": "Output folder.",
}


def read_config(name: str | None) -> dict[str, Any]:
    """Read a config file: its settings by name; none without a file.

    Raises:
        SettingsError: There is no such file, or it is not a YAML mapping.
    """
    if name is None:
        return {}
    try:
        settings = yaml.safe_load(Path(name).read_text("utf-8"))
    except OSError as error:
        known = sorted(path.stem for path in config_path("x").parent.glob("*.yaml"))
        raise SettingsError(
            f"cannot read the config {name}: {error.strerror}. Name a YAML file, or one of those that ship: "
            f"{', '.join(known)}.{did_you_mean(Path(name).stem, known)}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{name} is not YAML: {error}") from None
    if not isinstance(settings, dict):
        raise SettingsError(f"{name} is not a YAML mapping: write one setting a line, such as learning_rate: 1e-4")
    return settings


class FlagParser(TrlParser):
    """A parser of dataclasses: each field is a flag, and a key of the file that ``--config`` names.

    Args:
        classes: Dataclasses of the settings, the recipe's own first.
        doc: The recipe's docstring, whose first line is the help's.
        example: Flags of an example.
    """

    def __init__(self, classes: Sequence[Any], doc: str | None, example: str):
        self._groups: dict[str, Any] = {}
        self._titles = {
            name: _title(kind, name, place == 0) for place, kind in enumerate(classes) for name in _names(kind)
        }
        self._types = {name: _plain(hint) for kind in classes for name, hint in get_type_hints(kind).items()}
        self._described: list[argparse.Action] = []
        self._listed: list[argparse.Action] = []
        self._foreign = [base.__name__ for base in map(_foreign_base, classes) if base is not None]
        self._line, self._example = (doc or "").strip().partition("\n")[0], example
        super().__init__(
            classes, prog=_command(), usage="%(prog)s [--config FILE] [FLAGS]", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        text = "YAML file of settings, which flags override; or the name of one that ships, such as llama7b-news"
        self.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=text)

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Add a flag under the title of its class. The help shows one of its spellings."""
        name = str(options.get("dest") or names[0].removeprefix("--"))
        title = self._titles.get(name)
        if title is None or options.get("action") == "store_false":  # --help, --config; --no_x beside --x
            if title is not None:
                options["help"] = argparse.SUPPRESS
            return super().add_argument(*names, **options)

        if title:
            if title != _RECIPE:
                options["help"] = _WORDS.get(name, options.get("help"))
            if title not in self._groups:
                self._groups[title] = self.add_argument_group(title)
            action = self._groups[title].add_argument(*names, **options)
            self._described.append(action)
        else:
            action = super().add_argument(*names, **options)
            self._listed.append(action)
            action.help = argparse.SUPPRESS
        # What the help and errors show. The parser has taken note of all spellings before.
        action.option_strings = [shown_flag(name)]
        if not action.choices:
            action.metavar = _TYPES.get(self._types[name], "STR")
        return action

    def format_help(self) -> str:
        """The help: the recipe's own flags and the common ones with their meaning, all others with their defaults."""
        width = shutil.get_terminal_size().columns - 2
        example = textwrap.fill(
            f"Example: {self.prog} {self._example}", width, subsequent_indent="  ", break_on_hyphens=False
        )
        self.description = f"{textwrap.fill(self._line, width)}\n\n{example}"
        for action in self._described:
            unset = action.default is None or action.default == []
            if not unset and action.help and "(default: " not in action.help:
                default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
                action.help += f" (default: {default})".replace("%", "%%")

        self.epilog = None
        if self._listed:
            listed = ", ".join(_with_default(action) for action in self._listed)
            title = f"further settings of {' and '.join(self._foreign)}, with their defaults (https://huggingface.co/docs/trl):"
            text = textwrap.fill(listed, width - 2, break_on_hyphens=False, break_long_words=False)
            self.epilog = f"{textwrap.fill(title, width)}\n{textwrap.indent(text, '  ')}".replace("\xa0", " ")
        return super().format_help()

    def error(self, message: str) -> Any:
        """Refuse a command line.

        Raises:
            SettingsError: Always.
        """
        end = "" if message.endswith(("?", ".")) else "."
        raise SettingsError(f"{message}{end} See: {self.prog} --help")

    def read(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parse a command line into one object of each class; flags override the config file.

        Args:
            argv: Words of the command line; those of this process if None.

        Raises:
            SettingsError: A flag, a key of the config file or a value is invalid, or settings contradict one another.
        """
        words = spelled_out(sys.argv[1:] if argv is None else argv)
        given = given_flags(words)
        known = {*self._titles, *(f"no_{name}" for name in self._titles), "config", "help"}
        if words.count("--config") > 1 or ("config" in given and given["config"] is None):
            self.error("--config needs one file")
        file = read_config(given.get("config"))
        for name in sorted(given.keys() - known):
            self.error(f"no flag {shown_flag(name)}.{_hint(name, known)}")
        for name in sorted(file.keys() - known - {"env"}):
            self.error(f"{given['config']} has no setting {name!r} of this recipe.{did_you_mean(name, known)}")
        for action in (*self._described, *self._listed):
            value = given.get(action.dest)
            if action.choices and value is not None and value not in map(str, action.choices):
                choices = [str(choice) for choice in action.choices]
                hint = did_you_mean(value, choices)
                self.error(f"{action.option_strings[0]} is {value!r}, must be one of {', '.join(choices)}.{hint}")

        try:
            *settings, _, extra = self.parse_args_and_config(words, True, separate_remaining_strings=True)
        except SettingsError:
            raise
        except ValueError as error:  # settings that contradict one another, for TRL or transformers
            raise SettingsError(str(error)) from error
        if extra:
            self.error(f"no flag takes {' '.join(map(repr, extra))}")
        return tuple(settings)


def _command() -> str:
    """The command that runs this recipe, as a user types it."""
    main: Any = sys.modules["__main__"]
    if command := getattr(main, "COMMAND", None):  # set by the command `rsoups`
        return str(command)
    module = getattr(main, "__spec__", None)
    return f"accelerate launch -m {module.name}" if module else f"accelerate launch {sys.argv[0]}"


def _title(kind: Any, name: str, first: bool) -> str:
    """Title that a setting has in the help; empty for one that the help only lists."""
    ours = _is_ours(kind) and name in inspect.get_annotations(kind)
    if first:
        return _RECIPE
    if ours or name in _COMMON:
        return "base and adapter" if kind.__name__ == "ModelConfig" else "training"
    return ""


def _is_ours(kind: Any) -> bool:
    return not kind.__module__.startswith(("trl.", "transformers."))


def _foreign_base(kind: Any) -> Any:
    """The class of TRL's that a class is or extends; None for a recipe's own."""
    return next((base for base in kind.__mro__ if not _is_ours(base)), None)


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind) if field.init]


def _plain(kind: Any) -> Any:
    """The plain type in a type hint: int in ``list[int] | None``."""
    inside = [each for each in get_args(kind) if each is not type(None)]
    return _plain(inside[0]) if inside else kind


def _with_default(action: argparse.Action) -> str:
    default = action.default
    shown = isinstance(default, bool | int | float) or (isinstance(default, str) and 0 < len(default) < 20)
    return f"{action.option_strings[0]}\xa0{default}" if shown else action.option_strings[0]


def _hint(name: str, known: set[str]) -> str:
    return did_you_mean(shown_flag(name), map(shown_flag, sorted(known)))
