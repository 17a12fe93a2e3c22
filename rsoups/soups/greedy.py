"""Greedy soups (Wortsman et al. 2022): keep the adapters that improve a score."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.common.errors import LambdasError, RewardError
from rsoups.soups.soup import Soup, interpolate

logger = logging.getLogger(__name__)


def greedy(
    adapters: Sequence[Any] | Mapping[str, Any],
    score: Callable[[Soup], float],
    *,
    method: str = "exact",
    allow_base_mismatch: bool = False,
) -> Soup:
    """The greedy soup (Wortsman et al. 2022, recipe 1; DiWA's restricted selection).

    Adapters are ranked by their own scores; one after the other joins the uniform soup of those kept, and stays where the
    score does not get worse. So the soup is at least as good as the best single one on what `score` measures.

    Args:
        adapters: As `interpolate` takes them.
        score: Soup -> a number, higher is better, such as a reward's mean on held-out prompts. Called at most 2N - 1 times.
        method, allow_base_mismatch: As in `interpolate`.

    Returns:
        The uniform soup of the adapters that were kept, in the order of their scores.

    Raises:
        LambdasError: No adapters.
        AdapterError: As `interpolate`, before anything is scored.
        RewardError: A score that is not finite.
    """
    read = _read(adapters)
    interpolate(read, method=method, allow_base_mismatch=allow_base_mismatch)  # refuses what does not go together

    def soup_of(names: Sequence[str]) -> Soup:
        kept = {name: read[name] for name in names}
        soup = interpolate(kept, method=method, allow_base_mismatch=allow_base_mismatch)
        assert isinstance(soup, Soup)
        return soup

    def score_of(names: Sequence[str]) -> float:
        value = float(score(soup_of(names)))
        if not math.isfinite(value):  # compares with nothing, and would be kept or left out by chance
            raise RewardError(f"the score of the soup of {list(names)} is {value}")
        return value

    alone = {name: score_of([name]) for name in read}
    best, *others = sorted(alone, key=lambda name: -alone[name])
    kept, top = [best], alone[best]
    for name in others:
        value = score_of([*kept, name])
        logger.info("greedy soup of %s with %s: %g, without: %g", kept, name, value, top)
        if value >= top:
            kept, top = [*kept, name], value
    return soup_of(kept)


def _read(adapters: Sequence[Any] | Mapping[str, Any]) -> dict[str, Adapter]:
    if not adapters:
        raise LambdasError("no adapters to choose from")
    named = adapters if isinstance(adapters, Mapping) else {f"{i} {_name(a)}": a for i, a in enumerate(adapters)}
    return {name: a if isinstance(a, Adapter) else read_adapter(a) for name, a in named.items()}


def _name(source: Any) -> str:
    return Path(source).name if isinstance(source, (str, Path)) else "adapter"
