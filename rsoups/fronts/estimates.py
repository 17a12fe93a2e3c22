"""Figures with intervals: the paired bootstrap over prompts, hypervolumes with their reference, distinct-n.

Arrays only; nothing here knows records or fronts. All rewards are maximized.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError

RESAMPLES = 2_000
_TAILS = (0.025, 0.975)
_EXACT_REWARDS = 5  # moocore takes microseconds up to here; at 8 rewards and 200 points seconds for each of 2,000 draws
_ROUNDS = 8  # of the approximation, for its error


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% bootstrap interval over prompts: `low` and `high`, None where there are no prompts to resample."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, figures: Sequence[float] | NDArray[np.float64]) -> Estimate:
        """A figure as observed, then in each bootstrap draw (or alone): the value and its percentile interval."""
        if len(figures) == 1:
            return cls(float(figures[0]))
        return cls(float(figures[0]), *map(float, np.quantile(figures[1:], _TAILS)))

    @classmethod
    def basic(cls, figures: Sequence[float] | NDArray[np.float64]) -> Estimate:
        """As `of`, for what noise makes larger (a volume under the best points, a distance): 2·value less the draws' quantiles.

        The draws are noisier than the observation by as much as that is noisier than the truth, so that the percentile interval
        lies too high, by twice the bias: with 66 points of independent noise it held the true hypervolume in 63% of
        simulations, this one in 95%. Where the noise is large, the interval lies below the value.
        """
        value = float(figures[0])
        if len(figures) == 1:
            return cls(value)
        least, most = np.quantile(figures[1:], _TAILS)
        return cls(value, 2 * value - float(most), 2 * value - float(least))

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]")

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above 0: never without an interval."""
        return self.low is not None and self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is below 0: never without an interval."""
        return self.high is not None and self.high < 0


@dataclass(frozen=True)
class Volume(Estimate):
    """A hypervolume, which is nothing without its reference. Its interval is `Estimate.basic`.

    Attributes:
        reference: The value of each reward that volume is counted from. All rewards are maximized.
        error: One standard error of `value` where it is approximated (above 5 rewards), else 0.
    """

    reference: dict[str, float] = field(default_factory=dict)
    error: float = 0.0

    def __str__(self) -> str:
        at = ", ".join(f"{name} {value:g}" for name, value in self.reference.items())
        about = f" (approximated, standard error {self.error:.2g})" if self.error else ""
        return f"{super().__str__()}{about} above the reference {at} (every reward maximized)"


def resampling(n: int, seed: int) -> NDArray[np.float64] | None:
    """Bootstrap over n prompts: shape (2000, n), the share of each prompt in each draw; None below two prompts.

    The mean of values of shape (n, ...) in every draw is ``shares @ values``.
    """
    if n < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, n, size=(RESAMPLES, n))
    offsets = np.arange(RESAMPLES)[:, None] * n
    return np.bincount((draws + offsets).ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n) / n


def means_with_draws(values: NDArray[np.float64], shares: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Means over prompts as observed, then in each bootstrap draw: values of shape (prompts, ...) to (1 + draws, ...).

    NaN is a prompt without a value; the mean is over the others.
    """
    if np.isnan(values).any():
        observed = shared_means(np.full((1, len(values)), 1 / len(values)), values)
    else:
        observed = values.mean(axis=0)[None]
    return observed if shares is None else np.concatenate([observed, shared_means(shares, values)])


def shared_means(shares: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """``shares @ values`` over the prompts that have a value; of a draw without any of them, the mean of all."""
    missing = np.isnan(values)
    if not missing.any():
        return np.tensordot(shares, values, axes=1)
    totals = np.tensordot(shares, np.nan_to_num(values), axes=1)
    counts = np.tensordot(shares, 1.0 - missing, axes=1)
    every = np.nan_to_num(values).sum(axis=0) / np.maximum((~missing).sum(axis=0), 1)
    return np.where(counts > 0, totals / np.where(counts > 0, counts, 1), every)


def checked_reference(reference: Mapping[str, float], rewards: Sequence[str]) -> list[float]:
    """The reference in the order of the rewards.

    Raises:
        FrontError: A reward without a reference, a name too many, or a value that is not finite.
    """
    if set(reference) != set(rewards) or not all(math.isfinite(value) for value in reference.values()):
        raise FrontError(
            f"hypervolume needs a finite reference for each of {list(rewards)} (all maximized), got {dict(reference)}"
        )
    return [float(reference[reward]) for reward in rewards]


def hypervolumes(draws: NDArray[np.float64], at: Sequence[float]) -> NDArray[np.float64]:
    """Hypervolume of each set of points above a reference: shape (K, points, rewards) to (K,). Approximated above 5 rewards.

    Every set of an approximation is measured along the same directions, so that differences between sets are paired.
    """
    from moocore import hv_approx, hypervolume

    if draws.shape[-1] == 2:
        return _areas(draws, at)
    if draws.shape[-1] <= _EXACT_REWARDS:
        return np.array([hypervolume(points, ref=at, maximise=True) for points in draws])
    return np.array(
        [hv_approx(p, ref=at, maximise=True, nsamples=4_096, seed=0, method="DZ2019-MC") for p in draws[:501]]
    )


def _areas(draws: NDArray[np.float64], at: Sequence[float]) -> NDArray[np.float64]:
    """Hypervolumes of two rewards, all draws at once: the area under the staircase, from the right to the left."""
    beyond = np.maximum(draws - np.asarray(at), 0)
    order = np.argsort(-beyond[..., 0], axis=-1, kind="stable")
    widths, heights = (np.take_along_axis(beyond[..., column], order, axis=-1) for column in (0, 1))
    stairs = np.maximum.accumulate(heights, axis=-1)
    return (widths * np.diff(stairs, axis=-1, prepend=0)).sum(axis=-1)


def hypervolume_and_error(points: NDArray[np.float64], at: Sequence[float]) -> tuple[float, float]:
    """Hypervolume of one set of points, shape (points, rewards), and its standard error (0 where it is exact)."""
    from moocore import hv_approx

    if points.shape[-1] <= _EXACT_REWARDS:
        return float(hypervolumes(points[None], at)[0]), 0.0
    rounds = [
        hv_approx(points, ref=at, maximise=True, nsamples=32_768, seed=seed, method="DZ2019-MC")
        for seed in range(_ROUNDS)
    ]
    return float(np.mean(rounds)), float(np.std(rounds, ddof=1) / math.sqrt(_ROUNDS))


def distinct(texts: Sequence[Sequence[str]], n: int = 2) -> Estimate | None:
    """Distinct-n of texts by prompt: different n-grams of words over all n-grams (Li et al. 2016); None where there are none.

    The interval is the jackknife's over prompts, value ± 1.96 standard errors: a bootstrap draws a text twice and counts it
    as a repetition.
    """
    grams = [
        Counter(gram for text in some for gram in zip(*(text.split()[i:] for i in range(n)), strict=False))
        for some in texts
    ]
    total = sum(map(Counter.total, grams))
    if not total:
        return None
    holders = Counter(gram for found in grams for gram in found)  # for how many prompts
    value = len(holders) / total
    without = []
    for found in grams:
        lost = sum(holders[gram] == 1 for gram in found)
        if rest := total - found.total():
            without.append((len(holders) - lost) / rest)
    if len(without) < 2:
        return Estimate(value)
    error = math.sqrt((len(without) - 1) * float(np.var(without)))
    return Estimate(value, max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error))
