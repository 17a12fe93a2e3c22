"""Records to a front: means with paired bootstrap intervals, Pareto set, hypervolume, mode connectivity, the choice of λ.

Everything here is a pure function of records. All rewards are maximized: a card's ``sign`` turns those that are not.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError
from rsoups.common.files import json_lines
from rsoups.fronts.comparison import (
    Advantage,
    Comparison,
    advantage,
    attainment_draws,
    attainment_surfaces,
    compared,
    distance,
    volume_of,
    with_utilities,
)
from rsoups.fronts.estimates import Estimate, Volume, checked_reference, means_with_draws, resampling
from rsoups.fronts.notes import notes_of, settings_beside, trained_on_of, trained_prompts_of
from rsoups.fronts.points import (
    BASE,
    LAMBDA,
    Choice,
    Point,
    cells_of,
    check_record,
    estimates_of,
    lambdas_of,
    point_of_records,
    point_of_row,
    prompt_key,
)
from rsoups.fronts.selection import Constrained, Rule, by_preference, knee

if TYPE_CHECKING:
    from rsoups.fronts.votes import VotedUtility


MORL = "MORL"  # begins the names of runs that were trained on several rewards at once


def _check_scored(groups: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], rewards: Sequence[str]) -> None:
    """Refuse a model none of whose responses a reward has scored."""
    for key, found in groups.items():
        for reward in rewards:
            if all(record["rewards"][reward] is None for records in found.values() for record in records):
                raise FrontError(f"{reward} has no score (None) for any response of {key}: leave this reward out")


class Front:
    """Models compared on the same prompts by the same rewards, all of which are maximized.

    Attributes:
        points: In the order of the records.
        rewards: Names, sorted.
        prompts: Sorted, messages as JSON; empty for a front from elsewhere, which has means only: no figure of it has an
            interval of ours.
        shares: Of each prompt in each bootstrap draw; None where there are no prompts to resample.
        trained_on: By ingredient or other model, the rewards that it was trained on with their weights, as a sweep found them
            in ``lineage.json``.
        trained_prompts: How many of the prompts each of these was trained on, where it was.
    """

    def __init__(
        self,
        points: list[Point],
        rewards: list[str],
        prompts: list[str],
        shares: NDArray[np.float64] | None = None,
        trained_on: dict[str, dict[str, float]] | None = None,
    ):
        self.points, self.rewards, self.prompts, self.shares = points, rewards, prompts, shares
        self.trained_on = trained_on or {}
        self.trained_prompts: dict[str, int] = {}

    @classmethod
    def from_jsonl(cls, path: str | Path, seed: int = 0) -> Front:
        """The front of a records file, and what the settings beside it tell of the runs' training.

        Raises:
            FrontError: As `from_records`, no such file, or a line that is not JSON.
        """
        front = cls.from_records((record for _, record in json_lines(path, FrontError)), seed)
        settings = settings_beside(Path(path))
        front.trained_on, front.trained_prompts = trained_on_of(settings), trained_prompts_of(settings)
        return front

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], seed: int = 0) -> Front:
        """Group records by model, and resample the prompts, the same ones for every model.

        Args:
            records: As `sweep` writes them. Several records of one model and prompt are averaged.
            seed: Of the bootstrap.

        Raises:
            FrontError: No records, a record without a field, a reward that is not finite (the record is named), soups of
                other ingredients, or models that were not evaluated on the same prompts by the same rewards.
        """
        groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
        rewards: list[str] = []
        ingredients: list[str] = []
        for number, record in enumerate(records, 1):
            rewards = check_record(number, record, rewards)
            if record["lambdas"] is not None:
                if isinstance(record["lambdas"], Mapping):
                    ingredients = ingredients or list(record["lambdas"])
                record = {**record, "lambdas": lambdas_of(number, record, ingredients)}
            key = json.dumps([record["name"], record["lambdas"], record["method"]])
            groups.setdefault(key, {}).setdefault(prompt_key(record["prompt"]), []).append(record)
        if not groups:
            raise FrontError("no records: there is nothing to make a front of")
        prompts = sorted(next(iter(groups.values())))
        for key, found in groups.items():
            if sorted(found) != prompts:
                raise FrontError(
                    f"{key} was evaluated on {len(found)} prompts, others on {len(prompts)}, not all of them the same: "
                    "finish the sweep"
                )
        shares = resampling(len(prompts), seed)
        _check_scored(groups, rewards)
        points = [point_of_records([found[prompt] for prompt in prompts], rewards, shares) for found in groups.values()]
        if len({point.method for point in points if point.lambdas}) > 1:
            points = [replace(point, tells_method=True) for point in points]
        return cls(points, rewards, prompts, shares)

    @classmethod
    def from_csv(cls, path: str | Path, rewards: Sequence[str] | None = None) -> Front:
        """Points from elsewhere, a published front say: one row each, higher is better in every reward.

        Args:
            path: Columns ``lambda_<ingredient>`` (empty for a model that is no soup), one for each reward, and if you like
                ``name`` and ``<reward>_low``, ``<reward>_high`` (an interval as published).
            rewards: The reward columns; all the others by default.

        Returns:
            A front of means without prompts: intervals are those of the file, and figures made of the means have none.

        Raises:
            FrontError: No such file, no rows, no reward column, two rows of one name and λ, or a cell that is no finite
                number (row and column named).
        """
        try:
            with Path(path).open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                rows, columns = list(reader), list(reader.fieldnames or [])
        except OSError as error:
            raise FrontError(f"cannot read {path}: {error.strerror}") from None
        bounds = {f"{name}{end}" for name in columns for end in ("_low", "_high")}
        found = [c for c in columns if c != "name" and not c.startswith(LAMBDA) and c not in bounds]
        names = sorted(found if rewards is None else rewards)
        if not rows or not names or (missing := [name for name in names if name not in columns]):
            lacks = "rows" if not rows else "a reward column" if not names else f"the columns {missing}"
            raise FrontError(f"{path} lacks {lacks}; its columns are {columns}")
        points = [point_of_row(f"{path}, row {i}", row, names) for i, row in enumerate(rows, 1)]
        for i, point in enumerate(points):
            if (point.name, point.lambdas) in [(other.name, other.lambdas) for other in points[:i]]:
                raise FrontError(f"{path}: two rows are {point.name!r} ({point.label}): give each a name of its own")
        return cls(points, names, [])

    @cached_property
    def soups(self) -> list[Point]:
        """The soups; of two ingredients in order, from λ of the second 0 to 1."""
        found = [point for point in self.points if point.lambdas is not None]
        return sorted(found, key=lambda point: list((point.lambdas or {}).values()), reverse=True)

    @property
    def ingredients(self) -> list[str]:
        """Names, in the order of λ."""
        return list(self.soups[0].lambdas or {}) if self.soups else []

    @property
    def legend(self) -> str:
        """What the numbers of a soup's label weigh, for the head of a table."""
        return f"model (λ: {' / '.join(self.ingredients)})" if self.ingredients else "model"

    @property
    def others(self) -> list[Point]:
        """The base and whatever else was evaluated beside the soups."""
        return [point for point in self.points if point.lambdas is None]

    @property
    def base(self) -> Point | None:
        """The base, where it was evaluated."""
        return next((point for point in self.others if point.name == BASE), None)

    @cached_property
    def ends(self) -> dict[str, Point]:
        """The soups of one ingredient alone, by its name.

        Raises:
            FrontError: An end was not evaluated.
        """
        found = {name: p for p in self.soups for name in self.ingredients if (p.lambdas or {}).get(name) == 1}
        if missing := [name for name in self.ingredients if name not in found]:
            raise FrontError(f"no records at λ = 1 of {missing}: sweep the ends too")
        return {name: found[name] for name in self.ingredients}

    @property
    def has_chord(self) -> bool:
        """Whether it can be drawn over λ: more than one soup of two ingredients, both ends included."""
        try:
            return len(self.soups) > 1 and len(self.ends) == 2
        except FrontError:
            return False

    @property
    def has_band(self) -> bool:
        """Whether its attainment over bootstrap draws can be drawn: two rewards, and prompts to resample."""
        return len(self.rewards) == 2 and self.shares is not None

    def at(self, lambdas: Sequence[float] | Mapping[str, float]) -> Point:
        """The soup at λ, in the order of the ingredients or by their names.

        Raises:
            FrontError: There is none.
        """
        wanted = (
            [lambdas.get(name, 0.0) for name in self.ingredients] if isinstance(lambdas, Mapping) else list(lambdas)
        )
        for point in self.soups:
            weights = list((point.lambdas or {}).values())
            if len(weights) == len(wanted) and np.allclose(weights, wanted):
                return point
        raise FrontError(f"no soup at λ {lambdas}; there are {[point.label for point in self.soups]}")

    def named(self, name: str) -> Point:
        """The base, or another model that was evaluated beside the soups.

        Raises:
            FrontError: There is none of this name.
        """
        for point in self.others:
            if point.name == name:
                return point
        raise FrontError(f"no model {name!r} beside the soups; there are {[point.name for point in self.others]}")

    def pareto(self) -> list[Point]:
        """The points that no other point equals or beats in every reward and beats in one."""
        from moocore import is_nondominated

        kept = is_nondominated(self._stack(self.points)[0], maximise=True, keep_weakly=True)
        return [point for point, keep in zip(self.points, kept, strict=True) if keep]

    def pareto_shares(self) -> list[float] | None:
        """In how many of the bootstrap draws each point is on the Pareto front; None where there are no prompts to resample."""
        from moocore import is_nondominated

        if self.shares is None:
            return None
        draws = self._stack(self.points)[1:]
        kept = [is_nondominated(draw, maximise=True, keep_weakly=True) for draw in draws]
        return np.mean(kept, axis=0).tolist()

    def hypervolume(self, reference: Mapping[str, float], points: Sequence[Point] | None = None) -> Volume:
        """Volume that points dominate above a reference, with its interval. Approximated above 5 rewards, with its error.

        Args:
            reference: A value for each reward; what does not exceed it counts nothing.
            points: The soups by default; all points of a front that has none.

        Raises:
            FrontError: A reward without a reference, or one that is not finite; no points.
        """
        at = checked_reference(reference, self.rewards)
        if points is not None and not points:
            raise FrontError("hypervolume is of one point at least, got none")
        return volume_of(self._stack(self._front if points is None else points), self.rewards, at)

    def igd_plus(self, other: Front) -> Estimate:
        """How far the soups are, in units of the rewards, from the Pareto set of another front's: 0 if they reach all of it.

        IGD+ of Ishibuchi et al. 2015, paired over the common prompts. Points are chosen as by `hypervolume`.

        Raises:
            FrontError: Other rewards, or no common prompts.
        """
        first, second = self._paired_with(other)
        return distance(first._stack(first._front), second._stack(second._front))

    def compare(self, other: Front, reference: Mapping[str, float]) -> Comparison:
        """This front against another one, paired over their common prompts (`difference` is of two points of one front).

        Args:
            other: Of the same rewards. Where one of the two has no prompts (a CSV), means are compared, without intervals.
            reference: Of the hypervolumes.

        Raises:
            FrontError: Other rewards, no common prompts, or a reference that is none.
        """
        at = checked_reference(reference, self.rewards)
        first, second = self._paired_with(other)
        stacks = first._stack(first._front), second._stack(second._front)
        return compared(*stacks, len(first.prompts), self.rewards, at)

    def advantage(
        self,
        reference: Mapping[str, float],
        names: Sequence[str] | None = None,
        *,
        runs: tuple[int, int] | None = None,
        with_ends: bool = True,
    ) -> Advantage:
        """Do soups beat MORL, and by how much: as many soups as there are other runs, in hypervolume and for preferences.

        Args:
            reference: Of the hypervolumes.
            names: Of the other runs; by default all whose names begin with ``MORL``.
            runs: PPO runs that the soups and the others took; by default one for each ingredient and each other run.
            with_ends: Count each ingredient among the others too: it is MORL with all the weight on one reward.

        Raises:
            FrontError: No such run, fewer soups than other runs, an end that was not evaluated, or a reference that is none.
        """
        at = checked_reference(reference, self.rewards)
        morl = [point for point in self.others if point.name.lower().startswith(MORL.lower())]
        others = morl if names is None else [self.named(name) for name in dict.fromkeys(names)]
        if not others or not self.soups:
            raise FrontError(f"soups are compared with MORL runs here; there are {[p.label for p in self.points]}")
        others += list(self.ends.values()) if with_ends else []
        counted = runs or (len(self.ingredients), len(others))
        lambdas = [list((point.lambdas or {}).values()) for point in self.soups]
        stacks = self._stack(self.soups), self._stack(others)
        found = advantage(*stacks, counted, self.rewards, at, lambdas, with_ends)
        return with_utilities(found, _values(self.soups), _values(others), self.shares)

    def attainment(
        self, *seeds: Front, levels: Sequence[float] = (0.025, 0.5, 0.975)
    ) -> dict[float, NDArray[np.float64]]:
        """Empirical attainment surfaces: by level, the corners of what at least this share of the draws attains.

        Args:
            seeds: Fronts of the same experiment with other seeds: the surfaces are then over the runs (this one included),
                else over bootstrap draws of the prompts.
            levels: Shares.

        Returns:
            Corners by level, each of shape (K, rewards), float64, sorted by the first reward.

        Raises:
            FrontError: Other than two or three rewards, other rewards among the seeds, or no prompts to resample.
        """
        if seeds:
            for front in seeds:
                self._check_rewards(front)
            return attainment_surfaces([front._stack(front._front)[0] for front in (self, *seeds)], levels)
        if self.shares is None:
            raise FrontError(
                "attainment over bootstrap draws needs the records of two prompts or more; this front has means only"
            )
        return attainment_surfaces(attainment_draws(self._stack(self._front)), levels)

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
            out.append((point, self._estimates(point.values - np.asarray(chord))))
        return out

    def difference(self, point: Point, other: Point) -> dict[str, Estimate]:
        """By reward, one point of this front less another one, paired over prompts."""
        return self._estimates(point.values - other.values)

    def select(
        self,
        preference: Mapping[str, float] | None = None,
        *,
        maximize: str | None = None,
        subject_to: Mapping[str, str] | None = None,
        knee: bool = False,
        votes: str | Path | Sequence[Mapping[str, Any]] | VotedUtility | None = None,
        above_base: bool = False,
    ) -> Choice:
        """Choose λ among the soups that were evaluated (among all points of a front that has none), by one rule.

        A choice tells in which rewards it is not above the base, where the base was evaluated.

        Args:
            preference: Weights μ by reward: the largest Σ μi·Ri, of the rewards as they are (recipes/calibrate.py makes
                unlike scales comparable).
            maximize: A reward: the largest one ...
            subject_to: ... where others keep limits, ``{"harmless": ">= 0.2"}``.
            knee: The Pareto point farthest above the plane through the front's ends: where giving more of one reward
                begins to cost more of another.
            votes: A votes file, its rows, or what `fit_votes` made of them: the λ that the voters like best.
            above_base: The points that are above the base in every reward, with 95% confidence where there is one; of these
                the largest mean of the rewards, or the largest weighted sum by `preference`.

        Raises:
            FrontError: Not exactly one rule, a name that is no reward, limits that no point keeps (the best reachable
                value is told), or no point above the base in every reward (the nearest is told).
            VotesError: As `fit_votes`.
        """
        rules = [preference is not None and not above_base, maximize is not None, knee, votes is not None, above_base]
        if sum(rules) != 1 or (subject_to and maximize is None):
            raise FrontError(
                "choose by one rule: preference, maximize (with subject_to, if you like), knee, votes or above_base "
                "(with a preference, if you like)"
            )
        if votes is not None:
            return self._voted(votes)
        if above_base:
            return self._above_base(preference or dict.fromkeys(self.rewards, 1.0))
        among = self._front
        means = self._stack(among)
        rule, words = self._rule(preference, maximize, subject_to or {})
        if isinstance(rule, Constrained):
            rule.refuse(means[0], [point.label for point in among])
        chosen = int(rule(means[0]))
        share = None if len(means) == 1 else float(np.mean(rule(means[1:]) == chosen))
        return self._choice(among[chosen], words, share)

    def _rule(
        self, preference: Mapping[str, float] | None, maximize: str | None, subject_to: Mapping[str, str]
    ) -> tuple[Rule, str]:
        if preference is not None:
            weights = ", ".join(f"{name} {weight:g}" for name, weight in preference.items())
            return by_preference(preference, self.rewards), f"preference {weights}"
        if maximize is not None:
            limits = "".join(f", {name} {limit}" for name, limit in subject_to.items())
            return Constrained(maximize, subject_to, self.rewards), f"largest {maximize}{limits}"
        return knee, "knee of the front"

    def _voted(self, votes: str | Path | Sequence[Mapping[str, Any]] | VotedUtility) -> Choice:
        from rsoups.fronts.votes import VotedUtility, fit_votes

        if not self.soups:
            raise FrontError("votes choose among soups, and this front has none")
        utility = votes if isinstance(votes, VotedUtility) else fit_votes(votes, self.ingredients)
        if sorted(utility.ingredients) != sorted(self.ingredients):
            raise FrontError(f"the votes are about {utility.ingredients}, the soups weigh {self.ingredients}")
        best, share = utility.best_of([point.lambdas or {} for point in self.soups])
        return self._choice(self.soups[best], f"best liked in {utility.votes} votes", share)

    def _above_base(self, preference: Mapping[str, float]) -> Choice:
        """The choice among the points that are above the base in every reward."""
        among = [point for point in self._front if point is not self.base]
        rule = by_preference(preference, self.rewards)
        if self.base is None or not among:
            raise FrontError(f"above_base compares points with the base; there are {[p.label for p in self.points]}")
        gains = {point: self.difference(point, self.base) for point in among}
        surely = [point for point in among if all(gain.is_above_zero for gain in gains[point].values())]
        likely = [point for point in among if all(gain.value > 0 for gain in gains[point].values())]
        if not likely:
            nearest = max(
                among, key=lambda point: (self.share_above_base(point) or 0, min(map(_value, gains[point].values())))
            )
            raise FrontError(
                "no good choice: no soup is above the base in every reward; the nearest is "
                f"{self._choice(nearest, 'most often above it', None)}"
            )
        means = self._stack(surely or likely)
        chosen = int(rule(means[0]))
        share = None if len(means) == 1 else float(np.mean(rule(means[1:]) == chosen))
        sure = ", with 95% confidence" if surely else ", though not with 95% confidence" if self.prompts else ""
        return self._choice((surely or likely)[chosen], f"above the base in every reward{sure}", share)

    def share_above_base(self, point: Point) -> float | None:
        """In how many of the bootstrap draws a point is above the base in every reward; None without draws or a base."""
        if self.base is None or self.shares is None:
            return None
        gains = self._stack([point])[1:, 0] - self._stack([self.base])[1:, 0]
        return float((gains > 0).all(axis=-1).mean())

    def _choice(self, point: Point, words: str, share: float | None) -> Choice:
        """A choice, with what it has less than the base."""
        if self.base is None or point is self.base:
            return Choice(point, words, share)
        gains = self.difference(point, self.base)
        behind = {reward: gain for reward, gain in gains.items() if gain.value <= 0}
        return Choice(point, words, share, self.share_above_base(point), behind)

    @property
    def notes(self) -> list[str]:
        """What a reader should know before the figures: runs that did not learn, how little there is to compare."""
        return notes_of(self)

    def to_table(self) -> list[dict[str, Any]]:
        """One row for each point, ``pandas.DataFrame(front.to_table())`` makes a data frame.

        Columns: ``name``, ``lambda_<ingredient>``, rewards and extras (each with its ``_low`` and ``_high``), ``pareto``.
        """
        pareto = set(self.pareto())
        extras = list(dict.fromkeys(name for point in self.points for name in point.extras))
        rows = []
        for point in [*self.others, *self.soups]:
            row: dict[str, Any] = {"name": point.name}
            row |= {LAMBDA + name: (point.lambdas or {}).get(name) for name in self.ingredients}
            for name in self.rewards:
                row |= cells_of(name, point.estimate(name))
            for name in extras:
                row |= cells_of(name, point.extras.get(name))
            rows.append(row | {"pareto": point in pareto})
        return rows

    def to_csv(self, path: str | Path) -> None:
        """Write the points as `from_csv` reads them."""
        names = ["name", *(LAMBDA + name for name in self.ingredients)]
        names += [name + end for name in self.rewards for end in ("", "_low", "_high")]
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.to_table())

    def to_markdown(self) -> str:
        """A table of all points: the mean of each reward with its interval."""
        lines = [f"| {self.legend} | {' | '.join(self.rewards)} |", "| --- |" + " ---: |" * len(self.rewards)]
        for point in [*self.others, *self.soups]:
            lines.append(f"| {point.label} | {' | '.join(str(point.estimate(r)) for r in self.rewards)} |")
        return "\n".join(lines)

    @property
    def _front(self) -> list[Point]:
        """What is measured as a front: the soups, or all points where there are none."""
        return self.soups or self.points

    def _stack(self, points: Sequence[Point]) -> NDArray[np.float64]:
        """Means of points as observed, then in each bootstrap draw: shape (1 + draws, points, rewards)."""
        return means_with_draws(_values(points), self.shares)

    def _estimates(self, values: NDArray[np.float64]) -> dict[str, Estimate]:
        return estimates_of(values, self.rewards, self.shares)

    def _check_rewards(self, other: Front) -> None:
        if self.rewards != other.rewards:
            raise FrontError(f"fronts of the same rewards are compared: these have {self.rewards} and {other.rewards}")

    def _paired_with(self, other: Front) -> tuple[Front, Front]:
        """This front and another one on their common prompts, in the same draws; means only where one has no prompts."""
        self._check_rewards(other)
        common = sorted(set(self.prompts) & set(other.prompts))
        if not common and self.prompts and other.prompts:
            raise FrontError("the two fronts have no prompt in common: sweep both on the same ones")
        shares = resampling(len(common), seed=0)
        first, second = ([front._values_on(p, common) for p in front.points] for front in (self, other))
        return Front(first, self.rewards, common, shares), Front(second, self.rewards, common, shares)

    def _values_on(self, point: Point, prompts: Sequence[str]) -> Point:
        """A point on some of the prompts, or its means where there are none; its intervals are left out."""
        place = {prompt: i for i, prompt in enumerate(self.prompts)}
        values = point.values[[place[p] for p in prompts]] if prompts else point.values.mean(axis=0)[None]
        mean = dict(zip(self.rewards, values.mean(axis=0).tolist(), strict=True))
        return Point(point.name, point.lambdas, point.method, mean, {}, {}, len(prompts), values)


def _value(estimate: Estimate) -> float:
    return estimate.value


def _values(points: Sequence[Point]) -> NDArray[np.float64]:
    """Rewards of points for each prompt: shape (prompts, points, rewards)."""
    return np.stack([point.values for point in points], axis=1)
