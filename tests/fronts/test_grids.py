"""λ to sweep: grids, random points, and the largest gap of a front."""

import numpy as np
import pytest

import rsoups
from rsoups.fronts.grids import evenly_spread, largest_gap


def test_simplex():
    assert rsoups.simplex(2, 3) == [[1, 0], [0.5, 0.5], [0, 1]]
    grid = rsoups.simplex(3, 5)
    assert len(grid) == 15 and all(sum(row) == pytest.approx(1) for row in grid)
    with pytest.raises(ValueError, match="at least"):
        rsoups.simplex(2, 1)


def test_random_points_are_uniform_on_the_simplex():
    assert rsoups.simplex(3, 2, random=4, seed=1) == rsoups.simplex(3, 2, random=4, seed=1)
    assert rsoups.simplex(3, 2, random=4, seed=1)[3:] != rsoups.simplex(3, 2, random=4, seed=2)[3:]
    points = np.array(rsoups.simplex(3, 2, random=20_000))
    assert points[:3].tolist() == np.eye(3).tolist() and len(points) == 20_003
    drawn = points[3:]
    assert np.allclose(drawn.sum(axis=1), 1) and (drawn >= 0).all()
    assert np.allclose(drawn.mean(axis=0), 1 / 3, atol=0.01)
    assert drawn.var(axis=0) == pytest.approx(1 / 18, rel=0.05)  # of Dirichlet(1, 1, 1)


def test_the_gap_of_two_ingredients_is_between_points_next_to_each_other():
    lambdas = [[1, 0], [0, 1], [0.75, 0.25], [0.5, 0.5]]  # in any order
    rewards = np.array([[0.0, 4.0], [4.0, 0.0], [0.1, 3.9], [0.2, 3.8]])
    assert largest_gap(lambdas, rewards) == [0.25, 0.75]
    # A reward of a thousand times the scale has no more weight: here the second one has its gap between 1 and .75.
    rewards = np.array([[0.0, 0.0], [3.0, 1.1], [1.0, 1.0], [2.0, 1.05]]) * [1000, 1]
    assert largest_gap(lambdas, rewards) == [0.875, 0.125]


def test_the_gap_of_three_ingredients_is_on_an_edge_of_their_grid():
    lambdas = rsoups.simplex(3, 3)
    rewards = np.array([[row[0] ** 2, row[1]] for row in lambdas])
    found = largest_gap(lambdas, rewards)
    squares, edges = np.array(rewards) / np.std(rewards, axis=0), {}
    for i, one in enumerate(lambdas):  # of a grid of step 1/2, neighbors differ in two coordinates by 1/2
        for j in range(i):
            if sorted(np.abs(np.subtract(one, lambdas[j]))) == [0, 0.5, 0.5]:
                edges[tuple(np.add(one, lambdas[j]) / 2)] = np.linalg.norm(squares[i] - squares[j])
    assert len(edges) == 9 and tuple(found) == max(edges, key=edges.get)


def test_no_gap_where_there_is_nothing_between():
    assert largest_gap([[1.0, 0.0]], np.array([[1.0]])) is None
    assert largest_gap([[0.5, 0.5], [0.5001, 0.4999]], np.array([[0.0], [1.0]])) is None
    assert largest_gap([[1.0, 0.0], [0.0, 1.0]], np.array([[1.0], [1.0]])) is None


def test_some_of_many_points_are_spread_evenly():
    eleven = rsoups.simplex(2, 11)
    assert [eleven[i][1] for i in evenly_spread(eleven, 3)] == [0, 0.5, 1]
    assert [eleven[i][1] for i in evenly_spread(eleven, 5)] == [0, 0.3, 0.5, 0.7, 1]  # .25 is between .2 and .3
    assert [eleven[i][1] for i in evenly_spread(eleven, 3, with_ends=False)] == [0.3, 0.5, 0.7]
    assert [eleven[i][1] for i in evenly_spread(eleven, 1, with_ends=False)] == [0.5]
    assert evenly_spread(eleven, 11) == list(range(11)) and evenly_spread(eleven[:2], 2, with_ends=False) == [0, 1]
    crowded = [[1 - x, x] for x in (0, 0.001, 0.002, 0.4, 0.5, 1)]
    assert evenly_spread(crowded, 3) == [0, 4, 5]


def test_points_of_the_triangle_are_spread_evenly():
    triangle = rsoups.simplex(3, 5)
    chosen = [triangle[i] for i in evenly_spread(triangle, 6)]
    assert [row for row in chosen if max(row) == 1] == np.eye(3).tolist()
    nearest = min(np.linalg.norm(np.subtract(a, b)) for a in chosen for b in chosen if a != b)
    assert nearest > 0.6 and len(evenly_spread(triangle, 15)) == 15
    (middle,) = evenly_spread(triangle, 1, with_ends=False)
    assert sorted(triangle[middle]) == [0.25, 0.25, 0.5]
