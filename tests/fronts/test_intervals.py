"""Intervals of fronts' figures: by draws done one after the other, and by simulation."""

import numpy as np
import pytest
from front_records import GRID, noisy, record, resampled, staircase

import rsoups
from rsoups import Front
from rsoups.fronts.estimates import hypervolumes, means_with_draws, resampling, volume_of


def test_intervals_are_those_of_the_draws():
    front = Front.from_records(noisy())
    areas = [staircase(draw, (-1, -1)) for draw in resampled(front, front.soups)]
    volume = front.hypervolume({"a": -1, "b": -1})
    assert (volume.low, volume.high) == pytest.approx(2 * volume.value - np.quantile(areas, [0.975, 0.025]))
    on_front = np.zeros(len(front.points))
    for draw in resampled(front, front.points):
        beaten = [any((other >= mine).all() and (other > mine).any() for other in draw) for mine in draw]
        on_front += ~np.array(beaten)
    assert front.pareto_shares() == pytest.approx(on_front / 2000)


def test_a_hypervolumes_interval_holds_the_true_one_though_noise_makes_it_large():
    """66 points with independent noise: the best of them look better than they are."""
    lambdas = np.array(rsoups.simplex(3, 11))
    true = lambdas + 0.3 * (1 - (lambdas**2).sum(axis=1, keepdims=True))
    expected = hypervolumes(true[None], [-1.0] * 3)[0]
    held, percentile = 0, 0
    for seed in range(40):
        values = true + np.random.default_rng(seed).normal(size=(150, *true.shape))
        stack = means_with_draws(values, resampling(150, seed)[:400])
        volume = volume_of(stack, "abc", [-1.0] * 3)
        low, high = np.quantile(hypervolumes(stack[1:], [-1.0] * 3), [0.025, 0.975])
        held += volume.low <= expected <= volume.high
        percentile += low <= expected <= high
    assert held >= 34 and percentile < 20


def test_many_rewards_are_approximated_with_a_stated_error():
    random = np.random.default_rng(0)
    rows = [
        record("soup", {"A": x, "B": 1 - x}, f"p{i}", **{f"r{j}": random.random() for j in range(7)})
        for x in GRID
        for i in range(3)
    ]
    front = Front.from_records(rows)
    from moocore import hypervolume

    volume = front.hypervolume({f"r{j}": 0 for j in range(7)})
    exact = hypervolume([p.values.mean(axis=0) for p in front.soups], ref=[0] * 7, maximise=True)
    assert 0 < volume.error < 0.02 * exact and abs(volume.value - exact) < 4 * volume.error
    assert "approximated, standard error" in str(volume)
