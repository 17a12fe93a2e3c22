"""Greedy soups (Wortsman et al. 2022): keep the adapters that improve a score."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsoups.common.errors import LambdasError, RewardError
from rsoups.soups.interpolation import interpolate, opened
from rsoups.soups.soup import Soup

logger = logging.getLogger(__name__)


def greedy(
    adapters: Sequence[Any] | Mapping[str, Any],
    score: Callable[[Soup], float],
    *,
    method: str = "exact",
    allow_base_mismatch: bool = False,
) -> Soup:
    """Return the greedy soup (Wortsman et al. 2022, recipe 1; DiWA's restricted selection).

    Adapters are ranked by their own scores. One after the other joins the uniform soup of those kept, and stays if the score
    does not get worse. So the soup is at least as good as the best single adapter on what `score` measures.

    Args:
        adapters: As `interpolate` takes them.
        score: Function from a soup to a number, higher is better, such as a reward's mean on held-out prompts. It is called at
            most 2N - 1 times.
        method, allow_base_mismatch: As `interpolate`.

    Returns:
        The uniform soup of the adapters that were kept, in the order of their scores.

    Raises:
        LambdasError: No adapters.
        AdapterError: As `interpolate`, before anything is scored.
        RewardError: A score that is not finite.
    """
    if not adapters:
        raise LambdasError("no adapters to choose from")
    named = adapters if isinstance(adapters, Mapping) else {f"{i} {_name(a)}": a for i, a in enumerate(adapters)}
    read = opened(named)

    def soup_of(names: Sequence[str]) -> Soup:
        members = {name: read[name] for name in names}
        return interpolate(members, method=method, allow_base_mismatch=allow_base_mismatch)

    def score_of(names: Sequence[str]) -> float:
        value = float(score(soup_of(names)))
        if not math.isfinite(value):  # comparisons with NaN are False, so the result would be arbitrary
            raise RewardError(f"the score of the soup of {list(names)} is {value}")
        return value

    soup_of(list(read))  # refuses adapters that do not fit together, before any is scored
    scores = {name: score_of([name]) for name in read}
    first, *others = sorted(scores, key=lambda name: -scores[name])
    chosen, best = [first], scores[first]
    for name in others:
        value = score_of([*chosen, name])
        logger.info("greedy soup of %s with %s: %g, without: %g", chosen, name, value, best)
        if value >= best:
            chosen, best = [*chosen, name], value
    return soup_of(chosen)


def _name(source: Any) -> str:
    return Path(source).name if isinstance(source, (str, Path)) else "adapter"
