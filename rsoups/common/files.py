"""Atomic writes, JSON lines, hashes, one run per folder, Hub downloads."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from rsoups.common.errors import DatasetError, HubError, OutputError, RsoupsError

logger = logging.getLogger(__name__)

# A pool for reading files while the caller does other work.
READING = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="rsoups-reading")

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<subfolder>(/[\w.-]+)*)(@(?P<revision>[\w./-]+))?")
_LOCK = ".rsoups.lock"


@contextmanager
def whole_folder(target: str | Path, marker: str) -> Iterator[Path]:
    """A context that yields a temporary folder to fill, and renames it to `target` at the end if nothing failed.

    Args:
        target: Final name. A folder of this name is replaced only if it is empty or holds `marker`.
        marker: Name of a file that only folders written by rsoups have.

    Raises:
        OutputError: `target` holds something else, or cannot be written.
    """
    target = Path(target)
    check_replaceable(target, marker)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with writing(target):
            partial.mkdir(parents=True)
            yield partial
            for path in (*partial.rglob("*"), partial):
                sync(path)
            _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing(target: str | Path, remark: str = "") -> Iterator[None]:
    """A context that turns an error of the disk, for example a full one, into one line.

    Args:
        target: File or folder that is being written.
        remark: Text that follows the reason.

    Raises:
        OutputError: The disk refuses, whichever library was writing.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        raise OutputError(f"cannot write {target}: {reason}{remark}") from error


def _disk_error(error: Exception) -> str | None:
    """Reason of a failed write, in an error of Python, safetensors or torch.save; None if it is another error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    _, of_disk, reason = str(error).partition("I/O error: ")
    if of_disk:
        return reason
    return "the file could not be written whole; is the disk full?" if "inline_container.cc" in str(error) else None


def check_replaceable(target: Path, marker: str) -> None:
    """Refuse a folder that `whole_folder` would not replace; for work that takes long before it writes.

    Raises:
        OutputError: It is a file, or holds something, and no `marker`.
    """
    if target.exists() and not (target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))):
        raise OutputError(f"{target} exists and holds no {marker}: it is not replaced; choose another folder")


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        OutputError: The file cannot be written; the old one is unchanged.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _replace(partial: Path, target: Path) -> None:
    # A folder cannot be renamed onto one that is not empty.
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
    """Wait until a file, or a folder's entries, are on the disk."""
    if os.name == "nt":  # Windows syncs no folder, and no file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_jsonl(
    path: str | Path,
    refusal: type[RsoupsError] = DatasetError,
    check: Callable[[str, Any], object] | None = None,
) -> list[Any]:
    """Values of a JSON-lines file, gzip-compressed if the name ends in ``.gz``; empty lines are skipped.

    Args:
        path: Name of the file.
        refusal: Class of the error.
        check: Is called with ``"<file>, line <number>"`` and each value.

    Raises:
        RsoupsError: `refusal`: the file cannot be read, or a line is not JSON.
    """
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if str(path).endswith(".gz") else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise refusal(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None

    values = []
    # Not splitlines: it also cuts at U+2028, which a text may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise refusal(f"{where}: not JSON ({error})") from None
        if check is not None:
            check(where, value)
        values.append(value)
    return values


@contextmanager
def only_run_in(folder: str | Path) -> Iterator[None]:
    """A context that keeps other runs out of a folder; the lock of a killed process is free.

    Raises:
        OutputError: Another process holds the folder.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(f"another run is writing into {folder}: wait for it, or choose another folder") from None
    except (OSError, NotImplementedError) as error:  # file systems without locks
        logger.warning("cannot keep other runs out of %s: %s", folder, error)

    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes no open file
                Path(lock.lock_file).unlink()
            lock.release()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the Hub -----------------------------------------------------------------------------------------------------------


def is_hub_id(source: str) -> bool:
    """Whether a text has the form ``user/name[/subfolder][@revision]``."""
    return _hub_id(source) is not None


def is_hub_name(source: str) -> bool:
    """Whether a text has the form ``user/name``."""
    match = _hub_id(source)
    return match is not None and match["repo"] == source


def _hub_id(source: str) -> re.Match[str] | None:
    return None if ".." in source else _HUB_ID.fullmatch(source)


def from_hub(source: str, names: Iterable[str]) -> tuple[Path, str] | None:
    """Fetch files of a Hub repository, or find them in the cache.

    Args:
        source: ``user/name``, ``user/name@revision``, ``user/name/subfolder@revision``.
        names: Names or patterns of the files in the subfolder.

    Returns:
        Folder of the files, and the commit; None if `source` is not a Hub id.

    Raises:
        HubError: The Hub cannot be reached or refuses.
    """
    match = _hub_id(source)
    if match is None:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    inside = match["subfolder"].strip("/")
    wanted = [f"{inside}/{name}" if inside else name for name in names]
    try:
        folder = Path(snapshot_download(match["repo"], revision=match["revision"], allow_patterns=wanted))
    except LocalEntryNotFoundError:
        raise HubError(f"no folder {source!r}; as a Hub id it is not in the cache and the Hub is not reached") from None
    except HfHubHTTPError as error:
        raise HubError(f"cannot fetch {source!r} from the Hub: {error}") from None
    return folder / inside, folder.name  # the cache keeps each commit in a folder of its name


def hub_commit(source: str, revision: str | None = None) -> str | None:
    """Commit of a model's config in the cache, as last loaded; None if `source` is not a Hub id.

    Args:
        source: ``user/name``.
        revision: Branch, tag or commit; main by default.
    """
    if not is_hub_name(source) or Path(source).is_dir():
        return None
    config = hub_file(source, "config.json", revision)
    return config.parent.name if config else None


def hub_file(repo: str, name: str, revision: str | None = None) -> Path | None:
    """A file in the Hub's cache; None if it is not there.

    Args:
        repo: ``user/name``.
        name: Name of the file.
        revision: Branch, tag or commit; main by default.
    """
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def hub_files(source: str) -> list[str] | None:
    """Names of the files of a Hub repository, or of its subfolder; without those in deeper folders.

    Offline, the files in the cache are listed.

    Args:
        source: Hub id, as `from_hub` takes it.

    Returns:
        The names; None if `source` is not a Hub id.

    Raises:
        HubError: The Hub cannot be reached or refuses.
    """
    match = _hub_id(source)
    if match is None:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    inside = match["subfolder"].strip("/")
    if HF_HUB_OFFLINE:
        fetched = from_hub(source, ["*"])
        return sorted(path.name for path in fetched[0].iterdir() if path.is_file()) if fetched else None
    try:
        paths = HfApi().list_repo_files(match["repo"], revision=match["revision"])
    except HfHubHTTPError as error:
        raise HubError(f"cannot list the files of {source!r} on the Hub: {error}") from None
    except OSError as error:
        raise HubError(f"the Hub is not reached to list the files of {source!r}: {error}") from None
    start = f"{inside}/" if inside else ""
    names = [path.removeprefix(start) for path in paths if path.startswith(start)]
    return sorted(name for name in names if "/" not in name)
