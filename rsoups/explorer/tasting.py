"""The explorer's actions on a sweep, without the page: move λ, read responses, vote blind, save or publish a soup."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rsoups.common.errors import DatasetError, HubError
from rsoups.explorer.streaming import stream
from rsoups.explorer.sweep_folder import Frame, Prompt, SweepFolder
from rsoups.fronts.votes import fit_votes
from rsoups.soups.live import LiveSoup

LONGEST = 512  # tokens of a response
_ABSOLUTE = re.compile(r"(?<![\w:/.])/(?:[^\s'\"/]+/)*")  # the folders of an absolute path


def rescaled(lambdas: Sequence[float], moved: int, value: float) -> list[float]:
    """λ after one of them moves to a value: the others are scaled so that all sum to 1 (equal shares if they were all 0)."""
    others = sum(weight for i, weight in enumerate(lambdas) if i != moved)
    rest = 1 - value
    scaled = [weight / others * rest if others > 0 else rest / (len(lambdas) - 1) for weight in lambdas]
    scaled[moved] = value
    return scaled


@dataclass(frozen=True)
class Settings:
    """Settings of the generation: temperature (0 is greedy), length of the longest response in tokens, seed."""

    temperature: float
    max_new_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2 or not 1 <= self.max_new_tokens <= LONGEST or not 0 <= self.seed < 2**32:
            raise DatasetError(
                f"got {self}: temperature is 0 to 2, the longest response 1 to {LONGEST} tokens, the seed 0 or above"
            )


@dataclass(frozen=True)
class Reading:
    """Responses to one prompt: of the soup at the chosen λ, of each ingredient alone, of the base.

    Attributes:
        request: Prompt and settings.
        texts: Responses in that order; empty if not generated yet.
        busy: Places of the responses that are still growing.
    """

    request: tuple[Prompt, Settings]
    texts: tuple[str, ...]
    busy: range = range(0)


@dataclass(frozen=True)
class Question:
    """Two responses, whose λ are hidden until somebody has chosen.

    Attributes:
        prompt: Prompt of both.
        lambdas: λ of a and of b.
        texts: Responses a and b.
        busy: Whether they are still growing.
    """

    prompt: Prompt
    lambdas: tuple[dict[str, float], dict[str, float]]
    texts: tuple[str, str]
    busy: bool = False


class Tasting:
    """A sweep and its live model.

    Attributes:
        sweep: Folder of the sweep.
        live: Live model of its ingredients.
        front: Front of its records.
        names: Names of the ingredients, in the order of λ.
        frame: Frame of its prompts.
        votes: Utility of λ according to all votes so far.
        suggestion: Soup of the front that the votes like best; None without votes.
    """

    def __init__(self, sweep: SweepFolder, live: LiveSoup):
        self.sweep, self.live, self.front, self.names = sweep, live, sweep.front, live.names
        self.frame = Frame.of(sweep.prompts)
        self._random = random.Random()
        self._count_votes()

    def mix(self, values: Sequence[float]) -> dict[str, float]:
        """Numbers, not all 0, as λ by ingredient."""
        total = sum(values) or 1.0
        return {name: value / total for name, value in zip(self.names, values, strict=True)}

    def read(
        self, typed: str, lambdas: dict[str, float], settings: Settings, known: Reading | None = None
    ) -> Iterator[Reading]:
        """Responses as they grow.

        Args:
            typed: Question or prompt.
            lambdas: Chosen λ.
            settings: Settings of the generation.
            known: Reading before; if it has the same prompt and settings, only the soup responds again.

        Raises:
            DatasetError: As in `stream` and `Frame.prompt`.
        """
        request = self.frame.prompt(typed), settings
        ends = [[float(i == j) for j in range(len(self.names))] for i in range(len(self.names))]
        rows: list[list[float] | None] = [list(lambdas.values())]
        if known is not None and known.request == request and not known.busy:
            texts = ["", *known.texts[1:]]
        else:
            rows += [*ends, None]
            texts = [""] * len(rows)
        for step in self._stream(request, rows):
            texts[: len(rows)] = step
            yield Reading(request, tuple(texts), range(len(rows)))
        yield Reading(request, tuple(texts))

    def ask(self, typed: str | None, settings: Settings) -> Iterator[Question]:
        """Two responses to one prompt, at the two λ of the front whose comparison tells most, in random order.

        Args:
            typed: Question or prompt; None means one of the sweep's at random.
            settings: Settings of the generation.
        """
        prompt = self._random.choice(self.sweep.prompts) if typed is None else self.frame.prompt(typed)
        first, second = self.votes.ask([point.lambdas or {} for point in self.front.soups])
        sides = (first, second) if self._random.random() < 0.5 else (second, first)
        texts = ("", "")
        for a, b in self._stream((prompt, settings), [list(lambdas.values()) for lambdas in sides]):
            texts = (a, b)
            yield Question(prompt, sides, texts, busy=True)
        yield Question(prompt, sides, texts)

    def vote(self, question: Question, choice: str) -> None:
        """Write down a choice: ``"a"``, ``"b"`` or ``"tie"``."""
        pairs = zip(question.lambdas, question.texts, strict=True)
        a, b = ({"lambdas": lambdas, "response": text} for lambdas, text in pairs)
        self.sweep.vote(question.prompt, a, b, choice)
        self._count_votes()

    def _count_votes(self) -> None:
        self.votes = fit_votes(self.sweep.votes(), self.names)
        self.suggestion = self.front.select(votes=self.votes) if self.votes.votes else None

    def save(self, lambdas: dict[str, float], name: str) -> str:
        """Save the soup at λ. Returns its folder within the sweep's."""
        return self.sweep.save(self.live.to_soup(list(lambdas.values())), name.strip())

    def push(self, lambdas: dict[str, float], repo_id: str, private: bool) -> str:
        """Publish the soup at λ with huggingface_hub's own token. Returns the URL of the commit.

        Raises:
            HubError: As in `Soup.push_to_hub`; a name that is not ``user/name``.
        """
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        repo_id = repo_id.strip()
        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            repo_id = ""
        if repo_id.count("/") != 1:
            raise HubError("where to? A repository on the Hub is user/name")
        return self.live.to_soup(list(lambdas.values())).push_to_hub(repo_id, private=private)

    def plain(self, error: Exception) -> str:
        """The text of an error, without the names of this machine's folders."""
        text = str(error)
        for folder in (str(self.sweep.folder.resolve()), str(self.sweep.folder)):
            if len(folder) > 1:
                text = text.replace(folder, "the sweep's folder")
        return _ABSOLUTE.sub("", text)

    def _stream(self, request: tuple[Prompt, Settings], rows: Sequence[Sequence[float] | None]) -> Iterator[list[str]]:
        prompt, settings = request
        template = self.sweep.settings.chat_template_kwargs
        return stream(self.live, prompt, rows, template=template, **vars(settings))
