"""Values of tensors are looked at block by block."""

import math

import pytest
import torch
from safetensors.torch import save_file

from rsoups.adapters.tensor_files import _BLOCK, TensorFile, largest

SIZE = 2 * _BLOCK + 5


@pytest.mark.parametrize("place", [0, _BLOCK - 1, _BLOCK, SIZE - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_the_largest_magnitude_is_found_in_every_block(dtype, place):
    values = torch.linspace(-1, 1, SIZE)
    for value in (-3.5, 3.5):
        values[place] = value
        assert largest(values.to(dtype)) == 3.5
        assert largest(values.to(dtype).unflatten(0, (1, -1)).T) == 3.5
    values[place] = math.nan
    assert math.isnan(largest(values.to(dtype)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, _BLOCK, SIZE - 1])
def test_a_file_with_a_value_that_is_not_finite_is_told_wherever_it_is(tmp_path, place, value):
    values = torch.ones(SIZE)
    values[place] = value
    save_file({"a": torch.ones(3), "b": values, "c": torch.ones(3)}, tmp_path / "x.safetensors")
    assert TensorFile(tmp_path / "x.safetensors").scan().not_finite == "b"
    assert largest(torch.empty(0)) == 0.0
