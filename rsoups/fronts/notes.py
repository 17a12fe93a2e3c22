"""What a reader should know before the figures of a front: runs that did not learn, how little there is to compare."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsoups.fronts.estimates import Estimate
from rsoups.fronts.points import Point, estimates_of

if TYPE_CHECKING:
    from rsoups.fronts.front import Front


Weights = Mapping[str, float]


def notes_of(front: Front) -> list[str]:
    """The notes, a sentence each; the most important first."""
    found = not_learned(front)
    if front.trained_prompts:
        told = ", ".join(f"{name} on {count}" for name, count in front.trained_prompts.items())
        found.append(
            f"Of the {len(front.prompts)} prompts, {told} were trained on: the figures are not of new prompts."
        )
    for place, reward in enumerate(front.rewards):
        missing = float(np.mean([np.isnan(point.values[:, place]).mean() for point in front.points]))
        if missing:
            found.append(
                f"{reward} has no score for the responses to {missing:.0%} of the prompts: its means are over the others."
            )
    if len(front.rewards) == 1:
        found.append(f"There is one reward only, {front.rewards[0]}: a trade-off needs two.")
    if len(front.points) == 1:
        found.append(f"There is one point only, {front.points[0].label}: nothing to compare it with.")
    if len(front.prompts) == 1:
        found.append("There is one prompt only: no figure has an interval.")
    empty = [point for point in front.points if "words" in point.extras and point.extras["words"].value == 0]
    if empty and len(empty) == len(front.points):
        found.append("All responses of all models are empty: the rewards are of empty texts.")
    elif empty:
        found.append(f"All responses are empty at {', '.join(point.label for point in empty)}.")
    return found


def not_learned(front: Front) -> list[str]:
    """Runs that are not above the base, with 95% confidence, in what they were trained for."""
    found = []
    for name, point, weights in _trained(front):
        gain = _objective(front, point, weights)
        if gain is None or gain.is_above_zero or (gain.low is None and gain.value > 0):
            continue
        learned = "did not learn" if gain.value <= 0 else "is not seen to have learned"
        sure = "below" if gain.is_below_zero else "not above" if gain.value <= 0 else "not surely above"
        found.append(f"{name} {learned}: {_told(weights)} is {sure} the base's, by {_signed(gain)}.")
    return found


def not_checked(front: Front) -> str | None:
    """Which runs cannot be checked for having learned, and why; None where all can, or where there is no run."""
    if front.base is None:
        return "Whether the runs learned is not known: the base was not evaluated." if front.soups else None
    checked = {name for name, point, weights in _trained(front) if _objective(front, point, weights) is not None}
    left = [name for name in front.ingredients if name not in checked]
    if not left:
        return None
    return (
        f"Whether {', '.join(left)} learned is not known: no lineage.json tells which reward it was trained on, or that "
        "reward or λ = 1 was not evaluated."
    )


def trained_on_of(settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The rewards and weights by run that a sweep's settings tell; what is no such thing is left out."""
    found = settings.get("trained_on")
    told: dict[str, dict[str, float]] = {}
    for name, weights in found.items() if isinstance(found, dict) else ():
        if isinstance(weights, dict) and all(isinstance(r, str) and _is_number(w) for r, w in weights.items()):
            told[name] = {reward: float(weight) for reward, weight in weights.items()}
    return told


def trained_prompts_of(settings: Mapping[str, Any]) -> dict[str, int]:
    """How many of a sweep's prompts each run was trained on, as the settings tell; what is no such thing is left out."""
    found = settings.get("trained_prompts")
    return {n: count for n, count in found.items() if type(count) is int} if isinstance(found, dict) else {}


def settings_beside(records: Path) -> dict[str, Any]:
    """The settings beside a records file; empty where they are not there or not readable."""
    try:
        settings = json.loads(records.with_suffix(".settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _trained(front: Front) -> list[tuple[str, Point, Weights]]:
    """Runs with what they were trained for: as their lineage tells, else the reward of an ingredient's own name."""
    if front.base is None:
        return []
    alone = {name: p for p in front.soups for name, weight in (p.lambdas or {}).items() if weight == 1}
    runs = [(name, alone[name]) for name in front.ingredients if name in alone]
    runs += [(point.name, point) for point in front.others if point.name in front.trained_on]
    by_name = {reward: {reward: 1.0} for reward in front.rewards}
    found = [(name, point, front.trained_on.get(name) or by_name.get(name)) for name, point in runs]
    return [(name, point, weights) for name, point, weights in found if weights]


def _objective(front: Front, point: Point, weights: Weights) -> Estimate | None:
    """A run's weighted sum of rewards less the base's; None where not all of these rewards were evaluated."""
    if front.base is None or not all(reward in front.rewards for reward in weights):
        return None
    column = [weights.get(reward, 0.0) for reward in front.rewards]
    gains = (point.values - front.base.values) @ column
    return estimates_of(gains[:, None], ["gain"], front.shares)["gain"]


def _told(weights: Weights) -> str:
    """The objective in words."""
    if len(weights) == 1:
        ((reward, weight),) = weights.items()
        return f"its own reward, {reward}," if weight > 0 else f"its own reward, {weight:g}·{reward},"
    return f"its own sum of rewards, {' + '.join(f'{weight:g}·{reward}' for reward, weight in weights.items())},"


def _signed(gain: Estimate) -> str:
    interval = "" if gain.low is None else f" [{gain.low:+.3f}, {gain.high:+.3f}]"
    return f"{gain.value:+.3f}{interval}"
