"""Fit pairwise votes between responses at different λ to a utility over λ.

A vote is one line of JSON: ``{"prompt", "a": {"lambdas", "response"}, "b": {...}, "choice": "a" | "b" | "tie"}``.

The model is that of Bradley and Terry (1952), P(a preferred to b) = σ(u(λa) - u(λb)), with a Gaussian process as the prior of u
(Chu and Ghahramani 2005): an RBF kernel on the simplex, by scikit-learn's Nystroem features, in which u is linear. Logistic
regression finds the most probable u, Laplace's approximation its covariance. A tie is half a vote for each side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import VotesError
from rsoups.common.files import read_jsonl
from rsoups.fronts.grids import simplex

CHOICES = ("a", "b", "tie")
_OUTCOME = {"a": 1.0, "b": 0.0, "tie": 0.5}
# The prior: utilities differ by a few units of log-odds, and change over a good part of the simplex, whose edge is √2 long.
_AMPLITUDE, _LENGTH = 2.0, 0.6
_GRID = {1: 2, 2: 41, 3: 15, 4: 8}  # points on an edge of the grid, by number of ingredients; 4 for more
_DRAWS = 2_000
_LIKELY = 0.01  # share of the draws in which a λ is the best, to be worth a question
Array = NDArray[np.float64]


def check_vote(where: str, vote: Mapping[str, Any], ingredients: Sequence[str] | None = None) -> list[str]:
    """Check a vote, and return its ingredients.

    Raises:
        VotesError: Not a vote, or other ingredients; `where`, such as ``"votes.jsonl, line 3"``, begins the message.
    """
    try:
        choice, sides = vote["choice"], [vote["a"]["lambdas"], vote["b"]["lambdas"]]
        names = [list(side) for side in sides]
        finite = all(math.isfinite(weight) for side in sides for weight in side.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise VotesError(
            f"{where} is not a vote ({error!r}): write prompt, a and b (each with lambdas by ingredient) and choice"
        ) from None
    if choice not in CHOICES or not finite:
        raise VotesError(f"{where}: choice must be one of {list(CHOICES)} and λ finite, got {choice!r} and {sides}")
    expected = list(ingredients or names[0])
    if any(sorted(side) != sorted(expected) for side in names):
        raise VotesError(f"{where} weighs {names}, expected {expected}: fit votes about the same ingredients")
    return expected


def read_votes(path: str | Path) -> list[dict[str, Any]]:
    """The votes of a file.

    Raises:
        VotesError: No such file, or a line that is not a vote.
    """
    return read_jsonl(path, VotesError, check_vote)


def fit_votes(
    votes: str | Path | Iterable[Mapping[str, Any]], ingredients: Sequence[str] | None = None, seed: int = 0
) -> VotedUtility:
    """Fit the utility over λ that explains votes best.

    Args:
        votes: A votes file or its rows; may be empty if `ingredients` is given.
        ingredients: Names in the order of λ; those of the first vote by default.
        seed: Seed of the draws from the posterior.

    Raises:
        VotesError: Neither votes nor ingredients, a row that is not a vote or weighs other ingredients, or scikit-learn is
            missing.
    """
    rows = read_votes(votes) if isinstance(votes, (str, Path)) else list(votes)
    if not rows and not ingredients:
        raise VotesError("there are no votes; name the ingredients to learn which two λ to compare first")
    names = list(ingredients) if ingredients else check_vote("vote 1", rows[0])
    for number, vote in enumerate(rows, 1):
        check_vote(f"vote {number}", vote, names)
    return VotedUtility(rows, names, seed)


class VotedUtility:
    """A utility u over λ with mean 0 over the simplex. One unit more means odds of e to 1 in a vote.

    Attributes:
        ingredients: Names in the order of λ.
        votes: Number of votes it was fitted to.
    """

    def __init__(self, votes: Sequence[Mapping[str, Any]], ingredients: list[str], seed: int):
        self.ingredients, self.votes, self._seed = ingredients, len(votes), seed
        self._grid = np.array(simplex(len(ingredients), _GRID.get(len(ingredients), 4)))
        self._features = _features(self._grid)
        self._center = self._features(self._grid).mean(axis=0)
        first, second = (self._at([vote[side]["lambdas"] for vote in votes]) for side in "ab")
        outcomes = np.array([_OUTCOME[vote["choice"]] for vote in votes])
        self._mean, self._covariance = _laplace(first - second, outcomes)

    def __repr__(self) -> str:
        return f"VotedUtility({self.votes} votes on {', '.join(self.ingredients)})"

    def utility(self, lambdas: Sequence[Mapping[str, float]]) -> tuple[Array, Array]:
        """Mean and standard deviation of u at each λ, both of shape (K,), float64."""
        features = self._at(lambdas)
        variance = np.einsum("ki,ij,kj->k", features, self._covariance, features)
        return features @ self._mean, np.sqrt(np.maximum(variance, 0))

    def best(self) -> dict[str, float]:
        """The λ, on a fine grid of the simplex, with the largest mean utility.

        Raises:
            VotesError: There are no votes.
        """
        self._check_votes()
        means, _ = self.utility(self.candidates)
        return self.candidates[int(np.argmax(means))]

    def best_of(self, lambdas: Sequence[Mapping[str, float]]) -> tuple[int, float]:
        """The place of the λ with the largest mean utility, and the share of posterior draws in which it has the largest.

        Raises:
            VotesError: There are no votes.
        """
        self._check_votes()
        chosen = int(np.argmax(self.utility(lambdas)[0]))
        return chosen, float(np.mean(np.argmax(self._draws(lambdas), axis=1) == chosen))

    def ask(self, among: Sequence[Mapping[str, float]] | None = None) -> tuple[dict[str, float], dict[str, float]]:
        """The two λ whose comparison tells most about the best λ.

        Candidates are the λ that are best in at least 1% of the posterior draws (at least the four likeliest). The pair is the
        one whose answer carries the most information about u (Houlsby et al. 2011, BALD): an answer that is uncertain because
        u is, not because the voter has no preference.

        Args:
            among: λ to choose from; a grid of the simplex by default.

        Raises:
            VotesError: Fewer than two λ to choose from.
        """
        rows = [dict(row) for row in (self.candidates if among is None else among)]
        if len(rows) < 2:
            raise VotesError(f"a question compares at least two λ, got {len(rows)}: evaluate more λ")
        draws = self._draws(rows)
        wins = np.bincount(np.argmax(draws, axis=1), minlength=len(rows)) / len(draws)
        likely = np.argsort(-wins, kind="stable")[: max(4, int((wins >= _LIKELY).sum()))]
        pairs = list(combinations(sorted(likely.tolist()), 2))
        information = [_information(draws[:, a] - draws[:, b]) for a, b in pairs]
        first, second = pairs[int(np.argmax(information))]
        return rows[first], rows[second]

    def _check_votes(self) -> None:
        if not self.votes:
            raise VotesError("there are no votes to choose by: compare the two λ that `ask` returns first")

    @cached_property
    def candidates(self) -> list[dict[str, float]]:
        """λ on a regular grid of the simplex."""
        return [dict(zip(self.ingredients, row, strict=True)) for row in self._grid.tolist()]

    def _at(self, lambdas: Sequence[Mapping[str, float]]) -> Array:
        """Centered features of λ: shape (K, features)."""
        weights = [[float(row[name]) for name in self.ingredients] for row in lambdas]
        return self._features(np.array(weights).reshape(-1, len(self.ingredients))) - self._center

    def _draws(self, lambdas: Sequence[Mapping[str, float]]) -> Array:
        """Posterior draws of u: shape (draws, K)."""
        random = np.random.default_rng(self._seed)
        weights = random.multivariate_normal(self._mean, self._covariance, size=_DRAWS, method="cholesky")
        return weights @ self._at(lambdas).T


def _features(grid: Array) -> Callable[[Array], Array]:
    """A map from λ, shape (K, N), to features whose inner products are the prior covariance of u."""
    try:
        from sklearn.kernel_approximation import Nystroem
    except ImportError:
        raise VotesError("votes need scikit-learn, which is not installed: pip install 'rsoups[votes]'") from None
    nystroem = Nystroem(gamma=0.5 / _LENGTH**2, n_components=min(len(grid), 60), random_state=0).fit(grid)
    size = nystroem.components_.shape[0]
    return lambda rows: _AMPLITUDE * nystroem.transform(rows) if len(rows) else np.zeros((0, size))


def _laplace(differences: Array, outcomes: Array) -> tuple[Array, Array]:
    """Mode and covariance of the weights, where σ(differences @ weights) is the probability of outcome 1 and the prior N(0, 1).

    Args:
        differences: Features of the first λ minus those of the second, shape (votes, features).
        outcomes: 1 for a vote for the first, 0 for the second, 0.5 for a tie, shape (votes,).
    """
    size = differences.shape[1]
    if not len(differences):
        return np.zeros(size), np.eye(size)
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression

    # Every vote counts once for its outcome and, with the rest of its weight, against it: ties need no third class.
    rows = np.concatenate([differences, -differences, differences, -differences])
    labels = np.repeat([1, 0, 0, 1], len(differences))
    weight = np.concatenate([outcomes, outcomes, 1 - outcomes, 1 - outcomes]) / 2
    model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-8, max_iter=2_000)
    model.fit(rows, labels, sample_weight=weight)
    mode = model.coef_[0]
    p = expit(differences @ mode)
    precision = np.eye(size) + (differences * (p * (1 - p))[:, None]).T @ differences
    return mode, np.linalg.inv(precision)


def _information(difference: Array) -> float:
    """Mutual information, in nats, between a vote and u, given draws of the difference in utility."""
    from scipy.special import entr, expit  # scikit-learn brings scipy

    p = expit(difference)
    mean = p.mean()
    return float(entr(mean) + entr(1 - mean) - np.mean(entr(p) + entr(1 - p)))
