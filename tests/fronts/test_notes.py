"""What is said before the figures: runs that did not learn, judged by what they were trained on."""

import json

import numpy as np
import pytest
from front_records import record

from rsoups import Front
from rsoups.cli.main import main
from rsoups.fronts.notes import not_checked
from rsoups.reports.report import write_report


def runs(n=50, names=("A", "B"), **models):
    """A base at 0; the ends of two ingredients and other models by name, with these gains of a and b and some noise."""
    random, rows = np.random.default_rng(0), []
    for i in range(n):
        shared = random.normal(size=2)
        for name, gain in {"base": (0, 0), **models}.items():
            a, b = shared + gain + 0.1 * random.normal(size=2)
            lambdas = {other: float(other == name) for other in names} if name in names else None
            rows.append(record("soup" if lambdas else name, lambdas, f"p{i}", a=a, b=b))
    return rows


def front(trained_on=None, **models):
    found = Front.from_records(runs(**models))
    found.trained_on = trained_on or {}
    return found


def test_a_run_that_is_not_above_the_base_on_its_own_reward_is_told_with_its_interval():
    own = {"A": {"a": 1.0}, "B": {"b": 1.0}}
    assert front(own, A=(1, -1), B=(-1, 1)).notes == []
    (told,) = (found := front(own, A=(1, -1), B=(1, -0.5))).notes
    gain = found.difference(found.ends["B"], found.base)["b"]
    assert told == (
        f"B did not learn: its own reward, b, is below the base's, by {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]."
    )
    (told,) = front(own, A=(1, -1), B=(1, 0.01)).notes
    assert "B is not seen to have learned" in told and "is not surely above" in told


def test_the_weights_of_a_run_on_several_rewards_count():
    """MORL by its own sum; a reward that is minimized; rewards that were trained on beside others."""
    gains = {"A": (1, 0), "B": (0, 1), "MORL": (1, -0.5)}
    morl = {"A": {"a": 1.0}, "B": {"b": 1.0}}
    assert front(morl | {"MORL": {"a": 0.5, "b": 0.5}}, **gains).notes == []
    (told,) = front(morl | {"MORL": {"a": 0.2, "b": 0.8}}, **gains).notes
    assert told.startswith("MORL did not learn: its own sum of rewards, 0.2·a + 0.8·b, is below")
    assert front({"A": {"b": -1.0}, "B": {"b": 1.0}}, A=(0, -1), B=(0, 1)).notes == []
    (told,) = front({"A": {"a": 1.0, "b": -1.0}, "B": {"b": 1.0}}, A=(1, 1.5), B=(0, 1)).notes
    assert "A did not learn: its own sum of rewards, 1·a + -1·b, is below" in told


def test_without_a_lineage_an_ingredient_of_a_rewards_name_is_taken_for_that_rewards_run():
    named = Front.from_records(runs(names=("a", "b"), a=(1, 0), b=(0, -1)))
    assert [note.split(":")[0] for note in named.notes] == ["b did not learn"] and not_checked(named) is None
    named.trained_on = {"b": {"a": 1.0}}  # what the lineage tells comes before the name
    assert "its own reward, a," in named.notes[0]


def test_what_cannot_be_known_is_not_judged_and_said():
    unknown = front(A=(-1, -1), B=(0, 1))
    assert unknown.notes == [] and not_checked(unknown).startswith("Whether A, B learned is not known: no lineage.json")
    elsewhere = front({"A": {"c": 1.0}, "B": {"b": 1.0}}, A=(-1, -1), B=(0, 1))
    assert elsewhere.notes == [] and "Whether A learned" in not_checked(elsewhere)
    baseless = Front.from_records([r for r in runs(A=(1, 0), B=(0, 1)) if r["name"] != "base"])
    assert "the base was not evaluated" in not_checked(baseless)


def test_one_prompt_tells_by_the_means():
    single = Front.from_records(runs(n=1, A=(2, 0), B=(0, -2)))
    single.trained_on = {"A": {"a": 1.0}, "B": {"b": 1.0}}
    assert single.notes[0].startswith("B did not learn") and "[" not in single.notes[0]
    assert len(single.notes) == 2 and "one prompt only" in single.notes[1]


@pytest.mark.parametrize(
    "settings", ["{", "[]", '{"trained_on": 3}', '{"trained_on": {"B": {"b": "1"}}}', '{"trained_on": {"B": []}}']
)
def test_settings_that_tell_nothing_are_no_obstacle(tmp_path, settings):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in runs(A=(1, 0), B=(0, -1))))
    (tmp_path / "records.settings.json").write_text(settings)
    assert Front.from_jsonl(path).notes == []


@pytest.mark.parametrize(
    "settings", ["{", '{"held_out": 3, "command": 5, "adapters": [1], "trained_prompts": 2, "x": null}']
)
def test_a_report_and_a_choice_are_made_beside_odd_settings(tmp_path, capsys, settings):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in runs(n=3, A=(1, 0), B=(0, -1))))
    (tmp_path / "records.settings.json").write_text(settings)
    assert main(["report", str(path)]) == 0 and main(["select", str(path), "--maximize", "a"]) == 0
    assert "rsoups interpolate A B" in capsys.readouterr().out


def test_the_report_says_it_first(tmp_path, capsys):
    rows = runs(A=(1, 0), B=(0, -1))
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"trained_on": {"A": {"a": 1.0}, "B": {"b": 1.0}}}
    (tmp_path / "records.settings.json").write_text(json.dumps(settings))
    write_report(Front.from_records(rows), rows, tmp_path)  # the settings are beside it
    page, text = ((tmp_path / name).read_text("utf-8") for name in ("report.html", "report.md"))
    assert page.index("B did not learn") < page.index("<ul") < page.index("<figure") and text.index(
        "B did"
    ) < text.index("| base")
    assert main(["report", str(path)]) == 0 and capsys.readouterr().out.startswith(
        "B did not learn: its own reward, b, is below"
    )
    assert main(["select", str(path), "--knee"]) == 0 and capsys.readouterr().out.startswith("B did not learn")
