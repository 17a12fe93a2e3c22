"""Read the points of a front from a sweep's records or from a CSV table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsoups.common.errors import FrontError
from rsoups.fronts.estimates import Estimate, distinct, means_with_draws, resampling
from rsoups.fronts.points import SOUP, Point, estimates_of, is_number, model_key

LAMBDA = "lambda_"  # prefix of a table's columns of λ
_FIELDS = ("name", "lambdas", "method", "prompt", "response", "rewards", "seed")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Points:
    """Parts of a front; the fields are those of `Front`."""

    points: list[Point]
    rewards: list[str]
    prompts: list[str]
    shares: NDArray[np.float64] | None


def read_records(records: Iterable[Record], seed: int) -> Points:
    """Points of records, as `Front.from_records` describes it."""
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
    rewards: list[str] = []
    ingredients: list[str] = []
    for number, record in enumerate(records, 1):
        rewards = check_record(number, record, rewards)
        if record["lambdas"] is not None:
            lambdas = _lambdas_of(number, record, ingredients)
            ingredients = list(lambdas)
            record = {**record, "lambdas": lambdas}
        key = model_key(record["name"], record["lambdas"], record["method"])
        groups.setdefault(key, {}).setdefault(prompt_key(record["prompt"]), []).append(record)
    if not groups:
        raise FrontError("there are no records: run a sweep, which writes records.jsonl")

    prompts = sorted(next(iter(groups.values())))
    shares = resampling(len(prompts), seed)
    points = [_point_of_records(by_prompt, prompts, rewards, shares) for by_prompt in groups.values()]
    if len({point.method for point in points if point.lambdas}) > 1:
        points = [replace(point, tells_method=True) for point in points]
    return Points(points, rewards, prompts, shares)


def check_record(number: int, record: Record, rewards: list[str]) -> list[str]:
    """Check the record of a number, from 1, and return the names of its rewards: `rewards`, unless these are empty.

    Raises:
        FrontError: Not a record, a field is missing or of a wrong kind, other rewards, or a reward that is not finite.
    """
    if not isinstance(record, Mapping):
        raise FrontError(f"record {number} is {record!r}; expected an object with the fields {list(_FIELDS)}")
    missing = [field for field in _FIELDS if field not in record]
    if missing:
        raise FrontError(f"record {number} lacks the fields {missing}; rsoups.sweep writes {list(_FIELDS)}")

    where = f"record {number} ({record['name']}, lambdas {record['lambdas']}, prompt {record['prompt']!r})"
    kinds: dict[str, Any] = {"name": str, "prompt": (str, list), "response": str, "rewards": Mapping}
    wrong = [field for field, kind in kinds.items() if not isinstance(record[field], kind)]
    if wrong:
        raise FrontError(
            f"{where}: {wrong[0]} is {record[wrong[0]]!r}; a prompt is a text or messages, name and response are texts, and "
            "rewards are numbers by name"
        )
    names = rewards or sorted(record["rewards"])
    if sorted(record["rewards"]) != names or not names:
        raise FrontError(
            f"{where} has rewards {sorted(record['rewards'])}, others have {rewards}: score all models by the same rewards"
        )
    for reward in names:
        score = record["rewards"][reward]
        if not is_number(score) and not (score is None and reward in record.get("abstained", ())):
            raise FrontError(f"{where}: {reward} is {score!r}, must be a finite number: score this response again")
    return names


def _lambdas_of(number: int, record: Record, ingredients: Sequence[str]) -> dict[str, float]:
    """λ of a soup's record, in the order of the ingredients (in its own order where there are none yet)."""
    lambdas = record["lambdas"]
    if isinstance(lambdas, Mapping) and all(map(is_number, lambdas.values())):
        if not ingredients or sorted(lambdas) == sorted(ingredients):
            return {name: lambdas[name] for name in ingredients or lambdas}
        lambdas = list(lambdas)
    others = f", others are of {list(ingredients)}: make one front for each" if ingredients else ""
    raise FrontError(f"record {number} is of a soup of {lambdas}{others}; lambdas must be finite weights by ingredient")


def prompt_key(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as text: messages become JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def mean_score(records: Sequence[Record], reward: str) -> float:
    """The mean of a reward over the records that have a score (None means that the reward abstained); NaN without any."""
    scores = [record["rewards"][reward] for record in records]
    given = [score for score in scores if score is not None]
    return float(np.mean(given)) if given else math.nan


def _point_of_records(
    by_prompt: Mapping[str, Sequence[Record]],
    prompts: Sequence[str],
    rewards: Sequence[str],
    shares: NDArray[np.float64] | None,
) -> Point:
    """A point of the records of one model."""
    first = next(iter(by_prompt.values()))[0]
    model = f"{first['name']}, lambdas {first['lambdas']}"
    if sorted(by_prompt) != prompts:
        raise FrontError(
            f"{model} was evaluated on {len(by_prompt)} prompts, other models on {len(prompts)}, and not all are the same: "
            "finish the sweep by running it again"
        )
    samples = [by_prompt[prompt] for prompt in prompts]
    values = np.array([[mean_score(some, reward) for reward in rewards] for some in samples])
    for reward, column in zip(rewards, values.T, strict=True):
        if np.isnan(column).all():
            raise FrontError(f"{reward} has no score (None) for any response of {model}: leave this reward out")

    estimates = estimates_of(values, rewards, shares)
    mean = {reward: estimate.value for reward, estimate in estimates.items()}
    low = {reward: estimate.low for reward, estimate in estimates.items() if estimate.low is not None}
    high = {reward: estimate.high for reward, estimate in estimates.items() if estimate.high is not None}
    extras = _extras(samples, shares)
    return Point(first["name"], first["lambdas"], first["method"], mean, low, high, len(prompts), values, extras)


def _extras(samples: Sequence[Sequence[Record]], shares: NDArray[np.float64] | None) -> dict[str, Estimate]:
    """`Point.extras` of one model's records, by prompt."""
    columns = {"words": [np.mean([len(r["response"].split()) for r in some]) for some in samples]}
    for name, field in (("tokens", "tokens"), ("KL", "kl"), ("nll", "base_nll")):
        figures: list[list[Any]] = [[record.get(field) for record in some] for some in samples]
        if all(is_number(figure) for some in figures for figure in some):
            columns[name] = [np.mean(some) for some in figures]
    extras = estimates_of(np.array(list(columns.values()), dtype=np.float64).T, list(columns), shares)

    variety = distinct([[record["response"] for record in some] for some in samples])
    if variety:
        extras["distinct-2"] = variety
    if extras.pop("nll", None) and sum(columns.get("tokens", [0])) > 0:
        nll, tokens = means_with_draws(np.array([columns["nll"], columns["tokens"]]).T, shares).T
        extras["perplexity"] = Estimate.of(np.exp(nll / np.maximum(tokens, 1e-9)))
    return extras


def read_table(path: str | Path, rewards: Sequence[str] | None) -> Points:
    """Points of a CSV table, as `Front.from_csv` describes it."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise FrontError(f"cannot read {path}: {reason}") from None

    bounds = {name + end for name in columns for end in ("_low", "_high")}
    others = [name for name in columns if name != "name" and not name.startswith(LAMBDA) and name not in bounds]
    names = sorted(others if rewards is None else rewards)
    missing = [name for name in names if name not in columns]
    if not rows or not names or missing:
        lacks = "rows" if not rows else "a reward column" if not names else f"the columns {missing}"
        raise FrontError(f"{path} lacks {lacks}; its columns are {columns}")

    points = [_point_of_row(f"{path}, row {number}", row, names) for number, row in enumerate(rows, 1)]
    seen = set()
    for point in points:
        if point.key in seen:
            raise FrontError(f"{path}: two rows are {point.name!r} ({point.label}): give each a name of its own")
        seen.add(point.key)
    return Points(points, names, [], None)


def _point_of_row(where: str, row: Mapping[str, str], rewards: Sequence[str]) -> Point:
    def number(column: str) -> float:
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise FrontError(f"{where}: {column} is {row[column]!r}, must be a finite number")
        return value

    columns = [column for column in row if isinstance(column, str) and column.startswith(LAMBDA)]
    is_soup = any(row[column] for column in columns)
    lambdas = {column.removeprefix(LAMBDA): number(column) for column in columns} if is_soup else None
    mean = {reward: number(reward) for reward in rewards}
    low = {reward: number(f"{reward}_low") for reward in rewards if row.get(f"{reward}_low")}
    high = {reward: number(f"{reward}_high") for reward in rewards if row.get(f"{reward}_high")}
    name = row.get("name") or (SOUP if is_soup else where.rpartition(", ")[2])
    return Point(name, lambdas, None, mean, low, high, 0, np.array([list(mean.values())]))
