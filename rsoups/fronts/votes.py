"""Votes between generations at different λ, fitted to a utility over λ, with its uncertainty and what to ask next.

A vote is one line of JSON: ``{"prompt", "a": {"lambdas", "response"}, "b": {...}, "choice": "a" | "b" | "tie"}``.

The model is Bradley and Terry's (1952), P(a preferred to b) = σ(u(λa) - u(λb)), with a Gaussian process as the prior of u
(Chu and Ghahramani 2005): an RBF kernel on the simplex, by scikit-learn's Nystroem features, on which u is linear; logistic
regression finds the most probable u, and Laplace's approximation its covariance. A tie is half a vote for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import VotesError
from rsoups.common.files import read_jsonl

CHOICES = ("a", "b", "tie")
_OUTCOME = {"a": 1.0, "b": 0.0, "tie": 0.5}
# The prior: utilities differ by a few units of log-odds, and change over a good part of the simplex, whose edge is √2 long.
_AMPLITUDE, _LENGTH = 2.0, 0.6
_GRID = {1: 1, 2: 41, 3: 15, 4: 8}  # points on an edge of the grid, by ingredients; 4 for more
_DRAWS = 2_000


def check_vote(where: str, vote: Mapping[str, Any], ingredients: Sequence[str] | None = None) -> list[str]:
    """The ingredients of a vote, which is as above.

    Raises:
        VotesError: It is not, or its λ weigh other ingredients; `where` begins the message.
    """
    try:
        choice, sides = vote["choice"], [vote["a"]["lambdas"], vote["b"]["lambdas"]]
        names = [list(side) for side in sides]
        finite = all(math.isfinite(x) for side in sides for x in side.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise VotesError(
            f"{where} is not a vote: it needs prompt, a and b (each with lambdas by ingredient) and choice ({error!r})"
        ) from None
    if choice not in CHOICES or not finite:
        raise VotesError(f"{where}: choice is one of {list(CHOICES)} and λ are finite; got {choice!r} and {sides}")
    known = list(ingredients or names[0])
    if any(sorted(found) != sorted(known) for found in names):
        raise VotesError(f"{where} weighs {names}, expected {known}")
    return known


def read_votes(path: str | Path) -> list[dict[str, Any]]:
    """The votes of a file.

    Raises:
        VotesError: No such file, or a line that is not a vote.
    """
    return read_jsonl(path, VotesError, check_vote)


def fit_votes(
    votes: str | Path | Iterable[Mapping[str, Any]], ingredients: Sequence[str] | None = None, seed: int = 0
) -> VotedUtility:
    """The utility over λ that explains votes.

    Args:
        votes: A file or its rows.
        ingredients: In the order of λ; those of the first vote by default. With them there may be no votes yet.
        seed: Of the draws from the posterior.

    Raises:
        VotesError: No votes and no ingredients, a row that is not a vote or weighs other ingredients, or scikit-learn missing.
    """
    rows = read_votes(votes) if isinstance(votes, (str, Path)) else list(votes)
    if not rows and not ingredients:
        raise VotesError("there are no votes; name the ingredients to be told what to ask first")
    known = list(ingredients) if ingredients else check_vote("vote 1", rows[0])
    for number, vote in enumerate(rows, 1):
        check_vote(f"vote {number}", vote, known)
    return VotedUtility(rows, known, seed)


class VotedUtility:
    """A utility u over λ, up to a constant: its mean over the simplex is 0. One unit more is odds of e to 1 in a vote.

    Attributes:
        ingredients: Names, in the order of λ.
        votes: How many it was fitted to.
    """

    def __init__(self, votes: Sequence[Mapping[str, Any]], ingredients: list[str], seed: int):
        self.ingredients, self.votes, self._seed = ingredients, len(votes), seed
        self._grid = _simplex(len(ingredients))
        self._features = _features(self._grid)
        self._center = self._features(self._grid).mean(axis=0)
        sides = [[self._weights(vote[side]["lambdas"]) for vote in votes] for side in "ab"]
        first, second = (self._features(np.array(rows).reshape(-1, len(ingredients))) for rows in sides)
        outcomes = np.array([_OUTCOME[vote["choice"]] for vote in votes])
        self._mean, self._covariance = _laplace(first - second, outcomes)

    def utility(self, lambdas: Sequence[Mapping[str, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of u at each λ, both of shape (K,)."""
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
        """Which λ has the largest mean utility, and in how many draws from the posterior it has the largest one.

        Raises:
            VotesError: There are no votes.
        """
        self._check_votes()
        chosen = int(np.argmax(self.utility(lambdas)[0]))
        return chosen, float(np.mean(np.argmax(self._draws(lambdas), axis=1) == chosen))

    def ask(self, among: Sequence[Mapping[str, float]] | None = None) -> tuple[dict[str, float], dict[str, float]]:
        """The two λ whose comparison tells most about which is best.

        Among the λ that are best in at least 1% of the draws from the posterior (the four likeliest at least), the pair whose
        answer carries the most information about u (Houlsby et al. 2011, BALD): uncertain because u is, not because the
        voter is torn.

        Args:
            among: Candidates; a grid of the simplex by default.

        Raises:
            VotesError: Fewer than two candidates.
        """
        rows = [dict(row) for row in (self.candidates if among is None else among)]
        if len(rows) < 2:
            raise VotesError(f"a question needs two λ at least, got {len(rows)}")
        draws = self._draws(rows)
        wins = np.bincount(np.argmax(draws, axis=1), minlength=len(rows)) / len(draws)
        likely = np.argsort(-wins, kind="stable")[: max(4, int((wins >= 0.01).sum()))]
        pairs = list(combinations(sorted(likely.tolist()), 2))
        information = [_information(draws[:, a] - draws[:, b]) for a, b in pairs]
        first, second = pairs[int(np.argmax(information))]
        return rows[first], rows[second]

    def _check_votes(self) -> None:
        if not self.votes:
            raise VotesError("there are no votes to choose by: `ask` tells which two λ to compare first")

    @cached_property
    def candidates(self) -> list[dict[str, float]]:
        """A regular grid of the simplex."""
        return [dict(zip(self.ingredients, row, strict=True)) for row in self._grid.tolist()]

    def _weights(self, lambdas: Mapping[str, float]) -> list[float]:
        return [float(lambdas[name]) for name in self.ingredients]

    def _at(self, lambdas: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
        return self._features(np.array([self._weights(row) for row in lambdas])) - self._center

    def _draws(self, lambdas: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
        """Draws from the posterior of u: shape (draws, K)."""
        random = np.random.default_rng(self._seed)
        weights = random.multivariate_normal(self._mean, self._covariance, size=_DRAWS, method="cholesky")
        return weights @ self._at(lambdas).T


def _simplex(ingredients: int) -> NDArray[np.float64]:
    steps = _GRID.get(ingredients, 4) - 1
    if not steps:
        return np.ones((1, 1))
    grid = [c for c in product(range(steps + 1), repeat=ingredients) if sum(c) == steps]
    return np.array(sorted(grid, reverse=True)) / steps


def _features(grid: NDArray[np.float64]) -> Any:
    """λ of shape (K, N) to features whose inner products are the prior's covariance of u."""
    try:
        from sklearn.kernel_approximation import Nystroem
    except ImportError:
        raise VotesError("votes are fitted with scikit-learn: pip install 'rsoups[votes]'") from None
    nystroem = Nystroem(gamma=0.5 / _LENGTH**2, n_components=min(len(grid), 60), random_state=0).fit(grid)
    return lambda rows: (
        _AMPLITUDE * nystroem.transform(rows) if len(rows) else np.zeros((0, nystroem.components_.shape[0]))
    )


def _laplace(
    differences: NDArray[np.float64], outcomes: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mode and covariance of the weights: prior N(0, 1), σ(differences @ weights) the probability of an outcome of 1."""
    size = differences.shape[1]
    if not len(differences):
        return np.zeros(size), np.eye(size)
    from sklearn.linear_model import LogisticRegression

    # Every vote counts once for its outcome and, with the rest of its weight, against it: ties need no third class.
    rows = np.concatenate([differences, -differences, differences, -differences])
    labels = np.repeat([1, 0, 0, 1], len(differences))
    weight = np.concatenate([outcomes, outcomes, 1 - outcomes, 1 - outcomes]) / 2
    model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-8, max_iter=2_000)
    model.fit(rows, labels, sample_weight=weight)
    mode = model.coef_[0]
    p = 1 / (1 + np.exp(-(differences @ mode)))
    precision = np.eye(size) + (differences * (p * (1 - p))[:, None]).T @ differences
    return mode, np.linalg.inv(precision)


def _information(difference: NDArray[np.float64]) -> float:
    """Mutual information, in nats, between a vote and u, from draws of the difference in utility."""
    p = 1 / (1 + np.exp(-difference))
    return _entropy(p.mean()) - float(np.mean(_entropy(p)))


def _entropy(p: Any) -> Any:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -p * np.log(p) - (1 - p) * np.log(1 - p)
