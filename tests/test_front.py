"""Fronts of records whose figures are known in closed form."""

import json
import math

import numpy as np
import pytest

import rsoups
from rsoups import Front

GRID = [1.0, 0.75, 0.5, 0.25, 0.0]


def record(name, lambdas, prompt, **rewards):
    method = None if lambdas is None else "exact"
    return {
        "name": name,
        "lambdas": lambdas,
        "method": method,
        "prompt": prompt,
        "response": "text",
        "rewards": rewards,
        "seed": 0,
    }


def records(n=400, bulge=0.0, noise=1.0):
    """Soups from (1, 0) to (0, 1), `bulge`·4λ(1-λ) above the chord, with one noise per prompt that all share."""
    shared = np.random.default_rng(1).normal(size=n) * noise
    out = []
    for i in range(n):
        out.append(record("base", None, f"prompt {i}", a=shared[i], b=shared[i]))
        out.append(record("MORL", None, f"prompt {i}", a=0.5 + shared[i], b=0.5 + shared[i]))
        for x in GRID:
            above = bulge * 4 * x * (1 - x)
            rewards = {"a": x + above + shared[i], "b": 1 - x + above + shared[i]}
            out.append(record("soup", {"A": x, "B": 1 - x}, f"prompt {i}", **rewards))
    return out, shared


def test_means_and_intervals():
    found, shared = records()
    front = Front.from_records(found)
    assert [p.lambdas["B"] for p in front.soups] == [0, 0.25, 0.5, 0.75, 1]
    assert [p.name for p in front.others] == ["base", "MORL"] and front.rewards == ["a", "b"]
    point = front.soups[0]
    assert point.mean["a"] == pytest.approx(1 + shared.mean(), abs=1e-12) and point.n == 400
    half = 1.96 * shared.std(ddof=1) / math.sqrt(400)  # the normal interval of a mean
    assert point.high["a"] - point.mean["a"] == pytest.approx(half, rel=0.1)
    assert point.mean["a"] - point.low["a"] == pytest.approx(half, rel=0.1)


def test_several_samples_of_a_prompt_are_averaged():
    front = Front.from_records([record("base", None, "p", a=1.0), record("base", None, "p", a=2.0)])
    assert front.points[0].mean == {"a": 1.5} and front.points[0].n == 1


def test_the_chord_and_what_is_above_it():
    """The prompts' shared noise cancels: paired intervals are narrow though each mean's own is wide."""
    front = Front.from_records(records(bulge=0.1)[0])
    for point, gaps in front.linear_mode_connectivity():
        x = point.lambdas["A"]
        for gap in gaps.values():
            assert gap.value == pytest.approx(0.4 * x * (1 - x), abs=1e-9)
            assert gap.high - gap.low < 1e-9
    gain = front.difference(front.at([0.5, 0.5]), front.named("MORL"))
    assert gain["a"].value == pytest.approx(0.1) and gain["b"].low == pytest.approx(0.1)
    with pytest.raises(rsoups.FrontError, match="no model 'nobody'"):
        front.named("nobody")
    with pytest.raises(rsoups.FrontError, match="no soup at"):
        front.at({"A": 0.4, "B": 0.6})


def test_pareto_drops_what_is_dominated():
    front = Front.from_records(records(bulge=0.1)[0])
    assert {p.label for p in front.pareto()} == {p.label for p in front.soups}


def test_hypervolume_is_the_area_of_the_staircase():
    front = Front.from_records(records(noise=0.0)[0])
    volume = front.hypervolume({"a": -1.0, "b": -1.0})
    corners = [(x + 1, 2 - x) for x in GRID]  # widths and heights above the reference
    area, previous = 0.0, 0.0
    for width, height in sorted(corners):
        area += (width - previous) * height
        previous = width
    assert volume.value == pytest.approx(area, rel=1e-12) == pytest.approx(volume.low)


@pytest.mark.parametrize("reference", [{}, {"a": 0.0}, {"a": 0.0, "b": float("nan")}, {"a": 0, "b": 0, "c": 0}])
def test_hypervolume_wants_its_reference(reference):
    with pytest.raises(rsoups.FrontError, match=r"reference for each of \['a', 'b'\]"):
        Front.from_records(records(n=4)[0]).hypervolume(reference)


def test_an_end_that_is_missing_is_named():
    kept = [r for r in records(n=4)[0] if r["lambdas"] is None or r["lambdas"]["A"] < 1]
    with pytest.raises(rsoups.FrontError, match=r"λ = 1 of \['A'\]"):
        Front.from_records(kept).linear_mode_connectivity()


def test_records_that_no_front_can_be_made_of(tmp_path):
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
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(good[0]) + "\n{\n")
    with pytest.raises(rsoups.FrontError, match="line 2"):
        Front.from_jsonl(path)


def test_the_table_holds_every_point():
    table = Front.from_records(records(n=4)[0]).to_markdown().splitlines()
    assert table[0] == "| model (λ: A / B) | a | b |" and len(table) == 2 + 7
    assert any(line.startswith("| λ 0.25 / 0.75 | ") for line in table)
