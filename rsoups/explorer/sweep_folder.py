"""The folder of a sweep: front, base and ingredients; votes and soups go back into it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.bases.compatibility import check_one_base
from rsoups.common.errors import AdapterError, DatasetError, FrontError, OutputError
from rsoups.common.files import read_jsonl
from rsoups.common.schema import validated
from rsoups.data.prompts import question_of
from rsoups.fronts.front import Front
from rsoups.fronts.votes import check_vote, read_votes
from rsoups.generation.decoding import Prompt
from rsoups.soups.soup import Soup

RECORDS, VOTES, SOUPS = "records.jsonl", "votes.jsonl", "soups"
LONGEST_PROMPT = 8_000  # characters
_FIRST = "make one first: `rsoups demo` (offline, minutes), then `rsoups explore demo`; or `rsoups sweep --help`"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Frame:
    """The text that all prompts of a sweep have around their questions; empty if it differs.

    Attributes:
        before, after: A prompt is ``before + question + after``.
        messages: Messages before the user's last one; None if prompts are texts.
    """

    before: str = ""
    after: str = ""
    messages: list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> Frame:
        """The frame of some prompts."""
        chats = [prompt[:-1] for prompt in prompts if isinstance(prompt, list)]
        if chats:
            return cls(messages=chats[0] if all(chat == chats[0] for chat in chats) else [])
        frames = set()
        for prompt in prompts:
            before, _, after = str(prompt).rpartition(question_of(prompt))
            frames.add((before, after))
        return cls(*frames.pop()) if len(frames) == 1 else cls()

    def prompt(self, typed: str) -> Prompt:
        """The prompt for what a person types: a question, or a whole prompt in the same frame.

        Raises:
            DatasetError: The text is empty, or too long.
        """
        if not typed.strip() or len(typed) > LONGEST_PROMPT:
            raise DatasetError(f"a prompt has between 1 and {LONGEST_PROMPT:,} characters, this one has {len(typed):,}")
        if self.messages is not None:
            return [*self.messages, {"role": "user", "content": typed.strip()}]
        if not (self.before or self.after) or (typed.startswith(self.before) and typed.endswith(self.after)):
            return typed
        return f"{self.before}{' '.join(typed.split())}{self.after}"

    def typed(self, prompt: Prompt) -> str:
        """What a person types for a prompt of the sweep."""
        return prompt if isinstance(prompt, str) and not (self.before or self.after) else question_of(prompt)


@checked_dataclass(frozen=True, config=ConfigDict(strict=True, extra="ignore"))
class SavedSettings:
    """The settings of a sweep, as far as the explorer reads them from its settings file."""

    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    base: str | None = None
    adapters: dict[str, str | None] | None = None
    base_mismatch_allowed: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> SavedSettings:
        """Read a settings file, if it exists.

        Raises:
            FrontError: The file does not hold the settings of a sweep.
        """
        if not path.exists():
            return cls()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FrontError(f"{path} is not JSON ({error}): it should hold the settings of a sweep") from None
        return validated(cls, data, str(path), FrontError)


@dataclass(frozen=True, eq=False)
class SweepFolder:
    """The folder of a sweep.

    Attributes:
        records: Records file.
        front: Front of the records.
        prompts: Prompts of the records, each once.
        base: Folder, Hub id or ``rsoups/...``.
        sources: Folders or Hub ids of the ingredients by name, in the order of λ.
        adapters: Ingredients by name, in the same order.
        method: Interpolation method of the soups.
        settings: Settings of the sweep.
        base_mismatch: Whether ingredients may name other bases.
    """

    records: Path
    front: Front
    prompts: list[Prompt]
    base: str
    sources: dict[str, str]
    adapters: dict[str, Adapter]
    method: str
    settings: SavedSettings
    base_mismatch: bool = False

    @classmethod
    def read(
        cls,
        path: str | Path | None,
        *,
        base: str | None = None,
        adapters: Mapping[str, str] | None = None,
        allow_base_mismatch: bool = False,
    ) -> SweepFolder:
        """Read the folder of a sweep, and find its models.

        Args:
            path: Folder, or the records file in it.
            base: Base; by default that of records.settings.json, else that of the ingredients' configs.
            adapters: Ingredients by name; by default those of records.settings.json, else the folders ``ppo-NAME`` beside the
                records. A file may only name Hub ids and folders within its own.
            allow_base_mismatch: Accept ingredients that name other bases, as the sweep may have done.

        Raises:
            FrontError: There is no sweep, or one without soups.
            AdapterError: An ingredient is missing or unreadable, or there is no base.
        """
        if path is None:
            raise FrontError(f"which sweep? Name its folder, or {_FIRST}")
        records = Path(path) if Path(path).is_file() else Path(path) / RECORDS
        if not records.is_file():
            raise FrontError(f"{path} holds no {RECORDS}: {_FIRST}")
        front = Front.from_jsonl(records)
        names = list(front.soups[0].lambdas or {}) if front.soups else []
        if len(names) < 2:
            raise FrontError(f"{records} holds no soups of two ingredients or more: there is no λ to choose")

        settings = SavedSettings.read(records.with_suffix(".settings.json"))
        sources = _sources(records.parent, names, settings, adapters or {})
        read = {name: read_adapter(source) for name, source in sources.items()}
        base = base or settings.base or read[names[0]].settings.base_model_name_or_path
        if not base:
            raise AdapterError("neither the sweep nor its ingredients name their base: say --base")
        allowed = allow_base_mismatch or settings.base_mismatch_allowed
        if not allowed:
            check_one_base(read.values())
        method = front.soups[0].method or "exact"
        prompts = list({json.dumps(row["prompt"]): row["prompt"] for row in read_jsonl(records)}.values())
        return cls(records, front, prompts, base, sources, read, method, settings, allowed)

    @property
    def folder(self) -> Path:
        """Folder of the records."""
        return self.records.parent

    def vote(self, prompt: Prompt, a: Mapping[str, Any], b: Mapping[str, Any], choice: str) -> None:
        """Append one choice to votes.jsonl.

        Args:
            prompt: Prompt of both responses.
            a, b: ``{"lambdas": {name: λ}, "response": text}``.
            choice: ``"a"``, ``"b"`` or ``"tie"``.

        Raises:
            VotesError: Another choice, or λ of other ingredients.
            OutputError: The file cannot be written.
        """
        vote = {"prompt": prompt, "a": dict(a), "b": dict(b), "choice": choice}
        check_vote("this choice", vote, list(self.adapters))
        try:
            with (self.folder / VOTES).open("ab") as file:
                file.write((json.dumps(vote) + "\n").encode())  # one write: lines of two processes do not mix
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"the vote was not written: {error.strerror or error}") from None

    def votes(self) -> list[dict[str, Any]]:
        """All votes so far.

        Raises:
            VotesError: A line is not a vote.
        """
        path = self.folder / VOTES
        return read_votes(path) if path.exists() else []

    def save(self, soup: Soup, name: str) -> str:
        """Save a soup in the folder's soups. Returns ``soups/NAME``.

        Raises:
            OutputError: The name is invalid or taken, or the folder cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise OutputError(
                "a soup's name is 1 to 64 letters, digits, dots, dashes and underscores, and begins with a letter or digit"
            )
        target = self.folder / SOUPS / name
        if not target.resolve().is_relative_to(self.folder.resolve()):
            raise OutputError(f"{SOUPS} leads out of the sweep's folder: nothing is written there")
        if target.exists():
            raise OutputError(f"{SOUPS}/{name} is there already: choose another name")
        soup.save_pretrained(target)
        return f"{SOUPS}/{name}"


def _sources(folder: Path, names: list[str], settings: SavedSettings, given: Mapping[str, str]) -> dict[str, str]:
    """Folders or Hub ids of the ingredients, by name."""
    if unknown := sorted(set(given) - set(names)):
        raise AdapterError(f"the sweep has no ingredients {unknown}: they are {names}")

    sources, outside = {}, {}
    for name in names:
        demo = f"ppo-{name}" if (folder / f"ppo-{name}").is_dir() else None
        source = (settings.adapters or {}).get(name) or demo
        if name in given:
            sources[name] = given[name]
        elif source and _leaves(folder, source):
            outside[name] = os.path.normpath(folder / source)
        elif source:
            sources[name] = str(folder / source) if (folder / source).exists() else source
    if outside:
        flags = " ".join(shlex.quote(f"{name}={path}") for name, path in outside.items())
        raise AdapterError(f"the sweep's ingredients are outside of its folder: if you trust them, --adapters {flags}")
    if missing := [name for name in names if name not in sources]:
        flags = " ".join(f"{name}=FOLDER" for name in missing)
        raise AdapterError(f"the sweep does not say where its ingredients {missing} are: --adapters {flags}")
    return sources


def _leaves(folder: Path, source: str) -> bool:
    """Whether a source in a file is a path out of the file's folder. (A Hub id is a path to nothing inside it.)"""
    path, root = PurePosixPath(source), folder.resolve()
    return path.is_absolute() or ".." in path.parts or not (folder / source).resolve().is_relative_to(root)
