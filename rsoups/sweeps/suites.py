"""Tests of models: rewards on sets of prompts with thresholds, and no regression against a parent.

temperature: 0.7              # of the sampling; max_new_tokens and seed beside it
max_new_tokens: 24
against: runs/coverage        # a parent (folder or Hub id): no reward may fall by more than `tolerance`
tolerance: 0.1
sets:
  - task: concepts            # or dataset: mine.jsonl, with task: custom and a template
    prompts: 64
    require: [coverage >= 0.2, naturalness >= -0.5]
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import AfterValidator, Field, PlainValidator
from pydantic.dataclasses import dataclass

from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.common.errors import SuiteError
from rsoups.common.schema import STRICT, validated
from rsoups.data.datasets import load_rows
from rsoups.data.tasks import TASKS, Task, columns_of, find_task
from rsoups.fronts.front import Front
from rsoups.fronts.selection import Limit, parse_limit
from rsoups.rewards.interface import check_columns, columns_read
from rsoups.rewards.load import load_reward
from rsoups.sweeps.settings import SweepSettings
from rsoups.sweeps.sweep import sweep

_MODEL, _PARENT = "model", "parent"


class Check(NamedTuple):
    """One line of a result."""

    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.passed else 'FAILED'}  {self.text}"


def _task_name(name: str) -> str:
    known = [*sorted(TASKS), "custom"]
    if name not in known:
        raise ValueError(f"expected one of {known}")
    return name


def _not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("expected a list of at least one")
    return values


@dataclass(frozen=True, config=STRICT)
class PromptSet:
    """Prompts, and requirements for a model's responses to them.

    Attributes:
        require: Requirements for mean rewards, each ``reward >= number`` (or <=, >, <), with a reward as in `load_reward`.
        task: Name of a task, or custom.
        dataset: File, folder or Hub id; the task's own by default.
        template: Template of a custom task.
        prompts: Number of prompts, the first ones of the split.
        split: ``test`` (the last tenth of one file), or ``all`` rows of one file.
    """

    require: Annotated[tuple[Annotated[Limit, PlainValidator(parse_limit)], ...], AfterValidator(_not_empty)]
    task: Annotated[str, AfterValidator(_task_name)] = "concepts"
    dataset: str | None = None
    template: str | None = None
    prompts: Annotated[int, Field(ge=1)] = 64
    split: Literal["test", "all"] = "test"


@dataclass(frozen=True, config=STRICT)
class Suite:
    """Requirements for a model.

    Attributes:
        sets: Sets of prompts.
        base: Base to test on; the adapter's own by default.
        allow_base_mismatch: Accept a base of another name than the adapter's.
        allow_trained_prompts: Accept prompts that the adapter or its parent was trained on; the result names them.
        against: Parent, as in `read_adapter`; its rewards are compared on the same prompts, paired.
        tolerance: Largest fall of a mean below the parent's, at 95% confidence.
        temperature, max_new_tokens, seed: Settings of the sampling, as in `SweepSettings`.
    """

    sets: Annotated[tuple[PromptSet, ...], AfterValidator(_not_empty)]
    base: str | None = None
    allow_base_mismatch: bool = False
    allow_trained_prompts: bool = False
    against: str | None = None
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    seed: int = 0

    @classmethod
    def read(cls, path: str | Path) -> Suite:
        """Read and check a suite.

        Raises:
            SuiteError: The file is not YAML, or a field is missing, unknown or wrong.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise SuiteError(f"cannot read the suite {path}: {error}") from None
        return validated(cls, data, str(path), SuiteError)


def run_suite(suite: Suite, source: Any, against: str | Path | None = None) -> list[Check]:
    """Generate and score responses of a model, and check them against a suite.

    Args:
        suite: Suite of requirements.
        source: Adapter or soup, as in `read_adapter`, or an Adapter.
        against: Parent, instead of the suite's own.

    Raises:
        SuiteError: Neither the suite nor the adapter names a base.
        RsoupsError: As in `sweep` and `load_reward`.
    """
    adapter = source if isinstance(source, Adapter) else read_adapter(source)
    parent = against or suite.against
    base = suite.base or adapter.settings.base_model_name_or_path
    if not base:
        raise SuiteError("neither the suite nor the adapter names a base: add `base:` to the suite")
    rewards = {limit.reward: load_reward(limit.reward) for each in suite.sets for limit in each.require}
    others = {_PARENT: read_adapter(parent)} if parent else {}
    settings = SweepSettings(
        temperature=suite.temperature,
        max_new_tokens=suite.max_new_tokens,
        seed=suite.seed,
        allow_base_mismatch=suite.allow_base_mismatch,
        allow_trained_prompts=suite.allow_trained_prompts,
    )

    checks = []
    for number, each in enumerate(suite.sets, 1):
        task = find_task(each.task, each.dataset, each.template)
        required = {limit.reward: rewards[limit.reward] for limit in each.require}
        columns = _columns(task, each, list(required.values()))
        prompts = columns.pop("prompt")
        with TemporaryDirectory() as folder:
            front = sweep(
                base,
                {_MODEL: adapter},
                required,
                prompts,
                [[1.0]],
                replace(settings, cut=task.cut),
                others=others,
                columns=columns,
                out=Path(folder) / "records.jsonl",
            )
        details = [f"{len(prompts)} prompts"]
        details += [f"{name} was trained on {count}" for name, count in front.trained_prompts.items()]
        where = f"set {number} ({each.task}, {'; '.join(details)})"
        checks += _thresholds(front, each, where) + _regressions(front, suite.tolerance, where, parent)
    return checks


def _columns(task: Task, prompts: PromptSet, rewards: list[Any]) -> dict[str, list[Any]]:
    """The prompts of a set, each once, with the columns that rewards read."""
    rows = load_rows(task, prompts.dataset, prompts.split, kept=columns_read(rewards))
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(repr(row["prompt"]), row)
    columns = columns_of(list(first.values())[: prompts.prompts])
    check_columns(rewards, columns)
    return columns


def _thresholds(front: Front, prompts: PromptSet, where: str) -> list[Check]:
    (point,) = front.soups
    checks = []
    for limit in prompts.require:
        value = point.mean[limit.reward]
        interval = f"{value:.3f} [{point.low[limit.reward]:.3f}, {point.high[limit.reward]:.3f}]"
        passed = math.isfinite(value) and bool(limit.holds(value))
        checks.append(Check(passed, f"{where}: {limit.reward} {interval}, required {limit.sign} {limit.value:g}"))
    return checks


def _regressions(front: Front, tolerance: float, where: str, parent: Any) -> list[Check]:
    """A reward fails if even the upper end of its difference's interval is below -tolerance."""
    checks = []
    for other in front.others:
        if other.name != _PARENT:
            continue
        for reward, difference in front.difference(front.soups[0], other).items():
            highest = difference.value if difference.high is None else difference.high  # one prompt has no interval
            text = f"{where}: {reward} {difference} against {parent}, may fall by {tolerance:g}"
            checks.append(Check(highest >= -tolerance, text))
    return checks


def gate(checks: list[Check]) -> None:
    """Refuse to go on if a check failed.

    Raises:
        SuiteError: A check failed.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        raise SuiteError(f"{len(failed)} of {len(checks)} checks failed, the first: {failed[0].text}")
