"""Average the scores of several reward models."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rsoups.common.errors import RewardError, RsoupsError
from rsoups.rewards.cards import RewardCard
from rsoups.rewards.classifier import Reward

logger = logging.getLogger(__name__)


class AveragedScores:
    """Several loaded reward models, of any kinds: the score is the weighted mean of theirs."""

    columns: tuple[str, ...] = ()

    def __init__(self, card: RewardCard, device: str = "cpu", trust_remote_code: bool = False):
        from rsoups.soups.lambdas import weights_of

        self.card = card
        self.name = self.__name__ = card.name
        sources = [source.partition("@") for source in card.models or ()]
        try:
            (self.lambdas,) = weights_of(card.lambdas, len(sources), False, False)
        except RsoupsError as error:
            raise RewardError(f"reward card {self.name!r}: {error}") from error
        one = replace(card, models=None, average=None, lambdas=None, model="")
        self.members = [
            Reward(replace(one, model=model, revision=revision or None), device, trust_remote_code)
            for model, _, revision in sources
        ]

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        """Score each response to its prompt; errors as of `Reward`."""
        rows = zip(*(member(prompts, responses) for member in self.members), strict=True)
        return [math.fsum(weight * score for weight, score in zip(self.lambdas, row, strict=True)) for row in rows]
