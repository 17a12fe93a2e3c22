"""Judges' ratings: how they are asked for, scaled, kept and refused."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from judge_server import PROMPTS, RESPONSES, card_of

import rsoups
from rsoups.cli.main import main
from rsoups.rewards.load import cards, read_card
from rsoups.training.trl_rewards import reward_function

pytestmark = pytest.mark.usefixtures("cache")


def test_ratings_are_asked_for_by_the_rubric_and_scaled_by_the_card(tmp_path, server, caplog):
    caplog.set_level(logging.INFO)
    judge = rsoups.load_reward(card_of(tmp_path, server, price={"input": 2.0, "output": 10.0}))
    assert judge(PROMPTS, RESPONSES) == [0.0, 0.5, 1.0, 2.0]
    assert (judge.counts.calls, judge.counts.cached, judge.counts.failures) == (4, 0, 0)
    assert judge.counts.cost == pytest.approx(4 * (100 * 2 + 7 * 10) / 1e6)
    assert (judge.counts.input_tokens, judge.counts.output_tokens) == (400, 28)
    assert "helpful, 4 samples; in all: calls 4, cached 0, retries 0" in caplog.text
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and "authorization" not in headers
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 64)
    assert body["response_format"]["json_schema"]["schema"]["properties"]["score"]["enum"] == [1, 2, 3, 4, 5]
    said = {body["messages"][0]["content"] for _, _, body in server.seen}
    assert all("Is it helpful?" in text and "### Input" not in text for text in said)
    assert any("<question>\nquestion 3\n</question>\n\n<response>\na b c d e f g\n</response>" in text for text in said)
    with pytest.raises(rsoups.RewardError, match="4 prompts but 1 responses"):
        judge(PROMPTS, ["a"])


def test_the_same_sample_is_asked_for_once_by_all_processes(tmp_path, server):
    card = card_of(tmp_path, server)
    judge = rsoups.load_reward(card)
    assert judge([PROMPTS[0]] * 3, ["a b"] * 3) == [0.5] * 3
    assert (judge.counts.calls, judge.counts.cached) == (1, 2)
    code = "import rsoups, sys; j = rsoups.load_reward(sys.argv[1]); print(j([sys.argv[2]], ['a b']), j.counts.calls)"
    run = [sys.executable, "-c", code, str(card), PROMPTS[0]]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[0.5] 0" and len(server.seen) == 1
    # Whatever the rating depends on is part of the key.
    for fields in ({"rubric": "Other?"}, {"model": "n"}, {"scale": [1, 6]}, {"parameters": {"temperature": 1}}):
        assert rsoups.load_reward(card_of(tmp_path, server, **fields))([PROMPTS[0]], ["a b"]) == [0.5]
    assert len(server.seen) == 5


def test_processes_that_write_at_once_leave_whole_ratings(tmp_path, server, cache):
    server.delay = 0.05
    code = (
        "import rsoups, sys; print(rsoups.load_reward(sys.argv[1])(['q'] * 20, ['a ' * i for i in range(1, 21)])[:2])"
    )
    run = [sys.executable, "-c", code, str(card_of(tmp_path, server))]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["[0.0, 0.5]"] * 2
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert len(files) == 20 and all(json.loads(path.read_text())["rating"] in range(1, 6) for path in files)


def test_a_damaged_rating_is_asked_for_again_and_a_full_disk_is_no_end(tmp_path, server, cache, caplog):
    card = card_of(tmp_path, server)
    rsoups.load_reward(card)(PROMPTS[:1], ["a b"])
    (kept,) = [path for path in cache.rglob("*") if path.is_file()]
    for damaged in ("", '{"rating": 9}', '{"rating": "4"}', "[]"):
        kept.write_text(damaged)
        assert rsoups.load_reward(card)(PROMPTS[:1], ["a b"]) == [0.5]
        assert json.loads(kept.read_text()) == {"rating": 2}
    assert len(server.seen) == 5
    (tmp_path / "file").touch()
    judge = rsoups.Judge(read_card(card), cache=tmp_path / "file")
    assert judge(PROMPTS[:1], ["a b"]) == [0.5] and "cannot keep a judge's rating" in caplog.text


def test_trl_logs_what_a_judge_costs(tmp_path, server):
    logged = {}
    server.faults = [(500, {}, "busy")]
    judge = rsoups.load_reward(card_of(tmp_path, server, price={"input": 2.0, "output": 10.0}, concurrency=1))
    judge(PROMPTS, RESPONSES, log_metric=logged.__setitem__, trainer_state=None)
    one = (100 * 2.0 + 7 * 10.0) / 1e6
    assert logged == {"helpful/calls": 5.0, "helpful/failures": 1.0, "helpful/cost": pytest.approx(4 * one)}
    judge(PROMPTS, RESPONSES, log_metric=logged.__setitem__)  # known: nothing is asked
    assert logged["helpful/calls"] == 5.0
    server.faults = [(401, {}, "no")]
    with pytest.raises(rsoups.RewardError, match="status 401"):
        judge(["other"], ["a"])
    judge(["other"], ["a"], log_metric=logged.__setitem__)
    assert logged == {"helpful/calls": 7.0, "helpful/failures": 2.0, "helpful/cost": pytest.approx(5 * one)}


def test_a_judge_refuses_an_empty_question_and_reads_parts(tmp_path, server):
    judge = rsoups.load_reward(card_of(tmp_path, server))
    with pytest.raises(rsoups.DatasetError, match="asks nothing"):
        judge(["### Instruction:  ### Response: "], ["a"])
    judge([[{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]], ["a b"])
    assert len(server.seen) == 1 and "<question>\nWhy?\n</question>" in server.seen[0][2]["messages"][0]["content"]


BAD = [
    ({"rubric": " "}, "rubric is ' '"),
    ({"scale": [5, 1]}, r"scale is \[5, 1\]"),
    ({"scale": [1, 2, 3]}, "should have at most 2 items"),
    ({"scale": [1, 5.5]}, "field scale.1 is 5.5: input should be a valid integer"),
    ({"concurrency": 0}, "concurrency is 0"),
    ({"attempts": True}, "attempts is True"),
    ({"timeout": 0}, "timeout is 0"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"parameters": {"stream": True}}, r"parameters may not set \['stream'\]"),
    ({"parameters": 3}, "parameters is 3"),
    ({"endpoint": "localhost:8000"}, "must be an http"),
    ({"endpoint": "http://user:pw@host/v1"}, "endpoint holds credentials"),
    ({"endpoint": None, "key": "K"}, "key and price go with an endpoint"),
    ({"key": "sk-pw"}, "name of an environment variable"),
    ({"price": {"input": 1}}, "must be input and output"),
    ({"secret": "x"}, r"unknown field\(s\) \['secret'\]"),
]


@pytest.mark.parametrize(("fields", "words"), BAD)
def test_bad_judges_are_refused(tmp_path, server, fields, words):
    with pytest.raises(rsoups.RewardError, match=words) as caught:
        rsoups.load_reward(card_of(tmp_path, server, **fields))
    assert "pw" not in str(caught.value)


def test_bad_judge_cards_are_refused(tmp_path):
    for text, words in (
        ("name: j\njudge: 3", "judge is 3"),
        ("name: j\njudge: {model: m}", r"reward card 'j', judge: field rubric is missing"),
        ("name: j\njudge: {model: m, rubric: r}\nstd: 0", "std is 0"),
        ("name: j\njudge: {model: m, rubric: r}\nlogit: 1", r"unknown field\(s\) \['logit'\]"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(rsoups.RewardError, match=words):
            rsoups.load_reward(tmp_path / "c.yaml")


def test_the_shipped_judges_rate_three_aspects(server):
    judges = {name: read_card(path) for name, path in cards().items() if name.startswith("judge-")}
    assert set(judges) == {f"judge-{aspect}" for aspect in ("relevance", "factuality", "completeness")}
    for name, card in judges.items():
        assert name.removeprefix("judge-") in card.settings.rubric and card.settings.key is None
        assert Path(cards()[name]).read_text().count("\n    ") >= 6  # a line for each step of the scale, and more


def test_rsoups_score_asks_a_judge_and_says_so(tmp_path, server, capsys):
    card = str(card_of(tmp_path, server, attempts=1))
    assert main(["score", "--reward", card, "--prompt", "Why?", "--response", "a b c"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "raw     3",
        "score   1",
        "asked   calls 1, cached 0, retries 0, failures 0, input tokens 100, output tokens 7, cost 0",
    ]
    server.faults = [(500, {}, "down")]
    assert main(["score", "--reward", card, "--prompt", "Why?", "--response", "a b"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(
        "rsoups: reward 'helpful': no rating in 1 attempts: status 500"
    )


def test_a_judge_is_a_reward_of_a_ppo_run(tmp_path, server):
    """TRL's signature, with what TRL passes beside."""
    logged = {}
    function = reward_function(rsoups.load_reward(card_of(tmp_path, server)), str.strip)
    extras = {"completion_ids": [[1]], "trainer_state": None, "log_extra": None, "log_metric": logged.__setitem__}
    assert function(prompts=["Why?"], completions=[" a b c "], **extras) == [1.0]
    assert function.__name__ == "helpful" and logged["helpful/calls"] == 1
