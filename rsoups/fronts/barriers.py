"""Find λ where a soup is worse than both neighbors."""

from __future__ import annotations

from itertools import combinations

from rsoups.fronts.front import Front

_BARRIER = (
    "barrier between {a} and {b}: at λ {label} {reward} is {below_a} against {a} alone and {below_b} against {b} alone, "
    "below both by more than the interval. Where this soup is one of factors, try exact; train both from one start, for fewer "
    "steps or with a higher KL coefficient; or choose a λ nearer an end."
)


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
