"""Records of a sweep on disk: one line of JSON for each response, and a file with the settings of the sweep.

``records.jsonl`` holds the records, ``records.settings.json`` how they were made. If several processes share a sweep, each
appends to its own file, ``records.RANK.jsonl``, until the main process gathers them: a killed sweep can go on with any number
of processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsoups.common.errors import OutputError
from rsoups.common.files import read_jsonl, write_whole
from rsoups.fronts.points import model_key

# Settings that all records of one file share. The others tell where something came from, and may change.
_SHARED = "ingredients rewards temperature max_new_tokens seed prompts columns cut server chat_template_kwargs".split()
_GROWING = ("others", "other_hashes", "adapters", "trained_on")  # a later call may add entries
_PINNED = ("base", "base_weights")  # written by `pin`, once the weights are loaded
_BREAKS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # line breaks to some readers of JSON lines
Key = tuple[Any, str, int]


def key_of(record: Mapping[str, Any]) -> Key:
    """The key of a record: its model, prompt and sample."""
    model = model_key(record["name"], record["lambdas"], record["method"])
    return model, json.dumps(record["prompt"]), int(record.get("sample", 0))


class Records:
    """The records of a sweep, from the point of view of one process.

    Attributes:
        done: Keys of the records that are on disk.
    """

    def __init__(self, path: Path, rank: int = 0, processes: int = 1):
        """Read the records. (The main process has called `prepare` before.)"""
        self._own = path if processes == 1 else path.with_name(f"{path.stem}.{rank}{path.suffix}")
        self.done = set(map(key_of, _read(path)))

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records; they are on disk when this returns.

        Raises:
            OutputError: The records cannot be written; the file is as it was before.
        """
        size = self._own.stat().st_size if self._own.exists() else 0
        try:
            with self._own.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, records)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self._own.exists():
                os.truncate(self._own, size)
            raise OutputError(f"cannot write {self._own}: {error.strerror or error}; run again to go on") from error
        self.done |= set(map(key_of, records))


def prepare(path: Path, settings: dict[str, Any]) -> None:
    """Create the records file, or check that its records are of this sweep and gather what a killed one left.

    Raises:
        OutputError: `path` holds records of another sweep, or a line in its middle is not a record.
    """
    settings_path = path.with_suffix(".settings.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write into {path.parent}: {error.strerror or error}") from error

    old: dict[str, Any] = {}
    if path.exists():
        try:
            old = json.loads(settings_path.read_text("utf-8"))
        except (OSError, ValueError):
            raise OutputError(
                f"{path} exists without its {settings_path.name}: move it or choose another file"
            ) from None
        if differing := _differing(old, settings):
            raise OutputError(
                f"{path} holds records of another sweep (differing: {differing}); move it or choose another"
            )
        gather(path)

    growing = {name: {**old.get(name, {}), **settings[name]} for name in _GROWING}
    has_records = path.exists() and path.stat().st_size
    pinned = {name: old[name] for name in _PINNED if name in old and has_records}
    _write(settings_path, settings | growing | pinned)
    path.touch()


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of the settings in which records would differ."""
    names = sorted(name for name in _SHARED if new.get(name) != old.get(name))
    if "ingredients" not in names and list(new["ingredients"]) != list(old["ingredients"]):
        names.append("the order of the ingredients")
    old_hashes, new_hashes = old.get("other_hashes", {}), new["other_hashes"]
    both = sorted(old_hashes.keys() & new_hashes.keys())
    return names + [f"others: {name}" for name in both if old_hashes[name] != new_hashes[name]]


def pin(path: Path, base: str | None, weights: str, write: bool) -> None:
    """Check that existing records belong to this base; record its hash if it is missing.

    Args:
        path: Prepared records file.
        base: Name of the base, if it has one.
        weights: Hash of its weights.
        write: Whether this process writes the settings.

    Raises:
        OutputError: The records are of a base with other weights.
    """
    settings_path = path.with_suffix(".settings.json")
    old = json.loads(settings_path.read_text("utf-8"))
    if old.get("base_weights", weights) != weights:
        other = old.get("base") or "a model in memory"
        raise OutputError(
            f"{path} holds records of another sweep (differing: the base's weights; theirs are of {other}, not those of "
            f"{base or 'this model'}); sweep that base, or move the records or choose another file"
        )
    settings = old | {"base": base or old.get("base"), "base_weights": weights}
    if write and settings != old:
        _write(settings_path, settings)


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def gather(path: Path, order: Iterable[Key] = ()) -> None:
    """Merge the files of all processes into one: records in `order` first, then the others in their own order."""
    parts = [part for part in sorted(path.parent.glob(f"{path.stem}.*{path.suffix}")) if _is_part(part)]
    records = {key_of(record): record for file in (path, *parts) for record in _read(file)}

    place = {key: i for i, key in enumerate(order)}
    keys = sorted(records, key=lambda key: place.get(key, len(place)))  # stable
    text = "".join(_line(records[key]) for key in keys)
    if text != path.read_text("utf-8"):
        write_whole(path, text)
    for part in parts:
        part.unlink()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False).translate(_BREAKS) + "\n"


def _is_part(path: Path) -> bool:
    """Whether a file is that of a process, not a sweep with a number in its name."""
    return path.suffixes[-2][1:].isdigit() and not path.with_suffix(".settings.json").exists()


def _read(path: Path) -> list[dict[str, Any]]:
    """Records of a file; a last line without its end, which a killed process leaves, is cut off."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return read_jsonl(path, OutputError, _check)


def _check(where: str, record: Any) -> None:
    try:
        hash(key_of(record))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OutputError(f"{where}: not a record; remove the line, and run again") from None
