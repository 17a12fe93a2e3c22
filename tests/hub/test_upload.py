"""Uploads over a Hub that is busy, refuses, or cuts the connection."""

import httpx2
import pytest
from hub_pushes import FILES, PULL, cli, push, python
from hub_server import CUT
from huggingface_hub.errors import HfHubHTTPError

from rsoups.hub.upload import retried

REQUEST = httpx2.Request("POST", "https://huggingface.co/api/models/x/commit/main")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_explained_and_not_tried_again(hub, two, status):
    hub.faults = [("POST", "/api/repos/create", status, {})]
    out = push(hub, two)
    assert "the token in HF_TOKEN" in out and "write scope for someone" in out
    assert len([path for _, path in hub.seen if "create" in path]) == 1 and not hub.repositories


def test_busy_hubs_and_conflicts_are_tried_again(hub, two):
    hub.faults = [
        ("POST", "/commit/main", 429, {"Retry-After": "7"}),
        ("POST", "/commit/main", 409, {}),
        ("POST", "/commit/main", 503, {}),
    ]
    out = push(hub, two).splitlines()
    assert out[:3] == ["waited 7", "waited 2", "waited 4"] and "/commit/" in out[3]
    assert len(hub.history("someone/soup")) == 1 and len(hub.puts()) == 1  # the weights went over once
    heads = [path for method, path in hub.seen if (method, path) == ("GET", "/api/models/someone/soup")]
    assert len(heads) == 4  # each attempt looked where the head is


@pytest.mark.parametrize(
    ("told", "waited"),
    [
        ("86400", 60),
        ("0", 0),
        ("9" * 400, 60),
        ("-1", 1),
        ("inf", 1),
        ("\u00b2", 1),
        ("Fri, 31 Dec 2099 23:59:59 GMT", 1),
    ],
)
def test_a_hub_cannot_make_anyone_wait_for_ever(monkeypatch, told, waited):
    slept, answers = [], [429, 200]
    monkeypatch.setattr("time.sleep", slept.append)

    def call():
        if (status := answers.pop(0)) == 200:
            return "done"
        response = httpx2.Response(status, headers=[(b"Retry-After", told.encode("latin-1"))], request=REQUEST)
        raise HfHubHTTPError("busy", response=response)

    assert retried("someone/soup", None, call) == "done" and slept == [waited]


def test_a_commit_is_made_on_the_head_that_was_looked_at(hub, two, tmp_path):
    """Someone else pushes between the look and the commit: ours is refused, and made on theirs."""
    code = """
import sys, time, rsoups
from huggingface_hub import CommitOperationAdd, HfApi
time.sleep = lambda seconds: print(f"waited {seconds:g}")
look, raced = HfApi.model_info, []
def then_someone_else_pushes(api, repo_id, **more):
    found = look(api, repo_id, **more)
    if not raced:
        raced.append(True)
        api.create_commit(repo_id, [CommitOperationAdd("theirs.txt", b"theirs")], commit_message="theirs")
    return found
HfApi.model_info = then_someone_else_pushes
print(rsoups.interpolate(sys.argv[1:], [0.3, 0.7]).push_to_hub("someone/soup", commit_message="ours"))
"""
    out = python(hub, tmp_path, code, *two).splitlines()
    assert out[0] == "waited 1" and "/commit/" in out[1]
    assert [commit["message"] for commit in hub.history("someone/soup")] == ["theirs", "ours"]
    assert "theirs.txt" in hub.files("someone/soup")


def test_what_waiting_cannot_help_is_not_tried_again(hub, two):
    hub.faults = [("POST", "/commit/main", 400, {})]
    assert "HubError: the Hub refused someone/soup (400)" in push(hub, two)
    assert not hub.history("someone/soup")


def test_giving_up_says_so(hub, two):
    hub.faults = [("POST", "/commit/main", 500, {})] * 5
    assert "in 5 attempts (status 500)" in push(hub, two)
    assert not hub.history("someone/soup")


def test_a_connection_that_is_cut_in_an_upload_is_gone_on_with(hub, two, tmp_path):
    """Two soups' weights: one of the uploads is cut; the other one is not sent again."""
    code = """
import sys, time, rsoups
time.sleep = lambda seconds: None
soups = rsoups.interpolate(sys.argv[1:], [[0.25, 0.75], [0.5, 0.5]])
print(rsoups.push_front("someone/front", soups))
"""
    hub.faults = [("PUT", "/blob/", CUT, {})]
    assert "/commit/" in python(hub, tmp_path, code, *two)
    (commit,) = hub.history("someone/front")
    folders = ("lambda-0.25-0.75", "lambda-0.5-0.5")
    assert {p for p in commit["added"] if "/" in p} == {f"{f}/{n}" for f in folders for n in FILES - {"README.md"}}
    assert len(hub.puts()) == 3 and len(set(hub.puts())) == 2
    pulled = python(hub, tmp_path, PULL, *(f"someone/front/{f}" for f in folders))
    assert pulled.splitlines() == ["[0.25, 0.75]", "[0.5, 0.5]"]
    cli(hub, tmp_path, "pull", "someone/front/lambda-0.5-0.5", "--out", "half")
    assert {path.name for path in (tmp_path / "half").iterdir()} == FILES - {"README.md"}


def test_a_connection_that_is_cut_in_the_commit_publishes_nothing_or_all(hub, two):
    hub.faults = [("POST", "/commit/main", CUT, {})] * 5
    assert "HubError" in push(hub, two) and not hub.history("someone/soup")
    hub.faults = [("POST", "/commit/main", CUT, {})]
    assert "/commit/" in push(hub, two) and len(hub.history("someone/soup")) == 1


def test_concurrent_pushes_lose_nothing(hub, two, tmp_path):
    """Four at once to one repository: every soup is a commit, one after the other, and all are there in the end."""
    code = """
import sys, time, rsoups
from concurrent.futures import ThreadPoolExecutor
sleep = time.sleep
time.sleep = lambda seconds: sleep(0.05 * seconds)
soups = rsoups.interpolate(sys.argv[1:], [[w, 1 - w] for w in (0.2, 0.4, 0.6, 0.8)])
with ThreadPoolExecutor(4) as pool:
    print(*pool.map(lambda soup: rsoups.push_front("someone/front", [soup]), soups), sep="\\n")
"""
    urls = python(hub, tmp_path, code, *two).splitlines()
    commits = hub.history("someone/front")
    assert {url.rsplit("/", 1)[1] for url in urls} == {commit["oid"] for commit in commits} and len(commits) == 4
    folders = {path.split("/")[0] for path in hub.files("someone/front") if "/" in path}
    assert folders == {"lambda-0.2-0.8", "lambda-0.4-0.6", "lambda-0.6-0.4", "lambda-0.8-0.2"}
