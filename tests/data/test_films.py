"""The film plots that ship: three parts without a plot in common, no two of them alike."""

import re
from itertools import combinations

from rsoups.data.datasets import load_rows
from rsoups.data.prompts import question_of
from rsoups.data.tasks import TASKS

COMMON = set(
    "a an and as at by for from her his in is it its of on one or that the their to who whom whose with".split()
)


def words(plot):
    return set(re.findall(r"[\w-]+", plot.lower())) - COMMON


def test_no_two_plots_are_alike():
    parts = {split: load_rows(TASKS["film"], None, split, kept=["plot"]) for split in ("train", "dev", "test")}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 200, "dev": 40, "test": 60}

    plots = [row["plot"] for rows in parts.values() for row in rows]
    for one, other in combinations(map(words, plots), 2):
        assert len(one & other) / len(one | other) < 0.3


def test_a_prompt_is_a_users_turn_that_holds_the_plot():
    row, *_ = load_rows(TASKS["film"], None, "test", kept=["plot"])
    assert [message["role"] for message in row["prompt"]] == ["user"]
    assert question_of(row["prompt"]) == f"Write a one-sentence review of this film.\n\n{row['plot']}"
    assert TASKS["film"].cut("Good. Very good.") == "Good."
