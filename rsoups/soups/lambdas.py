"""Check interpolation weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rsoups.common.errors import LambdasError

SUM_TOLERANCE = 1e-6  # λ in single precision still count as summing to 1


def weights_of(lambdas: Any, count: int, normalize: bool, extrapolate: bool, any_sum: bool = True) -> list[list[float]]:
    """Return checked weights, K rows of `count` numbers.

    Args:
        lambdas: As `interpolate` takes them; None for uniform weights.
        count: Number of adapters.
        normalize, extrapolate: As `interpolate`.
        any_sum: Whether `extrapolate` allows sums other than 1. Whole models do not: each of them holds the base.

    Raises:
        LambdasError: As `interpolate`.
    """
    if lambdas is None:
        return [[1 / count] * count]
    try:
        rows = np.atleast_2d(np.asarray(lambdas, dtype=np.float64))
    except (TypeError, ValueError):
        raise LambdasError(f"lambdas must be {count} numbers, or rows of {count} numbers; got {lambdas!r}") from None
    if rows.ndim != 2 or rows.shape[1] != count or not len(rows):
        raise LambdasError(f"lambdas have shape {np.shape(lambdas)}, but there are {count} adapters: one λ for each")

    for row in rows:
        if not np.isfinite(row).all():
            raise LambdasError(f"lambdas {row.tolist()} hold NaN or infinity")
        total = math.fsum(row)
        if normalize:
            if abs(total) < SUM_TOLERANCE:
                raise LambdasError(f"lambdas {row.tolist()} sum to {total:g}: they cannot be normalized")
            row /= total
        elif abs(total - 1) > SUM_TOLERANCE and not (extrapolate and any_sum):
            remedy = "; extrapolate=True takes them as they are" if any_sum else ""
            raise LambdasError(
                f"lambdas {row.tolist()} sum to {total:g}, not 1; normalize=True divides by the sum{remedy}"
            )
        if not extrapolate and ((row < 0).any() or (row > 1 + SUM_TOLERANCE).any()):
            raise LambdasError(f"lambdas {row.tolist()} are not all within [0, 1]; extrapolate=True allows it")
    return [[float(value) for value in row] for row in rows]
