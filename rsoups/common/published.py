"""Leave paths of this disk and tokens out of everything that others read."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path, PureWindowsPath
from typing import Any

_ROOT = re.compile(r"/|~[\w.-]*(/|$)|\\\\|[A-Za-z]:[\\/]")
# A path inside a longer text: after a character that separates, as in --out=/home/me/x or a=/x,b=../y.
_PATH_INSIDE = re.compile(
    r"""(?<![^\s=,;:"'\[({<|])(?:file://)?(?:~[\w.-]*/|/(?!/)|[A-Za-z]:[\\/](?!/)|(?:\./)*\.\./)[^\s=,;:"'\])}>|]+"""
)
_TOKEN = re.compile(r"\bhf_\w+|(?<=token=).+")
# Fields whose values a model reads: a slash in them does not make a path.
_TEXTS = {"template", "input", "question", "system", "rubric", "prompt"}


def is_disk_path(text: str) -> bool:
    """Whether a text is a path from the root, a home folder or a drive, or one that leads upwards."""
    path = text.removeprefix("file://")
    return bool(_ROOT.match(path)) or ".." in PureWindowsPath(path).parts


def published(source: str) -> str:
    """A source without the path of this disk.

    Of a path that `is_disk_path` names, the last part is left, or everything from `recipes` on. A Hub id, or a path below the
    current folder, is returned unchanged.
    """
    if not is_disk_path(source):
        return source
    parts = PureWindowsPath(source.removeprefix("file://")).parts  # it takes slashes of both kinds
    return "/".join(parts[parts.index("recipes") :]) if "recipes" in parts else parts[-1].strip("\\/")


def without_paths(text: str) -> str:
    """A text, for example a word of a command, with `published` applied to each path in it."""
    flag, separator, value = text.partition("=")
    # Where a path with spaces ends is known only if the whole value is the path.
    if " " in value and is_disk_path(value):
        return f"{flag}{separator}{published(value)}"
    if " " in text and _ROOT.match(text):
        return published(text)
    return _PATH_INSIDE.sub(lambda match: published(match[0]), text)


def scrubbed(value: Any) -> Any:
    """Nested data without paths of this disk."""
    if isinstance(value, dict):
        return {key: _scrubbed_field(key, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrubbed(each) for each in value]
    return published(value) if isinstance(value, str) else value


def _scrubbed_field(key: str, value: Any) -> Any:
    if key == "command":
        return without_paths(str(value))
    return value if key in _TEXTS else scrubbed(value)


def command() -> str:
    """The running command, without absolute paths and tokens."""
    program, *words = sys.argv or [""]
    path = Path(program)
    head = "rsoups" if path.parts[-3:] == ("rsoups", "cli", "__main__.py") else published(program)
    if path.suffix == ".py" and head != "rsoups":
        head = f"python {head}"

    shown = [_TOKEN.sub("...", without_paths(word)) for word in words]
    for at, before in enumerate(words[:-1], 1):
        if before.endswith("token"):
            shown[at] = "..."
    return f"{head} {shlex.join(shown)}".strip()
