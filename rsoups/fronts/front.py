"""A front: models compared on the same prompts by the same rewards. Pure functions of a sweep's records.

All rewards are maximized; the ``sign`` of a reward card turns those that are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError
from rsoups.common.files import read_jsonl
from rsoups.fronts import selection
from rsoups.fronts.advantage import Advantage, advantage
from rsoups.fronts.attainment import attainment_draws, attainment_surfaces
from rsoups.fronts.comparison import Comparison, check_same_rewards, compared, distance, paired_stacks
from rsoups.fronts.estimates import Estimate, Stack, Volume, checked_reference, means_with_draws, pareto_mask, volume_of
from rsoups.fronts.notes import notes_of, sweep_settings, trained_on_of, trained_prompts_of
from rsoups.fronts.points import BASE, Choice, Point, estimates_of, values_of
from rsoups.fronts.reading import Points, read_records, read_table
from rsoups.fronts.tables import html_table, markdown_table, means_of, rows_of, write_csv

if TYPE_CHECKING:
    from rsoups.fronts.votes import VotedUtility


MORL = "MORL"  # prefix of the names of runs that were trained on several rewards at once


class Front:
    """Models compared on the same prompts by the same rewards, all of which are maximized.

    Attributes:
        points: Models in the order of the records.
        rewards: Names of the rewards, sorted.
        prompts: Prompts, sorted; messages as JSON. Empty for a front from a table, which has means only.
        shares: Share of each prompt in each bootstrap draw, shape (draws, prompts); None without prompts to resample.
        trained_on: Rewards and weights that each ingredient or other model was trained on, from its ``lineage.json``.
        trained_prompts: Number of the prompts that each of these was trained on, if any.
    """

    def __init__(self, points: Points):
        self.points, self.rewards, self.prompts, self.shares = (
            points.points,
            points.rewards,
            points.prompts,
            points.shares,
        )
        self.trained_on: dict[str, dict[str, float]] = {}
        self.trained_prompts: dict[str, int] = {}

    @classmethod
    def from_jsonl(cls, path: str | Path, seed: int = 0) -> Front:
        """The front of a records file, with what the settings beside it say of the runs' training.

        Raises:
            FrontError: As `from_records`, no such file, or a line that is not JSON.
        """
        front = cls.from_records(read_jsonl(path, FrontError), seed)
        settings = sweep_settings(Path(path))
        front.trained_on, front.trained_prompts = trained_on_of(settings), trained_prompts_of(settings)
        return front

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], seed: int = 0) -> Front:
        """Group records by model, and resample their prompts, the same draws for every model.

        Args:
            records: Records as `sweep` writes them. Several records of one model and prompt are averaged.
            seed: Seed of the bootstrap.

        Raises:
            FrontError: No records, a wrong record (which is named), soups of other ingredients, or models that were not
                evaluated on the same prompts by the same rewards.
        """
        return cls(read_records(records, seed))

    @classmethod
    def from_csv(cls, path: str | Path, rewards: Sequence[str] | None = None) -> Front:
        """Points from a table, such as a published front: one row each, higher is better in every reward.

        Args:
            path: Columns ``lambda_<ingredient>`` (empty for a model that is not a soup), one column for each reward, and
                optionally ``name`` and ``<reward>_low``, ``<reward>_high`` (an interval as published).
            rewards: Names of the reward columns; all remaining columns by default.

        Returns:
            A front of means without prompts: intervals are those of the file.

        Raises:
            FrontError: No such file, no rows, no reward column, two rows of one name and λ, or a cell that is not a number.
        """
        return cls(read_table(path, rewards))

    @cached_property
    def soups(self) -> list[Point]:
        """The soups; of two ingredients in order, from λ = 0 of the second to 1."""
        soups = [point for point in self.points if point.lambdas is not None]
        return sorted(soups, key=lambda point: point.weights, reverse=True)

    @property
    def ingredients(self) -> list[str]:
        """Names of the ingredients, in the order of λ."""
        return list(self.soups[0].lambdas or {}) if self.soups else []

    @property
    def legend(self) -> str:
        """Head of a table's first column: the ingredients that the numbers of a soup's label weigh."""
        return f"model (λ: {' / '.join(self.ingredients)})" if self.ingredients else "model"

    @property
    def others(self) -> list[Point]:
        """The base and all other models that are not soups."""
        return [point for point in self.points if point.lambdas is None]

    @property
    def base(self) -> Point | None:
        """The base, if it was evaluated."""
        return next((point for point in self.others if point.name == BASE), None)

    @property
    def candidates(self) -> list[Point]:
        """The points that are measured as a front: the soups, or all points of a front without soups."""
        return self.soups or self.points

    @cached_property
    def ends(self) -> dict[str, Point]:
        """The soups of one ingredient alone, by its name.

        Raises:
            FrontError: An end was not evaluated.
        """
        ends = {point.alone: point for point in self.soups if point.alone}
        missing = [name for name in self.ingredients if name not in ends]
        if missing:
            raise FrontError(f"no records at λ = 1 of {missing}: sweep the ends too")
        return {name: ends[name] for name in self.ingredients}

    @property
    def has_chord(self) -> bool:
        """Whether a chord can be drawn over λ: several soups of two ingredients, including both ends."""
        return len(self.soups) > 1 and len(self.ingredients) == 2 and sum(bool(p.alone) for p in self.soups) > 1

    @property
    def has_band(self) -> bool:
        """Whether attainment over bootstrap draws can be drawn: two rewards, and prompts to resample."""
        return len(self.rewards) == 2 and self.shares is not None

    def at(self, lambdas: Sequence[float] | Mapping[str, float]) -> Point:
        """The soup at λ, given in the order of the ingredients or by their names.

        Raises:
            FrontError: There is no such soup.
        """
        if isinstance(lambdas, Mapping):
            lambdas = [lambdas.get(name, 0.0) for name in self.ingredients]
        for point in self.soups:
            if len(point.weights) == len(lambdas) and np.allclose(point.weights, lambdas):
                return point
        raise FrontError(f"no soup at λ {lambdas}; there are {[point.label for point in self.soups]}")

    def named(self, name: str) -> Point:
        """The base, or another model that is not a soup.

        Raises:
            FrontError: There is no model with this name.
        """
        for point in self.others:
            if point.name == name:
                return point
        raise FrontError(f"no model {name!r} beside the soups; there are {[point.name for point in self.others]}")

    def pareto(self) -> list[Point]:
        """The points that no other point dominates: equals or beats in every reward and beats in one."""
        mask = pareto_mask(self.stack(self.points)[0])
        return [point for point, optimal in zip(self.points, mask, strict=True) if optimal]

    def pareto_shares(self) -> list[float] | None:
        """Share of the bootstrap draws in which each point is on the Pareto front; None without prompts to resample."""
        if self.shares is None:
            return None
        return np.mean([pareto_mask(draw) for draw in self.stack(self.points)[1:]], axis=0).tolist()

    def hypervolume(self, reference: Mapping[str, float], points: Sequence[Point] | None = None) -> Volume:
        """Volume that points dominate above a reference, with its interval. Approximated above 5 rewards, with its error.

        Args:
            reference: A value for each reward; a point that does not exceed all of them adds nothing.
            points: Points; the soups by default, all points of a front without soups.

        Raises:
            FrontError: A reward without a reference, a reference that is not finite, or no points.
        """
        values = checked_reference(reference, self.rewards)
        if points is not None and not points:
            raise FrontError("hypervolume needs at least one point, got none")
        return volume_of(self.stack(self.candidates if points is None else points), self.rewards, values)

    def igd_plus(self, other: Front) -> Estimate:
        """Distance of the soups, in units of the rewards, to the Pareto set of another front; 0 if they reach all of it.

        IGD+ of Ishibuchi et al. 2015, paired over the common prompts, of the points that `hypervolume` takes.

        Raises:
            FrontError: Other rewards, or no common prompts.
        """
        first, second, _ = paired_stacks(self, other)
        return distance(first, second)

    def compare(self, other: Front, reference: Mapping[str, float]) -> Comparison:
        """This front against another one, paired over their common prompts (`difference` is for two points of one front).

        Args:
            other: Front of the same rewards. If one of the two has no prompts (a CSV), means are compared, without intervals.
            reference: Reference of the hypervolumes, by reward.

        Raises:
            FrontError: Other rewards, no common prompts, or an incomplete reference.
        """
        values = checked_reference(reference, self.rewards)
        first, second, prompts = paired_stacks(self, other)
        return compared(first, second, prompts, self.rewards, values)

    def advantage(
        self,
        reference: Mapping[str, float],
        names: Sequence[str] | None = None,
        *,
        runs: tuple[int, int] | None = None,
        with_ends: bool = True,
    ) -> Advantage:
        """Compare soups with MORL runs, as many soups as other runs, in hypervolume and expected utility.

        Args:
            reference: Reference of the hypervolumes, by reward.
            names: Names of the other runs; by default all that begin with ``MORL``.
            runs: PPO runs that the soups and the others took; by default one for each ingredient and each other run.
            with_ends: Whether each ingredient counts as another run too: it is MORL with all weight on one reward.

        Raises:
            FrontError: No such run, fewer soups than other runs, an end that was not evaluated, or an incomplete reference.
        """
        values = checked_reference(reference, self.rewards)
        others = self.morl if names is None else [self.named(name) for name in dict.fromkeys(names)]
        if not others or not self.soups:
            labels = [point.label for point in self.points]
            raise FrontError(
                f"soups are compared with MORL runs here; there are {labels}: evaluate soups and MORL runs"
            )
        others = others + list(self.ends.values()) if with_ends else others
        return advantage(
            values_of(self.soups),
            values_of(others),
            self.shares,
            runs=runs or (len(self.ingredients), len(others)),
            names=self.rewards,
            reference=values,
            lambdas=[point.weights for point in self.soups],
            with_ends=with_ends,
        )

    @property
    def morl(self) -> list[Point]:
        """The models whose names begin with ``MORL``."""
        return [point for point in self.others if point.name.lower().startswith(MORL.lower())]

    def attainment(
        self, *seeds: Front, levels: Sequence[float] = (0.025, 0.5, 0.975)
    ) -> dict[float, NDArray[np.float64]]:
        """Empirical attainment surfaces: the corners of what at least a share of the draws attains.

        Args:
            seeds: Fronts of the same experiment with other seeds: the surfaces are then over these runs and this one. Without
                them, over bootstrap draws of the prompts.
            levels: Shares, in (0, 1].

        Returns:
            Corners by level, each of shape (K, rewards), float64, sorted by the first reward.

        Raises:
            FrontError: Other than two or three rewards, other rewards among the seeds, or no prompts to resample.
        """
        if seeds:
            for front in seeds:
                check_same_rewards(self, front)
            return attainment_surfaces([front.stack(front.candidates)[0] for front in (self, *seeds)], levels)
        if self.shares is None:
            raise FrontError(
                "attainment over bootstrap draws needs the records of two prompts or more; this front has means only"
            )
        return attainment_surfaces(attainment_draws(self.stack(self.candidates)), levels)

    def linear_mode_connectivity(self) -> list[tuple[Point, dict[str, Estimate]]]:
        """At each soup, its rewards minus the chord's, Σ λi·(reward of ingredient i), paired over prompts.

        At or above 0 in every reward is what the paper calls linear mode connectivity (its hypothesis 1).

        Raises:
            FrontError: An end was not evaluated.
        """
        rows = []
        for point in self.soups:
            chord = sum(weight * end.values for weight, end in zip(point.weights, self.ends.values(), strict=True))
            rows.append((point, self._estimates(point.values - chord)))
        return rows

    def difference(self, point: Point, other: Point) -> dict[str, Estimate]:
        """By reward, one point of this front minus another one, paired over prompts."""
        return self._estimates(point.values - other.values)

    def select(
        self,
        preference: Mapping[str, float] | None = None,
        *,
        maximize: str | None = None,
        subject_to: Mapping[str, str] | Iterable[str] | None = None,
        knee: bool = False,
        votes: str | Path | Sequence[Mapping[str, Any]] | VotedUtility | None = None,
        above_base: bool = False,
    ) -> Choice:
        """Choose λ by one rule among the evaluated soups (among all points of a front without soups).

        Args:
            preference: Weights μ by reward: the largest Σ μi·Ri, of the rewards as they are (recipes/calibrate.py makes
                unlike scales comparable).
            maximize: A reward: the point with the most of it ...
            subject_to: ... among those that keep limits, ``{"harmless": ">= 0.2"}`` or ``["harmless >= 0.2"]``.
            knee: The Pareto point farthest above the plane through the front's ends.
            votes: A votes file, its rows, or the result of `fit_votes`: the λ that voters like best.
            above_base: The points above the base in every reward, with 95% confidence if there are any; of these the one with
                the largest mean of the rewards, or the largest weighted sum by `preference`.

        Raises:
            FrontError: Not exactly one rule, an unknown reward, limits that no point keeps (the best reachable value is
                named), or no point above the base in every reward (the nearest is named).
            VotesError: As `fit_votes`.
        """
        rules = [preference is not None and not above_base, maximize is not None, knee, votes is not None, above_base]
        if sum(rules) != 1 or (subject_to and maximize is None):
            raise FrontError(
                "choose by one rule: preference, maximize (optionally with subject_to), knee, votes or above_base "
                "(optionally with a preference)"
            )
        if above_base:
            return selection.choose_above_base(self, preference or dict.fromkeys(self.rewards, 1.0))
        if preference is not None:
            return selection.choose_by_weights(self, preference)
        if maximize is not None:
            return selection.choose_by_limits(self, maximize, subject_to or {})
        return selection.choose_knee(self) if votes is None else selection.choose_by_votes(self, votes)

    def share_above_base(self, point: Point) -> float | None:
        """Share of the bootstrap draws in which a point is above the base in every reward; None without draws or a base."""
        return selection.share_above_base(self, point)

    @property
    def notes(self) -> list[str]:
        """What a reader should know before the figures: runs that did not learn, too little to compare."""
        return notes_of(self)

    def to_table(self) -> list[dict[str, Any]]:
        """One row for each point; ``pandas.DataFrame(front.to_table())`` makes a data frame.

        Columns: ``name``, ``lambda_<ingredient>``, rewards and extras (each with its ``_low`` and ``_high``), ``pareto``.
        """
        return rows_of(self)

    def to_csv(self, path: str | Path) -> None:
        """Write the points as `from_csv` reads them."""
        write_csv(self, path)

    def to_markdown(self) -> str:
        """A table of all points: the mean of each reward with its interval."""
        return markdown_table(*means_of(self))

    def __repr__(self) -> str:
        parts = [f"rewards {', '.join(self.rewards)}"]
        if self.soups:
            parts.append(f"{len(self.soups)} soups of {', '.join(self.ingredients)}")
        if self.others:
            parts.append(f"others {', '.join(point.label for point in self.others)}")
        parts.append(f"{len(self.prompts)} prompts" if self.prompts else "means only")
        return f"Front({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        return html_table(*means_of(self))

    def stack(self, points: Sequence[Point]) -> Stack:
        """Observed means of points, then their means in each bootstrap draw: shape (1 + draws, points, rewards)."""
        return means_with_draws(values_of(points), self.shares)

    def _estimates(self, values: NDArray[np.float64]) -> dict[str, Estimate]:
        return estimates_of(values, self.rewards, self.shares)
