"""Fixtures that several folders use."""

import pytest
from tiny import tiny_adapter


@pytest.fixture
def two(tmp_path):
    """Two adapters of one base that differ in every weight."""
    return [tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]
