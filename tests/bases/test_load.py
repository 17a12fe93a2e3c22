"""The one loader of bases, and its rule for the type of the weights."""

import pytest
import torch
from tiny import tiny_llama

import rsoups
from rsoups.bases.files import BaseFiles
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


def test_files_beside_the_weights_are_of_the_revision_that_was_loaded(tmp_path, monkeypatch):
    """Two revisions in the Hub's cache: a merged model takes what is beside its weights from its own, not from main."""
    repository = tmp_path / "models--user--base"
    for name, number in (("main", "1"), ("v2", "2")):
        tiny_llama(hidden_size=8 * int(number), head_dim=8).save_pretrained(repository / "snapshots" / (number * 40))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(number * 40)

    for module in ("huggingface_hub.constants", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path), raising=False)
    for revision, number in ((None, "1"), ("v2", "2"), ("2" * 40, "2")):
        model = load_base("user/base", **({"revision": revision} if revision else {}))
        assert model.config.hidden_size == 8 * int(number)
        assert BaseFiles.of(model).path("config.json").parent.name == number * 40
        model.save_pretrained(tmp_path / "saved")
        assert number * 40 not in (tmp_path / "saved" / "config.json").read_text()
