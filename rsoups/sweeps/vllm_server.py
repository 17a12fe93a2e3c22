"""A sweep through a running vLLM server: soups written as LoRAs, loaded by its runtime API, answered over HTTP.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve my/base --enable-lora --max-lora-rank 64
    rsoups sweep --server http://127.0.0.1:8000 ...

The server has to see this machine's files. Its random numbers are its own, from a seed for each response.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from rsoups.adapters.adapter import Adapter
from rsoups.common.errors import AdapterError, ServerError
from rsoups.generation.decoding import seed_of
from rsoups.soups.interpolation import interpolate
from rsoups.soups.soup import Soup
from rsoups.sweeps.items import Answer, Item, Model, Nats

_AT_ONCE = 32  # requests; vLLM batches what it has
_BATCH = 128  # responses from one record write to the next
_TRIES = 5
_PURE = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}  # else the model's generation config applies


class Server:
    """Answers items as `Generator` does; `kl` and `base_nll` are not known."""

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
            ServerError: It cannot be reached.
        """
        self._adapters, self._others, self._seed = adapters, others, seed
        self._settings = {"temperature": temperature, "max_tokens": max_new_tokens} | _PURE
        self._client = httpx.Client(base_url=url.rstrip("/"), timeout=600)
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="rsoups-server")
        served = self._ask("GET", "/v1/models").json()["data"]
        self._base: str = next(model["id"] for model in served if not model.get("parent"))
        self._folder = Path(tempfile.mkdtemp(prefix=".soups-", dir=folder)).resolve()
        self._loaded: dict[str, str] = {}  # names on the server, by model

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Items of one model each."""
        apart: dict[str, list[Item]] = {}
        for item in items:
            apart.setdefault(item.model.key, []).append(item)
        for of_one in apart.values():
            for start in range(0, len(of_one), _BATCH):
                yield of_one[start : start + _BATCH]

    def __call__(self, batch: list[Item]) -> list[Answer]:
        name = self._name(batch[0].model)

        def answer(item: Item) -> Answer:
            seed = seed_of(self._seed, item.prompt, item.sample) % 2**31
            asked = {"model": name, "prompt": item.ids, "seed": seed} | self._settings
            found = self._ask("POST", "/v1/completions", asked).json()
            return Answer(found["choices"][0]["text"], found["usage"]["completion_tokens"])

        return list(self._pool.map(answer, batch))

    def nats(self, batch: list[Item], answers: list[Answer]) -> list[Nats]:
        """Not known: the server would have to be asked for every token's log p of the base."""
        return [Nats() for _ in answers]

    def _name(self, model: Model) -> str:
        """The model's name on the server, which has loaded it; the one before is unloaded."""
        if model.ensemble:
            raise AdapterError("a server has no prediction ensembles: leave `ensemble` out, or sweep without `server`")
        if model.soup is None and model.other is None:
            return self._base
        if model.key not in self._loaded:
            self._unload()
            name = f"rsoups-{os.getpid()}-{self._folder.name[-6:]}-{len(list(self._folder.iterdir()))}"
            if model.soup:
                row, method = list(model.soup.values()), model.method or "exact"
                soup = interpolate(self._adapters, row, method=method, allow_base_mismatch=True)  # compared by `sweep`
            else:
                soup = interpolate([self._others[model.other or ""]], [1.0])
            assert isinstance(soup, Soup)
            soup.save_pretrained(self._folder / name)
            self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self._folder / name)})
            self._loaded[model.key] = name
        return self._loaded[model.key]

    def _unload(self) -> None:
        for name in self._loaded.values():
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        self._loaded = {}

    def close(self) -> None:
        """Unload the soups and remove their files."""
        try:
            self._unload()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._client.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(self, method: str, path: str, data: dict[str, Any] | None = None) -> httpx.Response:
        """An answer of the server, which may need some tries.

        Raises:
            ServerError: It cannot be reached, goes on to fail, or refuses.
        """
        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(2.0 ** (attempt - 2))
            try:
                response = self._client.request(method, path, json=data)
            except httpx.TransportError as error:
                problem = f"is not reached ({type(error).__name__})"
                continue
            if response.is_success:
                return response
            problem = f"answers {response.status_code} to {path}: {response.text[:300]}"
            if response.status_code != 429 and response.status_code < 500:
                break
        hint = "serve with --enable-lora, --max-lora-rank of the soup's rank, VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        raise ServerError(f"the server {self._client.base_url} {problem}; {hint}")
