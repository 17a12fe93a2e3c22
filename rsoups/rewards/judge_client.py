"""Ratings from an OpenAI-compatible server: asked for once each, retried, checked, kept on disk, counted."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from rsoups.common.errors import RewardError

_LONGEST_WAIT = 60.0  # seconds between two requests, whatever a server's Retry-After asks for
_PASSING = (408, 409, 425, 429)  # and 5xx: what may be different next time
_SHOWN = 300  # characters of a server's words in an error

logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What a judge has cost so far.

    Attributes:
        calls: Requests that were sent, retries among them.
        cached: Ratings that were found on disk, or asked for twice in one batch.
        retries: Requests sent again after a failure.
        failures: Requests without a rating: refused, cut off, too slow, or not parsed.
        input_tokens, output_tokens: As the server counts them.
        cost: In the unit of the card's price; 0 without one.
    """

    calls: int = 0
    cached: int = 0
    retries: int = 0
    failures: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0

    def __str__(self) -> str:
        return ", ".join(f"{field.name.replace('_', ' ')} {getattr(self, field.name):g}" for field in fields(self))


class _Failure(Exception):
    """One request without a rating: why, how long the server wants us to wait, and whether another one may help."""

    def __init__(self, reason: str, wait: float | None = None, passing: bool = True):
        super().__init__(reason)
        self.reason, self.wait, self.passing = reason, wait, passing


class Client:
    """One server, one model, one scale; safe to call from several threads.

    Args:
        url: Of the chat completions.
        key: The server's key, None for none.
        scale: Lowest and highest rating.
        attempts, timeout, price: As in a card.
        cache: Folder of the ratings, shared by any number of processes.

    Raises:
        RewardError: A key that cannot be sent.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        scale: Sequence[int],
        attempts: int,
        timeout: float,
        price: Mapping[str, float] | None,
        cache: Path,
    ):
        import httpx2  # comes with huggingface_hub 2, which speaks HTTP with it

        if key is not None and not re.fullmatch(r"[!-~]+", key):  # the HTTP library would show it in its error
            raise RewardError("a judge's key holds blanks or characters that no header can carry")
        self._key, self._scale, self._attempts, self._price, self._cache = key, scale, attempts, price, cache
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=None)  # the caller's threads are the limit
        self._url, self._http = url, httpx2.Client(headers=headers, timeout=timeout, limits=limits)
        self._errors = (httpx2.TransportError, httpx2.DecodingError)
        self._lock = threading.Lock()
        self.counts = Counts()

    def rating(self, body: dict[str, Any], stop: threading.Event) -> int:
        """The rating that answers a request's body: from disk, else from the server.

        Args:
            body: Of the request; all of it, and the server's URL, is the key of the cache.
            stop: Ends the waiting between attempts.

        Raises:
            RewardError: No rating in all attempts, or a refusal that another attempt does not change.
        """
        text = json.dumps({"url": self._url, "body": body, "scale": list(self._scale)}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        path = self._cache / name[:2] / f"{name}.json"
        if (found := self._read(path)) is not None:
            self._count(cached=1)
            return found
        for attempt in range(1, self._attempts + 1):
            try:
                rating = self._ask(body)
                self._write(path, rating)
                return rating
            except _Failure as failure:
                self._count(failures=1)
                if not failure.passing or attempt == self._attempts:
                    tried = f" in {attempt} attempts" if failure.passing else ""
                    raise RewardError(f"no rating{tried}: {failure.reason}") from None
                wait = failure.wait if failure.wait is not None else 2.0 ** (attempt - 1) * random.uniform(0.5, 1)
                logger.info("judge: %s; again in %.1f s", failure.reason, min(wait, _LONGEST_WAIT))
                if stop.wait(min(wait, _LONGEST_WAIT)):
                    raise RewardError("stopped before the rating came") from None
                self._count(retries=1)
        raise AssertionError("unreachable")

    def count_cached(self, number: int) -> None:
        self._count(cached=number)

    def _ask(self, body: dict[str, Any]) -> int:
        self._count(calls=1)
        try:
            response = self._http.post(self._url, json=body)
        except self._errors as error:
            raise _Failure(self._shown(f"{type(error).__name__} {error}")) from None
        if response.status_code != 200:
            passing = response.status_code in _PASSING or response.status_code >= 500
            wait = _seconds(response.headers.get("Retry-After"))
            raise _Failure(f"status {response.status_code}: {self._shown(response.text)}", wait, passing)
        try:
            reply = response.json()
            content = reply["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise _Failure(f"not a chat completion: {self._shown(response.text)}") from None
        self._count_usage(reply.get("usage"))
        rating = parse_rating(content, self._scale)
        if rating is None:
            raise _Failure(f"not a rating from {self._scale[0]} to {self._scale[1]}: {self._shown(str(content))}")
        return rating

    def _shown(self, text: str) -> str:
        """The beginning of a server's words, on one line, without the key that it may repeat."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:_SHOWN]

    def _count(self, **more: float) -> None:
        with self._lock:
            for name, number in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + number)

    def _count_usage(self, usage: Any) -> None:
        usage = usage if isinstance(usage, dict) else {}
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        given, made = (number if isinstance(number, int) else 0 for number in tokens)
        price = self._price or {"input": 0.0, "output": 0.0}
        cost = (given * price["input"] + made * price["output"]) / 1e6
        self._count(input_tokens=given, output_tokens=made, cost=cost)

    def _read(self, path: Path) -> int | None:
        try:
            rating = json.loads(path.read_text("utf-8"))["rating"]
        except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged: asked for again
            return None
        return rating if type(rating) is int and self._scale[0] <= rating <= self._scale[1] else None

    def _write(self, path: Path, rating: int) -> None:
        """Keep a rating, under its name only when whole: other processes may read and write beside this one."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(suffix=".partial", dir=path.parent)
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    json.dump({"rating": rating}, file)
                os.replace(partial, path)
            except BaseException:
                os.unlink(partial)
                raise
        except OSError as error:
            logger.warning("cannot keep a judge's rating in %s: %s", self._cache, error)


def parse_rating(content: Any, scale: Sequence[int]) -> int | None:
    """The rating in an answer: one JSON object ``{"score": 4}`` or one number, an integer of the scale; None for all else."""
    try:
        value = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        return None
    if isinstance(value, dict) and value.keys() == {"score"}:
        value = value["score"]
    return value if type(value) is int and scale[0] <= value <= scale[1] else None


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header, seconds or a date, in seconds from now."""
    if retry_after is None:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
