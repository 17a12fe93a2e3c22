"""What a sweep left in a folder, ready to be looked at: front, base, ingredients. Votes and soups go back into it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.bases.compatibility import check_one_base
from rsoups.common.errors import AdapterError, DatasetError, FrontError, OutputError
from rsoups.common.files import read_jsonl
from rsoups.data.prompts import question_of
from rsoups.fronts.front import Front
from rsoups.fronts.votes import check_vote, read_votes
from rsoups.soups.soup import Soup

RECORDS, VOTES, SOUPS = "records.jsonl", "votes.jsonl", "soups"
_FIRST = "make one first: `rsoups demo` (offline, minutes), then `rsoups explore demo`; or `rsoups sweep --help`"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LONGEST_PROMPT = 8_000  # characters


Prompt = str | list[dict[str, Any]]  # a text, or messages for the tokenizer's chat template


@dataclass(frozen=True)
class Frame:
    """What all prompts of a sweep share around their questions; empty where they do not.

    Attributes:
        before, after: A prompt is ``before + question + after``.
        messages: Those before the user's last one, where prompts are messages; None where they are texts.
    """

    before: str = ""
    after: str = ""
    messages: list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> Frame:
        chats = [prompt[:-1] for prompt in prompts if isinstance(prompt, list)]
        if chats:
            return cls(messages=chats[0] if all(chat == chats[0] for chat in chats) else [])
        found = set()
        for prompt in prompts:
            assert isinstance(prompt, str)
            before, _, after = prompt.rpartition(question_of(prompt))
            found.add((before, after))
        return cls(*found.pop()) if len(found) == 1 else cls()

    def prompt(self, typed: str) -> Prompt:
        """What the policy reads where a person has typed this: a question, or a whole prompt in the same frame.

        Raises:
            DatasetError: Nothing, or very much.
        """
        if not typed.strip() or len(typed) > LONGEST_PROMPT:
            raise DatasetError(f"a prompt has between 1 and {LONGEST_PROMPT:,} characters, this one has {len(typed):,}")
        if self.messages is not None:
            return [*self.messages, {"role": "user", "content": typed.strip()}]
        if not (self.before or self.after) or (typed.startswith(self.before) and typed.endswith(self.after)):
            return typed
        return f"{self.before}{' '.join(typed.split())}{self.after}"

    def typed(self, prompt: Prompt) -> str:
        """What to type for a prompt of the sweep."""
        return prompt if isinstance(prompt, str) and not (self.before or self.after) else question_of(prompt)


@dataclass(frozen=True, eq=False)
class SweepFolder:
    """A sweep's folder.

    Attributes:
        records: The file of records.
        front: Of the records.
        prompts: Of the records, each once.
        base: Folder, Hub id or ``rsoups/...``.
        sources: Folders or Hub ids of the ingredients, by name, in λ's order.
        adapters: The same, read.
        method: Of the soups.
        settings: Of the sweep, as it wrote them; empty where it did not.
        base_mismatch: Whether ingredients that name other bases are let in.
    """

    records: Path
    front: Front
    prompts: list[Prompt]
    base: str
    sources: dict[str, str]
    adapters: dict[str, Adapter]
    method: str
    settings: dict[str, Any]
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
        """Read a sweep's folder, and find its models.

        Args:
            path: The folder, or the records file in it.
            base: The one that records.settings.json or the ingredients' configs name, by default.
            adapters: Ingredients by name; those that records.settings.json names, or ``ppo-NAME`` beside the records, by
                default. A file may only name Hub ids and folders within its own.
            allow_base_mismatch: Accept ingredients that name other bases, as the sweep may have done.

        Raises:
            FrontError: No sweep there, or one without soups.
            AdapterError: An ingredient that is not found or not readable, or no base.
        """
        if path is None:
            raise FrontError(f"which sweep? Name its folder, or {_FIRST}")
        records = Path(path) if Path(path).is_file() else Path(path) / RECORDS
        if not records.is_file():
            raise FrontError(f"{path} holds no {RECORDS}: {_FIRST}")
        front = Front.from_jsonl(records)
        if not front.soups or len(front.soups[0].lambdas or {}) < 2:
            raise FrontError(f"{records} holds no soups of two ingredients or more: there is no λ to choose")
        settings = _settings(records.with_suffix(".settings.json"))
        sources = _sources(records.parent, list(front.soups[0].lambdas or {}), settings, adapters or {})
        read = {name: read_adapter(source) for name, source in sources.items()}
        base = base or settings.get("base") or next(iter(read.values())).config.base_model_name_or_path
        if not base:
            raise AdapterError("neither the sweep nor its ingredients name their base: say --base")
        allowed = allow_base_mismatch or settings.get("base_mismatch_allowed") is True
        if not allowed:
            check_one_base(read.values())
        method = front.soups[0].method or "exact"
        prompts = list({json.dumps(row["prompt"]): row["prompt"] for row in read_jsonl(records)}.values())
        return cls(records, front, prompts, base, sources, read, method, settings, allowed)

    @property
    def folder(self) -> Path:
        """Where the records lie."""
        return self.records.parent

    def vote(self, prompt: Prompt, a: Mapping[str, Any], b: Mapping[str, Any], choice: str) -> None:
        """Append one choice to votes.jsonl.

        Args:
            prompt: As the policy read it.
            a, b: ``{"lambdas": {name: λ}, "response": text}``.
            choice: ``"a"``, ``"b"`` or ``"tie"``.

        Raises:
            VotesError: The choice is another one, or the λ are not of these ingredients.
            OutputError: The file cannot be written.
        """
        vote = {"prompt": prompt, "a": dict(a), "b": dict(b), "choice": choice}
        check_vote("this choice", vote, list(self.adapters))
        line = json.dumps(vote) + "\n"
        try:
            with (self.folder / VOTES).open("ab") as file:  # one write: lines of two processes do not mix
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"the vote was not written: {error.strerror or error}") from None

    def votes(self) -> list[dict[str, Any]]:
        """All votes so far.

        Raises:
            VotesError: A line that is not a vote.
        """
        path = self.folder / VOTES
        return read_votes(path) if path.exists() else []

    def save(self, soup: Soup, name: str) -> str:
        """Save a soup in the folder's soups.

        Returns:
            ``soups/NAME``.

        Raises:
            OutputError: The name is none, or taken, or the folder cannot be written.
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


def _settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FrontError(f"{path} is not JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("adapters", {}), dict):
        raise FrontError(f"{path} holds no settings of a sweep")
    for name, kind in (
        ("temperature", (int, float)),
        ("max_new_tokens", int),
        ("base", str),
        ("chat_template_kwargs", dict),
    ):
        if not isinstance(found.get(name), (kind, NoneType)):
            raise FrontError(f"{path}: {name} is {found[name]!r}: these are no settings of a sweep")
    return found


def _sources(folder: Path, names: list[str], settings: dict[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    if unknown := sorted(set(given) - set(names)):
        raise AdapterError(f"the sweep has no ingredients {unknown}: they are {names}")
    named = {name: source for name, source in settings.get("adapters", {}).items() if isinstance(source, str)}
    found, outside = {}, {}
    for name in names:
        beside = f"ppo-{name}" if (folder / f"ppo-{name}").is_dir() else None  # as the demo leaves them
        source = given.get(name) or named.get(name) or beside
        if name in given:
            found[name] = str(source)
        elif source and _leaves(folder, source):
            outside[name] = os.path.normpath(folder / source)
        elif source:
            found[name] = str(folder / source) if (folder / source).exists() else source
    if outside:
        flags = " ".join(shlex.quote(f"{name}={path}") for name, path in outside.items())
        raise AdapterError(f"the sweep's ingredients are outside of its folder: if you trust them, --adapters {flags}")
    if missing := [name for name in names if name not in found]:
        flags = " ".join(f"{name}=FOLDER" for name in missing)
        raise AdapterError(f"the sweep does not say where its ingredients {missing} are: --adapters {flags}")
    return found


def _leaves(folder: Path, source: str) -> bool:
    """Whether what a file names is outside of the file's own folder. (A Hub id is inside, where nothing is.)"""
    parts = PurePosixPath(source)
    return (
        parts.is_absolute() or ".." in parts.parts or not (folder / source).resolve().is_relative_to(folder.resolve())
    )
