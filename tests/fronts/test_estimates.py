"""The one bootstrap: what its draws give, against closed forms."""

import numpy as np
import pytest

from rsoups.fronts.estimates import drawn_rows, estimate_of, means_with_draws, resampling


def test_the_bootstrap_of_a_mean_has_its_closed_form():
    """Over draws of n rows a mean has the mean of the rows, and their variance (not the sample's) divided by n."""
    values = np.random.default_rng(3).gamma(2.0, size=80)
    rows = drawn_rows(len(values), seed=0, draws=40_000)
    means = values[rows].mean(axis=1)
    expected = values.std() / np.sqrt(len(values))
    assert means.std() == pytest.approx(expected, rel=0.02)
    assert means.mean() == pytest.approx(values.mean(), abs=4 * expected / np.sqrt(len(rows)))
    assert rows.min() == 0 and rows.max() == len(values) - 1  # every row can be drawn


def test_shares_and_rows_are_the_same_draws():
    values = np.random.default_rng(4).normal(size=(30, 2))
    rows, shares = drawn_rows(30, seed=7), resampling(30, seed=7)
    assert np.allclose(shares.sum(axis=1), 1) and np.array_equal(means_with_draws(values, None)[0], values.mean(axis=0))
    assert np.allclose(means_with_draws(values, shares)[1:], values[rows].mean(axis=1), atol=1e-12)
    for column in values.T:
        estimate = estimate_of(lambda chosen, column=column: float(column[chosen].mean()), rows)
        low, high = np.quantile(column[rows].mean(axis=1), [0.025, 0.975])
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((column.mean(), low, high), abs=1e-12)


def test_fewer_draws_are_the_first_ones():
    """A probe's thousand draws are a front's first thousand, so a figure does not depend on who asked."""
    for n in (2, 8, 57, 200):
        assert np.array_equal(drawn_rows(n, seed=5, draws=1_000), drawn_rows(n, seed=5)[:1_000])


def test_draws_without_a_figure_are_left_out_and_rows_without_one_have_no_estimate():
    rows = np.array([[0, 0], [1, 1], [0, 1]])
    defined = {(0, 1): 2.0, (0, 0): 1.0, (1, 1): float("nan")}
    estimate = estimate_of(lambda chosen: defined[tuple(chosen.tolist())], rows)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((2.0, 1.025, 1.975))
    assert estimate_of(lambda chosen: float("nan"), rows) is None
