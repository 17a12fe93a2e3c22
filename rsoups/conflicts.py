"""Merge conflicts: adapters that no soup is well made of, and what can be done."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from rsoups.adapters import Adapter
from rsoups.base_weights import of_one_base
from rsoups.front import Front
from rsoups.stacking import cosines_of_starts

_ONE_START = 0.5  # cosine of A
_START = (
    "{a} and {b} start from different initialisations (cosine of A {cosine:+.2f}). Method factors mixes directions that do not "
    "belong together: use exact or svd; or train both from one adapter (--adapter_name_or_path, or one adapter_init_seed). "
    "Permutation alignment does not help a LoRA: the order of its rank's directions does not change B·A, and the base, "
    "whose neurons it would permute, is the same for all."
)
_BARRIER = (
    "barrier between {a} and {b}: at λ {label} {reward} is {below_a} against {a} alone and {below_b} against {b} alone, "
    "below both by more than the interval. Where this soup is one of factors, try exact; train both from one start, for fewer "
    "steps or with a higher KL coefficient; or choose a λ nearer an end."
)


def merge_conflicts(adapters: Mapping[str, Adapter], front: Front | None = None) -> list[str]:
    """What speaks against a soup of these adapters, each with its remedy; an empty list where nothing does.

    Args:
        adapters: By name.
        front: Of soups of them, if they were evaluated: barriers show in rewards alone.
    """
    adapters = of_one_base(adapters)
    names, found = list(adapters), []
    starts = cosines_of_starts(list(adapters.values()))
    for i, j in combinations(range(len(names)), 2):
        if starts[i][j] < _ONE_START:
            found.append(_START.format(a=names[i], b=names[j], cosine=starts[i][j]))
    return found + (barriers(front) if front is not None else [])


def barriers(front: Front) -> list[str]:
    """For each two ingredients and reward, the soup between them that is lowest, where it is below both ends with 95%
    confidence (paired over prompts); pairs whose ends were not evaluated are left out."""
    names = list(front.soups[0].lambdas or {}) if front.soups else []
    ends = {name: p for p in front.soups for name in names if (p.lambdas or {}).get(name) == 1}
    found = []
    for a, b in combinations(ends, 2):
        between = [p for p in front.soups if {n for n, weight in (p.lambdas or {}).items() if weight} == {a, b}]
        for reward in front.rewards:
            lowest = min(between, key=lambda point: point.mean[reward], default=None)
            if lowest is None:
                continue
            to_a, to_b = (front.difference(lowest, ends[name])[reward] for name in (a, b))
            if all(gap.high is not None and gap.high < 0 for gap in (to_a, to_b)):
                label = " / ".join(f"{weight:g}" for weight in (lowest.lambdas or {}).values())
                found.append(_BARRIER.format(a=a, b=b, label=label, reward=reward, below_a=to_a, below_b=to_b))
    return found
