"""Run a sweep: generate, score and record what is missing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from rsoups.adapters.adapter import Adapter
from rsoups.adapters.lineage import Manifest
from rsoups.common.errors import DatasetError
from rsoups.common.files import read_jsonl
from rsoups.data.prompts import fit_prompts, question_of
from rsoups.data.training_data import chat_template_of
from rsoups.fronts.grids import largest_gap
from rsoups.fronts.notes import trained_on_of
from rsoups.fronts.reading import mean_score
from rsoups.generation.decoding import Prompt, encode
from rsoups.rewards.functions import as_reward
from rsoups.sweeps.generation import Base, Generator
from rsoups.sweeps.items import Answer, Item, Model, Nats
from rsoups.sweeps.records import Key, Records, gather, model_key
from rsoups.sweeps.vllm_server import Server

ENSEMBLE = "ensemble"
_WAITING = 2  # batches that wait to be scored

logger = logging.getLogger(__name__)


class Run:
    """The work of one process: items that no record holds yet, in batches, which are scored beside the generation."""

    start: Callable[[], Generator | Server]  # what answers, when there is something to be answered

    def __init__(
        self,
        models: list[Model],
        asked: Asked,
        rewards: Mapping[str, Callable[..., Any]],
        cut: Callable[[str], str],
        samples: int,
        seed: int,
        path: Path,
        processes: Processes,
        progress: bool,
    ):
        self._models, self._asked, self._cut, self._samples, self._seed = models, asked, cut, samples, seed
        self._path, self._processes, self._progress = path, processes, progress
        self._rewards = {name: as_reward(reward, name) for name, reward in rewards.items()}
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="rsoups-scoring")
        self._models_here = [name for name, reward in self._rewards.items() if reward.is_model]
        self._scores: dict[tuple[int, str], dict[str, float]] = {}  # of what was said, by reward
        self._made: Generator | Server | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        self._scoring.shutdown(cancel_futures=True)
        if self._made is not None:
            self._made.close()

    def until_done(self, models: Sequence[Model]) -> None:
        """Answer what these models have not answered yet, and gather the records of all processes."""
        self._processes.wait()  # for `prepare`, or for the records that were gathered before
        records = Records(self._path, self._processes.rank, self._processes.count)
        todo = [item for item in self._items(models) if _key(item) not in records.done]
        if todo:
            share = sorted(todo, key=lambda item: len(item.ids), reverse=True)[
                self._processes.rank :: self._processes.count
            ]
            self._answer(share, records)
        self._processes.wait()
        if self._processes.is_main:
            gather(self._path, map(_key, self._items(self._models)))
        self._processes.wait()

    def _items(self, models: Sequence[Model]) -> Iterator[Item]:
        """In the order of the records file."""
        for model in models:
            for place, (prompt, ids) in enumerate(zip(self._asked.prompts, self._asked.ids, strict=True)):
                for sample in range(self._samples):
                    yield Item(model, place, prompt, ids, sample)

    def _answer(self, items: list[Item], records: Records) -> None:
        from tqdm.auto import tqdm

        self._made = generate = self._made or self.start()
        waiting: deque[tuple[list[Item], list[Answer], list[Nats], Future[None]]] = deque()
        shown = self._progress and self._processes.is_main
        with tqdm(total=len(items), unit="response", disable=not shown, desc="sweep") as bar:

            def record(most: int) -> None:
                while waiting and (len(waiting) > most or waiting[0][-1].done()):
                    batch, answers, nats, scored = waiting.popleft()
                    scored.result()
                    records.append(list(map(self._record, batch, answers, nats)))
                    bar.update(len(batch))

            # Models on the same cores are not run beside each other: their threads wait for one another, and a sweep takes a
            # third longer. Functions, which may be waiting for a judge, are.
            here = self._models_here if generate.on_cpu else []
            beside = [name for name in self._rewards if name not in here]
            for batch in generate.batches(items):
                answers = generate(batch)
                new = [key for key in dict.fromkeys(map(self._said, batch, answers)) if key not in self._scores]
                self._scores |= {key: {} for key in new}  # what several models say to a prompt is scored once
                scored = self._scoring.submit(self._score, new, beside)
                nats = generate.nats(batch, answers)
                self._score(new, here)
                waiting.append((batch, answers, nats, scored))
                record(_WAITING)
            record(0)

    def _said(self, item: Item, answer: Answer) -> tuple[int, str]:
        """What is scored: the prompt's place, and what rewards see of the response."""
        return item.place, self._cut(answer.text)

    def _score(self, said: list[tuple[int, str]], names: Sequence[str]) -> None:
        if not said:
            return
        places, responses = zip(*said, strict=True)
        prompts = [self._asked.prompts[place] for place in places]
        columns = {name: [column[place] for place in places] for name, column in self._asked.columns.items()}
        for name in names:
            scores = self._rewards[name](prompts, list(responses), **columns)
            for key, score in zip(said, scores, strict=True):
                self._scores[key][name] = score

    def _record(self, item: Item, answer: Answer, nats: Nats) -> dict[str, Any]:
        head, said = item.model.head, self._said(item, answer)
        scores = {name: self._scores[said][name] for name in self._rewards}
        record = head | {"prompt": item.prompt, "response": said[1], "rewards": scores}
        record |= {"seed": self._seed, "sample": item.sample, "tokens": answer.tokens, **nats._asdict()}
        if abstained := [name for name, score in scores.items() if score is None]:
            record["abstained"] = abstained
        return {key: value for key, value in record.items() if value is not None or key in head}

    def wanted(self) -> list[float] | None:
        """λ of one more soup, of the records of those there are."""
        soups = [model for model in self._models if model.soup]
        found: dict[str, list[dict[str, Any]]] = {}
        for record in read_jsonl(self._path):
            found.setdefault(model_key(record), []).append(record)
        means = np.array([[mean_score(found[model.key], name) for name in self._rewards] for model in soups])
        return largest_gap([list((model.soup or {}).values()) for model in soups], means)


@dataclass(frozen=True)
class Asked:
    """The prompts that leave room for a response: as given, in tokens, with their columns."""

    prompts: list[Prompt]
    ids: list[list[int]]
    columns: dict[str, list[Any]]

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence[Any]] | None,
        opened: Base,
        new: int,
        policy: str,
        template: Mapping[str, Any],
    ) -> Asked:
        for prompt in prompts:
            question_of(prompt)  # refuses what asks nothing
        different = {json.dumps(prompt) for prompt in prompts}
        if not prompts or len(different) != len(prompts):
            raise DatasetError(
                f"a sweep needs prompts, each once; got {len(prompts)}, {len(different)} of them different"
            )
        columns = columns or {}
        for name, column in columns.items():
            if len(column) != len(prompts):
                raise DatasetError(f"column {name!r} has {len(column)} values for {len(prompts)} prompts")
        ids = [encode(opened.tokenizer, prompt, template) for prompt in prompts]
        if not all(ids):
            raise DatasetError(f"prompt {prompts[ids.index([])]!r} has no tokens")
        places = list(range(len(prompts)))
        if opened.context is not None:
            places = fit_prompts(places, [len(one) for one in ids], opened.context - new, policy)
        if len(places) < len(prompts):
            logger.warning("%d of %d prompts dropped: too long", len(prompts) - len(places), len(prompts))
        kept = {name: [column[place] for place in places] for name, column in columns.items()}
        return cls([prompts[place] for place in places], [ids[place] for place in places], kept)


class Processes:
    """This process among those of `accelerate launch`."""

    def __init__(self) -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            from accelerate import PartialState

            slowest = timedelta(days=7)  # that the others wait for
            self._state = PartialState(cpu=not torch.accelerator.is_available(), timeout=slowest)
        self.rank = self._state.process_index if self._state else 0
        self.count = self._state.num_processes if self._state else 1
        self.is_main = self.rank == 0

    def wait(self) -> None:
        if self._state:
            self._state.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[None]:
        """A context that the others enter when the main process has left it."""
        return self._state.main_process_first() if self._state else nullcontext()


def trained_on(manifests: Sequence[Manifest]) -> dict[str, float]:
    """The rewards that an adapter's manifest names, with their weights; empty where it is not known."""
    rewards = (manifests[0].get("rewards") or []) if manifests else []
    return trained_on_of({"trained_on": {"it": {r.get("name"): r.get("weight", 1.0) for r in rewards}}}).get("it", {})


def template_of(
    given: Mapping[str, Any] | None, manifests: Mapping[str, Sequence[Manifest]], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Variables of the chat template: those given, or those that the adapters were trained with; none for texts."""
    if all(isinstance(prompt, str) for prompt in prompts):
        return {}
    return chat_template_of(manifests) if given is None else dict(given)


def _key(item: Item) -> Key:
    return item.model.key, json.dumps(item.prompt), item.sample


def check_texts(path: Path) -> None:
    if not any(record["response"] for record in read_jsonl(path)):
        raise DatasetError(
            f"all responses in {path} are empty: the model ends its responses at once, or `cut` leaves nothing of them"
        )


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def source_of(adapter: Adapter, folder: Path) -> str | None:
    """Where an adapter is: a Hub id, or a folder as seen from the records'; None of one in memory."""
    path = Path(adapter.source).expanduser()
    if path.is_dir():
        return os.path.relpath(path.resolve(), folder.resolve())
    return adapter.source if "of a live model" not in adapter.source else None


def provenance(base: Any) -> dict[str, Any]:
    return {
        "base": base if isinstance(base, str) else None,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("rsoups", "transformers", "peft", "torch")},
    }
