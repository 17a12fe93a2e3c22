"""Files and folders: that appear whole or not at all, their lines, their hashes, those of the Hub."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsoups.common.errors import DatasetError, HubError, OutputError, RsoupsError

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<subfolder>(/[\w.-]+)*)(@(?P<revision>[\w./-]+))?")


@contextmanager
def whole_folder(target: str | Path, marker: str) -> Iterator[Path]:
    """A context that yields a temporary folder to fill, and gives it its final name when all went well.

    Args:
        target: Final name. A folder there is replaced if it is empty or holds `marker`, so that nothing else is lost.
        marker: A file that tells that such a folder is ours.

    Raises:
        OutputError: `target` holds something else, or cannot be written.
    """
    target = Path(target)
    check_replaceable(target, marker)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        _replace(partial, target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(target: Path, marker: str) -> None:
    """Refuse a folder that `whole_folder` would not replace; for work that takes long before it writes.

    Raises:
        OutputError: It is a file, or holds something, and no `marker`.
    """
    if target.exists() and not (target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))):
        raise OutputError(f"{target} exists and holds no {marker}: it is not replaced; choose another folder")


def write_whole(path: Path, text: str) -> None:
    """Write a file all or nothing.

    Raises:
        OutputError: It cannot be written; what was there is as it was.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.rename(path)
        sync(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _replace(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_lines(path: str | Path, refusal: type[RsoupsError]) -> Iterator[tuple[int, Any]]:
    """The values of a JSON-lines file with the numbers of their lines, from 1; empty lines are passed over.

    Raises:
        RsoupsError: Of the given class: the file cannot be read, or a line is not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refusal(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which cuts at U+2028 inside a text too
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise refusal(f"{path}, line {number}: not JSON ({error})") from None


READING = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="rsoups-reading")  # beside the other work


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_hub_id(source: str) -> bool:
    """Whether a name is of the form ``user/name``, with a subfolder and a revision perhaps, and leads to no other place."""
    return bool(_HUB_ID.fullmatch(source)) and ".." not in source


def from_hub(source: str, names: Iterable[str]) -> tuple[Path, str] | None:
    """Files of a Hub repository, fetched or from the cache.

    Args:
        source: ``user/name``, ``user/name@revision``, ``user/name/subfolder@revision``.
        names: Names or patterns of the files, in the subfolder.

    Returns:
        Their folder and the commit; None where `source` is no Hub id.

    Raises:
        HubError: The Hub cannot be reached or refuses.
    """
    found = _HUB_ID.fullmatch(source)
    if not found or ".." in source:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    inside = found["subfolder"].strip("/")
    wanted = [f"{inside}/{name}" if inside else name for name in names]
    try:
        folder = Path(snapshot_download(found["repo"], revision=found["revision"], allow_patterns=wanted))
    except LocalEntryNotFoundError:
        raise HubError(f"no folder {source!r}; as a Hub id it is not in the cache and the Hub is not reached") from None
    except HfHubHTTPError as error:
        raise HubError(f"cannot fetch {source!r} from the Hub: {error}") from None
    return folder / inside, folder.name  # the cache keeps each commit in a folder of its name


def hub_commit(source: str, revision: str | None = None) -> str | None:
    """The commit of a model's config in the cache, as it was loaded last; None where `source` is no Hub id.

    Args:
        source: ``user/name``.
        revision: A branch, tag or commit; main if None.
    """
    from huggingface_hub import try_to_load_from_cache

    if not _HUB_ID.fullmatch(source) or Path(source).is_dir() or source.count("/") != 1:
        return None
    found = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def hub_files(source: str) -> list[str] | None:
    """Names of the files of a Hub repository (or of its subfolder), without those of further subfolders.

    Args:
        source: As `from_hub` takes it. Without network, the files that the cache has.

    Returns:
        The names; None where `source` is no Hub id.

    Raises:
        HubError: The Hub cannot be reached or refuses.
    """
    found = _HUB_ID.fullmatch(source)
    if not found or ".." in source:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    inside = found["subfolder"].strip("/")
    if HF_HUB_OFFLINE:
        fetched = from_hub(source, ["*"])
        return sorted(path.name for path in fetched[0].iterdir() if path.is_file()) if fetched else None
    try:
        paths = HfApi().list_repo_files(found["repo"], revision=found["revision"])
    except HfHubHTTPError as error:
        raise HubError(f"cannot list the files of {source!r} on the Hub: {error}") from None
    except OSError as error:
        raise HubError(f"the Hub is not reached to list the files of {source!r}: {error}") from None
    start = f"{inside}/" if inside else ""
    names = [path.removeprefix(start) for path in paths if path.startswith(start)]
    return sorted(name for name in names if "/" not in name)


logger = logging.getLogger(__name__)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, gzip-compressed where the name ends in ``.gz``."""
    path = Path(path)
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DatasetError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


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
