"""The demo's last step: the soup that it recommends, and what it says where there is none."""

import json
import runpy

import pytest
from front_records import above
from places import RECIPES
from tiny import tiny_adapter

import rsoups

DEMO = RECIPES / "demo.py"


@pytest.mark.parametrize(
    ("gains", "weights", "words"),
    [
        ([(1.0, -0.2), (0.6, 0.1), (0.3, 0.3)], (0.5, 0.5), "The best soup above the base, by equal weights"),
        ([(1.0, -0.2), (0.3, -0.1), (-0.2, 0.4)], (1, 0), "no good choice: no soup is above the base in every reward"),
    ],
    ids=["above the base", "none is"],
)
def test_the_demo_saves_what_is_above_the_base_or_says_that_nothing_is(tmp_path, capsys, gains, weights, words):
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in above(gains, n=60)))
    for seed, name in enumerate("AB"):
        tiny_adapter(tmp_path / f"ppo-{name}", seed=seed)
    folder = runpy.run_path(str(DEMO))["choose"](tmp_path)
    assert rsoups.Soup.from_pretrained(folder).lambdas == weights
    shown = capsys.readouterr().out
    assert words in shown and ("Saved all the same" in shown) == ("no good choice" in shown)
