"""Config files of the recipes, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rsoups.common.assets import shipped


def config_path(name: str) -> Path:
    """Path of a config that ships: recipes/configs/NAME.yaml."""
    return shipped("recipes") / "configs" / f"{name}.yaml"


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
