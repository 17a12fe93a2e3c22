"""Tests of models: rewards on sets of prompts with thresholds, and no step back from a parent.

temperature: 0.7              # of sampling; max_new_tokens and seed beside it
max_new_tokens: 24
against: runs/coverage        # a parent (folder or Hub id): no reward may fall, by more than `tolerance`
tolerance: 0.1
sets:
  - task: concepts            # or dataset: mine.jsonl, with task: custom and a template
    prompts: 64
    require: [coverage >= 0.2, naturalness >= -0.5]
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.common.errors import SuiteError
from rsoups.data.datasets import load_rows
from rsoups.data.tasks import TASKS, columns_of, find_task
from rsoups.fronts.front import Front
from rsoups.rewards.interface import check_columns, columns_read
from rsoups.rewards.load import load_reward
from rsoups.sweeps.sweep import sweep

_RULE = re.compile(r"(?P<reward>\S+)\s*(?P<sign>>=|<=|>|<)\s*(?P<limit>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)")
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda value, limit: value >= limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    "<": lambda value, limit: value < limit,
}
_MODEL, _PARENT = "model", "parent"


@dataclass(frozen=True)
class Check:
    """One line of a result."""

    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.passed else 'FAILED'}  {self.text}"


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and what is required of a model's responses to them.

    Attributes:
        require: ``reward >= number`` (or <=, >, <): of the mean. A reward as `load_reward` takes it.
        task: A task's name, or custom.
        dataset: File, folder or Hub id; the task's own by default.
        template: Of a custom task.
        prompts: The first so many of the split.
        split: ``test`` (of one file its last tenth), or ``all`` rows of one file.
    """

    require: tuple[str, ...]
    task: str = "concepts"
    dataset: str | None = None
    template: str | None = None
    prompts: int = 64
    split: str = "test"

    @property
    def rules(self) -> list[tuple[str, str, float]]:
        """Reward, sign and limit of each.

        Raises:
            SuiteError: One is not of this form.
        """
        found = []
        for text in self.require:
            if not (rule := _RULE.fullmatch(str(text).strip())):
                raise SuiteError(f"{text!r} is no requirement: write one as `coverage >= 0.2`")
            found.append((rule["reward"], rule["sign"], float(rule["limit"])))
        return found


@dataclass(frozen=True)
class Suite:
    """What a model must hold.

    Attributes:
        sets: Of prompts.
        base: The adapter's own by default.
        allow_base_mismatch: Accept a base of another name than the adapter's.
        allow_trained_prompts: Go on where the adapter, or its parent, was trained on some of the prompts; a result says so.
        against: A parent, as `read_adapter` takes it: rewards are compared on the same prompts, paired.
        tolerance: How far below the parent's a mean may be, with 95% confidence.
        temperature, max_new_tokens, seed: Of sampling.
    """

    sets: tuple[PromptSet, ...]
    base: str | None = None
    allow_base_mismatch: bool = False
    allow_trained_prompts: bool = False
    against: str | None = None
    tolerance: float = 0.0
    temperature: float = 1.0
    max_new_tokens: int = 32
    seed: int = 0

    @classmethod
    def read(cls, path: str | Path) -> Suite:
        """Read and check a suite.

        Raises:
            SuiteError: Not a YAML mapping, an unknown field, no sets, or a requirement that is none.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise SuiteError(f"cannot read the suite {path}: {error}") from None
        suite = _built(cls, data, str(path))
        if not isinstance(suite.sets, list) or not suite.sets:
            raise SuiteError(f"{path}: sets is {suite.sets!r}, must be a list of at least one set of prompts")
        sets = tuple(_built(PromptSet, each, f"{path}, a set") for each in suite.sets)
        for each in sets:
            if not isinstance(each.require, list) or not each.rules:
                raise SuiteError(f"{path}: require is {each.require!r}, must be a list such as [coverage >= 0.2]")
            if each.split not in ("test", "all"):
                raise SuiteError(f"{path}: split is {each.split!r}, must be test, or all of one file")
            if each.task not in {*TASKS, "custom"}:
                raise SuiteError(f"{path}: task is {each.task!r}, must be custom or one of {sorted(TASKS)}")
        for name in ("allow_base_mismatch", "allow_trained_prompts"):
            if not isinstance(value := getattr(suite, name), bool):
                raise SuiteError(f"{path}: {name} is {value!r}, must be true or false")
        if isinstance(suite.tolerance, bool) or not isinstance(suite.tolerance, (int, float)) or suite.tolerance < 0:
            raise SuiteError(f"{path}: tolerance is {suite.tolerance!r}, must be a number of at least 0")
        return cls(**{f.name: getattr(suite, f.name) for f in fields(cls)} | {"sets": sets})


def _built(kind: type, data: Any, where: str) -> Any:
    known = {field.name: field for field in fields(kind)}
    if not isinstance(data, dict) or set(data) - known.keys():
        raise SuiteError(f"{where} is {data!r}, must be an object of {sorted(known)}")
    try:
        return kind(**data)
    except TypeError as error:
        raise SuiteError(f"{where}: {error}") from None


def run_suite(suite: Suite, source: Any, against: str | Path | None = None) -> list[Check]:
    """Generate, score, compare.

    Args:
        suite: What to test.
        source: Adapter or soup, as `read_adapter` takes it, or an Adapter.
        against: A parent, instead of the suite's own.

    Raises:
        SuiteError: Neither the suite nor the adapter names a base.
        RsoupsError: As `sweep` and `load_reward`.
    """
    adapter = source if isinstance(source, Adapter) else read_adapter(source)
    parent = against or suite.against
    base = suite.base or adapter.config.base_model_name_or_path
    if not base:
        raise SuiteError("neither the suite nor the adapter names a base: add `base:` to the suite")
    rewards = {name: load_reward(name) for each in suite.sets for name, _, _ in each.rules}
    others = {_PARENT: read_adapter(parent)} if parent else {}
    checks = []
    for number, each in enumerate(suite.sets, 1):
        task = find_task(each.task, each.dataset, each.template)
        wanted = [rewards[name] for name, _, _ in each.rules]
        rows = load_rows(task, each.dataset, each.split, kept=columns_read(wanted))
        different = {repr(row["prompt"]): row for row in reversed(rows)}  # the first of those with one prompt
        columns = columns_of(list(different.values())[::-1][: each.prompts])
        check_columns(wanted, columns)
        prompts = columns.pop("prompt")
        with TemporaryDirectory() as temporary:
            front = sweep(
                base,
                {_MODEL: adapter},
                {name: rewards[name] for name, _, _ in each.rules},
                prompts,
                [[1.0]],
                others=others,
                columns=columns,
                cut=task.cut,
                temperature=suite.temperature,
                max_new_tokens=suite.max_new_tokens,
                seed=suite.seed,
                allow_base_mismatch=suite.allow_base_mismatch,
                allow_trained_prompts=suite.allow_trained_prompts,
                out=Path(temporary) / "records.jsonl",
            )
        seen = ", ".join(f"{name} was trained on {count}" for name, count in front.trained_prompts.items())
        where = f"set {number} ({each.task}, {len(prompts)} prompts{seen and '; '}{seen})"
        checks += _thresholds(front, each, where) + _regressions(front, suite.tolerance, where, parent)
    return checks


def _thresholds(front: Front, prompts: PromptSet, where: str) -> list[Check]:
    (point,) = front.soups
    found = []
    for reward, sign, limit in prompts.rules:
        value = point.mean[reward]
        interval = f"{value:.3f} [{point.low[reward]:.3f}, {point.high[reward]:.3f}]"
        passed = math.isfinite(value) and _HOLDS[sign](value, limit)
        found.append(Check(passed, f"{where}: {reward} {interval}, required {sign} {limit:g}"))
    return found


def _regressions(front: Front, tolerance: float, where: str, parent: Any) -> list[Check]:
    """A reward fails where even the upper end of its difference's interval is below -tolerance."""
    found = []
    for other in (point for point in front.others if point.name == _PARENT):
        for reward, difference in front.difference(front.soups[0], other).items():
            told = f"{where}: {reward} {difference} against {parent}, may fall by {tolerance:g}"
            highest = difference.value if difference.high is None else difference.high  # one prompt has no interval
            found.append(Check(highest >= -tolerance, told))
    return found


def gate(checks: list[Check]) -> None:
    """Let nothing through that failed.

    Raises:
        SuiteError: A check failed.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        raise SuiteError(f"{len(failed)} of {len(checks)} checks failed, the first: {failed[0].text}")
