"""A sweep through a running vLLM server: soups are saved as LoRAs, and loaded by the server's runtime API.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve my/base --enable-lora --max-lora-rank 64
    rsoups sweep --server http://127.0.0.1:8000 ...

The server must see this machine's files. It draws its own random numbers, from one seed for each response.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsoups.adapters.adapter import Adapter
from rsoups.common.errors import ServerError
from rsoups.generation.decoding import seed_of
from rsoups.sweeps.items import Answer, Item, Model, Nats, by_model
from rsoups.sweeps.places import soup_of

_PARALLEL = 32  # requests at a time; vLLM batches those that it has
_BATCH = 128  # responses from one write of records to the next
_RETRIES = 4
_SECONDS = 600.0  # for one response
# Without these, the model's generation config applies.
_PURE = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_HINT = "serve with --enable-lora, --max-lora-rank of the soup's rank, VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


class Server:
    """Generates like `Generator`, by a server; `kl` and `base_nll` are unknown."""

    on_cpu = False

    def __init__(
        self,
        url: str,
        adapters: Mapping[str, Adapter],
        others: Mapping[str, Adapter],
        folder: Path,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ):
        """Ask the server for its base.

        Raises:
            ServerError: The server cannot be reached, or it serves no base.
        """
        from openai import OpenAI

        self._adapters, self._others, self._seed = adapters, others, seed
        self._sampling: dict[str, Any] = {"temperature": temperature, "max_tokens": max_new_tokens, "top_p": 1.0}
        key = os.environ.get("VLLM_API_KEY", "none")  # not OpenAI's own key: the server may be anyone's
        self._url = url.rstrip("/")
        self._client = OpenAI(base_url=f"{self._url}/v1", api_key=key, max_retries=_RETRIES, timeout=_SECONDS)
        self._pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="rsoups-server")
        with self._refusals():
            served = list(self._client.models.list())
        bases = [model.id for model in served if not getattr(model, "parent", None)]
        if not bases:
            raise ServerError(f"the server {self._url} serves no base, only {[model.id for model in served]}")
        self._base = bases[0]
        self._folder = Path(tempfile.mkdtemp(prefix=".soups-", dir=folder)).resolve()
        self._loaded: tuple[Any, str] | None = None  # key of the model on the server, and its name there
        self._count = 0

    def batches(self, items: list[Item]) -> Iterator[list[Item]]:
        """Divide items into batches of one model each."""
        for group in by_model(items):
            for start in range(0, len(group), _BATCH):
                yield group[start : start + _BATCH]

    def __call__(self, batch: list[Item]) -> list[Answer]:
        """Generate the responses of a batch."""
        with self._refusals():
            name = self._name(batch[0].model)
            return list(self._pool.map(lambda item: self._answer(name, item), batch))

    def _answer(self, name: str, item: Item) -> Answer:
        seed = seed_of(self._seed, item.prompt, item.sample) % 2**31
        completion = self._client.completions.create(
            model=name, prompt=item.ids, seed=seed, **self._sampling, extra_body=_PURE
        )
        tokens = completion.usage.completion_tokens if completion.usage else 0
        return Answer(completion.choices[0].text, tokens)

    def nats(self, batch: list[Item], answers: list[Answer]) -> list[Nats]:
        """Unknown: the server does not tell the base's log-probability of every token."""
        return [Nats() for _ in answers]

    def _name(self, model: Model) -> str:
        """Name of a model on the server, which loads the model if needed and unloads the one before."""
        if model.is_base:
            return self._base
        if self._loaded is None or self._loaded[0] != model.key:
            self._unload()
            self._count += 1
            name = f"rsoups-{os.getpid()}-{self._folder.name[-6:]}-{self._count}"
            soup_of(model, self._adapters, self._others).save_pretrained(self._folder / name)
            self._post("/load_lora_adapter", {"lora_name": name, "lora_path": str(self._folder / name)})
            self._loaded = model.key, name
        return self._loaded[1]

    def _unload(self) -> None:
        if self._loaded is not None:
            self._post("/unload_lora_adapter", {"lora_name": self._loaded[1]})
            self._loaded = None

    def _post(self, path: str, body: dict[str, str]) -> None:
        """Call vLLM's own API, which answers with plain text."""
        self._client.post(path, cast_to=str, body=body)

    def close(self) -> None:
        """Unload the soup and remove the files."""
        try:
            with self._refusals():
                self._unload()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._client.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn the client's errors, which come after its retries, into ServerError."""
        from openai import APIConnectionError, APIStatusError, OpenAIError

        try:
            yield
        except APIStatusError as error:
            path, text = error.request.url.path, error.response.text[:300]
            problem = f"answers {error.status_code} to {path}: {text}"
        except APIConnectionError as error:
            problem = f"is not reached ({type(error.__cause__ or error).__name__})"
        except OpenAIError as error:
            problem = f"sends no completion ({error})"
        else:
            return
        raise ServerError(f"the server {self._url} {problem}; {_HINT}")
