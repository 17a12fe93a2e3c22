"""Estimates with intervals: paired bootstrap over prompts, hypervolume, distinct-n.

Functions of arrays, without records or fronts. All rewards are maximized. A stack is an array of shape (1 + draws, points,
rewards), float64: the observed means, then the means in each bootstrap draw over prompts. Two stacks in the same draws give
paired differences.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError

RESAMPLES = 2_000
Stack = NDArray[np.float64]
_TAILS = (0.025, 0.975)
_EXACT_REWARDS = (
    5  # exact hypervolumes take microseconds up to here; at 8 rewards and 200 points, seconds for each draw
)
_APPROXIMATED_DRAWS = 501
_ROUNDS = 8  # repetitions of the approximation, for its standard error


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% bootstrap interval over prompts, `low` to `high`; None where there are no prompts to resample."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, figures: Sequence[float] | NDArray[np.float64]) -> Estimate:
        """The observed figure, which is the first, with the percentile interval of the others, its draws."""
        if len(figures) == 1:
            return cls(float(figures[0]))
        return cls(float(figures[0]), *map(float, np.quantile(figures[1:], _TAILS)))

    @classmethod
    def basic(cls, figures: Sequence[float] | NDArray[np.float64]) -> Estimate:
        """The observed figure with the basic bootstrap's interval, 2·value minus the quantiles of the draws.

        For figures that noise makes larger: the volume under the best points, a distance. A draw has the noise of the
        observation and as much again, so the percentile interval is too high by twice the bias. With 66 points of independent
        noise it held the true hypervolume in 63% of simulations, this one in 95%. Where the noise is large, the interval lies
        below the value.
        """
        plain = cls.of(figures)
        if plain.low is None or plain.high is None:
            return plain
        return cls(plain.value, 2 * plain.value - plain.high, 2 * plain.value - plain.low)

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]")

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above 0; False without an interval."""
        return self.low is not None and self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is below 0; False without an interval."""
        return self.high is not None and self.high < 0


@dataclass(frozen=True)
class Volume(Estimate):
    """A hypervolume with its reference. The interval is that of `Estimate.basic`.

    Attributes:
        reference: Value of each reward from which volume is counted. All rewards are maximized.
        error: Standard error of `value` where it is approximated (above 5 rewards), otherwise 0.
    """

    reference: dict[str, float] = field(default_factory=dict)
    error: float = 0.0

    def __str__(self) -> str:
        reference = ", ".join(f"{name} {value:g}" for name, value in self.reference.items())
        error = f" (approximated, standard error {self.error:.2g})" if self.error else ""
        return f"{super().__str__()}{error} above the reference {reference} (every reward maximized)"


def drawn_rows(n: int, seed: int, draws: int = RESAMPLES) -> NDArray[np.int64]:
    """Rows of a bootstrap over n of them, shape (draws, n). Fewer draws are the first ones of more draws."""
    return np.random.default_rng(seed).integers(0, n, size=(draws, n))


def resampling(n: int, seed: int) -> NDArray[np.float64] | None:
    """Bootstrap over n prompts: the share of each prompt in each draw, shape (2000, n), float64; None below two prompts.

    The mean of values of shape (n, ...) in every draw is ``shares @ values``.
    """
    if n < 2:
        return None
    offsets = np.arange(RESAMPLES)[:, None] * n
    places = drawn_rows(n, seed) + offsets
    return np.bincount(places.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n) / n


def estimate_of(figure: Callable[[NDArray[np.int64]], float], draws: NDArray[np.int64]) -> Estimate | None:
    """A figure of rows with its interval, for figures that are no means; None where all rows together have none.

    Args:
        figure: The figure of given rows, one index for each; NaN where they have none. Such draws are left out.
        draws: Rows of each draw, shape (draws, n), of `drawn_rows`.
    """
    figures = [figure(rows) for rows in (np.arange(draws.shape[1]), *draws)]
    return Estimate.of([value for value in figures if np.isfinite(value)]) if np.isfinite(figures[0]) else None


def means_with_draws(values: NDArray[np.float64], shares: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Observed means over prompts, then the means in each draw: values of shape (prompts, ...) to (1 + draws, ...).

    NaN marks a prompt without a value; means are over the other prompts.
    """
    if np.isnan(values).any():
        observed = shared_means(np.full((1, len(values)), 1 / len(values)), values)
    else:
        observed = values.mean(axis=0)[None]
    return observed if shares is None else np.concatenate([observed, shared_means(shares, values)])


def shared_means(shares: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """``shares @ values`` over the prompts that have a value; in a draw without any, the mean of all prompts."""
    missing = np.isnan(values)
    if not missing.any():
        return np.tensordot(shares, values, axes=1)
    filled = np.nan_to_num(values)
    totals = np.tensordot(shares, filled, axes=1)
    counts = np.tensordot(shares, 1.0 - missing, axes=1)
    overall = filled.sum(axis=0) / np.maximum((~missing).sum(axis=0), 1)
    return np.where(counts > 0, totals / np.where(counts > 0, counts, 1), overall)


def checked_reference(reference: Mapping[str, float], rewards: Sequence[str]) -> list[float]:
    """The reference in the order of the rewards.

    Raises:
        FrontError: A reward without a reference, an unknown name, or a value that is not finite.
    """
    if set(reference) != set(rewards) or not all(math.isfinite(value) for value in reference.values()):
        raise FrontError(
            f"hypervolume needs a finite reference for each of {list(rewards)} (all maximized), got {dict(reference)}: give "
            "each reward a value below the values of interest"
        )
    return [float(reference[reward]) for reward in rewards]


def pareto_mask(means: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of the points, shape (points, rewards), that no other point dominates; equal points are all kept."""
    from moocore import is_nondominated

    return is_nondominated(means, maximise=True, keep_weakly=True)


def hypervolumes(sets: NDArray[np.float64], reference: Sequence[float]) -> NDArray[np.float64]:
    """Hypervolume of each set of points above a reference: shape (K, points, rewards) to (K,).

    Above 5 rewards it is approximated for the first 501 sets, in the same directions, so that differences are paired.
    """
    from moocore import hypervolume

    rewards = sets.shape[-1]
    if rewards == 2:
        return _areas(sets, reference)
    if rewards <= _EXACT_REWARDS:
        return np.array([hypervolume(points, ref=reference, maximise=True) for points in sets])
    return np.array([_approximated(points, reference, 4_096, 0) for points in sets[:_APPROXIMATED_DRAWS]])


def _approximated(points: NDArray[np.float64], reference: Sequence[float], directions: int, seed: int) -> float:
    from moocore import hv_approx

    return hv_approx(points, ref=reference, maximise=True, nsamples=directions, seed=seed, method="DZ2019-MC")


def _areas(sets: NDArray[np.float64], reference: Sequence[float]) -> NDArray[np.float64]:
    """Hypervolumes of two rewards, all sets at once: the area under the staircase, from right to left.

    One call of moocore for each draw takes six times as long.
    """
    beyond = np.maximum(sets - np.asarray(reference), 0)
    order = np.argsort(-beyond[..., 0], axis=-1, kind="stable")
    widths, heights = (np.take_along_axis(beyond[..., column], order, axis=-1) for column in (0, 1))
    stairs = np.maximum.accumulate(heights, axis=-1)
    return (widths * np.diff(stairs, axis=-1, prepend=0)).sum(axis=-1)


def volume_of(stack: Stack, names: Sequence[str], reference: Sequence[float]) -> Volume:
    """Hypervolume of a stack above a reference, both in the order of the names."""
    interval = Estimate.basic(hypervolumes(stack, reference))
    value, error = interval.value, 0.0
    if len(names) > _EXACT_REWARDS:
        rounds = [_approximated(stack[0], reference, 32_768, seed) for seed in range(_ROUNDS)]
        value, error = float(np.mean(rounds)), float(np.std(rounds, ddof=1) / math.sqrt(_ROUNDS))
    return Volume(value, interval.low, interval.high, dict(zip(names, reference, strict=True)), error)


def distinct(texts: Sequence[Sequence[str]], n: int = 2) -> Estimate | None:
    """Distinct-n of the responses to each prompt: different n-grams of words over all n-grams (Li et al. 2016), or None.

    The interval is the jackknife's over prompts, value ± 1.96 standard errors. A bootstrap would draw a text twice and count it
    as a repetition.
    """
    grams = []
    for responses in texts:
        words = [text.split() for text in responses]
        grams.append(Counter(gram for text in words for gram in zip(*(text[i:] for i in range(n)), strict=False)))
    total = sum(counts.total() for counts in grams)
    if not total:
        return None

    prompts_of = Counter(gram for counts in grams for gram in counts)
    value = len(prompts_of) / total
    without = []  # the figure without each prompt
    for counts in grams:
        own = sum(prompts_of[gram] == 1 for gram in counts)
        if total > counts.total():
            without.append((len(prompts_of) - own) / (total - counts.total()))
    if len(without) < 2:
        return Estimate(value)
    error = math.sqrt((len(without) - 1) * float(np.var(without)))
    return Estimate(value, max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error))
