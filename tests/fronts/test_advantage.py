"""What soups gain over MORL: with as many points, and for users whose preferences differ."""

from itertools import combinations

import numpy as np
import pytest
from front_records import noisy, records, resampled, staircase

import rsoups
from rsoups import Front
from rsoups.fronts.advantage import advantage
from rsoups.fronts.grids import simplex


def test_the_advantage_over_morl_is_a_difference_of_areas_with_as_many_points():
    front = Front.from_records(noisy())
    morl, ends = [p for p in front.others if "MORL" in p.name], list(front.ends.values())
    found = front.advantage({"a": -1, "b": -1})
    assert found.runs == (2, 4)  # an ingredient is the MORL run of one reward alone
    assert found.places == (0, 1, 3, 4)  # of five soups from λ 1 / 0 to 0 / 1, whatever their rewards
    four = [front.soups[place] for place in found.places]
    gains = [
        staircase(draw[:4], (-1, -1)) - staircase(draw[4:], (-1, -1))
        for draw in resampled(front, [*four, *morl, *ends])
    ]
    assert found.gain.value == pytest.approx(found.soups.value - found.others.value)
    assert found.soups.value == pytest.approx(staircase([p.values.mean(axis=0) for p in four], (-1, -1)))
    assert (found.gain.low, found.gain.high) == pytest.approx(np.quantile(gains, [0.025, 0.975]))
    alone = front.advantage({"a": -1, "b": -1}, ["MORL 0.5/0.5"], runs=(2, 1), with_ends=False)
    assert alone.others.value == pytest.approx(staircase([morl[0].values.mean(axis=0)], (-1, -1)))
    assert alone.places == (2,) and "(1 points each)" in str(alone) and "with 1 run: soups" in str(alone)
    with pytest.raises(rsoups.FrontError, match="compared with MORL runs"):
        Front.from_records([r for r in noisy(n=2) if "MORL" not in r["name"]]).advantage({"a": 0, "b": 0})
    with pytest.raises(rsoups.FrontError, match="counted from 1"):
        front.advantage({"a": 0, "b": 0}, runs=(2, 0))
    few = [r for r in noisy(n=2) if r["lambdas"] is None or r["lambdas"]["A"] in (0, 1)]
    with pytest.raises(rsoups.FrontError, match="2 soups for 4 MORL runs .*sweep more λ"):
        Front.from_records(few).advantage({"a": 0, "b": 0})


def test_hypervolume_against_the_number_of_runs():
    """Without noise: of each choice of runs the area of its staircase, then their mean and the largest."""
    front = Front.from_records(records(n=2, bulge=0.1, noise=0.0)[0])
    curve = front.advantage({"a": -1, "b": -1}).curve
    runs = [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)]  # MORL and the two ingredients
    for size, reach in enumerate(curve, 1):
        areas = [staircase(some, (-1, -1)) for some in combinations(runs, size)]
        assert reach.runs == size and reach.others.value == pytest.approx(np.mean(areas))
        assert reach.best == pytest.approx(max(areas))
    assert [reach.runs for reach in curve] == [1, 2, 3]
    ends = [staircase([end], (-1, -1)) for end in runs[1:]]
    assert curve[0].soups.value == pytest.approx(np.mean(ends))
    assert curve[1].soups.value == pytest.approx(staircase([(0.6, 0.6), *runs[1:]], (-1, -1)))  # three points, as MORL
    assert curve[2].soups is None


def told_by_the_other_half(values, weights, pick, tell):
    """Expected utility, one preference after the other."""
    means, told = values[pick].mean(axis=0), values[tell].mean(axis=0)
    return np.mean([told[max(range(len(means)), key=lambda i: means[i] @ weight)] @ weight for weight in weights])


def test_expected_utility_is_of_points_chosen_on_one_half_and_told_by_the_other():
    front = Front.from_records(noisy())
    found = front.advantage({"a": -1, "b": -1})
    weights = [(x, 1 - x) for x in np.linspace(0, 1, 21)]
    order = np.random.default_rng(0).permutation(60)
    others = [*(p for p in front.others if "MORL" in p.name), *front.ends.values()]
    for points, gain in ((front.soups, found.utility_of_all), ([front.soups[i] for i in found.places], found.utility)):
        sets = [np.stack([p.values for p in some], axis=1) for some in (points, others)]
        both = [
            [told_by_the_other_half(values, weights, pick, tell) for values in sets]
            for pick, tell in ((order[:30], order[30:]), (order[30:], order[:30]))
        ]
        assert gain.value == pytest.approx(np.mean([first - second for first, second in both]))
        assert gain.low < gain.value < gain.high
    better = records(n=40, bulge=0.3)[
        0
    ]  # all prompts alike but for a noise that cancels: soups are better by a sure margin
    gain = Front.from_records(better).advantage({"a": -9, "b": -9}, with_ends=False).utility
    assert gain.is_above_zero and gain.high - gain.low < 1e-9


def simulated(repeats, prompts, noise, draws, kind):
    """How often intervals of soups less MORL miss the truth, which is 0: (too high, too low) of hypervolume and utility.

    ``copies``: eleven soups that are copies of the five MORL runs. ``own``: five of each, at the same places. The ends are the
    same runs in both sets, as they are in a sweep.
    """
    at = np.linspace(1, 0, 5)
    five = np.stack([at + at * (1 - at) / 4, 1 - at + at * (1 - at) / 4], axis=-1)
    soups = five[[0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]] if kind == "copies" else five
    missed = np.zeros((2, 2))
    for repeat in range(repeats):
        random = np.random.default_rng([repeat, prompts])
        own = random.normal(size=(prompts, len(soups) + 5, 2)) * noise
        own[:, [len(soups), -1]] = own[:, [0, len(soups) - 1]]
        values = np.concatenate([soups, five])[None] + own + random.normal(size=(prompts, 1, 2)) * 0.8
        shares = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws) / prompts
        sets = values[:, : len(soups)], values[:, len(soups) :]
        options = {"runs": (2, 5), "names": ["a", "b"], "reference": [-0.5, -0.5], "lambdas": simplex(2, len(soups))}
        found = advantage(*sets, shares, **options)
        for figure, gain in enumerate((found.gain, found.utility)):
            missed[figure] += gain.low > 0, gain.high < 0
    return missed / repeats


@pytest.mark.parametrize("kind", ["copies", "own"])
def test_intervals_of_an_advantage_that_is_none_miss_it_seldom(kind, monkeypatch):
    """5% of both tails together, within three standard errors. Eleven points against five were above it in 11 to 14%."""
    monkeypatch.setattr("rsoups.fronts.advantage._curve", lambda *_: ())
    missed = simulated(250, 40, 0.8, 200, kind).sum(axis=1)
    assert ((missed >= 0.012) & (missed <= 0.092)).all(), missed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copies", "own"])
@pytest.mark.parametrize(("prompts", "noise"), [(60, 0.8), (200, 0.8)])
def test_intervals_of_an_advantage_hold_what_they_say(kind, prompts, noise, monkeypatch):
    """Each tail, nominally 2.5%, is between 1 and 4%."""
    monkeypatch.setattr("rsoups.fronts.advantage._curve", lambda *_: ())
    missed = simulated(2000, prompts, noise, 500, kind)
    assert ((missed >= 0.01) & (missed <= 0.04)).all(), missed
