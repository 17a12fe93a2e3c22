"""The units of a sweep's work: models, responses to generate, and responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rsoups.fronts.points import BASE, SOUP, Named
from rsoups.generation.decoding import Prompt, Response

ENSEMBLE = "ensemble"


@dataclass(frozen=True, eq=False)
class Model(Named):
    """One model of the sweep: a soup, the base, another adapter, or the ensemble of the ingredients.

    Attributes:
        name: Name in the records.
        lambdas: λ by ingredient; None unless the model is a soup.
        method: Interpolation method; None unless the model is a soup.
    """

    name: str
    lambdas: Mapping[str, float] | None = None
    method: str | None = None

    @property
    def other(self) -> str | None:
        """Name of the model among the other adapters; None if it is not one of them."""
        return None if self.name in (SOUP, BASE, ENSEMBLE) else self.name

    @property
    def is_base(self) -> bool:
        """Whether the model is the base, without any adapter."""
        return self.name == BASE

    @property
    def is_ensemble(self) -> bool:
        """Whether the model is the mean of the ingredients' next-token distributions."""
        return self.name == ENSEMBLE


@dataclass(frozen=True, eq=False)
class Item:
    """One response to generate.

    Attributes:
        model: Model that responds.
        place: Place of the prompt in the sweep.
        prompt: Text or messages.
        ids: Tokens of the prompt.
        sample: Number of the response among those of this model to this prompt, from 0.
    """

    model: Model
    place: int
    prompt: Prompt
    ids: list[int]
    sample: int


@dataclass(frozen=True)
class Answer:
    """A whole response.

    Attributes:
        text: Text without special tokens.
        tokens: Number of tokens, the one that ends it included.
        response: Tokens and their log-probability, of a response that was generated here.
        ids: Tokens of a server's response; None if the server does not tell them.
    """

    text: str
    tokens: int
    response: Response | None = None
    ids: list[int] | None = None


class Nats(NamedTuple):
    """KL to the base and negative log-likelihood under the base, of a whole response, in nats; None if unknown."""

    kl: float | None = None
    base_nll: float | None = None


def by_model(items: list[Item]) -> list[list[Item]]:
    """Items of each model, in order."""
    groups: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(item.model.key, []).append(item)
    return list(groups.values())
