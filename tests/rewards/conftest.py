"""Fixtures of judges."""

import pytest
from judge_server import JudgeServer, rate


@pytest.fixture
def server():
    server = JudgeServer(rate)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for ratings, of this test alone; and no long backoff."""
    monkeypatch.setenv("RSOUPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("random.uniform", lambda low, high: 0.01)
    return tmp_path / "cache"
