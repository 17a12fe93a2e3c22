"""Fixtures of the Hub: a server on loopback, and the records of a front."""

import json

import pytest
from front_records import records
from hub_server import TOKEN, Client, HubServer, files_with_the_token


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with HubServer() as server:
        server.client = Client(server, home, TOKEN)
        yield server
        server.client.close()
        server.shutdown()
    assert not files_with_the_token(home)


@pytest.fixture
def hub(served):
    yield served
    assert not [blob for blob in served.blobs.values() if TOKEN.encode() in blob]
    served.clear()


@pytest.fixture
def front(tmp_path):
    path = tmp_path / "records.jsonl"
    rows, _ = records(n=40)
    for row in rows:
        if row["lambdas"]:
            row["lambdas"] = dict(zip(("helpful", "harmless"), row["lambdas"].values(), strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"temperature": 0.7, "seed": 3, "task": "assistant", "adapters": {"x": "/home/someone/x"}}
    path.with_suffix(".settings.json").write_text(json.dumps(settings))
    return path
