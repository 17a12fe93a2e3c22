"""The one loader of bases, and its rule for the type of the weights."""

import pytest
import torch
from tiny import tiny_llama

import rsoups
from rsoups.bases.load import dtype_of, load_base
from rsoups.common.assets import resolve


@pytest.mark.parametrize(
    ("name", "dtype", "device", "expected"),
    [
        ("rsoups/tiny-llama", "auto", "cuda", torch.float32),
        (resolve("rsoups/tiny-llama"), "auto", "cuda:1", torch.float32),
        ("user/base", "auto", "cuda", "auto"),
        ("user/base", None, "cpu", torch.float32),
        ("user/base", "bfloat16", "cpu", torch.bfloat16),
        ("rsoups/tiny-llama", torch.float16, "cuda", torch.float16),
    ],
)
def test_the_type_of_a_bases_weights(name, dtype, device, expected):
    assert dtype_of(name, dtype, device) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_that_scores_is_in_float32_on_any_device(device):
    assert dtype_of("user/reward", "auto", device, scores=True) == torch.float32
    assert dtype_of(None, "auto", device, scores=True) == torch.float32  # an average of several models
    assert dtype_of("user/reward", "bfloat16", device, scores=True) == torch.bfloat16


@pytest.mark.parametrize("name", ["bf16", "nn", ""])
def test_a_type_that_torch_does_not_have_is_refused(name):
    with pytest.raises(rsoups.CheckpointError, match=f"dtype is '{name}', must be auto, float32"):
        load_base("rsoups/tiny-llama", dtype=name)


def test_a_base_in_half_precision_is_computed_in_float32_on_the_cpu(tmp_path):
    tiny_llama().half().save_pretrained(tmp_path)
    assert load_base(str(tmp_path), device="cpu").dtype == torch.float32
    assert load_base(str(tmp_path), dtype=torch.float16).dtype == torch.float16
    assert load_base("rsoups/tiny-llama", device="cuda").dtype == torch.float32
