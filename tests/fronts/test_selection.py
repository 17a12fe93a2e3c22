"""Choosing a point of a front: by a preference, limits, the knee, or what is above the base."""

import math

import numpy as np
import pytest
from front_records import above, noisy, record, records, resampled

import rsoups
from rsoups import Front
from rsoups.fronts.selection import knee, parse_limit


def test_a_preference_chooses_the_largest_weighted_sum_and_tells_how_surely():
    front = Front.from_records(noisy())
    weights = np.array([0.7, 0.3])
    choice = front.select({"a": 7, "b": 3})
    assert choice.point is max(front.soups, key=lambda p: p.values.mean(axis=0) @ weights)
    at = front.soups.index(choice.point)
    assert choice.share == pytest.approx(np.mean([np.argmax(d @ weights) == at for d in resampled(front, front.soups)]))
    assert 0.2 < choice.share < 1 and "preference a 7, b 3; chosen in" in str(choice)
    assert Front.from_records(records(n=5, bulge=0.1)[0]).select({"b": 1}).share == 1


def test_limits_leave_the_best_that_keeps_them():
    front = Front.from_records(noisy())
    choice = front.select(maximize="a", subject_to={"b": ">= 0.6"})
    kept = [p for p in front.soups if p.mean["b"] >= 0.6]
    assert choice.point is max(kept, key=lambda p: p.mean["a"]) and choice.point.mean["a"] < front.soups[0].mean["a"]
    at, made = front.soups.index(choice.point), 0
    for draw in resampled(front, front.soups):
        allowed = [i for i in range(5) if draw[i, 1] >= 0.6]
        made += bool(allowed) and max(allowed, key=lambda i: draw[i, 0]) == at
    assert choice.share == pytest.approx(made / 2000)
    assert front.select(maximize="a").point is max(front.soups, key=lambda p: p.mean["a"])
    assert front.select(maximize="a", subject_to={"a": "< 0.9", "b": ">0"}).point.mean["a"] < 0.9
    between = front.select(maximize="a", subject_to=["a >= .3", "a <= 0.9"])  # two limits of one reward
    assert 0.3 <= between.point.mean["a"] <= 0.9 and "largest a, a >= 0.3, a <= 0.9" in between.rule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("coverage >= 0.2", ("coverage", ">=", 0.2)),
        (" my reward<-1e-3 ", ("my reward", "<", -1e-3)),
        ("a<b <= +.5", ("a<b", "<=", 0.5)),
        ("r>2.", ("r", ">", 2.0)),
    ],
)
def test_limits_are_parsed(text, expected):
    limit = parse_limit(text)
    assert (limit.reward, limit.sign, limit.value) == expected
    assert limit.holds(expected[2]) == (limit.sign in (">=", "<="))


@pytest.mark.parametrize(
    "text", ["", ">= 1", "a", "a = 1", "a >= ", "a >= b", "a >= 1e999", "a >= nan", "a >== 1", "a >= 1.2.3", None]
)
def test_limits_that_are_not_are_refused(text):
    with pytest.raises(rsoups.FrontError, match="invalid limit"):
        parse_limit(text)


def test_limits_that_nothing_keeps_tell_the_best_reachable():
    front = Front.from_records(records(n=4, noise=0.0)[0])
    with pytest.raises(rsoups.FrontError, match=r"b >= 1\.5: the best reachable is 1 \(λ 0 / 1\)$"):
        front.select(maximize="a", subject_to={"b": ">= 1.5"})
    with pytest.raises(
        rsoups.FrontError, match=r"a >= 0\.9: the best reachable is 0\.25 \(λ 0\.25 / 0\.75\), the other limits kept"
    ):
        front.select(maximize="a", subject_to={"a": ">= .9", "b": ">= 0.7"})
    with pytest.raises(rsoups.FrontError, match="a reaches from 0 to 1; b reaches from 0 to 1"):
        front.select(maximize="a", subject_to={"a": "> 2", "b": "> 2"})


def test_the_knee_is_where_the_front_bends():
    """A front of two straight parts bends at (.8, .8), whatever the scales of the rewards."""
    corners = {0.0: (1.0, 0.0), 0.25: (0.9, 0.4), 0.5: (0.8, 0.8), 0.75: (0.4, 0.9), 1.0: (0.0, 1.0)}
    rows = [
        record("soup", {"A": 1 - x, "B": x}, f"p{i}", a=100 * a + noise, b=b)
        for x, (a, b) in corners.items()
        for i, noise in enumerate((0.0, 1.0, -1.0))
    ]
    choice = Front.from_records(rows).select(knee=True)
    assert choice.point.lambdas == {"A": 0.5, "B": 0.5} and choice.share == 1


@pytest.mark.parametrize("rewards", [2, 3, 4, 5])
def test_the_knee_is_the_farthest_above_the_plane_through_the_ends(rewards):
    """Das's definition in his words: the plane's equation solved, distances measured, on fronts whose ends differ."""
    tried = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        means = random.dirichlet(np.ones(rewards), 20) ** 0.6 * random.uniform(1, 100, rewards)
        front = [i for i, x in enumerate(means) if not any((y >= x).all() and (y > x).any() for y in means)]
        scaled = (means[front] - means[front].min(axis=0)) / np.ptp(means[front], axis=0)
        ends = scaled.argmax(axis=0)
        if len(set(ends)) < rewards:
            continue
        normal = np.linalg.solve(scaled[ends], np.ones(rewards))  # the plane is normal·x = 1
        heights = (
            (scaled @ normal - 1) / np.linalg.norm(normal) * np.sign(normal.sum() - 1)
        )  # the ideal point is above it
        if heights.max() > 1e-9:
            tried += 1
            assert knee(means) == front[int(heights.argmax())]
    assert tried > 30


def test_a_knee_where_one_point_is_the_end_of_two_rewards():
    points = np.array([[1, 1, 0], [0, 0, 1], [0.6, 0.6, 0.6], [0.2, 0.3, 0.9]])
    assert knee(points) == 2 and knee(points[:1]) == 0 and knee(np.stack([points, points])).tolist() == [2, 2]


def test_what_is_above_the_base_in_every_reward_is_recommended():
    """The largest sum is at λ 1 / 0, which is below the base in b."""
    front = Front.from_records(above([(1.0, -0.2), (0.6, 0.1), (0.3, 0.3), (-0.1, 0.5)]))
    equal = front.select({"a": 1, "b": 1})
    assert equal.point.lambdas["A"] == 1 and equal.above_base == 0 and list(equal.behind) == ["b"]
    assert equal.behind["b"] == front.difference(equal.point, front.base)["b"]
    assert "Not above the base in b, by -0.194 [" in str(equal)
    best = front.select(above_base=True)
    assert best.point is front.soups[1] and best.behind == {} and best.above_base == 1 and best.share > 0.9
    assert "above the base in every reward, with 95% confidence" in str(best)
    assert front.select({"b": 1}, above_base=True).point is front.soups[2]
    gains = [draw[1] - draw[0] for draw in resampled(front, [front.base, front.soups[3]])]
    assert front.share_above_base(front.soups[3]) == np.mean([(gain > 0).all() for gain in gains])


def test_a_choice_that_is_not_sure_and_one_that_is_not_good_are_told():
    """One soup is above the base in both rewards, hardly; then none is."""
    unsure = Front.from_records(above([(1.0, -0.2), (0.01, 0.01), (-0.1, 0.5)], noise=1.0))
    best = unsure.select(above_base=True)
    assert (
        best.point is unsure.soups[1] and "though not with 95% confidence" in best.rule and 0.1 < best.above_base < 0.9
    )
    none = Front.from_records(above([(1.0, -0.2), (0.4, -0.1), (-0.3, 0.5)]))
    with pytest.raises(
        rsoups.FrontError, match=r"no good choice.*the nearest is λ 0\.5 / 0\.5 .*Not above the base in b, by -0\.097"
    ):
        none.select(above_base=True)
    with pytest.raises(rsoups.FrontError, match="above_base compares points with the base"):
        Front.from_records([r for r in noisy(n=3) if r["name"] != "base"]).select(above_base=True)
    assert Front.from_records([r for r in noisy(n=3) if r["name"] != "base"]).select({"a": 1}).above_base is None


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "one rule"),
        ({"above_base": True, "knee": True}, "one rule"),
        ({"preference": {"c": 1}, "above_base": True}, r"no reward \['c'\]"),
        ({"preference": {"a": 1}, "knee": True}, "one rule"),
        ({"subject_to": {"a": "> 0"}, "knee": True}, "one rule"),
        ({"preference": {"c": 1}}, r"no reward \['c'\]; there are \['a', 'b'\]"),
        ({"preference": {"a": -1}}, "at least 0"),
        ({"preference": {"a": 0.0}}, "not all 0"),
        ({"preference": {"a": math.nan}}, "finite"),
        ({"maximize": "c"}, "no reward"),
        ({"maximize": "a", "subject_to": {"b": "0.2"}}, "invalid limit"),
        ({"maximize": "a", "subject_to": {"b": ">= 1.2.3"}}, "invalid limit"),
    ],
)
def test_rules_that_choose_nothing(rule, words):
    with pytest.raises(rsoups.FrontError, match=words):
        Front.from_records(records(n=2)[0]).select(**rule)
