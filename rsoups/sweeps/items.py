"""The units of a sweep's work."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rsoups.generation.decoding import Prompt, Said

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Model:
    """One model of the sweep: a soup, another adapter, the ensemble of the ingredients, or the base where it is none.

    Attributes:
        name: In the records.
        soup: λ by ingredient.
        other: Name of another adapter.
        ensemble: Whether it is the mean of the ingredients' next-token distributions.
    """

    name: str
    soup: Mapping[str, float] | None = None
    method: str | None = None
    other: str | None = None
    ensemble: bool = False

    @property
    def head(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"name": self.name, "lambdas": self.soup and dict(self.soup), "method": self.method}

    @property
    def key(self) -> str:
        return json.dumps([self.name, self.soup and dict(self.soup), self.method])


@dataclass(frozen=True, eq=False)
class Item:
    """One response to be made.

    Attributes:
        place: Of the prompt in the sweep.
        ids: The prompt's tokens.
        sample: Which response of this model to it.
    """

    model: Model
    place: int
    prompt: Prompt
    ids: list[int]
    sample: int


@dataclass(frozen=True)
class Answer:
    """A whole response: its text, how many tokens it has and, unless a server gave it, these and their log p."""

    text: str
    tokens: int
    said: Said | None = None


class Nats(NamedTuple):
    """What the base makes of a response, as records tell it; None where it is not known."""

    kl: float | None = None
    base_nll: float | None = None


def is_base(model: Model) -> bool:
    return model.soup is None and model.other is None and not model.ensemble
