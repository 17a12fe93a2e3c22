"""Words of the recipes' command lines, and config files by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rsoups.common.assets import shipped
from rsoups.common.errors import SHORT_NAMES

_LONG_NAMES = {short: name for name, short in SHORT_NAMES.items()}
_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


def config_path(name: str) -> Path:
    """Path of a config that ships: recipes/configs/NAME.yaml."""
    return shipped("recipes") / "configs" / f"{name}.yaml"


def spelled_out(argv: Sequence[str]) -> list[str]:
    """The words of a command line, with each flag as its setting is called, and the path of a config that ships.

    ``--learning-rate`` becomes ``--learning_rate``, ``--base`` ``--model_name_or_path``, and ``--out`` ``--output_dir``.
    """
    words = []
    for word in argv:
        if flag := _FLAG.fullmatch(word):
            name, value = flag[1].replace("-", "_"), flag[2]
            word = f"--{_LONG_NAMES.get(name, name)}" + ("" if value is None else f"={value}")
        words.append(word)
    return with_config_path(words)


def given_flags(words: Sequence[str]) -> dict[str, str | None]:
    """Names of the flags among words, each with its first value; None for a flag without one."""
    given: dict[str, str | None] = {}
    for place, word in enumerate(words, 1):
        if flag := _FLAG.fullmatch(word):
            value = next((following for following in words[place : place + 1] if not _FLAG.fullmatch(following)), None)
            given[flag[1]] = value if flag[2] is None else flag[2]
    return given


def with_config_path(argv: Sequence[str]) -> list[str]:
    """The flags, in which `--config llama7b-news` becomes the path of the config that ships under this name."""
    flags: list[str] = []
    for flag in argv:
        # TrlParser does not know the form --config=FILE.
        flags += flag.split("=", 1) if flag.startswith("--config=") else [flag]
    for place, flag in enumerate(flags[:-1], 1):
        path = config_path(Path(flags[place]).stem)
        if flag == "--config" and not Path(flags[place]).exists() and path.is_file():
            flags[place] = str(path)
    return flags
