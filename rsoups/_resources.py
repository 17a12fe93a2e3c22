"""Resolve names of assets, reward cards and recipes to paths; load base models and rows of datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from rsoups._errors import AdapterError, CheckpointError, DatasetError, HubError, RsoupsError, SettingsError
from rsoups.tasks import read_csv, read_jsonl

if TYPE_CHECKING:
    from rsoups.tasks import Task

_PACKAGE = Path(__file__).parent
_PREFIX = "rsoups/"
_TABLES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
_MOST_HELD_OUT = 1_000  # prompts of one file
LAST_TENTH = f"the last tenth of the file's different prompts, 1 to {_MOST_HELD_OUT:,}"  # as lineage.json tells it


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


def embedded_name(name: str) -> str | None:
    """``rsoups/<asset>`` of an embedded asset, by that name or by its folder; None of any other name."""
    if name.startswith(_PREFIX):
        return name
    folder = Path(name)
    return f"{_PREFIX}{folder.name}" if folder.is_absolute() and folder.parent == _PACKAGE / "assets" else None


def need(package: str, extra: str) -> None:
    """Refuse work that needs a package of an extra which is not installed, before any of it is done.

    Raises:
        SettingsError: It is not installed; the command that installs it is told.
    """
    if find_spec(package) is None:
        raise SettingsError(f"this needs the package {package}, which is not installed: pip install 'rsoups[{extra}]'")


def base_config(name: str, **options: Any) -> Any:
    """A base's config; errors as of `load_base`."""
    from transformers import AutoConfig

    with _base_of(name):
        return AutoConfig.from_pretrained(resolve(name), **{"trust_remote_code": False, **options})


def load_base(name: str, **options: Any) -> Any:
    """A causal language model by folder, Hub id or ``rsoups/...``.

    Args:
        name: Folder, Hub id or ``rsoups/...`` of the base.
        options: For transformers: revision, dtype, ...; with ``trust_remote_code=True`` Python code that comes with it runs.

    Raises:
        CheckpointError: It cannot be loaded: there is none, it holds a pickle only, or it asks for code of its own.
    """
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": False, **options}
    if getattr(options.get("quantization_config"), "quant_method", None) == "bitsandbytes":
        need("bitsandbytes", "quantised")
    with _base_of(name, options.get("revision")):
        return from_safetensors(AutoModelForCausalLM.from_pretrained, resolve(name), **options)


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer of a base; errors as of `load_base`."""
    from transformers import AutoTokenizer

    with _base_of(name, options.get("revision")):
        try:
            return AutoTokenizer.from_pretrained(resolve(name), **{"trust_remote_code": False, **options})
        except (ImportError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"{name!r} has no tokenizer that can be loaded ({reason}): save one there with tokenizer.save_pretrained"
            ) from error


def from_safetensors(load: Callable[..., Any], source: str, **options: Any) -> Any:
    """A model by transformers' own `load`; where it holds only pickles, its conversion in the cache, if there is one.

    Raises:
        OSError: It cannot be loaded.
    """
    from rsoups.convert import converted

    try:
        return load(source, use_safetensors=True, **options)
    except OSError:
        copy = converted(source, options.pop("revision", None))
        if copy is None:
            raise
        return load(str(copy), use_safetensors=True, **options)


@contextmanager
def _base_of(name: str, revision: str | None = None) -> Iterator[None]:
    try:
        yield
    except RsoupsError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot load {name!r}: {why_not(name, revision) or error}") from error
    except ValueError as error:  # an unknown kind of model, one that no causal language model is made of, no tokenizer
        if "trust_remote_code" not in str(error):
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"cannot load {name!r}: {reason}") from error
        raise CheckpointError(
            f"{name!r} brings Python code of its own; read it, and allow it with trust_remote_code (in Python: =True)"
        ) from None


def why_not(source: str, revision: str | None = None) -> str | None:
    """Return the remedy for a model that holds only pickles; None if it failed to load for another reason."""
    from rsoups.convert import holds_only_pickles, remedy

    try:
        return remedy(source, revision) if holds_only_pickles(source, revision) else None
    except (CheckpointError, HubError):
        return None


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


def asset(name: str) -> str:
    """A text that ships: a page, a style sheet, a script."""
    return (_PACKAGE / "assets" / name).read_text(encoding="utf-8")


def template(name: str) -> Template:
    """A page with $-placeholders, as it ships."""
    return Template(asset(name))


def named_sources(given: Sequence[str], kind: str, error: type[RsoupsError] = AdapterError) -> dict[str, str]:
    """``NAME=SOURCE`` texts as a dict, none of them lost.

    Args:
        given: A bare source is named by its last part, and by more of its path where others end alike.
        kind: What they are, for the error.
        error: Its type.

    Raises:
        RsoupsError: Two have one name, or a name or a source is empty.
    """
    pairs = [_pair(text) for text in given]
    bare = [source for name, source in pairs if name is None]
    found: dict[str, str] = {}
    for text, (name, source) in zip(given, pairs, strict=True):
        name = _short_name(source, bare) if name is None else name
        if not name or not source:
            raise error(f"{kind} {text!r} has no name or no source: write NAME=SOURCE")
        if name in found:
            raise error(
                f"two {kind} have the name {name!r}, {found[name]} and {source}: give each its own, NAME=SOURCE"
            )
        found[name] = source
    return found


def _pair(text: str) -> tuple[str | None, str]:
    """Name and source; the name is None where the text is a source alone."""
    name, separator, source = text.partition("=")
    return (None, text) if not separator or Path(text).exists() else (name.strip(), source)


def _short_name(source: str, among: Sequence[str]) -> str:
    """The last parts of a path, as many as tell it from the others, without a table's ending."""
    parts = Path(source).parts
    for count in range(1, len(parts) + 1):
        if sum(Path(other).parts[-count:] == parts[-count:] for other in among) == 1:
            break
    name = "/".join(parts[-count:]) if parts else ""
    return name.replace("//", "/").removesuffix(".jsonl").removesuffix(".csv")
