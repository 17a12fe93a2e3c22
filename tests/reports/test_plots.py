"""What pictures of the report and of the recipes are drawn with."""

import pytest

from rsoups.fronts.estimates import Estimate
from rsoups.reports.plots import add_legend, bars, new_figure


def test_bars_reach_from_the_figure_to_the_ends_and_never_backwards():
    """Where all prompts have one score, rounding may put an end on the wrong side; matplotlib refuses a negative bar."""
    estimates = [Estimate(1.0, 0.5, 1.25), Estimate(0.3, 0.1 + 0.2, 0.3 - 1e-16), Estimate(2.0)]
    assert bars(estimates) == [[0.5, 0.0, 0.0], [0.25, 0.0, 0.0]]
    axes = new_figure(3, 3).subplots()
    axes.errorbar(range(3), [estimate.value for estimate in estimates], yerr=bars(estimates))
    with pytest.raises(ValueError, match="negative"):
        axes.errorbar([0], [0.3], yerr=[[0.3 - (0.1 + 0.2)], [0.0]])


def test_a_legend_has_each_label_once():
    axes = new_figure(3, 3).subplots()
    for label in ("base", "soups", "base"):
        axes.plot([0, 1], [0, 1], label=label)
    add_legend(axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["base", "soups"]
