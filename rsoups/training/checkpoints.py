"""Checkpoints of a training run: under their final name only when whole, found again, one run to a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rsoups.common.files import sync

_PREFIX = "checkpoint-"
_MANIFEST = "complete.json"


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run's folder; None where there is none.

    Complete is one that holds every file that it was finished with, at its size then: neither a write that was cut off
    nor a copy of half of one is taken for a checkpoint.
    """
    found = [path for path in Path(folder).glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit()]
    return max(filter(is_complete, found), key=lambda path: int(path.name[len(_PREFIX) :]), default=None)


def is_complete(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / _MANIFEST).read_text("utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def finish_checkpoint(partial: Path, final: Path) -> None:
    """Put a filled folder under its final name, in the same file system: a list of its files, fsync, one rename.

    Whatever stands under the final name is replaced (a resumed run writes the steps after its checkpoint once more).
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    (partial / _MANIFEST).write_text(json.dumps(sizes), "utf-8")
    for path in (*files, partial / _MANIFEST, partial):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(final.parent)
