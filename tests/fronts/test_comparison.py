"""A front against another one, and the share of fronts that reach a point."""

import numpy as np
import pytest
from front_records import GRID, PUBLISHED, noisy, record, records, staircase

import rsoups
from rsoups import Front


def test_a_front_against_another_is_paired_over_their_common_prompts():
    shared, rows = records(n=60, bulge=0.1)[1], records(n=60, bulge=0.1)[0]
    other = [r for r in records(n=60)[0] if int(r["prompt"].split()[1]) >= 20]
    first, second = Front.from_records(rows), Front.from_records(other)
    found = first.compare(second, {"a": -9, "b": -9})
    common = sorted(range(20, 60), key=lambda i: f"prompt {i}")
    mean = shared[common].mean()
    sets = [[(x + g + mean, 1 - x + g + mean) for x in GRID for g in [bulge * 4 * x * (1 - x)]] for bulge in (0.1, 0)]
    areas = [staircase(points, (-9, -9)) for points in sets]
    assert found.prompts == 40 and found.gain.value == pytest.approx(areas[0] - areas[1])
    assert [v.value for v in found.hypervolume] == pytest.approx(areas)
    assert found.gain.is_above_zero
    # All of the straight front is covered by the bulging one, of which it holds the ends only.
    assert [c.value for c in found.coverage] == [1.0, 0.4] and found.coverage[0].low == 1.0
    assert found.attained[0] > found.attained[1]
    # IGD+: of each point of the bulging front, the shortfall of the nearest point of the straight one.
    gaps = [min(np.linalg.norm(np.maximum(np.subtract(goal, point), 0)) for point in sets[1]) for goal in sets[0]]
    assert found.igd_plus[1].value == pytest.approx(np.mean(gaps)) == pytest.approx(second.igd_plus(first).value)
    assert first.igd_plus(second).value == 0
    assert "40 common prompts" in str(found) and "every reward maximized" in str(found)


def test_fronts_that_cannot_be_compared():
    front = Front.from_records(noisy(n=5))
    with pytest.raises(rsoups.FrontError, match="no prompt in common"):
        front.compare(Front.from_records(noisy(n=5, start=5)), {"a": 0, "b": 0})
    with pytest.raises(rsoups.FrontError, match=r"same rewards.*\['a', 'b'\] and \['a'\]"):
        front.igd_plus(Front.from_records([record("base", None, "p", a=1.0)]))
    with pytest.raises(rsoups.FrontError, match="finite reference"):
        front.compare(front, {"a": 0})


def test_attainment_surfaces_over_seeds_hold_what_that_share_of_the_fronts_reaches():
    fronts = [Front.from_records(noisy(seed=seed)) for seed in range(5)]
    surfaces = fronts[0].attainment(*fronts[1:], levels=(0.2, 0.6, 1.0))
    means = [np.array([p.values.mean(axis=0) for p in front.soups]) for front in fronts]
    for goal in np.random.default_rng(0).uniform(-0.2, 1.4, size=(200, 2)):
        reached = np.mean([(points >= goal).all(axis=1).any() for points in means])
        for level, corners in surfaces.items():
            assert (corners >= goal).all(axis=1).any() == (reached >= level - 1e-9)
    assert (np.diff(surfaces[1.0][:, 0]) >= 0).all()


def test_attainment_over_draws_and_what_it_needs():
    front = Front.from_records(noisy())
    surfaces = front.attainment()
    inner, outer = surfaces[0.975], surfaces[0.025]
    assert all((outer >= corner).all(axis=1).any() for corner in inner)  # what most draws reach, some do
    with pytest.raises(rsoups.FrontError, match="shares of the draws"):
        front.attainment(levels=(0, 1))
    with pytest.raises(rsoups.FrontError, match="two or three rewards, got 1"):
        Front.from_records([record("base", None, p, a=1.0) for p in "pq"]).attainment()


def test_the_distance_is_to_the_points_that_nothing_beats():
    mine = Front.from_records([record("x", None, "p", a=1.0, b=1.0)])
    other = [record("y", None, "p", a=2.0, b=1.0), record("z", None, "p", a=-5.0, b=-5.0)]
    assert mine.igd_plus(Front.from_records(other)).value == 1.0  # (1 + 0) / 2 with the beaten one


def test_a_published_front_is_compared_by_its_means(tmp_path):
    path = tmp_path / "front.csv"
    path.write_text("\ufeff" + PUBLISHED, encoding="utf-8")
    front = Front.from_csv(path)
    assert [p.label for p in front.points] == ["λ 1 / 0", "λ 0.5 / 0.5", "λ 0 / 1", "MORL"] and front.prompts == []
    assert str(front.soups[0].estimate("a")) == "1.000 [0.900, 1.100]" and str(front.soups[0].estimate("b")) == "0.000"
    volume = front.hypervolume({"a": 0, "b": 0})
    assert (volume.value, volume.low, volume.high) == (pytest.approx(0.49), None, None)
    assert str(volume).startswith("0.490 above the reference")
    gap = front.linear_mode_connectivity()[1][1]["a"]
    assert gap.value == pytest.approx(0.2) and gap.low is None and not gap.is_above_zero
    assert front.select(knee=True).point.label == "λ 0.5 / 0.5" and front.select(knee=True).share is None
    assert front.pareto_shares() is None and len(front.pareto()) == 3
    with pytest.raises(rsoups.FrontError, match="needs the records of two prompts"):
        front.attainment()
    found = Front.from_records(records(n=5, noise=0.0)[0]).compare(front, {"a": 0, "b": 0})
    assert found.prompts == 0 and found.gain.low is None and found.attained is None and "means only" in str(found)
    assert found.gain.value == pytest.approx(staircase([(x, 1 - x) for x in GRID], (0, 0)) - 0.49)
