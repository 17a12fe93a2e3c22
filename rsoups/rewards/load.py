"""Load a reward by the name of its card, a file or a Hub id."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from rsoups.common.assets import shipped
from rsoups.common.errors import RewardError, did_you_mean
from rsoups.common.files import is_hub_name
from rsoups.rewards.averaged import AveragedScores
from rsoups.rewards.cards import RewardCard, made, read_card_file
from rsoups.rewards.classifier import Reward
from rsoups.rewards.functions import FunctionCard, FunctionReward, imported
from rsoups.rewards.judge import Judge, JudgeCard

logger = logging.getLogger(__name__)


def cards() -> dict[str, Path]:
    """Names and files of the cards that ship with rsoups."""
    return {path.stem: path for path in sorted(shipped("rewards").glob("*.yaml"))}


class LoadedReward(Protocol):
    """What `load_reward` returns, whatever its kind: prompts and responses in, one float each out (None: no opinion).

    Attributes:
        name: Of records, logs and plots.
        columns: Those of a dataset that it looks at beside prompts and responses, passed by name.
    """

    name: str
    columns: tuple[str, ...]

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[Any]: ...


def read_card(path: str | Path) -> RewardCard | FunctionCard | JudgeCard:
    """Read and check a card of any kind.

    Raises:
        RewardError: Not a YAML mapping, an unknown or missing key, or a value that is out of range.
    """
    data = read_card_file(path)
    kind: Any = JudgeCard if "judge" in data else FunctionCard if "function" in data else RewardCard
    return made(kind, data, str(path))


def _of_card(
    card: RewardCard | FunctionCard | JudgeCard, device: str, trust_remote_code: bool, arguments: dict[str, Any]
) -> LoadedReward:
    if isinstance(card, FunctionCard):
        return FunctionReward.of(replace(card, arguments={**card.arguments, **arguments}))
    if arguments:
        raise RewardError(
            f"reward {card.name!r} is a model: only a function's card takes arguments, {sorted(arguments)}"
        )
    if isinstance(card, JudgeCard):
        return Judge(card, device, trust_remote_code)
    kind = AveragedScores if card.average == "scores" else Reward
    return kind(card, device, trust_remote_code)


def load_reward(
    source: str | Path | Callable[..., Any],
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
    **arguments: Any,
) -> LoadedReward:
    """Load a reward.

    Args:
        source: A shipped card's name (``"naturalness"``, ``"rouge-l"``, ...), the path of a YAML card, a sequence classifier's
            Hub id or folder (read as ``tokenizer(question, response)``, score logits[0]), ``"module:function"`` (also of a
            file beside you), or a function.
        device: Where a model runs.
        trust_remote_code: Run Python code that comes with a model, of a kind that transformers does not know.
        arguments: Of the function that a card names, over the card's own.

    Raises:
        RewardError: No such reward (the shipped ones are listed), or an invalid one.
    """
    text, known = str(source), cards()
    path = known.get(text, Path(text))
    if not callable(source) and path.is_file():
        return _of_card(read_card(path), device, trust_remote_code, arguments)
    if arguments:
        raise RewardError(f"{text} is no card: only a function that a card names takes arguments, {sorted(arguments)}")
    if callable(source):
        return FunctionReward(source)
    if path.is_dir() or is_hub_name(text):
        logger.info("%s is no card: scored as tokenizer(question, response), logits[0]", text)
        return Reward(RewardCard(name=path.name, model=text), device, trust_remote_code)
    module, separator, name = text.partition(":")
    if separator:
        return FunctionReward(imported(module, name), name)
    raise RewardError(
        f"no reward {text!r}; shipped cards: {sorted(known)}, or give a YAML card, a classifier's Hub id or module:function."
        f"{did_you_mean(text, known)}"
    )


def rewards_by_name(loaded: Mapping[str, LoadedReward]) -> dict[str, LoadedReward]:
    """Rewards by their names, none of them lost.

    Args:
        loaded: Rewards by what they were loaded from.

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


def models_of(source: str) -> list[tuple[str, str | None]]:
    """Models and revisions that a reward will load, as far as its card or its name tells; errors as of `load_reward`."""
    path = cards().get(source, Path(source))
    if path.is_file():
        card = read_card(path)
        if not isinstance(card, RewardCard):
            return []
        if card.model is not None:
            return [(card.model, card.revision)]
        return [(model, revision or None) for model, _, revision in (name.partition("@") for name in card.models or ())]
    return [(source, None)] if path.is_dir() or is_hub_name(source) else []
