"""Charts of a front, as inline SVG: rewards against each other, over λ, against the chord, by the number of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from rsoups.fronts.advantage import Reach
from rsoups.fronts.attainment import outlines
from rsoups.fronts.estimates import Estimate
from rsoups.fronts.front import Front
from rsoups.fronts.points import BASE, Point
from rsoups.reports.svg import BASE_LOOK, SOUP_LOOK, Axes, Look, chart, limits_of, text

OTHER_SHAPES = ("diamond", "up", "down", "plus", "star", "cross")
COLORS = ("c1", "c2", "c3", "c4", "c5", "c6")
_MANY = 30  # points; their intervals are drawn pale


def looks_of(front: Front) -> dict[Point, Look]:
    """Soups are blue circles, the base is a gray square, every other model has a color and a shape of its own."""
    looks = dict.fromkeys(front.soups, SOUP_LOOK)
    others = [point for point in front.others if point.name != BASE]
    looks |= {point: Look(COLORS[i % 6], OTHER_SHAPES[(i + i // 6) % 6]) for i, point in enumerate(others)}
    return looks | {point: BASE_LOOK for point in front.others if point.name == BASE}


def look_of_other_front(number: int) -> Look:
    """The look of all points of another front; colors come from the other end than those of `looks_of`."""
    return Look(COLORS[5 - number % 6], "circle")


class Models:
    """The models of a front with what all its charts share.

    Attributes:
        front: The front.
        shown: Its points in the order of tables.
        numbers: Number of each point, by which the page highlights a model in all charts.
        looks: Color and shape of each point.
        pareto: The points on the Pareto front.
    """

    def __init__(self, front: Front):
        self.front = front
        self.shown = [*front.others, *front.soups]
        self.numbers = {point: number for number, point in enumerate(self.shown)}
        self.looks = looks_of(front)
        self.pareto = set(front.pareto())

    def tip(self, point: Point, rewards: Sequence[str] | None = None) -> str:
        """The label of a point and its rewards, one a line."""
        rewards = self.front.rewards if rewards is None else rewards
        return "\n".join([point.label, *(f"{reward} {point.estimate(reward)}" for reward in rewards)])

    def mark(self, axes: Axes, point: Point, x: Estimate, y: Estimate, tip: str, hollow: bool = False) -> Markup:
        """The mark of a point."""
        return axes.mark(self.looks[point], x, y, tip, self.numbers[point], hollow)


def front_chart(models: Models, x: str, y: str, others: Mapping[str, Front], wide: bool) -> Markup:
    """Two rewards against each other: soups, the base, other models and other fronts, with intervals.

    Soups of two ingredients are joined and have their chord; a band shows how far the front reaches.
    """
    front = models.front
    width, height = (680, 470) if wide else (440, 380)
    points = [*front.points, *(point for other in others.values() for point in other.points)]
    reach = outlines(front.attainment()) if front.has_band else []
    limits = []
    for column, reward in enumerate((x, y)):
        edges = [value for line in reach for value in line[:, column]]
        limits.append(limits_of((point.estimate(reward) for point in points), *edges))
    axes = Axes(62, 42, width - 22, height - 62, *limits)

    body = [axes.frame(x, y)]
    body += [axes.line(line, f"{name} soup") for name, line in zip(("band", "median"), reach, strict=False)]
    if len(front.ingredients) == 2 and len(front.soups) > 1:
        means = [(point.mean[x], point.mean[y]) for point in front.soups]
        body += [axes.line([means[0], means[-1]], "chord"), axes.line(means, "line soup")]
    for number, (name, other) in enumerate(others.items()):
        for point in other.candidates:
            tip = f"{name}: {models.tip(point)}"
            body.append(axes.mark(look_of_other_front(number), point.estimate(x), point.estimate(y), tip, hollow=True))
    # Labels before marks, so that no label hides a model.
    body += [_lambda_label(axes, front, place, x, y) for place in range(len(front.soups))]
    for point in [*front.soups, *front.others]:
        beaten = point not in models.pareto
        tip = models.tip(point) + ("\nbeaten by another point" if beaten else "")
        body.append(models.mark(axes, point, point.estimate(x), point.estimate(y), tip, beaten))

    named = [front.base] if front.base else []
    named += [point for point in front.soups if point.alone]
    ends = "; ".join(models.tip(point, (x, y)).replace("\n", ", ") for point in named)
    label = f"{y} against {x}, higher is better in both.{band_in_words(front)} {ends}"
    classes = ["wide"] * wide + ["quiet"] * (len(points) > _MANY)
    return chart(width, height, label, body, " ".join(classes))


def band_in_words(front: Front) -> str:
    """What the band behind the points shows; empty without a band."""
    if not front.has_band:
        return ""
    return (
        f" Shaded: how far the {'soups' if front.soups else 'points'} reach when prompts are drawn again: to the lower "
        "edge in 97.5% of the bootstrap draws, to the thin line in half of them, to the upper edge in 2.5%."
    )


def _lambda_label(axes: Axes, front: Front, place: int, x: str, y: str) -> Markup:
    """λ of the second ingredient at a soup; of three ingredients or more, the name at the ends."""
    point = front.soups[place]
    left, top = axes.x(point.mean[x]), axes.y(point.mean[y]) - 8
    if len(point.weights) == 2:
        return text("lambda minor" if place % 2 else "lambda", left + 8, top, f"{point.weights[1]:.3g}")
    if point.alone is None:
        return Markup("")
    if len(point.weights) > 2 and left > axes.right - 90:
        return text("lambda", left - 9, top, point.alone, "end")
    return text("lambda", left + 8, top, point.alone)


def chord_chart(models: Models, reward: str) -> Markup:
    """Of two ingredients: a reward over λ with its chord, and below, the difference with its interval."""
    front = models.front
    soups, second = front.soups, front.ingredients[1]
    at = [point.weights[1] for point in soups]
    estimates = [point.estimate(reward) for point in soups]
    gaps = [gap[reward] for _, gap in front.linear_mode_connectivity()]
    limits = min(at) - 0.03, max(at) + 0.03
    upper = Axes(62, 42, 418, 220, limits, limits_of(estimates))
    lower = Axes(62, 262, 418, 352, limits, limits_of(gaps, 0.0))

    values = [(x, estimate.value) for x, estimate in zip(at, estimates, strict=True)]
    body = [upper.frame("", reward), upper.band(at, estimates, "soup")]
    body += [upper.line([values[0], values[-1]], "chord"), upper.line(values, "line soup")]
    body.append(lower.frame(f"λ of {second}", "soup minus chord", y_ticks=3))
    body.append(lower.line([(limits[0], 0), (limits[1], 0)], "chord"))
    for point, x, estimate, gap in zip(soups, at, estimates, gaps, strict=True):
        tip = f"{point.label}\n{reward} {estimate}\nminus the chord {gap}"
        body.append(models.mark(upper, point, Estimate(x), Estimate(estimate.value), tip))
        body.append(models.mark(lower, point, Estimate(x), gap, tip, _holds_zero(gap)))
    label = f"{reward} over λ of {second} with the chord between the ends, and its difference from the chord"
    return chart(440, 412, label, body)


def chord_scatter(models: Models, reward: str) -> Markup:
    """Of three ingredients or more: each soup's reward against its chord's; above the line the soup has more."""
    rows = models.front.linear_mode_connectivity()
    chords = [Estimate(point.mean[reward] - gap[reward].value) for point, gap in rows]
    limits = limits_of([*chords, *(point.estimate(reward) for point, _ in rows)])
    axes = Axes(62, 42, 418, 330, limits, limits)
    body = [axes.frame(f"chord: Σ λ·{reward} of the ends", reward), axes.line([(v, v) for v in limits], "chord")]
    for (point, gaps), chord in zip(rows, chords, strict=True):
        gap = gaps[reward]
        tip = f"{point.label}\n{reward} {point.estimate(reward)}\nminus the chord {gap}"
        bounds = [None if bound is None else chord.value + bound for bound in (gap.low, gap.high)]
        paired = Estimate(point.mean[reward], *bounds)
        body.append(models.mark(axes, point, chord, paired, tip, _holds_zero(gap)))
    return chart(440, 392, f"{reward} of each soup against its chord", body, "quiet")


def _holds_zero(gap: Estimate) -> bool:
    return not (gap.is_above_zero or gap.is_below_zero)


def lambda_chart(models: Models, name: str) -> Markup:
    """Of two ingredients: one of the points' extras over λ; dashed lines are the other models'."""
    front = models.front
    soups, second = front.soups, front.ingredients[1]
    at = [point.weights[1] for point in soups]
    estimates = [point.extras[name] for point in soups]
    others = [point for point in front.others if name in point.extras]
    limits = limits_of([*estimates, *(point.extras[name] for point in others)])
    axes = Axes(62, 42, 418, 238, (min(at) - 0.03, max(at) + 0.03), limits)

    body = [axes.frame(f"λ of {second}", name, y_ticks=4), axes.band(at, estimates, "soup")]
    for point in others:
        level = point.extras[name].value
        body.append(axes.line([(x, level) for x in axes.x_limits], f"level {models.looks[point].color}"))
        tip = f"{point.label}\n{name} {point.extras[name]}"
        body.append(models.mark(axes, point, Estimate(axes.x_limits[1]), Estimate(level), tip))
    body.append(axes.line([(x, estimate.value) for x, estimate in zip(at, estimates, strict=True)], "line soup"))
    for point, x, estimate in zip(soups, at, estimates, strict=True):
        tip = f"{point.label}\n{name} {estimate}"
        body.append(models.mark(axes, point, Estimate(x), Estimate(estimate.value), tip))
    return chart(440, 300, f"{name} of the soups over λ of {second}", body)


def runs_chart(curve: Sequence[Reach]) -> Markup:
    """Hypervolume by the number of PPO runs: soups, and MORL on average and at best over the choices of runs."""
    best = [(float(reach.runs), reach.best) for reach in curve if reach.best is not None]
    series = [
        (Look("c1", "diamond"), "MORL", [(reach.runs, reach.others) for reach in curve if reach.others]),
        (SOUP_LOOK, "soups", [(reach.runs, reach.soups) for reach in curve if reach.soups]),
    ]
    estimates = [estimate for _, _, rows in series for _, estimate in rows]
    limits = limits_of(estimates, *(value for _, value in best))
    axes = Axes(62, 42, 658, 300, (0.5, max(reach.runs for reach in curve) + 0.5), limits)
    body = [axes.frame("PPO runs", "hypervolume"), axes.line(best, "chord")]
    for look, name, rows in series:
        body.append(axes.line([(runs, estimate.value) for runs, estimate in rows], f"line {look.color}"))
        for runs, estimate in rows:
            tip = f"{name}\n{runs} {'run' if runs == 1 else 'runs'}\nhypervolume {estimate}"
            body.append(axes.mark(look, Estimate(runs), estimate, tip))
    return chart(680, 364, "Hypervolume by the number of PPO runs, of soups and of MORL runs", body, "wide")
