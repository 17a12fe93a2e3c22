"""Fixtures of sweeps."""

import pytest
from tiny import tiny_adapter


@pytest.fixture
def two(tmp_path):
    """Two adapters by name, of one base."""
    return {name: tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
