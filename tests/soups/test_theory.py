"""Where rewards are quadratic in θ, with Hessians proportional to the identity, soups are the Pareto front (Ramé et al. 2023).

R_i(θ) = -η_i·‖θ - θ_i‖² over all weights of the model, with θ_i a real adapter's. The best θ for Σ μ_i·R_i is then Σ λ_i·θ_i
with λ_i ∝ μ_i·η_i, so that every preference's optimum is a soup and every soup is a preference's optimum.
"""

from itertools import combinations

import numpy as np
import pytest
import torch
from dense import delta_of, dense
from tiny import tiny_adapter

import rsoups

CURVATURES = (0.5, 2.0, 1.0)
GRID = rsoups.simplex(3, 5)


def theta(soup):
    """All weights that the soup changes, as one float64 vector of changes."""
    scaling = soup.config.lora_alpha / soup.config.r
    return torch.cat([scaling * delta.flatten() for _, delta in sorted(delta_of(soup).items())])


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory")
    return {name: tiny_adapter(folder / name, seed=seed, r=2 + seed) for seed, name in enumerate("abc")}


def ends_of(ingredients):
    """θ_i, from the files alone."""
    return [torch.cat([delta.flatten() for _, delta in sorted(dense(f).items())]) for f in ingredients.values()]


@pytest.fixture(scope="module")
def ends(ingredients):
    return ends_of(ingredients)


def soup_at(ingredients, row):
    return theta(rsoups.interpolate(ingredients, row, dtype=torch.float64))


def rewards(point, ends, hessians=CURVATURES):
    return torch.stack([-(h * (point - end) ** 2).sum() for h, end in zip(hessians, ends, strict=True)])


def records(points, ends):
    """As a sweep writes them: points named soup have λ."""
    for name, row, point in points:
        found = dict(zip("abc", rewards(point, ends).tolist(), strict=True))
        lambdas = None if row is None else dict(zip("abc", row, strict=True))
        method = None if row is None else "exact"
        yield {
            "name": name,
            "lambdas": lambdas,
            "method": method,
            "prompt": "",
            "response": "",
            "rewards": found,
            "seed": 0,
        }


def preference(row):
    """μ of which the soup at λ is the optimum: λ_i ∝ μ_i·η_i."""
    weights = torch.tensor([weight / curvature for weight, curvature in zip(row, CURVATURES, strict=True)])
    return (weights / weights.sum()).double()


@pytest.mark.parametrize("row", GRID, ids=str)
def test_each_soup_is_the_optimum_of_a_preference(ingredients, ends, row):
    """The utility is concave, so a point without gradient is its maximum over all weights."""
    point = soup_at(ingredients, row).requires_grad_()
    utility = (preference(row) * rewards(point, ends)).sum()
    (gradient,) = torch.autograd.grad(utility, point)
    assert gradient.abs().max() < 1e-7 < 1e-2 < point.detach().abs().max(), "factors are scaled in float32"


def test_each_preferences_optimum_is_a_soup(ingredients, ends):
    """The optimum by a solver that knows of no soups: steepest ascent on all weights, from far away."""
    for preferred in ([0.2, 0.5, 0.3], [0.7, 0.3, 0.0], [0.0, 0.0, 1.0]):
        mu = torch.tensor(preferred, dtype=torch.float64)
        point = 3 * torch.randn(len(ends[0]), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for _ in range(200):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad((mu * rewards(point, ends)).sum(), point)
            point = (point + 0.2 * gradient).detach()
        weights = mu * torch.tensor(CURVATURES)
        soup = soup_at(ingredients, (weights / weights.sum()).tolist())
        assert torch.allclose(point, soup, atol=1e-12)


def projected(point, ends):
    """λ of the soup nearest to a point: on each face of the simplex by least squares, then the nearest that lies in it."""
    found = []
    for size in (1, 2, 3):
        for face in combinations(range(3), size):
            first, *others = (ends[i] for i in face)
            sides = torch.stack([end - first for end in others] or [torch.zeros_like(first)], dim=1)
            inner = torch.linalg.lstsq(sides, (point - first)[:, None]).solution[: size - 1, 0].tolist()
            weights = [1 - sum(inner), *inner]
            if min(weights) >= 0:
                row = [weights[face.index(i)] if i in face else 0.0 for i in range(3)]
                nearest = sum(weight * end for weight, end in zip(row, ends, strict=True))
                found.append((float(torch.linalg.norm(point - nearest)), row))
    return min(found)[1]


def test_the_pareto_front_is_the_soups_and_nothing_else(ingredients, ends):
    generator = torch.Generator().manual_seed(0)
    others = []
    for number, row in enumerate([*GRID, [1.3, -0.3, 0.0], [-0.2, 0.6, 0.6], [0.0, 2.0, -1.0]]):
        nearby = sum(weight * end for weight, end in zip(row, ends, strict=True))
        noise = torch.randn(len(nearby), dtype=torch.float64, generator=generator) * (1e-4 if number < len(GRID) else 0)
        others.append((f"other {number}", None, nearby + noise))
    rows = [tuple(row) for row in GRID] + [tuple(projected(point, ends)) for *_, point in others]
    soups = [("soup", row, soup_at(ingredients, row)) for row in dict.fromkeys(rows)]
    front = rsoups.Front.from_records(records([*soups, *others], ends))
    assert {point.label for point in front.pareto()} == {point.label for point in front.soups}
    assert len(front.others) == len(others) == 18 and len(front.soups) > len(GRID) + 10


def test_two_rewards_trace_the_closed_form(ingredients, ends):
    """√(-R1/η1) + √(-R2/η2) = ‖θ1 - θ2‖ on the front, and more off it: the distances to the two ends add up."""
    between = torch.linalg.norm(ends[0] - ends[1])
    for weight in np.linspace(0, 1, 11):
        first, second, _ = rewards(soup_at(ingredients, [1 - weight, weight, 0.0]), ends)
        assert float((-first / 0.5).sqrt() + (-second / 2.0).sqrt()) == pytest.approx(float(between), rel=1e-12)


def test_other_hessians_have_better_points_than_soups(ends):
    """What the theorem needs: with curvatures that differ between weights, the optimum is no soup."""
    generator = torch.Generator().manual_seed(1)
    hessians = [0.1 + torch.rand(len(ends[0]), dtype=torch.float64, generator=generator) for _ in ends]
    mu = torch.full((3,), 1 / 3, dtype=torch.float64)
    optimum = sum(h * end for h, end in zip(hessians, ends, strict=True)) / sum(hessians)
    best = max(
        float((mu * rewards(sum(w * e for w, e in zip(row, ends, strict=True)), ends, hessians)).sum())
        for row in rsoups.simplex(3, 21)
    )
    assert float((mu * rewards(optimum, ends, hessians)).sum()) > best + 1e-3 * abs(best)


def test_factors_of_unlike_starts_miss_the_front(ingredients, tmp_path):
    """Averaging A and B apart is not Σ λi·Δi: those soups are dominated."""
    same = {name: tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("abc")}
    tops = ends_of(same)
    row = [0.2, 0.3, 0.5]
    with pytest.warns(UserWarning, match="factors"):
        apart = theta(rsoups.interpolate(same, row, method="factors", dtype=torch.float64))
    exact = rewards(soup_at(same, projected(apart, tops)), tops)
    assert (exact > rewards(apart, tops) + 1e-6).all()
