"""Probe rewards before optimizing them: how they score length, nothing, noise, templates and the wrong question.

A policy finds whatever a reward pays for. Each check changes one thing of a sample of responses and looks at how the scores
change; figures are in standard deviations of the sample's scores, with 95% bootstrap intervals over the sample.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import DatasetError, RewardError
from rsoups.data.prompts import question_of
from rsoups.fronts.estimates import Estimate, drawn_rows, estimate_of
from rsoups.generation.samples import LEAST, Sample
from rsoups.rewards.functions import as_reward

_WORDS = {
    "said twice": "a response said twice",
    "first half": "the first half of a response",
    "nothing": "an empty response",
    "one word": "one word said over and over",
    "template": "a question between Human: and Assistant:",
    "other question": "a response to another question",
}
_RESAMPLES = 1_000  # half of a front's: each draw ranks the sample anew

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        check: Name of the check.
        text: Result in words.
        rho: Spearman's rank correlation, where the check is one.
        change: Mean change of the score, in the sample's standard deviations, where the check changes something.
        higher: Share of the sample whose score became higher by the change.
    """

    check: str
    text: str
    rho: Estimate | None = None
    change: Estimate | None = None
    higher: float | None = None


@dataclass(frozen=True)
class Probe:
    """Results of a probe.

    Attributes:
        responses: Number of responses.
        mean, deviation: Mean and standard deviation of each reward on the sample.
        findings: Results by reward.
        agreement: Spearman's rank correlation of each pair of rewards on the sample; None where one of them is constant.
    """

    responses: int
    mean: dict[str, float]
    deviation: dict[str, float]
    findings: dict[str, list[Finding]]
    agreement: dict[str, dict[str, Estimate | None]]

    def __repr__(self) -> str:
        return f"Probe({self.responses} responses, rewards {list(self.findings)}); to_text() shows the findings"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def to_text(self) -> str:
        lines = [f"{self.responses} responses; changes in deviations of each reward on them, with 95% intervals"]
        for name, findings in self.findings.items():
            lines += ["", f"{name}: mean {self.mean[name]:.3g}, deviation {self.deviation[name]:.3g}"]
            for finding in findings:
                figure = finding.rho if finding.change is None else finding.change
                lines.append(f"  {finding.check:15} {'' if figure is None else str(figure):24} {finding.text}")

        if len(self.agreement) > 1:
            width = max(map(len, self.agreement))
            header = " ".join([" " * width, *(f"{name:>{width}}" for name in self.agreement)])
            lines += ["", "agreement (rank correlation)", header]
            for name, row in self.agreement.items():
                cells = (f"{'-' if rho is None else f'{rho.value:.2f}':>{width}}" for rho in row.values())
                lines.append(" ".join([f"{name:{width}}", *cells]))
        return "\n".join(lines)


def spearman(first: Sequence[float] | Values, second: Sequence[float] | Values) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; NaN where one side is constant."""
    a, b = (_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else float("nan")


def _ranks(values: Values) -> Values:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


def probe(rewards: Mapping[str, Any], sample: Sample, *, seed: int = 0, progress: bool = True) -> Probe:
    """Check what rewards should not depend on, and what they should.

    Args:
        rewards: Rewards by name: loaded ones, or functions.
        sample: At least 8 responses: references, a policy's, or a sweep's (`sample_of`).
        seed: Seed of the bootstrap, and of the exchange of questions.
        progress: Show a bar.

    Raises:
        DatasetError: Fewer responses, or not one prompt for each.
        RewardError: No rewards, or a score that is missing or not finite.
    """
    from tqdm.auto import tqdm

    count = len(sample.responses)
    if count < LEAST or len(sample.prompts) != count:
        raise DatasetError(
            f"a probe needs {LEAST} responses or more, and as many prompts; got {count}, {len(sample.prompts)}"
        )
    if not rewards:
        raise RewardError("a probe needs at least one reward")

    changes = _changes(sample, seed)
    draws = drawn_rows(count, seed, _RESAMPLES)
    scores: dict[str, Values] = {}
    findings: dict[str, list[Finding]] = {}
    with tqdm(total=len(rewards) * (1 + len(changes)), disable=not progress, desc="probe", leave=False) as bar:
        for name, reward in rewards.items():
            scores[name] = _score(name, reward, sample.prompts, sample.responses, sample.columns)
            bar.update()
            findings[name] = [_length(scores[name], sample.responses, draws)]
            for check, changed in changes.items():
                if changed is None:
                    findings[name].append(Finding(check, "not measured: all prompts ask the same"))
                else:
                    after = _score(name, reward, *changed, sample.columns)
                    findings[name].append(_change(check, scores[name], after, draws))
                bar.update()

    return Probe(
        responses=count,
        mean={name: float(values.mean()) for name, values in scores.items()},
        deviation={name: float(values.std()) for name, values in scores.items()},
        findings=findings,
        agreement={a: {b: _rho(scores[a], scores[b], draws) for b in rewards} for a in rewards},
    )


def _score(name: str, reward: Any, prompts: list[Any], responses: list[str], columns: dict[str, list[Any]]) -> Values:
    scores = as_reward(reward, name)(prompts, responses, **columns)
    if None in scores:
        raise RewardError(
            f"reward {name!r} gives no score (None) for the response {responses[scores.index(None)]!r}: a probe compares "
            "scores of the same responses, so leave such rows out"
        )
    return np.array(scores, dtype=np.float64)


# --- the changes -----------------------------------------------------------------------------------------------------


def _changes(sample: Sample, seed: int) -> dict[str, tuple[list[Any], list[str]] | None]:
    """Return by check the prompts and responses with one thing changed; None where the sample does not allow it."""
    prompts, responses = sample.prompts, sample.responses
    return {
        "said twice": (prompts, [f"{text} {text}" for text in responses]),
        "first half": (prompts, [_half(text) for text in responses]),
        "nothing": (prompts, [""] * len(responses)),
        "one word": (prompts, [_one_word(text) for text in responses]),
        "template": ([f"Human: {question_of(prompt)}\n\nAssistant:" for prompt in prompts], responses),
        "other question": _others(sample, seed),
    }


def _half(text: str) -> str:
    words = text.split()
    return " ".join(words[: max(len(words) // 2, 1)])


def _one_word(text: str) -> str:
    """Return the first word, as often as the text has words."""
    words = text.split()
    return " ".join(words[:1] * len(words))


def _others(sample: Sample, seed: int) -> tuple[list[Any], list[str]] | None:
    """Return each response with the prompt of another question."""
    by_question = {question_of(prompt): prompt for prompt in sample.prompts}
    if len(by_question) < 2:
        return None

    draw, questions, others = random.Random(seed), list(by_question), []
    for prompt in sample.prompts:
        other = own = question_of(prompt)
        while other == own:
            other = draw.choice(questions)
        others.append(by_question[other])
    return others, sample.responses


# --- the findings ----------------------------------------------------------------------------------------------------


def _rho(first: Values, second: Values, draws: NDArray[np.int64]) -> Estimate | None:
    return estimate_of(lambda rows: spearman(first[rows], second[rows]), draws)


def _by_sign(estimate: Estimate, above: str, below: str, neither: str) -> str:
    return above if estimate.is_above_zero else below if estimate.is_below_zero else neither


def _length(scores: Values, responses: list[str], draws: NDArray[np.int64]) -> Finding:
    words = np.array([len(text.split()) for text in responses], dtype=np.float64)
    rho = _rho(scores, words, draws)
    if rho is None:
        constant = "all lengths" if scores.std() else "all scores"
        return Finding("length", f"not measured: {constant} are the same")

    strength = "slightly " if abs(rho.value) < 0.2 else "strongly " if abs(rho.value) > 0.5 else ""
    longer, shorter = f"{strength}prefers longer responses", f"{strength}prefers shorter responses"
    text = _by_sign(rho, longer, shorter, "no preference for a length seen")
    return Finding("length", f"{text}: rho = {rho.value:.2f}", rho=rho)


def _change(check: str, before: Values, after: Values, draws: NDArray[np.int64]) -> Finding:
    moved = (after - before) / (float(before.std()) or 1.0)
    change = estimate_of(lambda rows: float(moved[rows].mean()), draws)
    assert change is not None  # scores are finite

    higher = float((moved > 0).mean())
    if moved.any():
        text = _by_sign(change, "scores higher", "scores lower", "scores as high on average")
        text += f"; higher for {higher:.0%} of the responses"
    else:
        text = "makes no difference at all"
        if check == "other question":
            text += ": the question is not read"

    rho = None
    if check == "template":
        rho = _rho(before, after, draws)
        if rho is not None and moved.any():
            text += f"; ranks the responses {'alike' if rho.value > 0.9 else 'differently'}: rho = {rho.value:.2f}"
    elif check == "nothing":
        text += f"; on average above {float((before < after.mean()).mean()):.0%} of the sample's scores"
    return Finding(check, f"{_WORDS[check]} {text}", rho=rho, change=change, higher=higher)
