"""Rows of datasets, and which of them are for testing."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.common.errors import DatasetError
from rsoups.common.files import read_jsonl

if TYPE_CHECKING:
    from rsoups.data.tasks import Task


import csv
import logging

from rsoups.common.assets import resolve
from rsoups.data.prompts import shown

_TABLES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
_MOST_HELD_OUT = 1_000  # prompts of one file
LAST_TENTH = f"the last tenth of the file's different prompts, 1 to {_MOST_HELD_OUT:,}"  # as lineage.json tells it


def load_rows(
    task: Task, dataset: str | None, split: str, limit: int | None = None, kept: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Rows of a task, ``{"prompt", "references"}``: the one place where train and test are told apart.

    Args:
        task: The task.
        dataset: As `raw_rows` takes it.
        split: ``"train"`` or ``"test"``; ``"all"`` of one file.
        limit: Keep the first `limit` rows that the task can use.
        kept: Further columns to keep, where the dataset has them: those that rewards read.

    Raises:
        DatasetError: Missing file or column, no usable row, or no such split.
    """
    from tqdm.auto import tqdm

    name, one_file = str(dataset or task.dataset), is_table(task, dataset)
    if split == "all" and not one_file:
        raise DatasetError(f"split all is of one file; {name!r} has its own splits: say train or test")
    # Seen only where it takes a while: datasets of the Hub.
    raw = tqdm(raw_rows(task, dataset, split), desc=f"{task.name}, {split}", unit=" rows", delay=3, leave=False)
    if one_file:
        return part_of(task.rows(raw, None, kept), split, name)[:limit]
    most = task.most.get(split) if _is_own(task, dataset) else None
    return task.rows(raw, min(filter(None, (limit, most)), default=None), kept)


def train_and_held_out(
    task: Task, dataset: str | None, held_out: int, kept: Collection[str] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on, and at most `held_out` others to judge by: the first ones of the test split (see `load_rows`)."""
    train = load_rows(task, dataset, "train", kept=kept)
    return train, load_rows(task, dataset, "test", held_out, kept) if held_out else []


def part_of(rows: list[dict[str, Any]], split: str, name: str) -> list[dict[str, Any]]:
    """A split of one file's rows: the last tenth of its different prompts, 1 to 1,000 of them, are for testing.

    Raises:
        DatasetError: No row is left.
    """
    if split == "all":
        return rows
    keys = [json.dumps(row["prompt"], sort_keys=True) for row in rows]
    different = list(dict.fromkeys(keys))
    count = min(max(len(different) // 10, 1), _MOST_HELD_OUT)
    held_out = set(different[-count:])
    part = [row for key, row in zip(keys, rows, strict=True) if (key in held_out) == (split == "test")]
    if not part:
        raise DatasetError(f"{name} holds one prompt only, which is held out for testing: add others to train on")
    return part


def is_table(task: Task, dataset: str | None) -> bool:
    """Whether the dataset is one file, which has no splits of its own."""
    return Path(resolve(dataset or task.dataset)).name.endswith(_TABLES)


def _is_own(task: Task, dataset: str | None) -> bool:
    return dataset is None or dataset == task.dataset


def raw_rows(task: Task, dataset: str | None, split: str) -> Iterable[dict[str, Any]]:
    """A dataset's rows as they are.

    Args:
        task: Whose dataset, its folders, revision and split names apply to that dataset.
        dataset: A file (.jsonl, .jsonl.gz, .csv, .parquet: then all rows come, for `part_of`), a folder of ``{split}.jsonl`` or
            the like, or a Hub id; the task's own by default.
        split: ``"train"`` or ``"test"``.

    Raises:
        DatasetError: A missing file, or a dataset that cannot be loaded.
    """
    source = resolve(dataset or task.dataset)
    path = Path(source)
    if path.is_dir():
        found = [p for kind in _TABLES if (p := path / f"{split}{kind}").is_file()]
        if not found:
            raise DatasetError(f"{path} holds no {split}.jsonl (or .jsonl.gz, .csv, .parquet)")
        path = found[0]
    if path.name.endswith(_TABLES) and not path.is_file():
        raise DatasetError(f"no dataset file {path}")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return read_jsonl(path)
    if path.name.endswith(".csv"):
        return read_csv(path)
    from datasets import load_dataset

    if path.name.endswith(_TABLES):
        return load_dataset(path.suffix[1:], data_files=str(path), split="train")
    own = _is_own(task, dataset)
    # Streamed where the paper takes the first rows only: stack-exchange-paired has 26 GB.
    streaming = own and split in task.most
    name = task.splits.get(split, split) if own else split
    place = {"data_dir": task.folders.get(split), "revision": task.revision} if own else {}
    try:
        return load_dataset(source, split=name, streaming=streaming, **place)
    except RuntimeError as error:
        if "Dataset scripts are no longer supported" not in str(error):
            raise
        raise DatasetError(
            f"dataset {source!r} is a script, which the package datasets no longer runs: load its branch "
            "refs/convert/parquet, save its rows as a .jsonl file, and give that file"
        ) from None
    except (OSError, ValueError) as error:  # no such dataset, or no such split
        raise DatasetError(f"cannot load the split {name!r} of {source!r}: {error}") from error


_LONGEST_FIELD = 2**30  # characters of a CSV field; Python's own limit is 131,072

logger = logging.getLogger(__name__)


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Rows of a CSV file. Every value is the text that the file has: "007", "NA" and "null" are no numbers and not nothing.

    Raises:
        DatasetError: No header, a name in it twice, a row of another number of fields, or a file that is not UTF-8.
    """
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if not header or len(set(header)) < len(header):
                raise DatasetError(f"{path}: the first line names the columns, each once; it is {header}")
            rows = []
            for values in reader:
                if values and len(values) != len(header):
                    raise DatasetError(
                        f"{path}, line {reader.line_num}: {len(values)} fields, the header has {len(header)}: {shown(values)}"
                    )
                if values:
                    rows.append(dict(zip(header, values, strict=True)))
            return rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not CSV in UTF-8: {error}") from None
    finally:
        csv.field_size_limit(before)
