"""Records and tables as fronts: what is read, and what is refused."""

import json

import pytest
from front_records import noisy, record, records

import rsoups
from rsoups import Front


def test_records_that_no_front_can_be_made_of(tmp_path):
    """Fault 36 among them: a reward that is not finite is refused, its record named."""
    good = records(n=3)[0]
    with pytest.raises(rsoups.FrontError, match="no records"):
        Front.from_records([])
    for value in (float("nan"), float("inf"), None, True, "1"):
        bad = record("soup", {"A": 0.5, "B": 0.5}, "prompt 1", a=value, b=0.0)
        with pytest.raises(rsoups.FrontError, match=r"record 22 \(soup.*prompt 1.*a is"):
            Front.from_records([*good, bad])
    with pytest.raises(rsoups.FrontError, match="finish the sweep"):
        Front.from_records(good[:-1])
    with pytest.raises(rsoups.FrontError, match=r"rewards \['c'\]"):
        Front.from_records([*good, record("x", None, "prompt 1", c=1.0)])
    with pytest.raises(rsoups.FrontError, match="lacks"):
        Front.from_records([{"name": "base", "rewards": {"a": 1}}])
    for record_, words in (
        (["base"], "record 1 is"),
        (good[0] | {"prompt": 1}, "prompt is 1; a prompt is a text"),
        (good[0] | {"rewards": 1}, "rewards is 1.*by name"),
        (good[0] | {"response": None}, "response is None"),
        (good[0] | {"name": 3}, "name is 3"),
        (good[2] | {"lambdas": {"A": "1"}}, "finite weights by ingredient"),
        (good[2] | {"lambdas": {"A": float("nan")}}, "finite weights by ingredient"),
    ):
        with pytest.raises(rsoups.FrontError, match=words):
            Front.from_records([record_])
    with pytest.raises(rsoups.FrontError, match="cannot read"):
        Front.from_jsonl(tmp_path / "nowhere.jsonl")
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(good[0]) + "\n{\n")
    with pytest.raises(rsoups.FrontError, match="line 2"):
        Front.from_jsonl(path)


def test_texts_with_unusual_line_ends_stay_on_their_line(tmp_path):
    path = tmp_path / "records.jsonl"
    row = record("base", None, "one\u2028two\x85three", a=1.0) | {"response": "four\u2029five"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert Front.from_jsonl(path).prompts == [row["prompt"]]
    path.write_bytes(b"\xff\n")
    with pytest.raises(rsoups.FrontError, match="cannot read.*utf-8"):
        Front.from_jsonl(path)


def test_lambdas_in_another_order_are_the_same_soup_and_other_ingredients_are_refused():
    rows = [record("soup", {"A": 0.3, "B": 0.7}, "p", a=1.0), record("soup", {"B": 0.7, "A": 0.3}, "p", a=3.0)]
    front = Front.from_records([*rows, record("soup", {"B": 1.0, "A": 0.0}, "p", a=5.0)])
    assert [(p.label, p.mean) for p in front.soups] == [("λ 0.3 / 0.7", {"a": 2.0}), ("λ 0 / 1", {"a": 5.0})]
    for lambdas in ({"A": 0.5, "C": 0.5}, {"A": 1.0}, [0.5, 0.5], 1):
        with pytest.raises(rsoups.FrontError, match=r"record 3 is of a soup of .*others are of \['A', 'B'\]"):
            Front.from_records([*rows, record("soup", lambdas, "p", a=1.0)])
    with pytest.raises(rsoups.FrontError, match="record 1 is of a soup of 1"):
        Front.from_records([record("soup", 1, "p", a=1.0)])


def test_soups_of_two_methods_are_told_apart():
    rows = [record("soup", {"A": 0.5, "B": 0.5}, "p", a=1.0) | {"method": method} for method in ("exact", "factors")]
    assert [p.label for p in Front.from_records(rows).points] == ["λ 0.5 / 0.5 (exact)", "λ 0.5 / 0.5 (factors)"]
    assert [p.label for p in Front.from_records(rows[1:]).points] == ["λ 0.5 / 0.5"]


def test_a_front_goes_through_csv(tmp_path):
    front = Front.from_records(noisy(n=8))
    front.to_csv(tmp_path / "front.csv")
    again = Front.from_csv(tmp_path / "front.csv")
    assert again.rewards == front.rewards and again.to_markdown() == front.to_markdown()
    rows = front.to_table()
    assert [row["name"] for row in rows][:3] == ["base", "MORL 0.5/0.5", "MORL 0.2/0.8"]
    assert rows[3]["lambda_A"] == 1 and rows[0]["lambda_A"] is None and rows[3]["words"] == 1.0
    assert {row["pareto"] for row in rows} == {True, False}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lacks rows"),
        ("lambda_A,a\n", "lacks rows"),
        ("lambda_A,name\n1,x\n", "lacks a reward column"),
        ("lambda_A,a\n1,high\n", "row 1: a is 'high'"),
        ("lambda_A,a\n1,0\n1,nan\n", "row 2: a is 'nan'"),
        ("lambda_A,lambda_B,a\n1,,0\n", "lambda_B is ''"),
        ("lambda_A,a,b\n1,0\n", "b is None"),
        ("name,lambda_A,a\nx,,0\ny,,1\nx,,2\n", r"two rows are 'x' \(x\): give each a name"),
        ("lambda_A,a\n1,0\n1.0,2\n", r"two rows are 'soup' \(λ 1\)"),
    ],
)
def test_tables_that_no_front_can_be_made_of(tmp_path, text, words):
    path = tmp_path / "front.csv"
    path.write_text(text)
    with pytest.raises(rsoups.FrontError, match=words):
        Front.from_csv(path)
    with pytest.raises(rsoups.FrontError, match=r"cannot read|lacks"):
        Front.from_csv(path if not text else tmp_path / "none.csv", ["a"])
