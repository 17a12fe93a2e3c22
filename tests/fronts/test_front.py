"""Fronts of records whose figures are known in closed form."""

import math

import numpy as np
import pytest
from front_records import GRID, noisy, record, records

import rsoups
from rsoups import Front


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


# Fault 35: no hypervolume without a finite reference for each reward, and the reference and the direction are printed with it.
@pytest.mark.parametrize("reference", [{}, {"a": 0.0}, {"a": 0.0, "b": float("nan")}, {"a": 0, "b": 0, "c": 0}])
def test_hypervolume_wants_its_reference(reference):
    with pytest.raises(rsoups.FrontError, match=r"reference for each of \['a', 'b'\]"):
        Front.from_records(records(n=4)[0]).hypervolume(reference)


def test_a_hypervolume_tells_its_reference_and_direction():
    volume = Front.from_records(records(n=4)[0]).hypervolume({"b": -4, "a": -3.5})
    assert str(volume).endswith("] above the reference a -3.5, b -4 (every reward maximized)")
    assert volume.reference == {"a": -3.5, "b": -4.0} and volume.error == 0


def test_an_end_that_is_missing_is_named():
    kept = [r for r in records(n=4)[0] if r["lambdas"] is None or r["lambdas"]["A"] < 1]
    with pytest.raises(rsoups.FrontError, match=r"λ = 1 of \['A'\]"):
        Front.from_records(kept).linear_mode_connectivity()


def test_the_table_holds_every_point():
    table = Front.from_records(records(n=4)[0]).to_markdown().splitlines()
    assert table[0] == "| model (λ: A / B) | a | b |" and len(table) == 2 + 7
    assert any(line.startswith("| λ 0.25 / 0.75 | ") for line in table)


def test_equal_points_are_all_on_the_front():
    rows = [record(name, None, "p", a=a, b=0.0) for name, a in (("x", 1.0), ("y", 1.0), ("z", 0.0))]
    assert [p.name for p in Front.from_records(rows).pareto()] == ["x", "y"]


def test_what_shows_reward_hacking_stands_beside_the_rewards():
    said = ["a b c", "a b", "", "d d d d"]
    rows = [
        record("base", None, f"p{i}", a=0.0) | {"response": text, "tokens": 2 + i, "kl": 0.5 * i, "base_nll": 3.0 + i}
        for i, text in enumerate(said)
    ]
    extras = Front.from_records(rows).points[0].extras
    assert extras["words"].value == 9 / 4 and extras["tokens"].value == 3.5 and extras["KL"].value == 0.75
    assert extras["perplexity"].value == pytest.approx(math.exp((3 + 4 + 5 + 6) / (2 + 3 + 4 + 5)))
    assert extras["distinct-2"].value == 3 / 6  # a b, b c, d d of ab bc ab dd dd dd
    left_out = [2 / 4, 3 / 5, 3 / 6, 2 / 3]
    error = math.sqrt(3 / 4 * sum((x - np.mean(left_out)) ** 2 for x in left_out))
    assert extras["distinct-2"].high == pytest.approx(0.5 + 1.96 * error)
    assert all(e.low <= e.value <= e.high for e in extras.values())
    rows[0].pop("kl")
    assert "KL" not in Front.from_records(rows).points[0].extras


def test_how_little_there_is_to_see_is_said():
    one = Front.from_records([record("base", None, "p", a=1.0) | {"response": " "}])
    assert [note.split(":")[0] for note in one.notes] == [
        "There is one reward only, a",
        "There is one point only, base",
        "There is one prompt only",
        "All responses of all models are empty",
    ]
    assert one.points[0].low == {} and one.hypervolume({"a": 0}).value == 1 and one.select(knee=True).share is None
    rows = [r | {"response": "" if r["name"] == "base" else "x"} for r in records(n=2)[0]]
    assert Front.from_records(rows).notes == ["All responses are empty at base."]


def test_reprs_are_one_line_and_notebooks_get_a_table():
    front = Front.from_records(noisy(n=8))
    assert repr(front) == ("Front(rewards a, b; 5 soups of A, B; others base, MORL 0.5/0.5, MORL 0.2/0.8; 8 prompts)")
    choice = front.select(knee=True)
    assert repr(choice) == f"Choice({choice})" and repr(choice.point).startswith(f"Point({choice.point.label}: a ")
    comparison, gain = front.compare(front, {"a": -3, "b": -3}), front.advantage({"a": -3, "b": -3})
    assert repr(comparison) == f"Comparison(hypervolume {comparison.gain} more than the other, 8 common prompts)"
    assert repr(gain) == f"Advantage(soups minus MORL, 4 points each: hypervolume {gain.gain}, utility {gain.utility})"
    for each in (front, choice, comparison, gain):
        assert "\n" not in repr(each) and len(repr(each)) < 300
    tables = [each._repr_html_() for each in (front, comparison, gain)]
    assert all(table.startswith("<table>") and table.endswith("</table>") for table in tables)
    assert tables[0].count("<tr>") == 1 + 8 and str(front.soups[0].estimate("a")) in tables[0]
    assert str(comparison.igd_plus[0]) in tables[1] and str(gain.utility_of_all) in tables[2]
    hostile = Front.from_records([record("<b>x</b>", None, "p", a=1.0)])
    assert "<b>" not in hostile._repr_html_() and "&lt;b&gt;" in hostile._repr_html_()
