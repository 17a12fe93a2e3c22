"""Load rows of datasets, and tell those for testing apart."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.common.assets import resolve
from rsoups.common.errors import DatasetError
from rsoups.common.files import read_jsonl
from rsoups.data.prompts import shown

if TYPE_CHECKING:
    from rsoups.data.tasks import Task

_TABLES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
_MOST_HELD_OUT = 1_000  # prompts of one file
_LONGEST_FIELD = 2**30  # characters of a CSV field; Python's own limit is 131,072
LAST_TENTH = f"the last tenth of the file's different prompts, 1 to {_MOST_HELD_OUT:,}"  # the words of lineage.json

logger = logging.getLogger(__name__)


def load_rows(
    task: Task, dataset: str | None, split: str, limit: int | None = None, kept: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return rows of a task, ``{"prompt", "references"}``: the one place that separates train from test.

    Args:
        task: Task that makes prompts of the dataset's rows.
        dataset: File, folder or Hub id, as `raw_rows` takes it; the task's own if None.
        split: ``"train"`` or ``"test"``; or ``"all"`` of one file.
        limit: Number of rows at most: the first ones that the task can use.
        kept: Names of further columns to keep, where the dataset has them: those that rewards read.

    Raises:
        DatasetError: Missing file or column, no usable row, or no such split.
    """
    from tqdm.auto import tqdm

    name, one_file = str(dataset or task.dataset), is_table(task, dataset)
    if split == "all" and not one_file:
        raise DatasetError(f"split all is for one file; {name!r} has its own splits: choose train or test")

    # The bar appears where it takes a while: for datasets of the Hub.
    raw = tqdm(raw_rows(task, dataset, split), desc=f"{task.name}, {split}", unit=" rows", delay=3, leave=False)
    if one_file:
        return part_of(task.rows(raw, None, kept), split, name)[:limit]
    most = task.most.get(split) if _is_own(task, dataset) else None
    return task.rows(raw, min(filter(None, (limit, most)), default=None), kept)


def train_and_held_out(
    task: Task, dataset: str | None, held_out: int, kept: Collection[str] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows to train on, and at most `held_out` rows of the test split; arguments as for `load_rows`."""
    train = load_rows(task, dataset, "train", kept=kept)
    return train, load_rows(task, dataset, "test", held_out, kept) if held_out else []


def part_of(rows: list[dict[str, Any]], split: str, name: str) -> list[dict[str, Any]]:
    """Return a split of one file's rows: the last tenth of its different prompts, 1 to 1,000 of them, is for testing.

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
        raise DatasetError(f"{name} holds only one prompt, which is held out for testing: add prompts to train on")
    return part


def is_table(task: Task, dataset: str | None) -> bool:
    """Whether the dataset is one file, which has no splits of its own."""
    return Path(resolve(dataset or task.dataset)).name.endswith(_TABLES)


def _is_own(task: Task, dataset: str | None) -> bool:
    return dataset is None or dataset == task.dataset


def raw_rows(task: Task, dataset: str | None, split: str) -> Iterable[dict[str, Any]]:
    """Return a dataset's rows, unchanged.

    Args:
        task: Task whose folders, revision and split names apply to its own dataset.
        dataset: File (.jsonl, .jsonl.gz, .csv, .parquet: all its rows are returned, for `part_of`), folder of
            ``{split}.jsonl`` or the like, or Hub id; the task's own if None.
        split: ``"train"`` or ``"test"``.

    Raises:
        DatasetError: A missing file, or a dataset that cannot be loaded.
    """
    source = resolve(dataset or task.dataset)
    path = Path(source)
    if path.is_dir():
        tables = [path / f"{split}{ending}" for ending in _TABLES]
        path = next((table for table in tables if table.is_file()), path)
        if path.is_dir():
            raise DatasetError(f"{path} holds no {split}.jsonl (or .jsonl.gz, .csv, .parquet)")

    if not path.name.endswith(_TABLES):
        return _of_hub(source, task, split, _is_own(task, dataset))
    if not path.is_file():
        raise DatasetError(f"no dataset file {path}")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return read_jsonl(path)
    if path.suffix == ".csv":
        return read_csv(path)

    from datasets import load_dataset

    return load_dataset("parquet", data_files=str(path), split="train")


def _of_hub(source: str, task: Task, split: str, own: bool) -> Iterable[dict[str, Any]]:
    """Load a split of a Hub dataset; the task's names of splits apply where it is the task's own."""
    from datasets import load_dataset

    name, options = split, {}
    if own:
        # The paper takes the first rows only of some datasets: stack-exchange-paired has 26 GB, so it is streamed.
        options = {"data_dir": task.folders.get(split), "revision": task.revision, "streaming": split in task.most}
        name = task.splits.get(split, split)
    try:
        return load_dataset(source, split=name, **options)
    except RuntimeError as error:
        if "Dataset scripts are no longer supported" not in str(error):
            raise
        raise DatasetError(
            f"dataset {source!r} is a script, which the package datasets no longer runs: load its branch "
            "refs/convert/parquet, save its rows as a .jsonl file, and give that file"
        ) from None
    except (OSError, ValueError) as error:  # no such dataset, or no such split
        raise DatasetError(f"cannot load the split {name!r} of {source!r}: {error}") from error


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; each value is the file's text: "007" is no number, "NA" and "null" are not None.

    Raises:
        DatasetError: No header, a name in it twice, a row of another number of fields, or a file that is not UTF-8.
    """
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if not header or len(set(header)) < len(header):
                raise DatasetError(f"{path}: the first line must name each column once; it is {header}")

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
