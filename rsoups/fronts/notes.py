"""Notes that a reader needs before the figures of a front: runs that did not learn, too little to compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsoups.fronts.estimates import Estimate
from rsoups.fronts.points import Point, estimates_of, is_number

if TYPE_CHECKING:
    from rsoups.fronts.front import Front


Weights = Mapping[str, float]


def notes_of(front: Front) -> list[str]:
    """The notes, one sentence each, the most important first."""
    notes = not_learned(front)
    if front.trained_prompts:
        runs = ", ".join(f"{name} on {count}" for name, count in front.trained_prompts.items())
        notes.append(
            f"Of the {len(front.prompts)} prompts, {runs} were trained on: the figures are not of new prompts."
        )
    for place, reward in enumerate(front.rewards):
        missing = float(np.mean([np.isnan(point.values[:, place]).mean() for point in front.points]))
        if missing:
            notes.append(
                f"{reward} has no score for the responses to {missing:.0%} of the prompts: its means are over the others."
            )
    if len(front.rewards) == 1:
        notes.append(f"There is one reward only, {front.rewards[0]}: a trade-off needs two.")
    if len(front.points) == 1:
        notes.append(f"There is one point only, {front.points[0].label}: nothing to compare it with.")
    if len(front.prompts) == 1:
        notes.append("There is one prompt only: no figure has an interval.")
    empty = [point for point in front.points if "words" in point.extras and point.extras["words"].value == 0]
    if empty and len(empty) == len(front.points):
        notes.append("All responses of all models are empty: the rewards are of empty texts.")
    elif empty:
        notes.append(f"All responses are empty at {', '.join(point.label for point in empty)}.")
    return notes


def not_learned(front: Front) -> list[str]:
    """Runs that are not above the base, with 95% confidence, in the rewards they were trained on."""
    notes = []
    for name, point, weights in _trained(front):
        gain = _objective(front, point, weights)
        if gain is None or gain.is_above_zero or (gain.low is None and gain.value > 0):
            continue
        verdict = "did not learn" if gain.value <= 0 else "is not seen to have learned"
        where = "below" if gain.is_below_zero else "not above" if gain.value <= 0 else "not surely above"
        interval = "" if gain.low is None else f" [{gain.low:+.3f}, {gain.high:+.3f}]"
        objective = _objective_in_words(weights)
        notes.append(f"{name} {verdict}: {objective} is {where} the base's, by {gain.value:+.3f}{interval}.")
    return notes


def not_checked(front: Front) -> str | None:
    """The runs that cannot be checked for having learned, and why; None if all can, or if there is no run."""
    if front.base is None:
        return "Whether the runs learned is not known: the base was not evaluated." if front.soups else None
    checked = {name for name, point, weights in _trained(front) if _objective(front, point, weights) is not None}
    unchecked = [name for name in front.ingredients if name not in checked]
    if not unchecked:
        return None
    return (
        f"Whether {', '.join(unchecked)} learned is not known: no lineage.json names the reward it was trained on, or that "
        "reward or λ = 1 was not evaluated."
    )


def trained_on_of(settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Rewards and weights of each run in a sweep's settings; invalid entries are left out."""
    runs = settings.get("trained_on")
    trained: dict[str, dict[str, float]] = {}
    for name, weights in runs.items() if isinstance(runs, dict) else ():
        if isinstance(weights, dict) and all(map(is_number, weights.values())):
            trained[name] = {reward: float(weight) for reward, weight in weights.items()}
    return trained


def trained_prompts_of(settings: Mapping[str, Any]) -> dict[str, int]:
    """Number of the prompts that each run was trained on, from a sweep's settings; invalid entries are left out."""
    runs = settings.get("trained_prompts")
    return {name: n for name, n in runs.items() if type(n) is int} if isinstance(runs, dict) else {}


def sweep_settings(records: Path) -> dict[str, Any]:
    """The settings beside a records file; empty if they are missing or not readable."""
    try:
        settings = json.loads(records.with_suffix(".settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _trained(front: Front) -> list[tuple[str, Point, Weights]]:
    """Runs with the weights of the rewards they were trained on.

    These come from the lineage; without one, an ingredient that has the name of a reward was trained on that reward.
    """
    if front.base is None:
        return []
    runs = [(point.alone, point) for point in front.soups if point.alone]
    runs.sort(key=lambda run: front.ingredients.index(run[0]))
    runs += [(point.name, point) for point in front.others if point.name in front.trained_on]
    by_name = {reward: {reward: 1.0} for reward in front.rewards}
    trained = [(name, point, front.trained_on.get(name) or by_name.get(name)) for name, point in runs]
    return [(name, point, weights) for name, point, weights in trained if weights]


def _objective(front: Front, point: Point, weights: Weights) -> Estimate | None:
    """A run's weighted sum of rewards minus the base's; None if not all of these rewards were evaluated."""
    if front.base is None or not all(reward in front.rewards for reward in weights):
        return None
    column = [weights.get(reward, 0.0) for reward in front.rewards]
    gains = (point.values - front.base.values) @ column
    return estimates_of(gains[:, None], ["gain"], front.shares)["gain"]


def _objective_in_words(weights: Weights) -> str:
    if len(weights) == 1:
        ((reward, weight),) = weights.items()
        return f"its own reward, {reward}," if weight > 0 else f"its own reward, {weight:g}·{reward},"
    return f"its own sum of rewards, {' + '.join(f'{weight:g}·{reward}' for reward, weight in weights.items())},"
