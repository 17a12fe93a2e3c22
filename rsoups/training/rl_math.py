"""The mathematics of PPO from human feedback: pure functions of tensors.

Shapes: B responses, padded to T tokens. A mask's 1 (or True) marks a real response token, its end token included; a
row's real tokens come first. Values, rewards and log-probabilities at padded positions are ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def weighted_scores(scores: Tensor, weights: Tensor) -> Tensor:
    """Σ μi·Ri / Σ |μi| over the rewards that have an opinion: the paper's MORL, extended to negative weights.

    Args:
        scores: Scores, (B, R); NaN is no opinion.
        weights: Weights μ, (R,); a negative one pays for less of its reward.

    Returns:
        Sums, (B,); NaN where no reward has an opinion.
    """
    answered = ~scores.isnan()
    return (scores.nan_to_num() * weights).sum(dim=1) / (answered * weights.abs()).sum(dim=1).where(
        answered.any(dim=1), 0
    )


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (B, T) over the real tokens; 0 where there are none."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Shift and scale the real tokens of `values` (B, T) to mean 0 and unbiased variance 1; padding becomes 0.

    As TRL 1.12 does, with Bessel's correction; a single token is only shifted.

    Args:
        values: Floats (B, T).
        mask: 1 = real token, (B, T).
        reduce: Sums a tensor over all processes, so that all share one mean and variance.
    """
    mask = mask.to(values.dtype)
    total = reduce or (lambda x: x)
    count = total(mask.sum()).clamp(min=1)
    mean = total((values * mask).sum()) / count
    variance = total(((values - mean) ** 2 * mask).sum()) / (count - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def kl_penalized_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Per-token rewards: -β (log π - log π_ref) at each token, plus the score at the last one.

    Ouyang et al. 2022, eq. 2, with the k1 estimator of the KL divergence at the sampled tokens.

    Args:
        scores: Reward of each whole response, (B,).
        logps, ref_logps: Log-probabilities of the sampled tokens under the policy that sampled and the reference, (B, T).
        mask: 1 = real token, (B, T).
        kl_coef: β.
    """
    mask = mask.to(logps.dtype)
    rewards = -kl_coef * (logps - ref_logps) * mask
    last = mask.sum(dim=1).long().clamp(min=1) - 1
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16): A_t = Σ_k (γλ)^k δ_{t+k}.

    δ_t = r_t + γ V_{t+1} - V_t; the value after a response's last token is 0 (the episode has ended).

    Args:
        rewards, values: Floats (B, T).
        mask: 1 = real token, (B, T).
        gamma: Discount γ.
        lam: λ of the estimator (not of a soup).

    Returns:
        Advantages and returns (advantages + values), (B, T), 0 at padding.
    """
    mask = mask.to(values.dtype)
    values, rewards = values * mask, rewards * mask
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = (deltas[:, t] + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss of each token (Schulman et al. 2017, eq. 7), negated for descent.

    Returns:
        Loss (B, T), and whether the clip is active (B, T).
    """
    ratio = torch.exp(logps - old_logps)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of each token's value, the larger of it and of the value clipped around the old one (B, T).

    The value clipping of OpenAI's PPO, as in TRL 1.12.
    """
    near = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


@dataclass
class KLController:
    """The coefficient β of the KL penalty; adaptive where a target is set (Ziegler et al. 2019, section 2.2).

    e = clip(KL / target - 1, ±0.2);  β ← β (1 + e · episodes / horizon).

    Attributes:
        coef: β now.
        target: KL to hold, in nats per response; None keeps β fixed.
        horizon: Episodes over which β adapts.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, episodes: int) -> None:
        """Adapt β to the mean KL (nats per response) of so many episodes."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * episodes / self.horizon
