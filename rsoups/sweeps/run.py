"""Run a sweep: generate, score and record the responses that are missing."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from rsoups.common.files import read_jsonl
from rsoups.fronts.grids import largest_gap
from rsoups.fronts.reading import mean_score
from rsoups.sweeps.generator import Generator
from rsoups.sweeps.items import Answer, Item, Model, Nats
from rsoups.sweeps.places import places_of
from rsoups.sweeps.plan import Plan
from rsoups.sweeps.records import Key, Records, gather, key_of, pin
from rsoups.sweeps.vllm_server import Server

_WAITING = 2  # batches that may wait for their scores while the next one is generated
_LONGEST_WAIT = timedelta(days=7)  # for the slowest process; torch's own limit is ten minutes
_Response = tuple[int, str]  # place of the prompt, and what rewards see of the response


@dataclass(frozen=True)
class _Batch:
    """Generated responses, whose scores by functions may still be missing."""

    items: list[Item]
    answers: list[Answer]
    nats: list[Nats]
    scored: Future[None]


class Processes:
    """This process among those of `accelerate launch`.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        is_main: Whether this process is the one that writes the files that all share.
    """

    def __init__(self) -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            from accelerate import PartialState

            self._state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
        self.rank: int = self._state.process_index if self._state else 0
        self.count: int = self._state.num_processes if self._state else 1
        self.is_main = self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self._state:
            self._state.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[None]:
        """A context that the other processes enter when the main process has left it."""
        return self._state.main_process_first() if self._state else nullcontext()


class Worker:
    """The work of one process: items without a record, in batches; scoring runs beside generation."""

    def __init__(self, plan: Plan, path: Path, processes: Processes, progress: bool):
        self._plan, self._path, self._processes, self._progress = plan, path, processes, progress
        self._models = plan.models()
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="rsoups-scoring")
        self._scores: dict[_Response, dict[str, float]] = {}
        self._generator: Generator | Server | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: Any) -> None:
        self._scoring.shutdown(cancel_futures=True)
        if self._generator is not None:
            self._generator.close()

    def run(self) -> None:
        """Evaluate all models of the plan, then the λ of its refinement."""
        self._evaluate(self._models)
        for _ in range(self._plan.settings.refine):
            row = self._next_lambda()
            if row is None:
                break
            self._models.append(self._plan.soup(row))
            self._evaluate(self._models[-1:])

    def _evaluate(self, models: Sequence[Model]) -> None:
        """Generate the missing responses of these models, and gather the records of all processes."""
        processes = self._processes
        processes.wait()  # until the main process has prepared, or gathered, the records file
        records = Records(self._path, processes.rank, processes.count)
        missing = [item for item in self._items(models) if _key(item) not in records.done]
        if missing:
            missing.sort(key=lambda item: len(item.ids), reverse=True)  # so that all shares have like lengths
            self._generate(missing[processes.rank :: processes.count], records)

        processes.wait()
        if processes.is_main:
            gather(self._path, map(_key, self._items(self._models)))
        processes.wait()

    def _items(self, models: Sequence[Model]) -> Iterator[Item]:
        """All items of some models, in the order of the records file."""
        table = self._plan.table
        for model in models:
            for place, (prompt, ids) in enumerate(zip(table.prompts, table.ids, strict=True)):
                for sample in range(self._plan.settings.samples):
                    yield Item(model, place, prompt, ids, sample)

    def _generate(self, items: list[Item], records: Records) -> None:
        from tqdm.auto import tqdm

        generator = self._generator = self._generator or self._open()
        # Reward models on the same cores are not run beside generation: the threads wait for one another, and a sweep takes a
        # third longer. Functions are run beside it, since they may wait for a judge.
        afterwards = [name for name, reward in self._plan.rewards.items() if generator.on_cpu and reward.is_model]
        in_parallel = [name for name in self._plan.rewards if name not in afterwards]

        waiting: deque[_Batch] = deque()
        shown = self._progress and self._processes.is_main
        with tqdm(total=len(items), unit="response", disable=not shown, desc="sweep") as bar:

            def write(most: int) -> None:
                """Write the batches that are scored, and wait for scores while more than `most` batches are waiting."""
                while waiting and (len(waiting) > most or waiting[0].scored.done()):
                    batch = waiting.popleft()
                    batch.scored.result()
                    records.append(list(map(self._record, batch.items, batch.answers, batch.nats)))
                    bar.update(len(batch.items))

            for batch in generator.batches(items):
                answers = generator(batch)
                # Equal responses of several models to a prompt are scored once.
                responses = dict.fromkeys(map(self._seen, batch, answers))
                new = [response for response in responses if response not in self._scores]
                self._scores |= {response: {} for response in new}
                scored = self._scoring.submit(self._score, new, in_parallel)
                nats = generator.nats(batch, answers)
                self._score(new, afterwards)
                waiting.append(_Batch(batch, answers, nats, scored))
                write(_WAITING)
            write(0)

    def _open(self) -> Generator | Server:
        """Load what generates: called once there is something to generate."""
        plan, settings = self._plan, self._plan.settings
        if settings.server is not None:
            folder, options = self._path.parent, {"method": settings.method, **settings.sampling}
            return Server(settings.server, plan.adapters, plan.others, folder, **options)

        weights = plan.base.fingerprint()
        with self._processes.main_first():
            pin(self._path, plan.base.name, weights, write=self._processes.is_main)
        places = places_of(plan.base.load(), plan.adapters, plan.others, settings.method, settings.ensemble)
        tokenizer, tokens = plan.base.tokenizer, settings.batch_tokens
        return Generator(plan.base.model, tokenizer, places, batch_tokens=tokens, **settings.sampling)

    def _seen(self, item: Item, answer: Answer) -> _Response:
        """What rewards see of an answer."""
        return item.place, self._plan.settings.cut(answer.text)

    def _score(self, responses: list[_Response], names: Sequence[str]) -> None:
        """Keep the scores of responses by some of the rewards."""
        if not responses:
            return
        table = self._plan.table
        places, texts = zip(*responses, strict=True)
        prompts = [table.prompts[place] for place in places]
        columns = {name: [column[place] for place in places] for name, column in table.columns.items()}
        for name in names:
            scores = self._plan.rewards[name](prompts, list(texts), **columns)
            for response, score in zip(responses, scores, strict=True):
                self._scores[response][name] = score

    def _record(self, item: Item, answer: Answer, nats: Nats) -> dict[str, Any]:
        model, response = item.model, self._seen(item, answer)
        # In the order of the rewards, whichever of them was first to score.
        rewards = {name: self._scores[response][name] for name in self._plan.rewards}
        head: dict[str, Any] = {
            "name": model.name,
            "lambdas": model.lambdas and dict(model.lambdas),
            "method": model.method,
        }
        record = head | {"prompt": item.prompt, "response": response[1], "rewards": rewards}
        record |= {"seed": self._plan.settings.seed, "sample": item.sample, "tokens": answer.tokens}
        record |= {name: value for name, value in nats._asdict().items() if value is not None}
        if abstained := [name for name, score in rewards.items() if score is None]:
            record["abstained"] = abstained
        return record

    def _next_lambda(self) -> list[float] | None:
        """λ of one more soup, chosen from the records; None if the front has no gap to fill."""
        records: dict[Any, list[dict[str, Any]]] = {}
        for record in read_jsonl(self._path):
            records.setdefault(key_of(record)[0], []).append(record)

        soups = [model for model in self._models if model.lambdas]
        means = [[mean_score(records[soup.key], name) for name in self._plan.rewards] for soup in soups]
        return largest_gap([soup.weights for soup in soups], np.array(means))


def _key(item: Item) -> Key:
    return item.model.key, json.dumps(item.prompt), item.sample
