"""The one interface of rewards, which `sweep`, `probe`, `rsoups score` and TRL's trainers call; checks of data and scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rsoups.common.errors import RewardError, RsoupsError
from rsoups.data.prompts import whole_response


class LoadedReward(ABC):
    """A reward of any kind: prompts and responses in, one number each out (None: no opinion on a response).

    TRL's trainers (PPOTrainer, GRPOTrainer, RLOOTrainer) take it in `reward_funcs` as it is: they call it as
    ``reward(prompts=..., completions=..., **columns)`` and log it under its ``__name__``.

    Attributes:
        name: Name in records, logs and plots.
        columns: Names of the dataset's columns that it reads beside prompts and responses.
        needs: Those of them that it cannot do without.
        card: Card that it was loaded from; None for a function of one's own.
        is_model: Whether it runs a model in this process. Two models on the same cores slow each other down.
    """

    name: str
    columns: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    card: Any = None
    is_model: bool = False

    @property
    def __name__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        summary = " ".join(self.card.summary().split()) if self.card else "a function"
        return f"{type(self).__name__}({self.name}: {summary})"

    def __call__(
        self,
        prompts: Sequence[Any],
        responses: Sequence[str] | None = None,
        *,
        completions: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[Any]:
        """Score each response to its prompt.

        Args:
            prompts: Policy prompts (a reward model is asked about their question), bare questions, or messages.
            responses: As many responses.
            completions: Instead of `responses`, TRL's: texts, or lists of messages. A reward scores the last message, and of
                a text also the words of the response that the prompt already holds.
            columns: Columns of the dataset, a value for each prompt, and what TRL passes along with them.

        Raises:
            RewardError: Unequal numbers, a missing column, a reward that raised an exception, or a score that is not finite;
                the sample is shown.
        """
        if completions is not None:
            responses = [whole_response(*pair) for pair in zip(prompts, completions, strict=True)]
        responses = list(responses or ())
        if len(prompts) != len(responses):
            raise RewardError(f"reward {self.name!r} got {len(prompts)} prompts but {len(responses)} responses")
        if not responses:
            return []
        if missing := [name for name in self.needs if columns.get(name) is None]:
            raise RewardError(f"reward {self.name!r} needs the column(s) {missing} beside prompts and responses")

        try:
            scores = self._scores(list(prompts), responses, columns)
        except RsoupsError:
            raise
        except Exception as error:
            raise RewardError(
                f"reward {self.name!r} raised {type(error).__name__}: {error}; the batch begins with prompt {prompts[0]!r}, "
                f"response {responses[0]!r}"
            ) from error

        check_scores(self.name, scores, prompts, responses)
        return scores

    @abstractmethod
    def _scores(self, prompts: list[Any], responses: list[str], columns: dict[str, Any]) -> list[Any]:
        """Return a float for each response, or None."""


def check_scores(name: str, scores: Sequence[float | None], prompts: Sequence[Any], responses: Sequence[Any]) -> None:
    """Refuse scores that would poison a run; None is no score, and passes.

    Raises:
        RewardError: Not one score per sample, or a score that is NaN or infinite; the error names the reward and the sample.
    """
    if len(scores) != len(responses):
        begins = f"; the batch begins with prompt {prompts[0]!r}, response {responses[0]!r}" if len(prompts) else ""
        raise RewardError(f"reward {name!r} returned {len(scores)} scores for {len(responses)} responses{begins}")

    for score, prompt, response in zip(scores, prompts, responses, strict=True):
        if score is not None and not math.isfinite(score):
            raise RewardError(f"reward {name!r} returned {score} for prompt {prompt!r}, response {response!r}")


def columns_read(rewards: Iterable[Any]) -> set[str]:
    """Return the names of the dataset's columns that rewards read."""
    return {name for reward in rewards for name in getattr(reward, "columns", ())}


def check_columns(rewards: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> None:
    """Refuse data without the columns that its rewards need, before anything is generated.

    A function of one's own gets what a row has, None included; a card's function needs a value in every row.

    Args:
        rewards: Loaded rewards.
        columns: Columns of the data, a value for each row.

    Raises:
        RewardError: A needed column is missing, or is empty where it must not be.
    """
    for reward in rewards:
        for name in getattr(reward, "needs", ()):
            values = columns.get(name, ())
            if all(value is None for value in values):
                raise RewardError(
                    f"reward {reward.name!r} needs a column {name!r}, the dataset gives {sorted(columns)}: choose a --dataset "
                    "that has it"
                )

            empty = sum(value is None or value == "" or value == [] for value in values)
            if empty and reward.card is not None:
                raise RewardError(
                    f"reward {reward.name!r} needs {name!r} of every row: {empty} of {len(values)} have none"
                )


def rewards_by_name(loaded: Mapping[str, LoadedReward]) -> dict[str, LoadedReward]:
    """Return rewards by their names.

    Args:
        loaded: Rewards by the source that each was loaded from.

    Raises:
        RewardError: Two have one name.
    """
    sources: dict[str, str] = {}
    for source, reward in loaded.items():
        if reward.name in sources:
            raise RewardError(
                f"two rewards have the name {reward.name!r}, {sources[reward.name]} and {source}: "
                "give each its own, in its card or as the function's name"
            )
        sources[reward.name] = source

    return {name: loaded[source] for name, source in sources.items()}
