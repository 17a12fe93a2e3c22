"""Commit folders to the Hub, retrying transient errors."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from rsoups.adapters.filenames import (
    CARD_FILE,
    CONFIG_FILE,
    FRONT_FILE,
    MANIFEST_FILE,
    PICTURE_FILE,
    SOUP_FILE,
    WEIGHTS_FILE,
)
from rsoups.common.errors import HubError, OutputError
from rsoups.common.files import whole_folder

OUR_FILES = (WEIGHTS_FILE, CONFIG_FILE, SOUP_FILE, MANIFEST_FILE, CARD_FILE, FRONT_FILE, PICTURE_FILE)
_ATTEMPTS = 5
_LONGEST_WAIT = 60.0  # seconds
_T = TypeVar("_T")


def reserve(name: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Make a repository, empty as yet, if it is not there: for runs that will push when they end.

    Returns:
        Its id, ``user/name``; the token's user where `name` has none.

    Raises:
        HubError: As `push`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    return str(_retried(name, token, lambda: api.create_repo(name, private=private, exist_ok=True)).repo_id)


# --- how -------------------------------------------------------------------------------------------------------------


def publish(
    repo_id: str,
    write: Callable[[Path], None],
    marker: str | None,
    private: bool | None,
    message: str,
    create_pr: bool,
    dry_run: bool | str | Path,
    token: str | None,
) -> str:
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise HubError(f"a repository is user/name; got {repo_id!r}")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pushed"
        write(folder)
        if dry_run:
            out = Path(f"{repo_id.split('/')[1]}-dry-run" if dry_run is True else dry_run)
            if marker is None and out.exists():
                raise OutputError(f"{out} exists: it is not replaced; remove it or choose another folder")
            with whole_folder(out, marker or SOUP_FILE) as partial:
                shutil.copytree(folder, partial, dirs_exist_ok=True)
            return str(out)
        return _commit(folder, repo_id, private, message, create_pr, token)


def _commit(folder: Path, repo_id: str, private: bool | None, message: str, create_pr: bool, token: str | None) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    # Of an earlier push, and no longer true.
    stale = set(OUR_FILES) - files.keys()
    _retried(repo_id, token, lambda: api.create_repo(repo_id, private=private, exist_ok=True))

    def commit() -> Any:
        # Each attempt looks at the head anew, and commits on it or not at all; operations remember what was uploaded.
        head = api.model_info(repo_id)
        there = {sibling.rfilename for sibling in head.siblings or ()}
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(stale & there)]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            create_pr=create_pr,
            parent_commit=None if create_pr else head.sha,
        )

    made = _retried(repo_id, token, commit)
    return str(made.pr_url if create_pr else made.commit_url)


def _retried(repo_id: str, token: str | None, call: Callable[[], _T]) -> _T:
    """Call, and call again where waiting or a new head can help; explain where it cannot."""
    import httpx2  # what huggingface_hub 2 speaks HTTP with
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise HubError(
                    f"the Hub refused {repo_id} ({status}), with {_which(token)}: it needs write scope for "
                    f"{repo_id.split('/')[0]}; `hf auth login` takes another one"
                ) from None
            if status not in (409, 412, 429) and status < 500:  # 409, 412: the head is another one by now
                raise HubError(f"the Hub refused {repo_id} ({status}): {error.server_message or error}") from None
            reason, wait = f"status {status}", error.response.headers.get("Retry-After", "")
        except OfflineModeIsEnabled:
            raise HubError(f"cannot publish {repo_id}: HF_HUB_OFFLINE is set") from None
        except (httpx2.TransportError, ConnectionError, TimeoutError) as error:
            reason, wait = f"{type(error).__name__}", ""
        if attempt < _ATTEMPTS:
            time.sleep(min(float(wait) if wait.isdecimal() else 2.0 ** (attempt - 1), _LONGEST_WAIT))
    raise HubError(f"the Hub did not take {repo_id} in {_ATTEMPTS} attempts ({reason}); nothing is half-published")


def _which(token: str | None) -> str:
    """Where the token came from; never the token."""
    from huggingface_hub import get_token

    if token is not None:
        return "the token that was given"
    if os.environ.get("HF_TOKEN"):
        return "the token in HF_TOKEN"
    return "the token of `hf auth login`" if get_token() else "no token"
