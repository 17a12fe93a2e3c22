"""Samples of responses to score: a dataset's references, a policy's responses, or a sweep's records."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsoups.common.errors import DatasetError
from rsoups.common.files import read_jsonl
from rsoups.data.datasets import is_table, load_rows
from rsoups.data.tasks import Task, columns_of
from rsoups.generation.respond import texts_of_policy

LEAST = 8  # responses of a sample


@dataclass(frozen=True)
class Sample:
    """Prompts (texts or messages), as many responses, and further columns that rewards read: what a probe scores."""

    prompts: list[Any]
    responses: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Sample({len(self.responses)} responses, columns {list(self.columns)})"


def sample_of(
    task: Task,
    dataset: str | None = None,
    *,
    split: str | None = None,
    rows: int = 200,
    kept: Collection[str] = (),
    model: str = "rsoups/tiny-llama",
    temperature: float = 0.7,
    max_new_tokens: int = 32,
    seed: int = 0,
    device: str = "cpu",
    template: Mapping[str, Any] | None = None,
) -> Sample:
    """Return a dataset's prompts with its reference responses; where it has none, with a policy's.

    Args:
        task: Task of the prompts, which also cuts the responses.
        dataset: Dataset, as `load_rows` takes it.
        split: ``"train"``, ``"test"`` or ``"all"``; by default all rows of one file, the test split of other datasets.
        rows: Number of rows, the first ones.
        kept: Names of the columns that the rewards read.
        model: Folder, Hub id or ``rsoups/...`` of the policy, for prompts without references.
        temperature, max_new_tokens, seed, device, template: Settings of `texts_of_policy`.

    Raises:
        DatasetError: Too few rows, a missing file or column, or no usable row.
        CheckpointError: A policy that cannot be loaded.
    """
    check_rows(rows)
    split = split or ("all" if is_table(task, dataset) else "test")
    loaded = load_rows(task, dataset, split, rows, kept)
    with_references = [row for row in loaded if row["references"]]
    if with_references:
        responses = [row["references"][0] for row in with_references]
        # The response itself is no reference, where there are others to compare it with.
        loaded = [row | {"references": row["references"][1:] or row["references"]} for row in with_references]
    else:
        prompts = [row["prompt"] for row in loaded]
        settings: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
        responses = texts_of_policy(model, prompts, device=device, template=template, **settings)

    columns = columns_of(loaded)
    return Sample(columns.pop("prompt"), [task.cut(text) for text in responses], columns)


def sample_of_records(path: str | Path, rows: int = 200, seed: int = 0) -> Sample:
    """Draw responses from all records of a sweep, each pair of prompt and response once.

    Raises:
        DatasetError: Too few rows, no such file, or a record without prompt or response.
    """
    check_rows(rows)
    if not Path(path).is_file():
        raise DatasetError(f"no records file {path}")
    try:
        by_text = {json.dumps([r["prompt"], r["response"]]): (r["prompt"], r["response"]) for r in read_jsonl(path)}
    except (KeyError, TypeError):
        raise DatasetError(f"{path} holds a line without prompt or response: is it a sweep's records.jsonl?") from None

    pairs = list(by_text.values())
    drawn = random.Random(seed).sample(pairs, k=min(rows, len(pairs)))
    return Sample([prompt for prompt, _ in drawn], [response for _, response in drawn])


def check_rows(rows: int) -> None:
    if rows < LEAST:
        raise DatasetError(f"a probe of {rows} responses says nothing: {LEAST} or more are needed")
