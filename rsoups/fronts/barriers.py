"""Find λ where a soup is worse than both of its ingredients alone."""

from __future__ import annotations

from itertools import combinations

from rsoups.fronts.front import Front

_BARRIER = (
    "barrier between {a} and {b}: at λ {label} {reward} is {below_a} against {a} alone and {below_b} against {b} alone, "
    "below both by more than the interval. If the method is factors, use exact. Otherwise train both from one start, for fewer "
    "steps or with a higher KL coefficient; or choose a λ nearer to an end."
)


def barriers(front: Front) -> list[str]:
    """The lowest soup between each two ingredients that is below both of them with 95% confidence, paired over prompts.

    Returns:
        One message for each pair of ingredients and reward. Pairs whose ends were not evaluated are left out.
    """
    ends = {point.alone: point for point in front.soups if point.alone}
    messages = []
    for a, b in combinations(ends, 2):
        between = [p for p in front.soups if {name for name, weight in (p.lambdas or {}).items() if weight} == {a, b}]
        for reward in front.rewards if between else []:
            lowest = min(between, key=lambda point: point.mean[reward])
            to_a, to_b = (front.difference(lowest, ends[name])[reward] for name in (a, b))
            if to_a.is_below_zero and to_b.is_below_zero:
                label = " / ".join(f"{weight:g}" for weight in lowest.weights)
                messages.append(_BARRIER.format(a=a, b=b, label=label, reward=reward, below_a=to_a, below_b=to_b))
    return messages
