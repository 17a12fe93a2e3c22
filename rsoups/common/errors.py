"""Typed errors: every refusal is a `RsoupsError` whose message names the cause and the remedy.

RsoupsError
├── AdapterError          an adapter folder, its config or its tensors (also a ValueError)
├── CheckpointError       a model's full weights (also a ValueError)
├── LambdasError          interpolation weights, method or rank (also a ValueError)
├── RewardError           a reward card, its model or its scores (also a ValueError)
├── SettingsError         settings of a run that contradict one another (also a ValueError)
├── DatasetError          prompts and datasets (also a ValueError)
├── FrontError            records and fronts (also a ValueError)
├── VotesError            choices between generations (also a ValueError)
├── TrainingError         a run that diverged: values are not finite, or far from the reference
├── OutputError           an output folder that is in use or cannot be written
├── LineageError          an invalid manifest, or a soup that differs from its manifest (also a ValueError)
├── SuiteError            an invalid test suite, or one that a soup fails (also a ValueError)
├── ServerError           a server that generates responses
└── HubError              publishing to or reading from the Hub
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

# Settings of TRL's, and the names that all commands have for them.
SHORT_NAMES = {"model_name_or_path": "base", "output_dir": "out"}


@contextmanager
def in_one_line() -> Iterator[None]:
    """A context for scripts: a `RsoupsError` becomes one line on stderr, and exit code 2."""
    try:
        yield
    except RsoupsError as error:
        print(one_line(error), file=sys.stderr)
        sys.exit(2)


def shown_flag(name: str) -> str:
    """The flag of a setting, as the help spells it: ``--max-steps`` for ``max_steps``."""
    return f"--{SHORT_NAMES.get(name, name).replace('_', '-')}"


def one_line(error: object) -> str:
    """An error as a command shows it: on one line, with flags as the help spells them.

    ``normalize=True`` becomes ``--normalize``, ``--output_dir`` ``--out``, and ``--max_steps`` ``--max-steps``.
    """

    def flag(match: re.Match[str]) -> str:
        return shown_flag(match[1])

    words = " ".join(str(error).split())  # other libraries' reasons have several lines
    words = re.sub(r"(?<==True) \(on the command line --[\w-]+\)", "", words)  # for those who read it in Python
    words = re.sub(r"(?<![\w.-])([a-z][a-z_]+)=(?:True|(?=[\s),.;:]|$))", flag, words)
    return "rsoups: " + re.sub(r"(?<![\w-])--([a-z][a-z0-9_]+)", flag, words)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" for a misspelled name, with a space before it; nothing if no known name is near."""
    near = get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class RsoupsError(Exception):
    """Base of all errors that rsoups raises on purpose."""


class AdapterError(RsoupsError, ValueError):
    """An adapter that cannot be read, or cannot be part of an exact soup."""


class CheckpointError(RsoupsError, ValueError):
    """Full weights that cannot be read, or cannot be added to others."""


class LambdasError(RsoupsError, ValueError):
    """Interpolation weights of the wrong number, not finite, not summing to 1, or outside [0, 1]; no such method or rank."""


class RewardError(RsoupsError, ValueError):
    """A reward card that is invalid, or a reward that returned something other than one finite number per sample."""


class SettingsError(RsoupsError, ValueError):
    """Settings of a run that contradict one another, or that do not divide."""


class DatasetError(RsoupsError, ValueError):
    """A dataset that is empty, malformed, or lacks a column."""


class FrontError(RsoupsError, ValueError):
    """Records that do not make a front."""


class VotesError(RsoupsError, ValueError):
    """Votes that are malformed, or not about the ingredients asked for."""


class TrainingError(RsoupsError):
    """A training run that was stopped because it diverged; the last checkpoint is usable."""


class OutputError(RsoupsError):
    """An output folder that is in use by another process or cannot be written."""


class LineageError(RsoupsError, ValueError):
    """A manifest that cannot be read, ingredients that are missing, or a soup that differs from its manifest."""


class SuiteError(RsoupsError, ValueError):
    """A test suite that cannot be read, or that a model fails."""


class ServerError(RsoupsError):
    """A server that should generate responses refused, or could not be reached."""


class HubError(RsoupsError):
    """The Hub refused, or could not be reached."""
