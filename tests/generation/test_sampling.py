"""Draws on the CPU: the right distribution, and only where they are asked for."""

from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_llama

from rsoups.generation.sampling import draw, fast_sampling


def too_far(counts, expected):
    """Pearson's χ² against its mean and four of its deviations."""
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return statistic > freedom + 4 * (2 * freedom) ** 0.5


def test_draws_follow_the_weights():
    torch.manual_seed(0)
    weights = torch.tensor([0.0, 0.3, 0.0, 0.05, 0.6, 0.05, 0.0]) * 3  # need not sum to 1
    drawn = draw(weights.expand(100_000, -1)).squeeze(1)
    counts = torch.bincount(drawn, minlength=7)
    assert counts[[0, 2, 6]].sum() == 0
    likely = weights > 0
    expected = weights[likely] / weights.sum() * 100_000
    assert not too_far(counts[likely], expected)
    assert too_far(counts[likely], expected.roll(1)), "the check cannot fail"


@pytest.mark.parametrize("size", [1, 12_000])
def test_the_ends_of_the_unit_interval_are_drawn_from_what_is_possible(monkeypatch, size):
    for number in (0.0, 1 - 2**-53):
        monkeypatch.setattr(torch, "rand_like", lambda x, number=number: torch.full_like(x, number))
        weights = torch.zeros(2, size)
        weights[0, size // 2] = 0.1
        weights[1, size // 3] = 1e-30
        assert draw(weights).squeeze(1).tolist() == [size // 2, size // 3]


def test_only_one_draw_for_each_row_is_answered_and_only_in_the_context():
    probabilities = torch.full((3, 1_000), 0.001)

    def drawn(count, context=None):
        torch.manual_seed(0)
        with context or nullcontext():
            return torch.multinomial(probabilities, num_samples=count)

    torch.manual_seed(0)
    ours = draw(probabilities)
    assert not torch.equal(ours, drawn(1))
    assert torch.equal(ours, drawn(1, fast_sampling("cpu")))
    assert torch.equal(drawn(2), drawn(2, fast_sampling("cpu")))
    assert torch.equal(drawn(1), drawn(1, fast_sampling("cuda")))


def test_generation_samples_from_the_model():
    """The first token's frequencies against the model's own probabilities."""
    model = tiny_llama(initializer_range=0.4)
    ids = torch.tensor([[1, 5, 9]]).expand(4_000, -1)
    settings = {"max_new_tokens": 1, "do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(0)
    with fast_sampling("cpu"):
        drawn = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, -1]
    with torch.no_grad():
        expected = (model(ids[:1]).logits[0, -1] / 0.7).softmax(-1) * len(ids)
    likely = expected > 20
    counts = torch.bincount(drawn, minlength=64)
    found, wanted = (torch.cat([x[likely], x[~likely].sum().view(1)]) for x in (counts, expected))
    assert likely.sum() > 5 and not too_far(found, wanted)
