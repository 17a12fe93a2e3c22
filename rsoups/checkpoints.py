"""Checkpoints of a training run: under their final name only when whole, found again, one run to a folder."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rsoups._errors import OutputError
from rsoups._files import sync

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


@contextmanager
def only_run_in(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder for as long as the context lasts; a killed process leaves no lock behind.

    Raises:
        OutputError: Another process holds the folder.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)  # the folder itself: nothing to leave behind
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another run is writing into {folder}: wait for it, or choose another folder") from None
        except OSError as error:  # file systems without locks
            logging.getLogger(__name__).warning("cannot keep other runs out of %s: %s", folder, error)
        yield
    finally:
        os.close(descriptor)
