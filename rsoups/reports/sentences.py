"""What a report says in words: the chord, hypervolume, MORL, other fronts, the choice of λ."""

from __future__ import annotations

from collections.abc import Mapping

from rsoups.common.errors import FrontError
from rsoups.fronts.advantage import Advantage
from rsoups.fronts.comparison import Comparison
from rsoups.fronts.estimates import Estimate, checked_reference
from rsoups.fronts.front import Front
from rsoups.fronts.notes import not_checked


def sentences_of(
    front: Front, reference: Mapping[str, float] | None, others: Mapping[str, Front], advantage: Advantage | str | None
) -> list[str]:
    """The sentences of a report; `advantage` is the result of `advantage_of`."""
    sentences = _on_the_chord(front)
    if reference is not None:
        sentences.append(f"Hypervolume of the {'soups' if front.soups else 'points'}: {front.hypervolume(reference)}.")
        if advantage is not None:
            sentences.append(advantage if isinstance(advantage, str) else _on_morl(front, advantage))
        sentences += [_on_another(name, front.compare(other, reference)) for name, other in others.items()]
    if front.base is not None and front.soups:
        sentences.append(_on_the_choice(front))
    unchecked = not_checked(front)
    return sentences + ([unchecked] if unchecked else [])


def advantage_of(front: Front, reference: Mapping[str, float]) -> Advantage | str | None:
    """Soups against MORL runs; a sentence that says why they cannot be compared; None without soups or MORL runs.

    Raises:
        FrontError: An incomplete reference.
    """
    checked_reference(reference, front.rewards)
    if not front.soups or not front.morl:
        return None
    ends = {point.alone for point in front.soups if point.alone}
    try:
        return front.advantage(reference, with_ends=len(ends) == len(front.ingredients))
    except FrontError as error:
        return f"Soups are not compared with MORL: {error}."


def _on_the_chord(front: Front) -> list[str]:
    """How far each reward is from the chord between the ends."""
    try:
        rows = front.linear_mode_connectivity()
    except FrontError:
        return []
    inner = [gaps for point, gaps in rows if not point.alone]
    sentences = []
    for reward in front.rewards if inner else []:
        gaps = [row[reward] for row in inner]
        mean = sum(gap.value for gap in gaps) / len(gaps)
        certainty = ""
        if front.prompts:
            above, below = sum(gap.is_above_zero for gap in gaps), sum(gap.is_below_zero for gap in gaps)
            certainty = f"; above it with 95% confidence at {above} of {len(gaps)} λ, below it at {below}"
        sentences.append(f"{reward}: between the ends the soups are {mean:+.3f} from the chord on average{certainty}.")
    return sentences


def _on_morl(front: Front, advantage: Advantage) -> str:
    count = len(advantage.places)
    ingredients = ", the ingredients among them" if count > len(front.morl) else ""
    places = ", ".join(front.soups[place].label for place in advantage.places)
    sentences = [
        f"Soups minus MORL in hypervolume, {count} points each: {advantage.gain}{_verdict(advantage.gain)}; "
        f"soups at {places} ({advantage.runs[0]} runs), MORL ({advantage.runs[1]} runs{ingredients})."
    ]
    few, many = advantage.utility, advantage.utility_of_all
    if few and many:
        sentences.append(
            "Expected utility over all preferences, the point chosen on one half of the prompts and evaluated on the other: "
            f"these soups minus MORL {few}{_verdict(few)}; all {len(front.soups)} soups minus MORL {many}{_verdict(many)}."
        )
    soups = ", ".join(f"{reach.soups.value:.3f} with {reach.runs}" for reach in advantage.curve if reach.soups)
    others = [
        f"{reach.others.value:.3f} (at best {reach.best:.3f}) with {reach.runs}"
        for reach in advantage.curve
        if reach.others
    ]
    sentences.append(
        f"Hypervolume by PPO runs: soups {soups}; MORL, the mean over choices of runs, {', '.join(others)}."
    )
    return " ".join(sentences)


def _verdict(gain: Estimate) -> str:
    if gain.low is None:
        return ""
    return " (more)" if gain.is_above_zero else " (less)" if gain.is_below_zero else " (no clear difference)"


def _on_another(name: str, comparison: Comparison) -> str:
    own, other = comparison.coverage
    return (
        f"Against {name} ({comparison.prompts or 'no'} common prompts): {comparison.gain} more hypervolume; IGD+ to its "
        f"front {comparison.igd_plus[0]}, of it to this front {comparison.igd_plus[1]}; {own.value:.0%} of its points are "
        f"equaled or beaten here, {other.value:.0%} of these by it."
    )


def _on_the_choice(front: Front) -> str:
    """The soup to take where nothing else is known: one above the base in every reward."""
    try:
        return f"Best soup above the base: {front.select(above_base=True)}."
    except FrontError as error:
        reason = str(error)
        return f"{reason[0].upper()}{reason[1:]}."
