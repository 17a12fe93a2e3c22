"""Records of a sweep on disk: one line of JSON for each response, appended as they come, with their settings beside them.

``records.jsonl`` holds them, ``records.settings.json`` how they were made. Of several processes each appends to a file of its
own, ``records.RANK.jsonl``, until one of them gathers them, so that any number of processes goes on after a kill.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsoups.common.errors import OutputError
from rsoups.common.files import read_jsonl, write_whole

# Settings that records of one file have in common; the others tell where things came from, and may change.
_SAME: tuple[str, ...] = (
    "ingredients",
    "rewards",
    "temperature",
    "max_new_tokens",
    "seed",
    "prompts",
    "columns",
    "cut",
    "server",
)
_SAME += ("chat_template_kwargs",)
_GROWING = ("others", "other_hashes", "adapters", "trained_on")  # a later call may add to these
_PINNED = ("base", "base_weights")  # `pin` tells them, who has seen the weights
_BREAKS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # some readers take them for the end of a line
Key = tuple[str, str, int]


def model_key(record: Mapping[str, Any]) -> str:
    """What tells models apart: name, λ and method."""
    return json.dumps([record["name"], record["lambdas"], record["method"]])


def key_of(record: Mapping[str, Any]) -> Key:
    """Model, prompt and sample: one record each."""
    return model_key(record), json.dumps(record["prompt"]), int(record.get("sample", 0))


class Records:
    """The records of one sweep, as one of its processes sees them.

    Attributes:
        path: The file of all.
        done: Keys of the records that are there.
    """

    def __init__(self, path: Path, rank: int = 0, processes: int = 1):
        """Read what is there. (The main process calls `prepare` before.)"""
        self.path = path
        self._own = path if processes == 1 else _part(path, rank)
        self.done = {key_of(record) for record in _read(path)}

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records, and have them on disk before returning.

        Raises:
            OutputError: They cannot be written; those before are whole.
        """
        text = "".join(map(_line, records))
        size = self._own.stat().st_size if self._own.exists() else 0
        try:
            with self._own.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self._own.exists():
                os.truncate(self._own, size)
            raise OutputError(f"cannot write {self._own}: {error.strerror or error}; run again to go on") from error
        self.done |= {key_of(record) for record in records}


def prepare(path: Path, settings: dict[str, Any]) -> None:
    """Check that the records there, if any, are of this sweep, and gather what a killed one left.

    Raises:
        OutputError: `path` holds records of another sweep, or a line in its middle that is not a record.
    """
    beside = path.with_suffix(".settings.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write into {path.parent}: {error.strerror or error}") from error
    found: dict[str, Any] = {}
    if path.exists():
        try:
            found = json.loads(beside.read_text("utf-8"))
        except (OSError, ValueError):
            raise OutputError(f"{path} is there without its {beside.name}: move it or choose another file") from None
        differing = sorted(key for key in _SAME if settings.get(key) != found.get(key))
        if "ingredients" not in differing and list(settings["ingredients"]) != list(found["ingredients"]):
            differing.append("the order of the ingredients")
        both = found.get("other_hashes", {}).keys() & settings["other_hashes"].keys()
        differing += [f"others: {n}" for n in sorted(both) if found["other_hashes"][n] != settings["other_hashes"][n]]
        if differing:
            raise OutputError(
                f"{path} holds records of another sweep (differing: {differing}); move it or choose another"
            )
        gather(path)
    for name in _GROWING:
        settings[name] = {**found.get(name, {}), **settings[name]}
    known = [name for name in _PINNED if name in found and path.stat().st_size]  # there are records
    _write(beside, settings | {name: found[name] for name in known})
    path.touch()


def pin(path: Path, base: str | None, weights: str, write: bool) -> None:
    """Check that records which are there are of this base; where their settings do not tell its weights, they do from now on.

    Args:
        path: Of the records, which are prepared.
        base: Its name, where it has one.
        weights: Their hash.
        write: Whether it is for this process to write.

    Raises:
        OutputError: They are of a base with other weights.
    """
    beside = path.with_suffix(".settings.json")
    found = json.loads(beside.read_text("utf-8"))
    if found.get("base_weights", weights) != weights:
        other = found.get("base") or "a model in memory"
        raise OutputError(
            f"{path} holds records of another sweep (differing: the base's weights; theirs are of {other}, not those of "
            f"{base or 'this model'}); sweep that base, or move the records or choose another file"
        )
    settings = found | {"base": base or found.get("base"), "base_weights": weights}
    if write and settings != found:
        _write(beside, settings)


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def gather(path: Path, order: Iterable[Key] = ()) -> None:
    """Merge the processes' files into one, its records in `order`; others keep theirs, after those."""
    place = {key: i for i, key in enumerate(order)}
    parts = [part for part in sorted(path.parent.glob(f"{path.stem}.*{path.suffix}")) if _is_part(part)]
    before = path.read_text("utf-8")
    records = {key_of(record): record for file in (path, *parts) for record in _read(file)}
    kept = sorted(records, key=lambda key: place.get(key, len(place)))  # stable
    text = "".join(_line(records[key]) for key in kept)
    if text != before:
        write_whole(path, text)
    for part in parts:
        part.unlink()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False).translate(_BREAKS) + "\n"


def _is_part(path: Path) -> bool:
    """Whether it is a process's file, not a sweep of such a name."""
    return path.suffixes[-2][1:].isdigit() and not path.with_suffix(".settings.json").exists()


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}.{rank}{path.suffix}")


def _read(path: Path) -> list[dict[str, Any]]:
    """Records of a file; a last line without its end, which a killed process leaves, is cut off."""
    data = path.read_bytes()
    if (end := data.rfind(b"\n") + 1) < len(data):
        os.truncate(path, end)
    return read_jsonl(path, OutputError, _check)


def _check(where: str, record: Any) -> None:
    try:
        key_of(record)
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{where}: not a record; remove the line, and it is made again") from None
