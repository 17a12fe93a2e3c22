"""Records to a front: means with paired bootstrap intervals, Pareto set, hypervolume, linear mode connectivity.

Everything here is a pure function of records. All rewards are maximised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsoups._errors import FrontError

SOUP, BASE = "soup", "base"
_FIELDS = ("name", "lambdas", "method", "prompt", "response", "rewards", "seed")
_RESAMPLES = 2_000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% bootstrap interval over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, eq=False)
class Point:
    """One model on the front.

    Attributes:
        name: ``"soup"``, ``"base"``, or the name it was evaluated under.
        lambdas: Weights by ingredient, None unless a soup.
        method: Of interpolation, None unless a soup.
        mean, low, high: By reward; the 95% percentile bootstrap interval over prompts.
        n: Prompts.
        values: Shape (n, rewards), float64: each prompt's rewards, in the front's order of prompts and rewards.
    """

    name: str
    lambdas: dict[str, float] | None
    method: str | None
    mean: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    n: int
    values: NDArray[np.float64]

    @property
    def label(self) -> str:
        """The name, with the λ of a soup."""
        return self.name if self.lambdas is None else "λ " + " / ".join(f"{x:.3g}" for x in self.lambdas.values())


class Front:
    """Models compared on the same prompts by the same rewards."""

    def __init__(self, points: list[Point], rewards: list[str], prompts: list[str], draws: NDArray[np.int64]):
        self.points, self.rewards, self.prompts, self._draws = points, rewards, prompts, draws

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Front:
        """The front of a records file.

        Raises:
            FrontError: As `from_records`, or a line that is not JSON.
        """
        records = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise FrontError(f"{path}, line {number}: not JSON ({error})") from None
        return cls.from_records(records)

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], seed: int = 0) -> Front:
        """Group records by model, and resample the prompts, the same ones for every model.

        Args:
            records: As `sweep` writes them. Several records of one model and prompt are averaged.
            seed: Of the bootstrap.

        Raises:
            FrontError: No records, a record without a field, a reward that is not finite (the record is named), or models
                that were not evaluated on the same prompts by the same rewards.
        """
        groups: dict[str, dict[str, list[list[float]]]] = {}
        heads: dict[str, Mapping[str, Any]] = {}
        rewards: list[str] = []
        for number, record in enumerate(records, 1):
            rewards = rewards or sorted(record.get("rewards") or [])
            scores = _checked(number, record, rewards)
            key = json.dumps([record["name"], record["lambdas"], record["method"]])
            heads.setdefault(key, record)
            prompt = record["prompt"] if isinstance(record["prompt"], str) else json.dumps(record["prompt"])
            groups.setdefault(key, {}).setdefault(prompt, []).append(scores)
        if not groups:
            raise FrontError("no records: there is nothing to make a front of")
        prompts = sorted(next(iter(groups.values())))
        for key, found in groups.items():
            if sorted(found) != prompts:
                raise FrontError(
                    f"{key} was evaluated on {len(found)} prompts, others on {len(prompts)}, not all of them the same: "
                    "finish the sweep"
                )
        draws = np.random.default_rng(seed).integers(0, len(prompts), size=(_RESAMPLES, len(prompts)))
        points = []
        for key, found in groups.items():
            values = np.array([np.mean(found[prompt], axis=0) for prompt in prompts])
            mean, low, high = (dict(zip(rewards, c.tolist(), strict=True)) for c in _interval(values, draws))
            head = heads[key]
            points.append(Point(head["name"], head["lambdas"], head["method"], mean, low, high, len(prompts), values))
        return cls(points, rewards, prompts, draws)

    @cached_property
    def soups(self) -> list[Point]:
        """The soups; of two ingredients in order, from λ of the second 0 to 1."""
        found = [point for point in self.points if point.lambdas is not None]
        return sorted(found, key=lambda point: list((point.lambdas or {}).values()), reverse=True)

    @property
    def legend(self) -> str:
        """What the numbers of a soup's label weigh, for the head of a table."""
        names = " / ".join(self.soups[0].lambdas or {}) if self.soups else ""
        return f"model (λ: {names})" if names else "model"

    @property
    def others(self) -> list[Point]:
        """The base and whatever else was evaluated beside the soups."""
        return [point for point in self.points if point.lambdas is None]

    @cached_property
    def ends(self) -> dict[str, Point]:
        """The soups of one ingredient alone, by its name.

        Raises:
            FrontError: An end was not evaluated.
        """
        names = [] if not self.soups else list(self.soups[0].lambdas or {})
        found = {name: p for p in self.soups for name in names if (p.lambdas or {}).get(name) == 1}
        if missing := [name for name in names if name not in found]:
            raise FrontError(f"no records at λ = 1 of {missing}: sweep the ends too")
        return {name: found[name] for name in names}

    def pareto(self) -> list[Point]:
        """The points that no other point equals or beats in every reward and beats in one."""
        from moocore import is_nondominated

        means = np.array([point.values.mean(axis=0) for point in self.points])
        kept = is_nondominated(means, maximise=True, keep_weakly=True)
        return [point for point, keep in zip(self.points, kept, strict=True) if keep]

    def hypervolume(self, reference: Mapping[str, float], points: Sequence[Point] | None = None) -> Estimate:
        """Volume that points dominate above a reference, with its interval.

        Args:
            reference: A value for each reward; what does not exceed it counts nothing.
            points: The soups by default.

        Raises:
            FrontError: A reward without a reference, or one that is not finite.
        """
        from moocore import hypervolume

        if set(reference) != set(self.rewards) or not all(math.isfinite(value) for value in reference.values()):
            raise FrontError(
                f"hypervolume needs a finite reference for each of {self.rewards} (all maximised), got {dict(reference)}"
            )
        at = [reference[reward] for reward in self.rewards]
        values = np.stack([point.values for point in (self.soups if points is None else points)])
        volumes = [
            hypervolume(values[:, draw].mean(axis=1), ref=at, maximise=True) for draw in self._draws[: _RESAMPLES // 4]
        ]
        low, high = np.quantile(volumes, _tails())
        return Estimate(float(hypervolume(values.mean(axis=1), ref=at, maximise=True)), float(low), float(high))

    def linear_mode_connectivity(self) -> list[tuple[Point, dict[str, Estimate]]]:
        """At each soup, its reward less the chord's, Σ λi·(reward of ingredient i), paired over prompts.

        At or above 0 for every reward is what the paper calls linear mode connectivity (its hypothesis 1).

        Raises:
            FrontError: An end was not evaluated.
        """
        out = []
        for point in self.soups:
            assert point.lambdas is not None
            chord = sum(weight * self.ends[name].values for name, weight in point.lambdas.items())
            out.append((point, self._paired(point.values - np.asarray(chord))))
        return out

    def compare(self, name: str, lambdas: Sequence[float]) -> dict[str, Estimate]:
        """By reward, the soup at `lambdas` less the model called `name`, paired over prompts.

        Raises:
            FrontError: No such soup or model.
        """
        other = next((point for point in self.others if point.name == name), None)
        at = [p for p in self.soups if np.allclose(list((p.lambdas or {}).values()), lambdas)]
        if other is None or not at:
            raise FrontError(f"no {name!r} or no soup at {list(lambdas)}; there are {[p.label for p in self.points]}")
        return self.difference(at[0], other)

    def difference(self, point: Point, other: Point) -> dict[str, Estimate]:
        """By reward, one point of this front less another one, paired over prompts."""
        return self._paired(point.values - other.values)

    def _paired(self, differences: NDArray[np.float64]) -> dict[str, Estimate]:
        columns = zip(*_interval(differences, self._draws), strict=True)
        return {reward: Estimate(*map(float, column)) for reward, column in zip(self.rewards, columns, strict=True)}

    def to_markdown(self) -> str:
        """A table of all points: the mean of each reward with its interval."""
        lines = [f"| {self.legend} | {' | '.join(self.rewards)} |", "| --- |" + " ---: |" * len(self.rewards)]
        for point in [*self.others, *self.soups]:
            cells = [str(Estimate(point.mean[r], point.low[r], point.high[r])) for r in self.rewards]
            lines.append(f"| {point.label} | {' | '.join(cells)} |")
        return "\n".join(lines)


def _checked(number: int, record: Mapping[str, Any], rewards: list[str]) -> list[float]:
    if missing := [field for field in _FIELDS if field not in record]:
        raise FrontError(f"record {number} lacks {missing}")
    where = f"record {number} ({record['name']}, lambdas {record['lambdas']}, prompt {record['prompt']!r})"
    if sorted(record["rewards"]) != rewards or not rewards:
        raise FrontError(f"{where} has rewards {sorted(record['rewards'])}, others have {rewards}")
    scores = [record["rewards"][reward] for reward in rewards]
    for reward, score in zip(rewards, scores, strict=True):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise FrontError(f"{where}: {reward} is {score!r}, must be a finite number")
    return scores


def _tails() -> list[float]:
    return [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2]


def _interval(values: NDArray[np.float64], draws: NDArray[np.int64]) -> tuple[NDArray, NDArray, NDArray]:
    """Mean and percentile interval over axis 0 of (prompts, rewards)."""
    low, high = np.quantile(values[draws].mean(axis=1), _tails(), axis=0)
    return values.mean(axis=0), low, high
