"""What a person does with a sweep, without the page: move λ, read what it writes, vote blind, save a soup or publish it."""

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
_ABSOLUTE = re.compile(r"(?<![\w:/.])/(?:[^\s'\"/]+/)*")


def rescaled(lambdas: Sequence[float], moved: int, value: float) -> list[float]:
    """λ with one of them moved to a value, the others scaled so that all sum to 1 (shared equally where they were all 0)."""
    others = sum(x for i, x in enumerate(lambdas) if i != moved)
    rest = 1 - value
    return [
        value if i == moved else (x / others * rest if others > 0 else rest / (len(lambdas) - 1))
        for i, x in enumerate(lambdas)
    ]


@dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes:
        temperature: 0 is greedy.
        max_new_tokens: Longest response.
        seed: Of sampling.
    """

    temperature: float
    max_new_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2 or not 1 <= self.max_new_tokens <= LONGEST or not 0 <= self.seed < 2**32:
            raise DatasetError(
                f"temperature is 0 to 2, the longest response 1 to {LONGEST} tokens, the seed 0 or above"
            )


@dataclass(frozen=True)
class Reading:
    """Texts of one prompt: at the chosen λ, of each ingredient alone, of the base.

    Attributes:
        asked: The prompt and settings.
        texts: In that order; of ends and base, those known so far.
        busy: Places of the texts that are still being written.
    """

    asked: tuple[Prompt, Settings]
    texts: tuple[str, ...]
    busy: range = range(0)


@dataclass(frozen=True)
class Question:
    """Two texts whose λ are not told until someone has chosen.

    Attributes:
        prompt: As the policy read it.
        lambdas: Of a and of b.
        texts: Of a and of b.
        busy: Whether they are still being written.
    """

    prompt: Prompt
    lambdas: tuple[dict[str, float], dict[str, float]]
    texts: tuple[str, str]
    busy: bool = False


class Tasting:
    """A sweep and its live model.

    Attributes:
        found: The sweep.
        live: Its model.
        front: Its front.
        names: Of the ingredients, in λ's order.
        frame: Of its prompts.
        votes: What they say about λ so far.
        suggestion: The soup of the front that they like best, and how sure that is; None without votes.
    """

    def __init__(self, found: SweepFolder, live: LiveSoup):
        self.found, self.live, self.front, self.names = found, live, found.front, live.names
        self.frame = Frame.of(found.prompts)
        self._count()
        self._random = random.Random()

    def mix(self, values: Sequence[float]) -> dict[str, float]:
        """Numbers, not all 0, as λ by ingredient."""
        total = sum(values) or 1.0
        return {name: value / total for name, value in zip(self.names, values, strict=True)}

    def read(
        self, typed: str, lambdas: dict[str, float], settings: Settings, known: Reading | None = None
    ) -> Iterator[Reading]:
        """Texts as they grow.

        Args:
            typed: A question or a prompt.
            lambdas: The chosen λ.
            settings: Of the generation.
            known: What was read before: where it answers the same, ends and base are not written again.

        Raises:
            DatasetError: As `stream`, and `Frame.prompt`.
        """
        asked = self.frame.prompt(typed), settings
        ends = [[float(i == j) for j in range(len(self.names))] for i in range(len(self.names))]
        old = known is not None and known.asked == asked and not known.busy
        texts = ["", *(known.texts[1:] if old and known else [""] * (len(ends) + 1))]
        rows = [list(lambdas.values()), *([] if old else [*ends, None])]
        for step in self._stream(asked, rows):
            texts[: len(rows)] = step
            yield Reading(asked, tuple(texts), range(len(rows)))
        yield Reading(asked, tuple(texts))

    def ask(self, typed: str | None, settings: Settings) -> Iterator[Question]:
        """Two texts of one prompt at the two λ of the front that tell most, in an order that tells nothing.

        Args:
            typed: A question or a prompt; one of the sweep's at random if None.
            settings: Of the generation.
        """
        prompt = self._random.choice(self.found.prompts) if typed is None else self.frame.prompt(typed)
        first, second = self.votes.ask([point.lambdas or {} for point in self.front.soups])
        sides = (first, second) if self._random.random() < 0.5 else (second, first)
        texts = ("", "")
        for step in self._stream((prompt, settings), [list(lambdas.values()) for lambdas in sides]):
            texts = (step[0], step[1])
            yield Question(prompt, sides, texts, busy=True)
        yield Question(prompt, sides, texts)

    def vote(self, question: Question, choice: str) -> None:
        """Write down what was chosen: ``"a"``, ``"b"`` or ``"tie"``."""
        a, b = (
            {"lambdas": lambdas, "response": text}
            for lambdas, text in zip(question.lambdas, question.texts, strict=True)
        )
        self.found.vote(question.prompt, a, b, choice)
        self._count()

    def _count(self) -> None:
        self.votes = fit_votes(self.found.votes(), self.names)
        self.suggestion = self.front.select(votes=self.votes) if self.votes.votes else None

    def save(self, lambdas: dict[str, float], name: str) -> str:
        """Save the soup at λ. Returns where, from the sweep's folder on."""
        return self.found.save(self.live.to_soup(list(lambdas.values())), name.strip())

    def push(self, lambdas: dict[str, float], repo_id: str, private: bool) -> str:
        """Publish the soup at λ with huggingface_hub's own token. Returns the commit's URL.

        Raises:
            HubError: As `Soup.push_to_hub`, and a name that is not ``user/name``.
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
        """An error in words that tell nothing of this machine's folders."""
        text = str(error)
        for folder in (str(self.found.folder.resolve()), str(self.found.folder)):
            if len(folder) > 1:
                text = text.replace(folder, "the sweep's folder")
        return _ABSOLUTE.sub("", text)

    def _stream(self, asked: tuple[Prompt, Settings], rows: Sequence[Sequence[float] | None]) -> Iterator[list[str]]:
        prompt, settings = asked
        return stream(
            self.live,
            prompt,
            rows,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            template=self.found.settings.get("chat_template_kwargs"),
        )
