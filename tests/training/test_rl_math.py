"""Every formula against a loop in plain Python floats."""

import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rsoups.training import rl_math


@pytest.fixture
def rollout():
    """Three responses of 5, 1 and 3 real tokens."""
    torch.manual_seed(0)
    lengths, width = [5, 1, 3], 5
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    return {
        "lengths": lengths,
        "mask": mask,
        "logps": torch.randn(3, width, dtype=torch.float64),
        "ref": torch.randn(3, width, dtype=torch.float64),
        "values": torch.randn(3, width, dtype=torch.float64),
        "scores": torch.randn(3, dtype=torch.float64),
    }


def test_masked_mean_and_whitening_ignore_padding(rollout):
    values, mask = rollout["values"], rollout["mask"]
    real = [values[i, t].item() for i, n in enumerate(rollout["lengths"]) for t in range(n)]
    mean = math.fsum(real) / len(real)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in real) / (len(real) - 1))
    assert rl_math.masked_mean(values, mask).item() == pytest.approx(mean, abs=1e-12)
    white = rl_math.masked_whiten(values, mask)
    assert white[0, 2].item() == pytest.approx((values[0, 2].item() - mean) / std, abs=1e-7)
    assert white[mask == 0].abs().max() == 0


def on_processes(work, parts):
    """What `work(*part, reduce)` returns for each part, all at one time; a reduction sums what they all hand in."""
    barrier, handed_in = threading.Barrier(len(parts), timeout=10), {}

    def run(process):
        def reduce(value):
            handed_in[process] = value
            barrier.wait()
            total = sum(handed_in.values())
            barrier.wait()  # nobody hands in the next value before all have read this one
            return total

        return work(*parts[process], reduce)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


def test_whitening_over_processes_is_whitening_of_all_their_tokens(rollout):
    """Two processes, with rows 0 and 1, and with row 2: of 6 and of 3 tokens, and with unlike means."""
    values, mask = rollout["values"] + torch.tensor([[0.0], [0.0], [5.0]]), rollout["mask"]
    real = values[mask == 1].tolist()
    mean = math.fsum(real) / 9
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in real) / 8)

    found = torch.cat(on_processes(rl_math.masked_whiten, [(values[:2], mask[:2]), (values[2:], mask[2:])]))
    assert found[mask == 1].tolist() == pytest.approx([(x - mean) / std for x in real], abs=1e-7)
    assert not found[mask == 0].any()


def test_rewards_are_the_penalty_at_each_token_and_the_score_at_the_last(rollout):
    rewards = rl_math.kl_penalized_rewards(
        rollout["scores"], rollout["logps"], rollout["ref"], rollout["mask"], kl_coef=0.3
    )
    for i, n in enumerate(rollout["lengths"]):
        for t in range(5):
            expected = 0.0
            if t < n:
                expected = -0.3 * (rollout["logps"][i, t] - rollout["ref"][i, t]).item()
            if t == n - 1:
                expected += rollout["scores"][i].item()
            assert rewards[i, t].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)])
def test_gae_is_the_discounted_sum_of_temporal_differences(rollout, gamma, lam):
    rewards = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    advantages, returns = rl_math.gae(rewards, rollout["values"], rollout["mask"], gamma, lam)
    for i, n in enumerate(rollout["lengths"]):
        r, v = rewards[i, :n].tolist(), [*rollout["values"][i, :n].tolist(), 0.0]
        for t in range(n):
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, n))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[i, t].item() == pytest.approx(expected + v[t], abs=1e-12)
    assert advantages[rollout["mask"] == 0].abs().max() == 0


def test_policy_loss_is_the_pessimistic_one_of_ratio_and_clipped_ratio():
    rng = random.Random(0)
    for _ in range(50):
        old, new, advantage = rng.gauss(-2, 1), rng.gauss(-2, 1), rng.gauss(0, 1)
        loss, clipped = rl_math.policy_loss(
            torch.tensor([[new]]).double(), torch.tensor([[old]]).double(), torch.tensor([[advantage]]).double(), 0.2
        )
        ratio = math.exp(new - old)
        inside = min(max(ratio, 0.8), 1.2)
        assert loss.item() == pytest.approx(-min(ratio * advantage, inside * advantage), rel=1e-5)
        assert bool(clipped) == (inside * advantage < ratio * advantage)


def test_policy_gradient_is_zero_where_the_clip_is_active():
    new = torch.tensor([[0.5]], requires_grad=True)
    loss, clipped = rl_math.policy_loss(new, torch.zeros(1, 1), torch.ones(1, 1), 0.2)
    loss.sum().backward()
    assert clipped.all() and new.grad.item() == 0


@pytest.mark.parametrize(
    ("value", "old", "target", "error"),
    [
        (1.0, 0.0, 1.0, 0.8),  # reached the return; the clipped value, 0.2, has not
        (-1.0, 0.0, -1.0, 0.8),
        (0.1, 0.0, 1.0, 0.9),  # the clip is idle
        (1.0, 0.0, 0.0, 1.0),  # moved away from the return: the clip does not hide it
        (-1.0, 0.0, 0.0, 1.0),
        (3.0, 5.0, 0.0, 4.8),  # the clip is around the old value
    ],
)
def test_value_loss_takes_the_larger_of_clipped_and_unclipped(value, old, target, error):
    tensors = (torch.tensor([[number]], dtype=torch.float64) for number in (value, old, target))
    assert rl_math.value_loss(*tensors, clip=0.2).item() == pytest.approx(error**2 / 2, abs=1e-12)


def test_kl_controller_moves_towards_the_target_by_at_most_a_fifth():
    controller = rl_math.KLController(coef=0.2, target=6.0, horizon=10_000)
    controller.update(kl=60.0, episodes=128)
    assert controller.coef == pytest.approx(0.2 * (1 + 0.2 * 128 / 10_000))
    controller = rl_math.KLController(coef=0.2, target=6.0, horizon=10_000)
    controller.update(kl=5.4, episodes=128)
    assert controller.coef == pytest.approx(0.2 * (1 - 0.1 * 128 / 10_000))
    fixed = rl_math.KLController(coef=0.2)
    fixed.update(kl=60.0, episodes=128)
    assert fixed.coef == 0.2


def test_scores_are_weighted_over_those_that_have_an_opinion():
    none = float("nan")
    scores = torch.tensor([[1.0, 3.0], [1.0, none], [none, 3.0], [none, none]])
    assert rl_math.weighted_scores(scores, torch.tensor([1.0, 3.0]))[:3].tolist() == [2.5, 1.0, 3.0]
    assert rl_math.weighted_scores(scores, torch.tensor([1.0, -1.0]))[:3].tolist() == [-1.0, 1.0, -3.0]
    assert rl_math.weighted_scores(scores, torch.tensor([1.0, 3.0]))[3].isnan()
