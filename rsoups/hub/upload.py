"""Commit a folder to the Hub, retrying transient errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from rsoups.adapters.filenames import (
    CARD_FILE,
    CONFIG_FILE,
    FRONT_FILE,
    MANIFEST_FILE,
    PICTURE_FILE,
    SOUP_FILE,
    WEIGHTS_FILE,
)
from rsoups.common.errors import HubError

OUR_FILES = (WEIGHTS_FILE, CONFIG_FILE, SOUP_FILE, MANIFEST_FILE, CARD_FILE, FRONT_FILE, PICTURE_FILE)
_ATTEMPTS = 5
_LONGEST_WAIT = 60.0  # seconds
_HEAD_MOVED = (409, 412)
_T = TypeVar("_T")


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that is not ``user/name``."""
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise HubError(f"a repository is user/name; got {repo_id!r}")


def reserve(name: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Create an empty repository, if it does not exist: for runs that push when they end.

    Returns:
        Its id, ``user/name``; with the token's user where `name` has none.

    Raises:
        HubError: As `push`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    return str(retried(name, token, lambda: api.create_repo(name, private=private, exist_ok=True)).repo_id)


def commit(folder: Path, repo_id: str, private: bool | None, message: str, create_pr: bool, token: str | None) -> str:
    """Commit all files of a folder at once, and return the URL of the commit or the pull request.

    Raises:
        HubError: As `push`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    retried(repo_id, token, lambda: api.create_repo(repo_id, private=private, exist_ok=True))

    # Not `upload_folder`, which may make several commits of one folder, so that half of it could be published.
    def attempt() -> Any:
        head = api.model_info(repo_id)
        present = {sibling.rfilename for sibling in head.siblings or ()}
        # Files of an earlier push would tell of another model.
        stale = sorted(present.intersection(OUR_FILES) - files.keys())
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message=message,
            create_pr=create_pr,
            parent_commit=None if create_pr else head.sha,
        )

    info = retried(repo_id, token, attempt)
    return str(info.pr_url if create_pr else info.commit_url)


def retried(repo_id: str, token: str | None, call: Callable[[], _T]) -> _T:
    """Call, and call again after an error that waiting or a new head can help.

    Raises:
        HubError: The Hub refuses, is offline, or does not answer in a bounded number of attempts.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=_wait,
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        reraise=True,
    )
    try:
        return attempts(call)
    except OfflineModeIsEnabled:
        raise HubError(f"cannot publish {repo_id}: HF_HUB_OFFLINE is set") from None
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if _is_transient(error):
            reason = f"status {status}" if status else type(error).__name__
            raise HubError(
                f"the Hub did not take {repo_id} in {_ATTEMPTS} attempts ({reason}); nothing is half-published"
            ) from None
        if status in (401, 403):
            raise HubError(
                f"the Hub refused {repo_id} ({status}), with {_origin_of(token)}: it needs write scope for "
                f"{repo_id.split('/')[0]}; `hf auth login` takes another one"
            ) from None
        if isinstance(error, HfHubHTTPError):
            raise HubError(f"the Hub refused {repo_id} ({status}): {error.server_message or error}") from None
        raise


def _is_transient(error: BaseException) -> bool:
    import httpx2  # the HTTP client of huggingface_hub 2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (*_HEAD_MOVED, 429) or status >= 500
    # Offline mode is a ConnectionError too.
    is_cut = isinstance(error, (httpx2.TransportError, ConnectionError, TimeoutError))
    return is_cut and not isinstance(error, OfflineModeIsEnabled)


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds that the Hub asks for, or 1, 2, 4, ...; at most `_LONGEST_WAIT`."""
    error = state.outcome.exception() if state.outcome else None
    response = getattr(error, "response", None)
    wanted = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(wanted) if wanted.isdecimal() else 2.0 ** (state.attempt_number - 1), _LONGEST_WAIT)


def _origin_of(token: str | None) -> str:
    """Name the origin of the token, never the token."""
    from huggingface_hub import get_token

    if token is not None:
        return "the token that was given"
    if os.environ.get("HF_TOKEN"):
        return "the token in HF_TOKEN"
    return "the token of `hf auth login`" if get_token() else "no token"
