"""A sweep through a running vLLM server: soups are saved as LoRAs, and loaded by the server's runtime API.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve my/base --enable-lora --max-lora-rank 64
    rsoups sweep --server http://127.0.0.1:8000 ...

The server must see this machine's files. It draws its own random numbers, from one seed for each response. Log-probabilities
are those that it gives the tokens of a response when it reads the response as a prompt.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rsoups.adapters.adapter import Adapter
from rsoups.adapters.served import served_rank, write_served
from rsoups.generation.decoding import seed_of
from rsoups.generation.vllm_client import VLLMClient, token_ids
from rsoups.soups.interpolation import interpolate
from rsoups.sweeps.items import Answer, Item, Model, Nats, by_model
from rsoups.sweeps.places import soup_of

_BATCH = 128  # responses from one write of records to the next

logger = logging.getLogger(__name__)


class Server:
    """Generates like `Generator`, by a server.

    KL is known for greedy decoding and at temperature 1: at others the server does not tell log-probabilities.
    """

    on_cpu = False

    def __init__(
        self,
        url: str,
        adapters: Mapping[str, Adapter],
        others: Mapping[str, Adapter],
        folder: Path,
        *,
        method: str,
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ):
        """Ask the server for its base, and let it load one soup and the largest other adapter.

        Raises:
            ServerError: The server cannot be reached, serves no base, or does not load adapters of this rank.
            AdapterError: A soup or another adapter is nothing that vLLM can load.
        """
        self._adapters, self._others, self._seed = adapters, others, seed
        self._sampling: dict[str, Any] = {"temperature": temperature, "max_tokens": max_new_tokens, "top_p": 1.0}
        self._client = VLLMClient(url)
        self._folder = Path(tempfile.mkdtemp(prefix=".soups-", dir=folder)).resolve()
        self._saved: tuple[Any, Path] | None = None  # key of the model on the server, and its folder
        self._count = 0
        self._base_logps: dict[tuple[int, tuple[int, ...]], float] = {}  # by place of the prompt and tokens
        try:
            self._check(method)
        except BaseException:
            self.close()
            raise

    def _check(self, method: str) -> None:
        """Load the adapters with the largest ranks now, before there is any work that a refusal would waste."""
        soup = interpolate(self._adapters, method=method, allow_base_mismatch=True).as_adapter()
        largest = max([soup, *self._others.values()], key=served_rank)
        self._client.load(self._write(largest))

    def batches(self, items: list[Item]) -> Iterator[list[Item]]:
        """Divide items into batches of one model each."""
        for group in by_model(items):
            for start in range(0, len(group), _BATCH):
                yield group[start : start + _BATCH]

    def __call__(self, batch: list[Item]) -> list[Answer]:
        """Generate the responses of a batch."""
        requests = [self._request(item) for item in batch]
        answers = []
        for completion in self._client.complete(requests, self._adapter_of(batch[0].model)):
            tokens = completion.usage.completion_tokens if completion.usage else 0
            answers.append(Answer(completion.choices[0].text, tokens, ids=token_ids(completion)))
        return answers

    def _request(self, item: Item) -> dict[str, Any]:
        seed = seed_of(self._seed, item.prompt, item.sample) % 2**31
        return {"prompt": item.ids, "seed": seed, **self._sampling}

    def nats(self, batch: list[Item], answers: list[Answer]) -> list[Nats]:
        """KL to the base and negative log-likelihood under the base; unknown if the server tells no token ids."""
        pairs = [(item, answer.ids) for item, answer in zip(batch, answers, strict=True) if answer.ids]
        if len(pairs) < len(batch):
            logger.warning("the server tells no token ids (vLLM 0.11 and later do): KL and base_nll are unknown")
            return [Nats() for _ in batch]

        keys = [(item.place, tuple(ids)) for item, ids in pairs]
        prompts = {key: item.ids for key, item in zip(keys, batch, strict=True)}
        new = {key: prompt for key, prompt in prompts.items() if key not in self._base_logps}
        self._base_logps |= self._logps(new, None)

        model = batch[0].model
        own = self._base_logps
        if not model.is_base and self._sampling["temperature"] in (0, 1):
            own = self._logps(prompts, self._adapter_of(model))
        nats = []
        for key in keys:
            base = self._base_logps[key]
            known = model.is_base or own is not self._base_logps
            nats.append(Nats(round(own[key] - base, 4) if known else None, round(-base, 4)))
        return nats

    def _logps(
        self, prompts: Mapping[tuple[int, tuple[int, ...]], list[int]], adapter: Path | None
    ) -> dict[tuple[int, tuple[int, ...]], float]:
        """Σ log p of responses, at temperature 1 and in nats, by their keys."""
        read = self._client.read([(prompt, list(response)) for (_, response), prompt in prompts.items()], adapter)
        return {key: sum(logps) for key, logps in zip(prompts, read, strict=True)}

    def _adapter_of(self, model: Model) -> Path | None:
        """Folder of a model's adapter, written if it is another one than before; None for the base."""
        if model.is_base:
            return None
        if self._saved is None or self._saved[0] != model.key:
            folder = self._write(soup_of(model, self._adapters, self._others).as_adapter())
            self._saved = model.key, folder
        return self._saved[1]

    def _write(self, adapter: Adapter) -> Path:
        """Write an adapter into a new folder, in place of the one before, whose files the server needs no longer."""
        self._count += 1
        folder = self._folder / f"rsoups-{os.getpid()}-{self._folder.name[-6:]}-{self._count}"
        write_served(adapter, folder)
        for old in self._folder.iterdir():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        return folder

    def close(self) -> None:
        """Unload the soup and remove the files."""
        try:
            self._client.close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
