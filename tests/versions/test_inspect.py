"""What `rsoups inspect` tells, against dense float64 changes."""

import math

import pytest
import torch
from dense import dense, one_start
from tiny import tiny_adapter

from rsoups.adapters.adapter import read_adapter
from rsoups.versions.inspect import inspect_adapters


def test_norms_and_cosines_are_those_of_the_dense_changes(tmp_path):
    folders = {
        "a": tiny_adapter(tmp_path / "a", seed=1),
        "b": tiny_adapter(tmp_path / "b", seed=2, r=2, use_rslora=True),
        "c": tiny_adapter(tmp_path / "c", seed=3, target_modules=["q_proj"], layers_to_transform=[1]),
    }
    found = inspect_adapters({name: read_adapter(folder) for name, folder in folders.items()})
    changes = {name: dense(folder) for name, folder in folders.items()}
    assert list(found.products) == ["model.layers.0", "model.layers.1"]
    for layer in (*found.products, None):
        vectors = {
            name: torch.cat(
                [
                    change.get(path, torch.zeros(32, 32, dtype=torch.float64)).flatten()
                    for path in changes["a"]
                    if layer is None or path.startswith(layer + ".")
                ]
            )
            for name, change in changes.items()
        }
        for one, x in vectors.items():
            assert found.norm(one, layer) == pytest.approx(float(x.norm()), rel=1e-9, abs=1e-12)
            for other, y in vectors.items():
                if x.norm() and y.norm():
                    expected = float(x @ y / x.norm() / y.norm())
                    assert found.cosine(one, other, layer) == pytest.approx(expected, abs=1e-9)
                else:
                    assert math.isnan(found.cosine(one, other, layer))
    assert found.refusals["exact"] is None and "use 'exact'" in found.refusals["factors"]


def test_it_tells_whether_two_started_alike(tmp_path):
    folders = [tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]

    def look():
        return inspect_adapters({str(i): read_adapter(folder) for i, folder in enumerate(folders)})

    assert abs(look().starts[0][1]) < 0.3 and "different initializations" in look().to_text()
    one_start(folders)
    assert look().starts[0][1] > 0.9 and "one initialization" in look().to_text()
