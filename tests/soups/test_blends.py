"""A soup's tensors in pieces are its tensors."""

import pytest
import torch
from tiny import tiny_adapter

import rsoups
from rsoups.soups.blends import pieces_of, tensor_of


@pytest.mark.filterwarnings("ignore:these ingredients do not start from one")
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lambdas", [[0.3, 0.7], [1.0, 0.0]])
@pytest.mark.parametrize("method", ["exact", "factors", "svd"])
def test_pieces_are_the_tensor(tmp_path, method, lambdas, dtype):
    two = [tiny_adapter(tmp_path / "a"), tiny_adapter(tmp_path / "b", seed=1, dtype=torch.bfloat16)]
    soup = rsoups.interpolate(two, lambdas, method=method, dtype=dtype)
    for name, tensor in soup.tensors.items():
        pieces = list(pieces_of(tensor))
        assert all(piece.dtype == soup.layout[name].dtype for piece in pieces)
        assert torch.equal(torch.cat(pieces), soup.state_dict[name]), name
        assert torch.equal(tensor_of(tensor), soup.state_dict[name])
