"""λ: one row or many, in any order, and what is refused."""

import pytest
import torch
from dense import delta_of, dense, logits, merged_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_adapter, tiny_llama

import rsoups


def test_a_matrix_of_lambdas_gives_a_soup_for_each_row(two):
    rows = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    soups = rsoups.interpolate({"x": two[0], "y": two[1]}, rows)
    assert [soup.lambdas for soup in soups] == [tuple(row) for row in rows]
    assert [i.name for i in soups[0].ingredients] == ["x", "y"]
    uniform = rsoups.interpolate(two)
    assert uniform.lambdas == (0.5, 0.5)
    assert all(torch.equal(soups[1].state_dict[k], uniform.state_dict[k]) for k in uniform.state_dict)


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    order=st.permutations([0, 1, 2]),
)
def test_order_does_not_matter_and_the_change_is_linear(tmp_path_factory, weights, order):
    folders = shared_three(tmp_path_factory)
    total = sum(weights)
    weights = [w / total for w in weights]
    straight = delta_of(rsoups.interpolate(folders, weights, normalize=True))
    permuted = delta_of(rsoups.interpolate([folders[i] for i in order], [weights[i] for i in order], normalize=True))
    singles = [dense(folder) for folder in folders]
    for path in straight:
        expected = sum(w * single[path] for w, single in zip(weights, singles, strict=True) if path in single)
        assert torch.allclose(straight[path], expected, atol=1e-7)
        assert torch.allclose(straight[path], permuted[path], atol=1e-7)


_three: list = []


def shared_three(factory):
    if not _three:
        root = factory.mktemp("three")
        _three.extend(tiny_adapter(root / str(i), seed=i, r=i + 2) for i in range(3))
    return _three


BAD_LAMBDAS = [
    ([0.5], "shape"),
    ([0.2, 0.3, 0.5], "shape"),
    ([0.5, 0.6], "sum to 1.1"),
    ([0.5, 0.501], "sum to 1.001"),
    ([float("nan"), 1.0], "NaN"),
    ([float("inf"), 0.0], "NaN or infinity"),
    ([1.5, -0.5], "extrapolate"),
    ([[0.5, 0.5], [1.0]], "numbers"),
    ([], "shape"),
    ("half", "numbers"),
]


@pytest.mark.parametrize(("lambdas", "words"), BAD_LAMBDAS)
def test_lambdas_are_refused(two, lambdas, words):
    with pytest.raises(rsoups.LambdasError, match=words):
        rsoups.interpolate(two, lambdas)


def test_opting_in(two):
    assert rsoups.interpolate(two, [1, 3], normalize=True).lambdas == (0.25, 0.75)
    soup = rsoups.interpolate(two, [1.5, -0.5], extrapolate=True)
    assert (logits(tiny_llama(), soup) - merged_logits(tiny_llama(), two, [1.5, -0.5])).abs().max() < 2e-6
    with pytest.raises(rsoups.LambdasError, match="no adapters"):
        rsoups.interpolate([])
    with pytest.raises(rsoups.AdapterError, match="one adapter"):
        rsoups.interpolate(str(two[0]))
    with pytest.raises(rsoups.LambdasError, match="method"):
        rsoups.interpolate(two, method="linear")
    for rank, method in ((4, "exact"), (0, "svd"), (1.5, "svd"), (-0.1, "svd")):
        with pytest.raises(rsoups.LambdasError, match="rank"):
            rsoups.interpolate(two, method=method, rank=rank)
