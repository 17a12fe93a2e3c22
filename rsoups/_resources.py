"""Where names lead: embedded assets, reward cards and recipes, in a checkout and in an installed wheel alike."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from rsoups._errors import DatasetError
from rsoups.tasks import read_jsonl

if TYPE_CHECKING:
    from rsoups.tasks import Task

_PACKAGE = Path(__file__).parent
_PREFIX = "rsoups/"


def shipped(folder: str) -> Path:
    """A folder that a checkout holds at its top level (`rewards`, `recipes`) and the wheel inside the package."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def resolve(name: str) -> str:
    """The local folder or file behind ``rsoups/<asset>``; any other name (a path, a Hub id) comes back unchanged."""
    if not name.startswith(_PREFIX):
        return name
    asset = name.removeprefix(_PREFIX)
    known = sorted(p.name for p in (_PACKAGE / "assets").iterdir() if p.is_dir())
    if asset not in known:
        raise DatasetError(f"no embedded asset {name!r}; there are {[_PREFIX + k for k in known]}")
    return str(_PACKAGE / "assets" / asset)


def load_rows(task: Task, dataset: str | None, split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a task, ``{"prompt", "references"}``, from a JSONL file, a folder of ``{split}.jsonl``, or the Hub.

    Args:
        task: The task.
        dataset: A ``.jsonl`` or ``.jsonl.gz`` file (then `split` is ignored), a folder, or a Hub id; the task's own by default.
        split: ``"train"`` or ``"test"``.
        limit: Keep the first `limit` rows that the task can use.

    Raises:
        DatasetError: Missing file or column, or no usable row.
    """
    source = resolve(dataset or task.dataset)
    path = Path(source)
    if path.is_dir():
        kinds = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
        found = [p for p in (path / f"{split}{kind}" for kind in kinds) if p.is_file()]
        if not found:
            raise DatasetError(f"{path} holds no {split}.jsonl (or .jsonl.gz, .csv, .parquet)")
        path = found[0]
    if path.name.endswith((".jsonl", ".jsonl.gz", ".csv", ".parquet")) and not path.is_file():
        raise DatasetError(f"no dataset file {path}")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        raw: Any = read_jsonl(path)
    elif path.suffix in (".csv", ".parquet"):
        from datasets import load_dataset

        raw = load_dataset(path.suffix[1:], data_files=str(path), split="train")
    else:
        from datasets import load_dataset

        subset = task.subset if dataset is None or dataset == task.dataset else None
        # Streamed where a limit is known: stack-exchange-paired has 26 GB, of which the paper uses 40,000 rows.
        most = task.most.get(split)
        raw = load_dataset(source, subset, split=task.splits.get(split, split), streaming=most is not None)
        limit = min(filter(None, (limit, most)), default=None)
    return task.rows(raw, limit)


def template(name: str) -> Template:
    """A page with $-placeholders, as it ships."""
    return Template((_PACKAGE / "assets" / name).read_text(encoding="utf-8"))
