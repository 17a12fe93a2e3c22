"""The one loader of bases, and its rule for the type of the weights."""

import pytest
import torch
from tiny import tiny_llama

from rsoups.bases.load import dtype_of, load_base
from rsoups.common.assets import resolve


@pytest.mark.parametrize(
    ("name", "dtype", "device", "expected"),
    [
        ("rsoups/tiny-llama", "auto", "cuda", torch.float32),
        (resolve("rsoups/tiny-llama"), "auto", "cuda:1", torch.float32),
        ("user/base", "auto", "cuda", "auto"),
        ("user/base", None, "cpu", torch.float32),
        ("user/base", "bfloat16", "cpu", "bfloat16"),
        ("rsoups/tiny-llama", torch.float16, "cuda", torch.float16),
    ],
)
def test_the_type_of_a_bases_weights(name, dtype, device, expected):
    assert dtype_of(name, dtype, device) == expected


def test_a_base_in_half_precision_is_computed_in_float32_on_the_cpu(tmp_path):
    tiny_llama().half().save_pretrained(tmp_path)
    assert load_base(str(tmp_path), device="cpu").dtype == torch.float32
    assert load_base(str(tmp_path), dtype=torch.float16).dtype == torch.float16
    assert load_base("rsoups/tiny-llama", device="cuda").dtype == torch.float32
