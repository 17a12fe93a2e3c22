"""A voter whose utility is known: found again, ever more surely, and with questions that are worth asking."""

import json
import math

import numpy as np
import pytest
from front_records import records

import rsoups
from rsoups import Front, fit_votes

TOPS = {2: {"A": 0.3, "B": 0.7}, 3: {"A": 0.2, "B": 0.5, "C": 0.3}}


class Voter:
    """Prefers λ near a point, and answers by Bradley and Terry's model."""

    def __init__(self, top, seed, scale=8.0):
        self.top, self.scale, self.random = top, scale, np.random.default_rng(seed)

    def utility(self, lambdas):
        return -self.scale * sum((lambdas[name] - at) ** 2 for name, at in self.top.items())

    def vote(self, a, b):
        likes_a = self.random.random() < 1 / (1 + math.exp(self.utility(b) - self.utility(a)))
        return vote(a, b, "a" if likes_a else "b")

    def at_random(self, number):
        grid = fit_votes([], list(self.top)).candidates
        pairs = [self.random.choice(len(grid), 2, replace=False) for _ in range(number)]
        return [self.vote(grid[i], grid[j]) for i, j in pairs]

    def asked(self, number):
        rows = []
        for _ in range(number):
            rows.append(self.vote(*fit_votes(rows, list(self.top)).ask()))
        return rows


def vote(a, b, choice):
    return {"prompt": "p", "a": {"lambdas": a, "response": "x"}, "b": {"lambdas": b, "response": "y"}, "choice": choice}


@pytest.mark.parametrize("ingredients", [2, 3])
def test_the_liking_of_a_simulated_voter_is_found(ingredients):
    voter = Voter(TOPS[ingredients], seed=0)
    found = fit_votes(voter.at_random(300))
    assert found.votes == 300 and found.ingredients == list(voter.top)
    assert all(abs(found.best()[name] - at) < 0.12 for name, at in voter.top.items())
    true = np.array([voter.utility(row) for row in found.candidates])
    mean, deviation = found.utility(found.candidates)
    assert np.corrcoef(mean, true)[0, 1] > 0.95
    off = np.abs(mean - (true - true.mean())) / deviation
    assert np.mean(off < 3) > 0.9


def test_more_votes_make_it_surer():
    deviations = [fit_votes(Voter(TOPS[3], 0).at_random(n), list("ABC")).utility([TOPS[3]])[1][0] for n in (0, 20, 200)]
    assert deviations[0] > deviations[1] > deviations[2] and deviations[2] < 0.5 * deviations[0]


@pytest.mark.parametrize("ingredients", [2, 3])
def test_asked_votes_teach_more_than_random_ones(ingredients):
    regret = {}
    for how in ("asked", "at_random"):
        voters = [Voter(TOPS[ingredients], seed) for seed in range(6)]
        regret[how] = np.mean([-v.utility(fit_votes(getattr(v, how)(12)).best()) for v in voters])
    assert regret["asked"] < 0.6 * regret["at_random"]


def test_the_mode_is_that_of_bradley_and_terry_with_the_prior():
    """Gradient of the log posterior by hand: 0 at the fitted utilities."""
    rows = Voter(TOPS[2], 1).at_random(25)
    rows[0]["choice"] = "tie"
    found = fit_votes(rows)
    grid = np.array([[row["A"], row["B"]] for row in found.candidates])
    distance = ((grid[:, None] - grid[None]) ** 2).sum(axis=-1)
    prior = 4 * np.exp(-0.5 * distance / 0.6**2)  # of a GP of amplitude 2 and length 0.6
    at = [[found.candidates.index(row[side]["lambdas"]) for row in rows] for side in "ab"]
    mean = found.utility(found.candidates)[0]
    p = 1 / (1 + np.exp(mean[at[1]] - mean[at[0]]))
    outcome = np.array([{"a": 1.0, "b": 0.0, "tie": 0.5}[row["choice"]] for row in rows])
    pull = np.zeros(len(grid))
    np.add.at(pull, at[0], outcome - p)
    np.subtract.at(pull, at[1], outcome - p)
    expected = prior @ pull  # where the gradient is 0, u is the prior's covariance times the likelihood's gradient
    np.testing.assert_allclose(mean, expected - expected.mean(), atol=1e-3)


def test_ties_say_that_two_are_alike():
    ends = {"A": 1.0, "B": 0.0}, {"A": 0.0, "B": 1.0}
    mean, deviation = fit_votes([vote(*ends, "tie")] * 30).utility(ends)
    assert abs(mean[0] - mean[1]) < 1e-6
    assert deviation[0] < 0.8 * fit_votes([], ["A", "B"]).utility(ends)[1][0]


def test_votes_choose_a_point_of_the_front(tmp_path):
    front = Front.from_records(records(n=3)[0])
    path = tmp_path / "votes.jsonl"
    rows = Voter({"A": 0.25, "B": 0.75}, 0).at_random(200)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = front.select(votes=path)
    assert choice.point.lambdas == {"A": 0.25, "B": 0.75} and "200 votes" in choice.rule
    assert 0.5 < choice.share <= 1 and front.select(votes=fit_votes(rows)).share == choice.share
    assert front.select(votes=rows[:10]).share < choice.share
    with pytest.raises(rsoups.FrontError, match="about .'A', 'C'., the soups weigh"):
        front.select(votes=fit_votes([], ["A", "C"]))
    with pytest.raises(rsoups.FrontError, match="has none"):
        Front.from_records([r for r in records(n=2)[0] if r["name"] == "base"]).select(votes=rows)


def test_a_question_is_about_two_candidates():
    found = fit_votes([], ["A", "B"])
    rows = [{"A": x, "B": 1 - x} for x in (0.0, 0.5, 1.0)]
    asked = found.ask(rows)
    assert asked[0] != asked[1] and all(row in rows for row in asked)
    assert found.ask(rows) == asked
    with pytest.raises(rsoups.VotesError, match="two λ"):
        found.ask(rows[:1])
    with pytest.raises(rsoups.VotesError, match="no votes to choose by"):
        found.best()


GOOD = vote({"A": 1.0, "B": 0.0}, {"A": 0.0, "B": 1.0}, "a")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt": "p"}, "is not a vote"),
        (["a"], "is not a vote"),
        (GOOD | {"a": {"response": "x"}}, "is not a vote"),
        (GOOD | {"choice": "c"}, "choice must be one of"),
        (GOOD | {"a": {"lambdas": {"A": math.nan, "B": 1.0}}}, "λ finite"),
        (GOOD | {"a": {"lambdas": {"A": 1.0, "C": 0.0}}}, "expected"),
    ],
)
def test_votes_that_are_none(tmp_path, bad, words):
    with pytest.raises(rsoups.VotesError, match=f"vote 2.*{words}"):
        fit_votes([GOOD, bad])
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(rsoups.VotesError, match=f"line 2.*{words}"):
        fit_votes(path)


def test_files_of_votes_that_cannot_be_read(tmp_path):
    with pytest.raises(rsoups.VotesError, match="cannot read"):
        fit_votes(tmp_path / "none.jsonl")
    path = tmp_path / "votes.jsonl"
    path.write_text("{")
    with pytest.raises(rsoups.VotesError, match="line 1: not JSON"):
        fit_votes(path)
    path.write_text("")
    with pytest.raises(rsoups.VotesError, match="no votes; name the ingredients"):
        fit_votes(path)
    with pytest.raises(rsoups.VotesError, match="weighs"):
        fit_votes([GOOD], ["A", "C"])
