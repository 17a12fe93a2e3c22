"""Requests to a judge's server: faults, waits, keys, and answers that are no rating."""

import logging
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from judge_server import PROMPTS, card_of

import rsoups
from rsoups.rewards.judge_client import parse_rating

pytestmark = pytest.mark.usefixtures("cache")
KEY = "sk-0123456789-secret"
GARBLED = '{"choices": [{"message": {"content": "%s"}}]}'
FAULTS: list[tuple] = [
    ((500, {}, "down"), "status 500: down"),
    ((503, {}, ""), "status 503"),
    ("cut", "RemoteProtocolError"),
    ((200, {}, "{no json"), "not a chat completion"),
    ((200, {}, "[]"), "not a chat completion"),
    ((200, {}, GARBLED % "I would say 4."), "not a rating from 1 to 5: I would say 4."),
    ((200, {}, GARBLED % "6"), "not a rating from 1 to 5: 6"),
    ((200, {}, '{"choices": [{"message": {"content": null}}]}'), "not a rating from 1 to 5: None"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS)
def test_what_may_pass_is_tried_again_and_then_refused_with_the_sample(tmp_path, server, fault, words, caplog):
    caplog.set_level(logging.INFO)
    server.faults = [fault, fault]
    judge = rsoups.load_reward(card_of(tmp_path, server, attempts=3))
    assert judge(PROMPTS[:1], ["a b"]) == [0.5] and words in caplog.text
    assert (judge.counts.calls, judge.counts.retries, judge.counts.failures) == (3, 2, 2)
    server.faults = [fault] * 3
    with pytest.raises(rsoups.RewardError, match="no rating in 3 attempts") as caught:
        judge(["What?"], ["a b c"])
    for part in ("reward 'helpful'", words, "question 'What?', response 'a b c'"):
        assert part in str(caught.value)
    assert len(server.seen) == 6
    assert judge(["What?"], ["a b c"]) == [1.0], "a failure is not kept"


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_is_not_tried_again(tmp_path, server, status):
    server.faults = [(status, {}, "no")]
    with pytest.raises(rsoups.RewardError, match=f"no rating: status {status}: no"):
        rsoups.load_reward(card_of(tmp_path, server))(PROMPTS[:1], ["a"])
    assert len(server.seen) == 1


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_is_honored_and_bounded(tmp_path, server, kind, monkeypatch):
    """A date says whole seconds: two from now are more than one."""
    after = "1" if kind == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    server.faults = [(429, {"Retry-After": after}, "slow down")]
    judge = rsoups.load_reward(card_of(tmp_path, server))
    assert judge(PROMPTS[:1], ["a b"]) == [0.5]
    assert server.times[1] - server.times[0] > 0.9
    monkeypatch.setattr("rsoups.rewards.judge_client._LONGEST_WAIT", 0.2)
    server.faults = [(429, {"Retry-After": "30"}, "slow down")]
    started = time.monotonic()
    assert judge(PROMPTS[1:2], ["a b"]) == [0.5] and time.monotonic() - started < 5


def test_no_more_requests_at_a_time_than_the_card_says(tmp_path, server):
    server.delay = 0.1
    judge = rsoups.load_reward(card_of(tmp_path, server, concurrency=3))
    scores = judge(["q"] * 12, [f"{'a ' * (i % 5)}x{i}" for i in range(12)])
    assert scores == [(min(i % 5 + 1, 5) - 1) / 2 for i in range(12)]
    assert server.most_at_once == 3


def test_a_slow_server_runs_out_of_time(tmp_path, server):
    server.delay = 1.0
    judge = rsoups.load_reward(card_of(tmp_path, server, timeout=0.1, attempts=2))
    with pytest.raises(rsoups.RewardError, match="no rating in 2 attempts: ReadTimeout"):
        judge(PROMPTS[:1], ["a"])


def test_one_failure_ends_the_waiting_of_all_others(tmp_path, server):
    """The first request is refused for good while the others wait for a server that asks for a minute."""
    server.faults = [(401, {}, "no"), *[(429, {"Retry-After": "60"}, "")] * 20]
    judge = rsoups.load_reward(card_of(tmp_path, server, concurrency=4))
    started = time.monotonic()
    with pytest.raises(rsoups.RewardError, match="status 401"):
        judge(["q"] * 12, [f"a {i}" for i in range(12)])
    assert time.monotonic() - started < 10 and len(server.seen) < 12


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, server, cache, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    card = card_of(tmp_path, server, key="JUDGE_KEY", attempts=2)
    with pytest.raises(rsoups.RewardError, match="environment variable JUDGE_KEY, with the key, is not set"):
        rsoups.load_reward(card)
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")  # as files of keys end
    judge = rsoups.load_reward(card)
    echo = (500, {}, f"wrong key: Bearer {KEY} is bad")
    server.faults = [echo]
    assert judge(PROMPTS[:1], ["a b"]) == [0.5]
    assert server.seen[0][1]["authorization"] == f"Bearer {KEY}"
    server.faults = [echo] * 2
    with pytest.raises(rsoups.RewardError, match=r"wrong key: Bearer \*\*\* is bad") as caught:
        judge(PROMPTS[1:2], ["a b"])
    chain, error = [], caught.value
    while error is not None:
        chain.append(repr(error))
        error = error.__cause__ or error.__context__
    written = "".join(path.read_text() for path in cache.rglob("*") if path.is_file())
    assert written and KEY not in caplog.text + "".join(chain) + written + repr(judge.card) + repr(vars(judge))
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\r\nX-Other: 1")
    with pytest.raises(rsoups.RewardError, match="no header can carry") as caught:
        rsoups.load_reward(card)
    assert KEY not in str(caught.value)


def test_no_key_of_the_environment_goes_to_a_server_whose_card_names_none(tmp_path, server, monkeypatch):
    """openai's client sends OPENAI_API_KEY and others to any server, unless told not to."""
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/")
    assert rsoups.load_reward(card_of(tmp_path, server))(PROMPTS[:1], ["a b"]) == [0.5]
    assert KEY not in repr(server.seen)
    monkeypatch.setenv("OTHER", "other")
    rsoups.load_reward(card_of(tmp_path, server, key="OTHER"))(PROMPTS[:1], ["a b c"])
    assert server.seen[1][1]["authorization"] == "Bearer other" and KEY not in repr(server.seen)


def test_a_server_needs_the_extra_and_says_so_first(tmp_path, server, monkeypatch):
    monkeypatch.setattr("rsoups.common.assets.find_spec", lambda name: None)
    with pytest.raises(rsoups.SettingsError, match=r"openai.*pip install 'rsoups\[server\]'"):
        rsoups.load_reward(card_of(tmp_path, server))


@pytest.mark.parametrize(
    ("content", "rating"),
    [
        ("4", 4),
        (' {"score": 1}\n', 1),
        *((bad, None) for bad in ("0", "6", "4.0", "true", '"4"', "", "4 of 5", '{"score": "4"}', '{"score": 4.5}')),
        *(
            (bad, None)
            for bad in ('{"score": true}', '{"score": 4, "why": "x"}', "[4]", "NaN", "```4```", None, "[" * 9999)
        ),
    ],
)
def test_only_one_integer_of_the_scale_is_a_rating(content, rating):
    assert parse_rating(content, (1, 5)) == rating
