"""The maths of low-rank changes Δ = B·A: truncated, measured, all from their factors, never from the dense Δ.

Factors of convolutions are (r, in, ...) and (out, r, 1, ...); where it says B·A they are flattened to (r, in·...) and
(out, r).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def truncate(A: Tensor, B: Tensor, rank: int | float) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation of B·A in the Frobenius norm (Eckart and Young 1936).

    QR of B and of Aᵀ leaves an SVD of a core of r × r.

    Args:
        A, B: float64 (r, in) and (out, r).
        rank: An int, the largest rank; or a float below 1, the largest relative error, which decides the rank.

    Returns:
        A and B of the approximation, and the squared norms of what was cut off and of B·A.
    """
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    # Squared norm of what is left out where k singular values are kept, k = 0, 1, ...
    lost = torch.cat([(s**2).flip(0).cumsum(0).flip(0), s.new_zeros(1)])
    total = float(lost[0])
    k = int(rank) if rank >= 1 else int((lost > rank**2 * total).sum())
    k = max(1, min(k, len(s)))
    root = s[:k].sqrt()
    return root[:, None] * (vh[:k] @ q_a.T), (q_b @ u[:, :k]) * root, float(lost[k]), total


def truncate_all(factors: Sequence[tuple[Tensor, Tensor]], rank: int | float) -> tuple[Tensor, Tensor, float, float]:
    """`truncate` of several changes to one rank: the largest that any of them needs.

    Returns:
        A (n, rank, in) and B (n, out, rank), and the sums of the squared norms.
    """
    made = [truncate(a, b, rank) for a, b in factors]
    largest = max(len(A) for A, *_ in made)
    if any(len(A) < largest for A, *_ in made):
        made = [truncate(a, b, largest) for a, b in factors]
    A, B = torch.stack([one[0] for one in made]), torch.stack([one[1] for one in made])
    return A, B, sum(one[2] for one in made), sum(one[3] for one in made)


def inner(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
    """⟨B1·A1, B2·A2⟩ in the Frobenius sense, in float64: Σ (B1ᵀ·B2) ∘ (A1·A2ᵀ)."""
    (a1, b1), (a2, b2) = ((a.flatten(1).double(), b.flatten(1).double()) for a, b in (one, two))
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())
