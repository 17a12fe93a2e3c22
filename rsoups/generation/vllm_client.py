"""A client of a running vLLM server, which loads adapters as it runs and may restart meanwhile.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve my/base --enable-lora --max-lora-rank 64

The server must see this machine's files. Prompts and responses are token ids, so no text is tokenized twice.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.adapters.filenames import CONFIG_FILE
from rsoups.common.errors import ServerError

if TYPE_CHECKING:
    from openai.types import Completion

_PARALLEL = 128  # requests at a time; vLLM batches those that it has
_TRIES = 4  # further ones for a request that fails for a moment, within seconds
_SECONDS = 600.0  # for one response
_RESTARTS = 5  # of the server during one call
_PATIENCE = 900.0  # seconds that a restart may take
_POLL = 2.0  # seconds between two looks for the server
_HINT = "serve with --enable-lora, --max-lora-rank of the adapter's rank, VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
# Where nothing is said, the generation config of the served model applies.
_PURE = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}

logger = logging.getLogger(__name__)


class _LostError(Exception):
    """The server is gone, or has come back without the adapter."""


class VLLMClient:
    """Responses of a running vLLM server, by its base or with one adapter at a time.

    Attributes:
        base: Name of the base on the server.
    """

    def __init__(self, url: str):
        """Ask the server for its base.

        Raises:
            ServerError: The server cannot be reached, or it serves no base.
        """
        from openai import OpenAI

        key = os.environ.get("VLLM_API_KEY", "none")  # not OpenAI's own key: the server may be anyone's
        self.url = url.rstrip("/").removesuffix("/v1")
        self._client = OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=_TRIES, timeout=_SECONDS)
        self._once = self._client.with_options(max_retries=0)  # for calls whose failure says something
        self._pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="rsoups-server")
        self._loaded: Path | None = None  # folder of the adapter on the server
        try:
            with self._refusals():
                self.base = self._served_base()
        except _LostError as lost:
            raise ServerError(f"the server {self.url} {lost}; {_HINT}") from None

    def _served_base(self) -> str:
        served = list(self._once.models.list())
        bases: list[str] = [model.id for model in served if not getattr(model, "parent", None)]
        if not bases:
            raise ServerError(f"the server {self.url} serves no base, only {[model.id for model in served]}")
        return bases[0]

    def complete(self, requests: Sequence[Mapping[str, Any]], adapter: Path | None) -> list[Completion]:
        """Complete prompts. If the server restarts, wait for it, load the adapter again, and repeat what was lost.

        Args:
            requests: Fields of vLLM's completion requests, without ``model``. Sampling is pure unless they say otherwise.
            adapter: Folder of an adapter as `rsoups.adapters.served` writes it, under a name that no other weights have
                ever had: the server remembers prompts by this name. None asks the base.

        Raises:
            ServerError: The server refuses, does not come back, or comes back with another base.
        """
        return self._repeated(adapter, lambda model: self._pool.map(partial(self._complete, model), requests))

    def read(self, texts: Sequence[tuple[list[int], list[int]]], adapter: Path | None) -> list[list[float]]:
        """log p of each token of responses, at temperature 1 and in nats, as `complete` waits and repeats.

        They are read one at a time: on a processor, vLLM (0.32) dies of two prompts whose log-probabilities it is asked for at
        once, if it was started with --enable-lora.

        Args:
            texts: Tokens of prompts, and of the response to each.
            adapter: As of `complete`.

        Raises:
            ServerError: As of `complete`; or the server sends no log-probabilities, or logits in their place.
        """
        fields = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        requests = [{"prompt": [*prompt, *response], **fields} for prompt, response in texts]
        completions = self._repeated(adapter, lambda model: [self._complete(model, request) for request in requests])
        return [_read(completion, response) for completion, (_, response) in zip(completions, texts, strict=True)]

    def _repeated(self, adapter: Path | None, complete: Callable[[str], Iterable[Completion]]) -> list[Completion]:
        """Completions by the model of this name, made again after each restart of the server."""
        restarts = 0
        while True:
            try:
                with self._refusals():
                    return list(complete(self.base if adapter is None else self._load(adapter)))
            except _LostError as lost:
                if restarts == _RESTARTS:
                    raise ServerError(f"the server {self.url} {lost}, {restarts} times in a row; see its log") from None
                restarts += 1
                self._loaded = None
                self._wait(lost)

    def _complete(self, model: str, request: Mapping[str, Any]) -> Completion:
        from openai import InternalServerError, NotFoundError

        try:
            return self._client.completions.create(
                model=model, prompt=request["prompt"], extra_body={**_PURE, "return_token_ids": True, **request}
            )
        except NotFoundError as error:  # a server that has restarted does not know the adapter
            raise _LostError(f"does not know the model {model}: {error.response.text[:300]}") from error
        except InternalServerError as error:
            raise _LostError(f"answers {error.status_code}: {error.response.text[:300]}") from error

    def load(self, folder: Path) -> None:
        """Let the server load an adapter, instead of the one before; `complete` does so too.

        Raises:
            ServerError: The server refuses, or is not reached.
        """
        try:
            with self._refusals():
                self._load(folder)
        except _LostError as lost:
            raise ServerError(f"the server {self.url} {lost}; {_HINT}") from None

    def _load(self, folder: Path) -> str:
        """Load an adapter, and return its name on the server.

        It gets a new name and is not loaded in place of the one before, because vLLM would go on with the keys and values that
        it remembers of prompts under the same name and path.
        """
        from openai import APIStatusError

        if self._loaded == folder:
            return folder.name
        self._unload()
        try:
            self._post("/load_lora_adapter", {"lora_name": folder.name, "lora_path": str(folder)})
        except APIStatusError as error:
            text = error.response.text
            if error.status_code in (502, 503, 504) or "EngineCore" in text or "EngineDead" in text:
                raise _LostError(f"answers {error.status_code}: {text[:300]}") from error
            if "max_lora_rank" in text:
                rank = json.loads((folder / CONFIG_FILE).read_text("utf-8"))["r"]
                raise ServerError(
                    f"the server {self.url} takes no LoRA of rank {rank}: serve with --max-lora-rank {rank}, or take a "
                    "smaller rank (for soups: method svd)"
                ) from None
            if "already been loaded" not in text:  # by another process of the same run
                raise
        self._loaded = folder
        return folder.name

    def _unload(self) -> None:
        """Let the server forget the adapter."""
        from openai import APIStatusError

        if self._loaded is None:
            return
        try:
            self._post("/unload_lora_adapter", {"lora_name": self._loaded.name})
        except APIStatusError:
            logger.debug("the server has forgotten %s already", self._loaded.name)
        self._loaded = None

    def _post(self, path: str, body: dict[str, str]) -> None:
        """Call vLLM's own API, which answers with plain text."""
        self._once.post(path, cast_to=str, body=body)

    def _wait(self, lost: _LostError) -> None:
        """Wait until the server answers again.

        Raises:
            ServerError: It stays away, or has another base now.
        """
        logger.warning("the server %s %s: waiting for it up to %.0f minutes", self.url, lost, _PATIENCE / 60)
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                with self._refusals():
                    base = self._served_base()
                break
            except _LostError as still:
                if time.monotonic() > end:
                    raise ServerError(
                        f"the server {self.url} {still}, for {_PATIENCE / 60:.0f} minutes; start it and run again: what is "
                        "finished is kept"
                    ) from None
            time.sleep(_POLL)
        if base != self.base:
            raise ServerError(
                f"the server {self.url} serves {base!r} now, no longer {self.base!r}; what is finished is kept"
            )

    def close(self) -> None:
        """Unload the adapter, if the server is still there."""
        try:
            with self._refusals():
                self._unload()
        except (_LostError, ServerError) as error:
            logger.debug("nothing was unloaded: %s", error)
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._client.close()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn the client's errors, which come after its retries, into ServerError, or _LostError if waiting may help."""
        from openai import APIConnectionError, APIStatusError, OpenAIError

        try:
            yield
        except APIStatusError as error:
            status, path, text = error.status_code, error.request.url.path, error.response.text[:300]
            if status in (502, 503, 504):
                raise _LostError(f"answers {status} to {path}: {text}") from error
            problem = f"answers {status} to {path}: {text}"
        except APIConnectionError as error:
            raise _LostError(f"is not reached ({type(error.__cause__ or error).__name__})") from error
        except OpenAIError as error:
            problem = f"sends no completion ({error})"
        else:
            return
        raise ServerError(f"the server {self.url} {problem}; {_HINT}")


def token_ids(completion: Completion) -> list[int] | None:
    """Tokens of a response, the end token included; None from a server that does not tell them."""
    return getattr(completion.choices[0], "token_ids", None)


def _read(completion: Completion, response: Sequence[int]) -> list[float]:
    """log p of a response's tokens, which end the prompt of a completion."""
    rows = getattr(completion.choices[0], "prompt_logprobs", None) or []
    try:
        pairs = zip(rows[-len(response) :], response, strict=True)
        logps = [float(row[str(token)]["logprob"]) for row, token in pairs]
    except (ValueError, KeyError, TypeError):
        raise ServerError(f"the server sends no log-probabilities of a prompt's tokens: {str(rows)[:200]}") from None
    if max(logps, default=0.0) > 1e-3:
        raise ServerError(
            f"the server sends {max(logps):.3g} as a log-probability: serve with --logprobs-mode raw_logprobs"
        )
    return logps
