"""Load a reward by the name of its card, a file or a Hub id."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsoups.common.assets import shipped
from rsoups.common.errors import RewardError, did_you_mean
from rsoups.common.files import is_hub_name
from rsoups.rewards.cards import RewardCard, of_fields, read_fields
from rsoups.rewards.classifier import AveragedScores, Reward
from rsoups.rewards.functions import FunctionCard, FunctionReward, as_reward, imported
from rsoups.rewards.interface import LoadedReward
from rsoups.rewards.judge import Judge, JudgeCard

logger = logging.getLogger(__name__)


def cards() -> dict[str, Path]:
    """Return the names and files of the cards that ship with rsoups."""
    return {path.stem: path for path in sorted(shipped("rewards").glob("*.yaml"))}


def read_card(path: str | Path) -> RewardCard | FunctionCard | JudgeCard:
    """Read and check a card of any kind.

    Raises:
        RewardError: Not a YAML mapping, an unknown or missing key, or a value that is out of range.
    """
    data = read_fields(path)
    kind: Any = JudgeCard if "judge" in data else FunctionCard if "function" in data else RewardCard
    return of_fields(kind, data, str(path))


def load_reward(
    source: str | Path | Callable[..., Any],
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
    **arguments: Any,
) -> LoadedReward:
    """Load a reward.

    Args:
        source: Name of a shipped card (``"naturalness"``, ``"rouge-l"``, ...), path of a YAML card, Hub id or folder of a
            sequence classifier (read as ``tokenizer(question, response)``, score logits[0]), ``"module:function"`` (also of a
            file in the working folder), or a function.
        device: Device of a model.
        trust_remote_code: Run Python code that comes with a model, of a kind that transformers does not know.
        arguments: Arguments of the function that a card names; they replace the card's own.

    Raises:
        RewardError: No such reward (the shipped ones are listed), or an invalid one.
    """
    text, shipped_cards = str(source), cards()
    path = shipped_cards.get(text, Path(text))
    if not callable(source) and path.is_file():
        return _of_card(read_card(path), device, trust_remote_code, arguments)
    if arguments:
        raise RewardError(f"{text} is no card: only a function that a card names takes arguments, {sorted(arguments)}")

    if callable(source):
        return as_reward(source)
    if path.is_dir() or is_hub_name(text):
        logger.info("%s is no card: scored as tokenizer(question, response), logits[0]", text)
        return Reward(RewardCard(name=path.name, model=text), device, trust_remote_code)
    module, separator, name = text.partition(":")
    if separator:
        return FunctionReward(imported(module, name), name)
    raise RewardError(
        f"no reward {text!r}; shipped cards: {sorted(shipped_cards)}, or give a YAML card, a classifier's Hub id or "
        f"module:function.{did_you_mean(text, shipped_cards)}"
    )


def _of_card(
    card: RewardCard | FunctionCard | JudgeCard, device: str, trust_remote_code: bool, arguments: dict[str, Any]
) -> LoadedReward:
    if isinstance(card, FunctionCard):
        card = replace(card, arguments={**card.arguments, **arguments})
        return FunctionReward(card.build(), card.name, card)
    if arguments:
        raise RewardError(
            f"reward {card.name!r} is a model: only a function's card takes arguments, {sorted(arguments)}"
        )
    if isinstance(card, JudgeCard):
        return Judge(card, device, trust_remote_code)
    return (AveragedScores if card.average == "scores" else Reward)(card, device, trust_remote_code)


def models_of(source: str) -> list[tuple[str, str | None]]:
    """Return the models and revisions that a reward will load, as far as its card or its name tells.

    Raises:
        RewardError: A card that is invalid.
    """
    path = cards().get(source, Path(source))
    if path.is_file():
        card = read_card(path)
        return card.sources if isinstance(card, RewardCard) else []
    return [(source, None)] if path.is_dir() or is_hub_name(source) else []
